"""vLLM: rollouts with the trainer's weights, and EM-INF as a logits processor of both runners."""
import copy
import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.models import ROOT, TINY_BASE

pytest.importorskip("vllm", reason="vLLM is not installed; see course/when_something_goes_wrong.md")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import BatchUpdateBuilder, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

from em_inf import adaptive_temperature, minimize_entropy
from engine import run
from engine.sampler import generate
from entropy import output_head, score_all
from scale import vllm_rollouts
from scale.em_inf_vllm import EMInfVLLM
from tasks.problems import load_problems
from tasks.prompts import encode_problem, stop_ids

ASKED = [  # what a request may ask for, and the same by hand
    (None, None),
    ({"another_processor": 1}, None),
    ({"em_inf": {}}, {"function": minimize_entropy, "delta": 0.3}),
    ({"em_inf": {"delta": 0.1, "steps": 5}},
     {"function": minimize_entropy, "delta": 0.1, "steps": 5}),
    ({"em_inf.delta": 0, "em_inf.optimizer": "sgd"},
     {"function": minimize_entropy, "delta": 0, "optimizer": "sgd"}),
    ({"adaptive_temperature.alpha": 0.4}, {"function": adaptive_temperature, "alpha": 0.4}),
]


def by_hand(logits, wanted):
    """Each row alone, through em_inf's function: (B, V) -> (B, V)."""
    rows = []
    for row, settings in zip(logits, wanted):
        if settings:
            settings = dict(settings)
            row = settings.pop("function")(row[None], **settings)[0]
        rows.append(row)
    return torch.stack(rows)


def random_logits(rows, generator):
    """Rows from nearly sure to nearly flat, each with a masked token."""
    logits = torch.randn(rows, 50, generator=generator)
    logits *= torch.rand(rows, 1, generator=generator) * 10
    logits[:, 7] = -torch.inf
    return logits


