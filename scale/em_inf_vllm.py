"""
EM-INF and adaptive temperature inside vLLM: a logits processor with settings for each request.

    PYTHONPATH=. vllm serve MODEL --logits-processors scale.em_inf_vllm:EMInfVLLM

    over HTTP   "vllm_xargs": {"em_inf.delta": 0.3, "em_inf.steps": 10}
                "vllm_xargs": {"adaptive_temperature.alpha": 0.5}
    in Python   SamplingParams(extra_args={"em_inf": {"delta": 0.3, "steps": 10}})

Settings and defaults are those of `em_inf.EMInf` and `em_inf.AdaptiveTemperature`, which do the
work. A request without them is not touched, and one with bad ones is refused with status 400.

It works on the logits before the sampling temperature, as em_inf.py does. So it does not say that
it is argmax-invariant, although it nearly is: vLLM applies what says so after the temperature.

vLLM 0.32 has two model runners, each with an interface of its own for logits processors, and
refuses a processor that has not the right one. It takes the second runner wherever Triton works,
so on a GPU, and the first one on a CPU. EMInfVLLM has both interfaces. The first runner loads no
processors together with speculative decoding.
"""
import functools
import inspect
import math
from difflib import get_close_matches

from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates
from vllm.v1.worker.gpu.sample import logits_processor as second_runner

from em_inf import AdaptiveTemperature, EMInf, entropy_of_rows

SHARPENERS = {"em_inf": EMInf, "adaptive_temperature": AdaptiveTemperature}
# Beyond these a request would hold up all others, or its logits could overflow.
LIMITS = {"lr": 1, "kl_weight": 1, "steps": 100}


def sharpener_of(params):
    """What sharpens a request with these SamplingParams, or None where nothing is asked for.

    Equal settings give the same object. Raises ValueError for bad ones.
    """
    asked = {}
    for key, value in (params.extra_args or {}).items():
        name, dot, setting = key.partition(".")
        if name not in SHARPENERS:
            for meant in get_close_matches(name.lower(), SHARPENERS, cutoff=0.8):
                raise ValueError(f"{key} is not known: is {meant} meant?")
            continue  # another processor's
        settings = {setting: value} if dot else value
        if not isinstance(settings, dict):
            raise ValueError(f'{name}: give settings one by one, such as "{name}.delta": 0.3')
        asked[name] = asked.get(name, {}) | settings
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)}: give a request one of them")
    for name, settings in asked.items():
        for key, value in settings.items():
            check(name, key, value)
        return make_sharpener(name, tuple(sorted(settings.items())))
    return None


def check(name, key, value):
    """Raise ValueError for a setting that is unknown, of the wrong type or beyond LIMITS."""
    known = inspect.signature(SHARPENERS[name]).parameters
    if key not in known:
        raise ValueError(f"{name}.{key} is not known: give {', '.join(known)}")
    kind = type(known[key].default)
    allowed = (int, float) if kind is float else (kind,)
    if type(value) not in allowed:
        words = {int: "a whole number", float: "a number", str: "a string"}
        raise ValueError(f"{name}.{key}: {value!r} is not {words[kind]}")
    if kind is not str and not (math.isfinite(value) and value <= LIMITS.get(key, math.inf)):
        most = f"at most {LIMITS[key]}" if key in LIMITS else "finite"
        raise ValueError(f"{name}.{key}: {value} must be {most}")


@functools.lru_cache
def make_sharpener(name, settings):
    return SHARPENERS[name](**dict(settings))  # a ValueError where they are out of range


class EMInfVLLM(LogitsProcessor, second_runner.LogitsProcessor):
    """Sharpens the rows of those requests that ask for it: (B, V) -> (B, V), in place."""

    def __init__(self, vllm_config, *states):
        self.sharpeners = {}  # of each row (first runner), or of each request's slot (second)

    @classmethod
    def validate_params(cls, sampling_params):
        """vLLM calls this as a request comes in, and answers a ValueError with status 400."""
        sharpener_of(sampling_params)

    def is_argmax_invariant(self):
        return False  # so that the first runner applies it before the temperature

    def update_state(self, batch_update):
        """First runner, before each step: requests have come, gone and changed their rows."""

        def sharpener_of_row(params, prompt_ids, output_ids):
            return sharpener_of(params)

        process_dict_updates(self.sharpeners, batch_update, sharpener_of_row)

    def add_request(self, req_idx, sampling_params):
        """Second runner: a request takes a slot, perhaps that of one that has ended."""
        sharpener = sharpener_of(sampling_params)
        self.sharpeners.pop(req_idx, None)
        if sharpener:
            self.sharpeners[req_idx] = sharpener
        return sharpener is not None

    def apply(self, logits, ctx=None):
        """Sharpen each row by its request's settings; only the second runner gives a `ctx`."""
        slots = range(len(logits))
        if ctx is not None:
            present = self.sharpeners.keys() & ctx.idx_mapping_np.tolist()
            slots = ctx.expanded_idx_mapping.tolist() if present else []
        rows = [row for row, slot in enumerate(slots) if slot in self.sharpeners]
        if not rows:
            return logits
        entropy = entropy_of_rows(logits[rows]).tolist()  # nats
        groups = {}  # the rows of requests with equal settings are sharpened together
        for row, nats in zip(rows, entropy):
            sharpener = self.sharpeners[slots[row]]
            if nats >= sharpener.delta:
                groups.setdefault(sharpener, []).append(row)
        for sharpener, group in groups.items():
            logits[group] = sharpener.function(logits[group]).to(logits.dtype)
        return logits
