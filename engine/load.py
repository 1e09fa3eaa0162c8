"""
Load a language model and its tokenizer: on which device, in which precision, from where.
"""
import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import re
import time
import traceback
from pathlib import Path

import safetensors
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from engine import cache
from tasks.errors import UserError, one_line
from tasks.problems import hub_says, reach_hub
from tasks.prompts import set_template


def add_device_arguments(add):
    """The flags of set_up. `add` is the add_argument of a parser, or of a group of it."""
    add("--device", help="cuda, mps or cpu; without it the first there is")
    add("--dtype", choices=["bfloat16", "float32"], help="of the weights; without it bfloat16 on "
        "a GPU that has it and, above 50 M parameters, on a CPU where it is faster")
    add("--graph", action=argparse.BooleanOptionalAction, default=True, help="on a GPU, sample "
        "by CUDA graphs where the model allows it")


def set_up(device=None, dtype=None, graph=True):
    """(device, dtype) to work with, chosen where they are not given.

    Weights are bfloat16 on a CUDA GPU that has it, else float32 (on a T4, say): float16 would need
    its losses scaled. On a CPU the dtype stays None, and load_model chooses. `graph` is for the
    sampler. Raises UserError for a device that is not there.
    """
    if device is None:
        other = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else other
    try:
        if device.split(":")[0] not in ("cuda", "mps", "cpu"):
            raise RuntimeError("give cuda, mps or cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0][:160]
        raise UserError(f"--device {device}: not usable here ({reason})") from None
    # cuDNN's attention makes a plan for every new shape, which takes longer than a token does
    torch.backends.cuda.enable_cudnn_sdp(False)
    cache.use_graphs = graph
    if dtype is None and device == "cpu":
        return device, None
    native = device.startswith("cuda")
    native = native and torch.cuda.is_bf16_supported(including_emulation=False)
    return device, getattr(torch, dtype or ("bfloat16" if native else "float32"))


def cpu_dtype(config):
    """bfloat16 for a large model where its matrix products are faster than float32's: three times
    with AVX-512 BF16 or AMX, while without them they are slower."""
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    if parameters < 50e6:
        return torch.float32
    seconds = {dtype: seconds_of_product(dtype) for dtype in (torch.float32, torch.bfloat16)}
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    chosen = torch.bfloat16 if ratio > 1.2 else torch.float32
    print(f"dtype: {str(chosen).removeprefix('torch.')}, since on this CPU bfloat16's matrix "
          f"products are {ratio:.1f} times as fast as float32's; --dtype sets it")
    return chosen


def seconds_of_product(dtype):
    """The best of five, of a product as large as those of a model with 0.5 B parameters."""
    a, b, seconds = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 4096, dtype=dtype), []
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def load_model(name, device, dtype=torch.float32, template=()):
    """(model in eval mode, tokenizer) of a folder or a Hub id.

    With dtype None it is cpu_dtype's. A folder of adapters that has no tokenizer gets that of
    its base model. `template` are settings of the chat template (tasks.prompts.set_template).
    Raises UserError for what is missing or damaged, by the name of the file where it is known.
    """
    folder, base, source = Path(name), name, name
    check_files(folder)
    adapters = folder / "adapter_config.json"  # of --lora
    if adapters.exists():
        base = json.loads(adapters.read_text(encoding="utf-8"))["base_model_name_or_path"]
        if not importlib.util.find_spec("peft"):
            raise UserError(f"model {name}: these are adapters, which need peft; pip install peft")
        if not (folder / "tokenizer_config.json").exists():
            source = base
    reached = Path(base).is_dir() or reach_hub()
    with loading("tokenizer", source, reached):
        tokenizer = AutoTokenizer.from_pretrained(source)
    set_template(tokenizer, template)
    with loading("model", base, reached):
        dtype = dtype or cpu_dtype(AutoConfig.from_pretrained(base))
        model, found = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, output_loading_info=True
        )
    if missing := sorted(found["missing_keys"]):  # transformers would make random ones
        raise UserError(f"model {base}: {len(missing)} of its weights are in none of its files, "
                        f"such as {missing[0]}; is it a {type(model).__name__}?")
    if adapters.exists():
        import peft

        with loading("adapters", name, reached):
            with_adapters = peft.PeftModel.from_pretrained(model, name)
            model = with_adapters.get_base_model()  # whose layers keep the adapters
    if model.num_parameters() < 2**20 and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(1)  # more threads are slower when other jobs run
    model.to(device).eval()
    if model.device.type == "cpu":
        # safetensors has mapped the file into memory: whoever writes to it changes the model,
        # and Windows lets nobody rename it
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            tensor.data = tensor.data.clone()
    return model, tokenizer


def check_files(folder):
    """Raise UserError for a damaged file of a model's folder. transformers would not name some of
    them, and others it would silently do without."""
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: damaged, it is not JSON ({one_line(error)})") from error
    for path in sorted(folder.glob("*.safetensors")):
        path.open("rb").close()  # PermissionError, of which safetensors says: no such file
        try:
            safetensors.safe_open(path, "pt")
        except safetensors.SafetensorError as error:
            raise UserError(f"{path}: damaged ({one_line(error)})") from error


@contextlib.contextmanager
def loading(part, name, reached):
    """UserError for whatever the loaders of other libraries raise: files can be wrong in any way.
    An exception that is raised in this file keeps its traceback."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if traceback.extract_tb(error.__traceback__)[-1].filename == __file__:
            raise
        reason = one_line(error)
        if isinstance(error, OSError) and not Path(name).is_dir():
            reason = f"no folder here, and {hub_says(reached)} model ({reason})"
        raise UserError(f"model {name}: its {part} can't be loaded: {reason}") from error


def switch_off_dropout(model, quiet=False):
    """Set the probability of every dropout to 0, of nn.Dropout and of each forward that reads a
    number, and that of other noise in training (skipped layers, routers that jitter).

    With dropout the distribution that is trained would not be the one that was sampled from: with
    attention_dropout 0.1, ratios that should be 1 went from 0.03 to 2.8.
    """
    largest = 0.0
    for module in model.modules():
        for name, value in list(vars(module).items()):
            is_noise = re.search("drop|jitter", name) or name == "p"
            if is_noise and type(value) is float and value > 0:
                largest = max(largest, value)
                setattr(module, name, 0.0)
    if largest and not quiet:
        print(f"dropout: the model's own, up to {largest}, is off; its samples have none either")