def test_settings_follow_a_request_through_batches_whose_rows_come_go_and_move():
    """A bug would sharpen the row of a neighbour, or with the settings of the row's last owner."""
    chance = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    processor = EMInfVLLM(None, "cpu", False)
    batch = []  # what each row's request asks for, by hand
    for _ in range(300):
        builder = BatchUpdateBuilder()
        # some end, the first free rows are taken by new ones, and the last move into gaps
        gone = sorted(chance.sample(range(len(batch)), chance.randint(0, len(batch) // 2)))
        for row in gone:
            builder.removed_append(row)
            batch[row] = "free"
        for _ in range(chance.randint(0, 3)):
            extra_args, settings = chance.choice(ASKED)
            row = builder.pop_removed()
            if row is None:
                row = len(batch)
                batch.append("free")
            batch[row] = settings
            builder.added.append((row, SamplingParams(extra_args=extra_args), [], []))
        while "free" in batch:
            gap = batch.index("free")
            last = len(batch) - 1
            if batch[last] != "free":
                builder.moved.append((last, gap, MoveDirectionality.UNIDIRECTIONAL))
                batch[gap] = batch[last]
            batch.pop()
        if len(batch) > 1 and chance.random() < 0.5:
            a, b = chance.sample(range(len(batch)), 2)
            builder.moved.append((a, b, MoveDirectionality.SWAP))
            batch[a], batch[b] = batch[b], batch[a]
        processor.update_state(builder.get_and_reset(len(batch)))
        if batch:
            logits = random_logits(len(batch), generator)
            right = by_hand(logits, batch)
            torch.testing.assert_close(processor.apply(logits.clone()), right, rtol=0, atol=1e-5)
    assert not processor.is_argmax_invariant()  # or it would come after the temperature


def test_the_second_runner_s_slots_are_taken_over_and_its_rows_reordered():
    """A slot goes from one request to the next, and rows are in another order at each step."""
    chance = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    processor = EMInfVLLM(None, None)
    slots = {}
    for _ in range(100):
        slot = chance.randrange(8)
        extra_args, slots[slot] = chance.choice(ASKED)
        asked = processor.add_request(slot, SamplingParams(extra_args=extra_args))
        assert asked == (slots[slot] is not None)
        present = chance.sample(list(slots), chance.randint(1, len(slots)))
        rows = [slot for slot in present for _ in range(2)]  # two draft tokens each
        context = LogitsContext(
            expanded_idx_mapping=torch.tensor(rows),
            idx_mapping=torch.tensor(present),
            idx_mapping_np=np.array(present),
            expanded_local_pos=None,
            input_ids=None,
            pos=None,
            seq_lens_upper_bound_np=None,
        )
        logits = random_logits(len(rows), generator)
        right = by_hand(logits, [slots[slot] for slot in rows])
        got = processor.apply(logits.clone(), context)
        torch.testing.assert_close(got, right, rtol=0, atol=1e-5)


def test_rows_under_delta_are_not_computed_and_equal_settings_are_sharpened_together(monkeypatch):
    import scale.em_inf_vllm as module

    seen = []

    def spy(logits, **settings):
        seen.append((len(logits), settings["delta"]))
        return minimize_entropy(logits, **settings)

    monkeypatch.setattr("em_inf.minimize_entropy", spy)
    module.make_sharpener.cache_clear()
    processor = EMInfVLLM(None, "cpu", False)
    builder = BatchUpdateBuilder()
    for row, delta in enumerate([0.3, 0.2, 0.3, 0.3, None]):
        extra_args = delta and {"em_inf": {"delta": delta}}
        builder.added.append((row, SamplingParams(extra_args=extra_args), [], []))
    processor.update_state(builder.get_and_reset(5))
    seen.clear()  # of the calls that check settings
    logits = torch.zeros(5, 9)
    logits[3, 0] = 50.0  # sure already
    processor.apply(logits)
    assert sorted(seen) == [(1, 0.2), (2, 0.3)]
    module.make_sharpener.cache_clear()


@pytest.mark.parametrize("extra_args, reason", [
    ({"em_inf": {"delta": -1}}, "none may be negative"),
    ({"em_inf": {"delta": "0.3"}}, "em_inf.delta: '0.3' is not a number"),
    ({"em_inf.delta": "0.3"}, "em_inf.delta: '0.3' is not a number"),
    ({"em_inf": {"delta": True}}, "is not a number"),
    ({"em_inf": {"delta": float("nan")}}, "must be finite"),
    ({"em_inf": {"delta": [0.3]}}, "is not a number"),
    ({"em_inf": {"detla": 0.3}}, "em_inf.detla is not known: give delta, lr, steps"),
    ({"em_inf": 0.3}, "give settings one by one"),
    ({"em_inf": {"steps": 3.0}}, "not a whole number"),
    ({"em_inf": {"steps": 10**9}}, "must be at most 100"),  # it would stop everybody's requests
    ({"em_inf": {"lr": 1000}}, "must be at most 1"),  # logits would overflow to nan
    ({"em_inf": {"optimizer": "lion"}}, "must be adam or sgd"),
    ({"em-inf": {"delta": 0.3}}, "is em_inf meant?"),  # as em_inf.py calls it
    ({"adaptive_temperature": {"alpha": 1}}, "must be inside"),
    ({"em_inf": {}, "adaptive_temperature": {}}, "one of them"),
])
def test_bad_settings_are_refused_when_a_request_comes_in_and_not_in_the_engine(extra_args, reason):
    with pytest.raises(ValueError, match=reason.replace("?", r"\?")):
        EMInfVLLM.validate_params(SamplingParams(extra_args=extra_args))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_no_allowed_setting_makes_finite_logits_overflow(optimizer):
    """vLLM would draw from a row of nan without a word."""
    processor = EMInfVLLM(None, "cpu", False)
    settings = {"delta": 0, "lr": 1, "steps": 100, "kl_weight": 1, "optimizer": optimizer}
    builder = BatchUpdateBuilder()
    for row in range(64):
        builder.added.append((row, SamplingParams(extra_args={"em_inf": settings}), [], []))
    processor.update_state(builder.get_and_reset(64))
    logits = random_logits(64, torch.Generator().manual_seed(0)) * 5
    sharper = processor.apply(logits)
    assert not sharper.isnan().any() and sharper.amax() < torch.inf


# ------------------------------------------------------------------------------ in an engine


@pytest.fixture(scope="module")
def start():
    """`vllm_rollouts.start`, whose engines live until the last of these tests: one that is
    deleted takes with it the process groups that all of a process share."""
    engines = []

    def start_and_keep(model, **settings):
        engines.append(vllm_rollouts.start(model, "float32", longest=512, **settings))
        return engines[-1]

    yield start_and_keep


@pytest.fixture(scope="module")
def engine(start):
    return start(TINY_BASE, logits_processors=[EMInfVLLM])


def tiny_prompts(tokenizer, count):
    problems = load_problems(str(ROOT / "tiny/test.jsonl"))[:count]
    return [encode_problem(tokenizer, problem) for problem in problems]


def gap(engine, model, prompts, temperature=1.0):
    """Largest |difference| in nats between vLLM's log-probs of what it draws and score_all's."""
    responses, sampled = vllm_rollouts.sample(
        engine, prompts, [279], max_new_tokens=16, temperature=temperature, N=2, seed=1
    )
    head = output_head(model, prompts[0])
    repeated = [prompt for prompt in prompts for _ in range(2)]
    _, scored, mask = score_all(model, head, repeated, responses, temperature)
    assert (sampled[~mask] == 0).all()
    return (sampled - scored)[mask].abs().max().item()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollouts_have_the_sampler_s_format_and_the_trainer_s_log_probs(engine, tiny, temperature):
    """A prompt's responses in another order, log-probs before the temperature, top-k or top-p,
    or a stop token that is lost, would all show here."""
    model, tokenizer = tiny
    prompts = tiny_prompts(tokenizer, 16)
    stop = stop_ids(model, tokenizer)
    vllm_rollouts.load(engine, model.named_parameters())
    responses, sampled = vllm_rollouts.sample(engine, prompts, stop, 24, temperature, N=4, seed=1)
    assert len(responses) == 64 and sampled.shape == (64, max(map(len, responses)))
    assert sampled.dtype == torch.float32
    for response in responses:
        assert len(response) == 24 or response[-1] in stop
        assert not any(token in stop for token in response[:-1])
    assert len({tuple(response) for response in responses[:4]}) > 1  # a seed for each of the four
    again, _ = vllm_rollouts.sample(engine, prompts, stop, 24, temperature, N=4, seed=1)
    other, _ = vllm_rollouts.sample(engine, prompts, stop, 24, temperature, N=4, seed=2)
    assert again == responses and other != responses
    assert gap(engine, model, prompts, temperature) < 1e-3


def test_the_drawn_tokens_are_distributed_as_our_own_sampler_s(engine, tiny):
    """Mean log-prob and length of 1,024 responses, four standard errors apart at most."""
    model, tokenizer = tiny
    prompts = tiny_prompts(tokenizer, 128)
    stop = stop_ids(model, tokenizer)
    vllm_rollouts.load(engine, model.named_parameters())
    torch.manual_seed(0)
    rollout = generate(model, prompts, stop, 64, N=8, batch_size=1024)
    ours, our_logprobs = rollout.responses, rollout.logprobs
    theirs, their_logprobs = vllm_rollouts.sample(engine, prompts, stop, 64, 1.0, N=8, seed=1)
    pairs = [
        (our_logprobs.sum(-1), their_logprobs.sum(-1)),
        (torch.tensor([len(r) for r in ours]), torch.tensor([len(r) for r in theirs])),
    ]
    for a, b in pairs:
        means = [x.double().view(128, 8).mean(1) for x in (a, b)]
        difference = means[0] - means[1]  # of each prompt
        assert difference.mean().abs() < 4 * difference.std() / 128**0.5


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_jump_arrive_in_the_engine(start, engine, tiny, tied, tmp_path):
    """vLLM's reload_weights leaves the old output head where it is tied, on a CPU; and keys and
    values of a prompt that the engine has seen would still be the old weights'."""
    model, tokenizer = tiny
    if not tied:
        config = model.config.to_dict() | {"tie_word_embeddings": False}
        config = type(model.config)(**config)
        model = type(model)(config).eval()
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        engine = start(str(tmp_path))
    model = copy.deepcopy(model)
    prompts = [20 * prompt for prompt in tiny_prompts(tokenizer, 4)]  # longer than a block
    torch.manual_seed(0)
    for _ in range(3):
        vllm_rollouts.load(engine, model.named_parameters())
        assert gap(engine, model, prompts) < 1e-3
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * p.std() * torch.randn_like(p) if p.dim() > 1 else 0.1)
        assert gap(engine, model, prompts) > 0.1  # not loaded yet


def test_weights_that_jump_arrive_in_the_engine_of_every_process(tmp_path):
    """An engine with old weights, with a process's own shards, or with those of another step
    would be tenths of a nat away, also in the mean over both processes. They have prompts and
    lengths of their own, so a collective in the midst of sampling would hang here."""
    flags = (
        "--device cpu --sampler vllm --data-size 64 --prompts 8 --val none --max-new-tokens 20 "
        "--steps 3 --lr 0.03 --guard 0 --out run"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, ROOT / "scale/em_rl_fsdp.py", *flags.split()], cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    gaps = re.findall(r"vLLM and trainer differ by (\S+) nats", done.stdout)
    assert len(gaps) == 3 and max(map(float, gaps)) < 1e-3  # rank 0 alone prints
    rows = run.read_rows(tmp_path / "run/metrics.csv")[1:]
    assert min(row["kl"] for row in rows[1:]) > 0.1  # nats a token, so far from the first weights


def answers(engine, prompts, temperature, extra_args):
    """(token ids, log-probs) of a response to each prompt, all in one batch."""
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    params = [
        SamplingParams(
            temperature=temperature, max_tokens=24, stop_token_ids=[279], ignore_eos=True,
            logprobs=0, detokenize=False, seed=i, extra_args=extra_args[i],
        )
        for i in range(len(prompts))
    ]
    outputs = [r.outputs[0] for r in engine.generate(inputs, params, use_tqdm=False)]
    logprobs = []
    for output in outputs:
        steps = zip(output.logprobs, output.token_ids)
        logprobs.append([step[token].logprob for step, token in steps])
    return [list(output.token_ids) for output in outputs], logprobs


def test_untouched_requests_equal_those_of_an_engine_without_the_processor(start, engine, tiny):
    """Half of a batch is sharpened; the other half must not notice, greedy or sampled."""
    model, tokenizer = tiny
    prompts = tiny_prompts(tokenizer, 64)
    vllm_rollouts.load(engine, model.named_parameters())
    plain = start(TINY_BASE)
    deltas = [0.05 + 0.01 * i for i in range(0, 64, 2)]
    mixed = []
    for delta in deltas:
        mixed += [None, {"em_inf": {"delta": delta, "steps": 10}}]
    for temperature in (0.0, 1.0):
        right = answers(plain, prompts, temperature, [None] * 64)[0]
        got = answers(engine, prompts, temperature, mixed)[0]
        assert got[::2] == right[::2]
        if temperature:
            assert got[1::2] != right[1::2]


def test_the_engine_draws_from_em_inf_s_logits_divided_by_the_temperature(engine, tiny):
    """If the processor came after the temperature, or on another row, log-probs would differ."""
    model, tokenizer = tiny
    prompts = tiny_prompts(tokenizer, len(ASKED) * 4)
    extra_args = [asked for asked, _ in ASKED] * 4
    vllm_rollouts.load(engine, model.named_parameters())
    responses, logprobs = answers(engine, prompts, 0.7, extra_args)
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        settings = ASKED[i % len(ASKED)][1]
        sharp = by_hand(logits, [settings] * len(logits))
        right = (sharp / 0.7).log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs[i]), right, rtol=0, atol=1e-3)


def test_a_refused_request_leaves_the_engine_alive(engine, tiny):
    model, tokenizer = tiny
    prompts = tiny_prompts(tokenizer, 2)
    with pytest.raises(VLLMValidationError, match="none may be negative"):
        answers(engine, prompts, 1.0, [None, {"em_inf": {"delta": -1}}])
    assert len(answers(engine, prompts, 1.0, [None, {"em_inf": {}}])[0]) == 2
