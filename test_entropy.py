"""
Every test. Each name says the bug that it guards against; each formula is compared with an independent reference.

    pytest                       # a laptop's CPU, no network
    pytest -k "head or padded"   # some of it
"""
import base64
import csv
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the Hub's libraries are imported: no test waits for a network

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import transformers
from torch.distributions import Categorical
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import em_ft
import em_rl
import eval as ev  # the name of a Python built-in
import problems
import rollouts
import run
import sandbox
import scores
from em_inf import AdaptiveTemperature, EMInf
from entropy import _EntropyAndLogprob, adaptive_temperature, entropy_and_logprob, minimize_entropy, token_entropy

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "tiny"))
import findings
import report
import prepare

SMALL = dict(vocab_size=280, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8, max_position_embeddings=256, bos_token_id=None, eos_token_id=279, pad_token_id=279)
ARCHITECTURES = {  # every kind of output head: tied and untied, soft cap, a scale multiplied by, a scale divided by
    "qwen2": {}, "qwen3": {}, "llama": dict(tie_word_embeddings=False), "gemma2": dict(query_pre_attn_scalar=8, final_logit_softcapping=1.5),
    "gemma3_text": dict(query_pre_attn_scalar=8, final_logit_softcapping=1.5, sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
    "cohere": dict(logit_scale=0.3), "granite": dict(logits_scaling=4.0), "phi": {}, "gpt2": {},
}


def random_model(kind, seed=0):
    """A small model of that architecture with random weights, large enough that distributions are not flat."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **ARCHITECTURES[kind]}))
    for name, p in model.named_parameters():
        if p.dim() > 1 or name.endswith("lm_head.bias"):
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def rows_of(*lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=g).tolist() for n in lengths]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="session")
def tiny():
    return ev.load_model(HERE / "tiny/base", "cpu")


# -------------------------------------------------------------------------------------------------------------- entropy.py


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_token_entropy_is_the_entropy(scale):
    logits = torch.randn(3, 5, 1000, dtype=torch.float64) * scale
    torch.testing.assert_close(token_entropy(logits), Categorical(logits=logits).entropy())
    torch.testing.assert_close(token_entropy(logits.float()).double(), Categorical(logits=logits).entropy(), atol=1e-5, rtol=1e-5)


def test_token_entropy_of_half_precision_logits_is_computed_in_float32():
    logits = (torch.randn(4, 50_000) * 3).bfloat16()
    assert token_entropy(logits).dtype == torch.float32
    torch.testing.assert_close(token_entropy(logits).double(), Categorical(logits=logits.double()).entropy(), atol=1e-5, rtol=1e-5)


def test_the_usual_eps_formula_would_fail_here():
    p = torch.zeros(152_064).softmax(-1)
    wrong, right = -(p * (p + 1e-6).log()).sum().item(), math.log(152_064)
    assert abs(token_entropy(torch.zeros(152_064)).item() - right) < 1e-4 < abs(wrong - right)


def test_masked_logits_contribute_nothing_to_entropy_or_gradient():
    logits = torch.randn(2, 6, dtype=torch.float64)
    masked = torch.cat([logits, torch.full((2, 3), -torch.inf, dtype=torch.float64)], -1).requires_grad_()
    entropy = token_entropy(masked)
    torch.testing.assert_close(entropy, token_entropy(logits))
    entropy.sum().backward()
    assert masked.grad.isfinite().all() and (masked.grad[:, 6:] == 0).all()


def test_entropy_gradient_is_the_closed_form():
    z = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    H = token_entropy(z)
    H.sum().backward()
    logp = z.detach().log_softmax(-1)
    torch.testing.assert_close(z.grad, -logp.exp() * (logp + H.detach()[:, None]))
    assert torch.autograd.gradcheck(token_entropy, z)


HEADS = [dict(), dict(scale=0.3), dict(softcap=2.0), dict(temperature=0.6), dict(scale=1.7, softcap=2.0, temperature=0.6)]


def head_inputs(dtype=torch.float64, n=7, d=5, v=11, bias=True):
    g = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return random(n, d), random(v, d), torch.randint(v, (n,), generator=g), random(v) if bias else None


def plain(hidden, weight, targets, bias, scale=1.0, softcap=None, temperature=1.0):
    """The same by way of the whole logits and torch.distributions."""
    logits = scale * (hidden @ weight.T + (0 if bias is None else bias))
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    distribution = Categorical(logits=logits / temperature)
    return distribution.entropy(), distribution.log_prob(targets)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("bias", [True, False])
def test_entropy_and_logprob_values_and_gradients(head, bias):
    h, w, t, b = head_inputs(bias=bias)
    for got, wanted in zip(entropy_and_logprob(h, w, t, b, block=12, **head), plain(h, w, t, b, **head)):
        torch.testing.assert_close(got, wanted)
    inputs = [x for x in (h, w, b) if x is not None]
    assert torch.autograd.gradcheck(lambda h, w, b=None: entropy_and_logprob(h, w, t, b, block=12, **head), inputs)


@pytest.mark.parametrize("block", [1, 3, 64, 1000, None])
def test_any_blocks_give_the_same(block):
    h, w, t, b = head_inputs(torch.float32, n=7, d=16, v=1000)
    results = [torch.autograd.grad((H * 0.7 - l * 1.3).sum(), (h, w, b)) for H, l in (entropy_and_logprob(h, w, t, b, block=block), plain(h, w, t, b))]
    for got, wanted in zip(*results):
        assert relative(got, wanted) < 1e-5


def test_no_tensor_of_tokens_times_vocabulary_is_made_or_kept(monkeypatch):
    h, w, t, _ = head_inputs(torch.float32, n=64, d=8, v=5000)
    made, kept, logits = [], [], _EntropyAndLogprob.logits
    monkeypatch.setattr(_EntropyAndLogprob, "logits", staticmethod(lambda *a: made.append(logits(*a)) or made[-1]))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        H, l = entropy_and_logprob(h, w, t, block=2000)
    (H + l).sum().backward()
    assert max(z.numel() for z in made) <= 2000 and sum(z.numel() for z in made) == 2 * 64 * 5000  # once forward, once backward
    assert max(kept) == w.numel() < 64 * 5000


def test_gradients_only_for_what_needs_them():
    h, w, t, b = head_inputs(torch.float32)
    entropy_and_logprob(h.detach(), w, t, b.detach())[0].sum().backward()
    assert w.grad is not None and h.grad is None and b.grad is None
    with torch.no_grad():
        assert not entropy_and_logprob(h, w, t, b)[0].requires_grad


def test_bf16_weights_get_gradients_summed_in_float32():
    h, w, t, b = head_inputs(torch.float32, n=512, d=16, v=100)
    half = [x.detach().bfloat16().requires_grad_() for x in (h, w, b)]
    H, l = entropy_and_logprob(half[0], half[1], t, half[2], block=200)
    assert H.dtype == l.dtype == torch.float32
    (H + l).mean().backward()
    wanted = torch.autograd.grad(sum(x.mean() for x in plain(*(x.double() for x in half[:2]), t, half[2].double())), half)
    for x, g in zip(half, wanted):
        assert x.grad.dtype == torch.bfloat16 and relative(x.grad.double(), g.double()) < 0.02


def test_autocast_is_followed_forward_and_backward():
    h, w, t, b = head_inputs(torch.float32, n=32, d=16, v=100)
    with torch.autocast("cpu", torch.bfloat16):
        H, l = entropy_and_logprob(h, w, t, b)
    (H.mean() + l.mean()).backward()
    assert h.grad.dtype == w.grad.dtype == torch.float32
    wanted = torch.autograd.grad(sum(x.mean() for x in plain(h, w, t, b)), (h, w, b))
    for x, g in zip((h, w, b), wanted):
        assert relative(x.grad, g) < 0.02
    with pytest.raises(ValueError, match="bfloat16.*float32"):
        entropy_and_logprob(h.bfloat16(), w, t, b)


# ------------------------------------------------------------------------------------------------------- models and padding


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_output_head_of_every_kind_is_found(kind):
    model, prompt = random_model(kind), rows_of(12)[0]
    head = ev.output_head(model, prompt)
    logits = model(torch.tensor([prompt])).logits[0].detach()
    H, l, _ = ev.score(model, head, [prompt[:4]], [prompt[4:]])
    torch.testing.assert_close(H[0].detach(), Categorical(logits=logits[3:-1]).entropy(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(l[0].detach(), Categorical(logits=logits[3:-1]).log_prob(torch.tensor(prompt[4:])), atol=1e-4, rtol=1e-4)
    if "logit_scale" in ARCHITECTURES[kind] or "logits_scaling" in ARCHITECTURES[kind]:
        assert head["scale"] == pytest.approx(ARCHITECTURES[kind].get("logit_scale", 0.25))
    if kind == "phi":
        assert head["bias"] is not None


def test_an_output_head_that_we_do_not_know_stops_with_an_error():
    model = random_model("llama")
    forward = model.lm_head.forward
    model.lm_head.forward = lambda h: forward(h) ** 3
    with pytest.raises(ValueError, match="LlamaForCausalLM.*nats"):
        ev.output_head(model, rows_of(12)[0])


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "gemma3_text", "gpt2"])  # gpt2: its positions are absolute, so a shift shows
def test_padded_rows_give_what_each_row_gives_alone(kind):
    model = random_model(kind)
    prompts, responses = rows_of(3, 9, 20, 1), rows_of(7, 1, 12, 30, seed=1)
    responses[0][2] = responses[0][-1] = 279  # pad == eos inside a response changes nothing
    head = ev.output_head(model, prompts[2])
    H, l, mask = ev.score(model, head, prompts, responses)
    assert mask.sum(-1).tolist() == [7, 1, 12, 30] and (H[~mask] == 0).all() and (l[~mask] == 0).all()
    rewards = [em_rl.reward(k, H, l, mask, n) for k in ("token", "sequence") for n in ("mean", "sum")]
    loss = sum(r.sum() for r in rewards)
    together = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    alone = [torch.zeros_like(p) for p in model.parameters()]
    for i in range(4):
        Hi, li, mi = ev.score(model, head, [prompts[i]], [responses[i]])
        torch.testing.assert_close(H[i][mask[i]], Hi[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(l[i][mask[i]], li[0], atol=1e-5, rtol=1e-5)
        single = [em_rl.reward(k, Hi, li, mi, n) for k in ("token", "sequence") for n in ("mean", "sum")]
        for r, s in zip(rewards, single):
            assert r[i].item() == pytest.approx(s.item(), rel=1e-5)
        for a, g in zip(alone, torch.autograd.grad(sum(s.sum() for s in single), list(model.parameters()), allow_unused=True)):
            a += 0 if g is None else g
    for whole, micro in zip((H, l, mask), ev.score_all(model, head, prompts, responses, budget=40)):
        torch.testing.assert_close(micro, whole.detach(), atol=1e-5, rtol=1e-5)
    for g, a in zip(together, alone):
        assert g is None or (g - a).norm() <= 1e-5 * max(a.norm(), alone[0].norm())


def test_score_shifts_by_one_and_leaves_the_prompt_out():
    model, (prompt, response) = random_model("llama"), rows_of(5, 4)
    _, l, mask = ev.score(model, ev.output_head(model, prompt), [prompt], [response])
    logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    wanted = torch.stack([logprobs[4 + t, response[t]] for t in range(4)])
    assert mask.sum() == 4
    torch.testing.assert_close(l[0], wanted, atol=1e-5, rtol=1e-5)


def test_temperature_of_scoring_is_that_of_sampling():
    model, (prompt, response) = random_model("qwen2"), rows_of(5, 4)
    H, l, _ = ev.score(model, ev.output_head(model, prompt), [prompt], [response], temperature=0.5)
    distribution = Categorical(logits=model(torch.tensor([prompt + response])).logits[0, 4:-1] / 0.5)
    torch.testing.assert_close(H[0], distribution.entropy(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(l[0], distribution.log_prob(torch.tensor(response)), atol=1e-4, rtol=1e-4)


def test_batches_keep_the_budget_and_every_index():
    lengths = [5, 100, 7, 7, 30, 1]
    groups = ev.batches(lengths, 32)
    assert sorted(sum(groups, [])) == list(range(6)) and groups[0] == [1]
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 32 for g in groups)


# --------------------------------------------------------------------------------------------------------------- generation


def test_rollouts_ignore_the_checkpoints_generation_config(tiny):
    model, tokenizer = tiny
    prompt = ev.encode_prompt(tokenizer, "Mod 10, left to right: 3+4*5-6*7")
    own = transformers.GenerationConfig(do_sample=True, temperature=0.01, top_k=1, top_p=0.1, repetition_penalty=3.0, min_new_tokens=5,
                                        no_repeat_ngram_size=2, suppress_tokens=list(range(48, 58)), eos_token_id=279)
    kept, model.generation_config = model.generation_config, own
    try:
        torch.manual_seed(0)
        first = [r[0] for r in ev.generate(model, [prompt] * 4000, [279], 1)]
        assert model.generation_config is own
    finally:
        model.generation_config = kept
    p = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    observed = torch.bincount(torch.tensor(first), minlength=len(p)) / 4000
    assert (observed - p).abs().max() < 5 * math.sqrt(0.25 / 4000)  # five standard errors of a share
    assert ((p > 0.01) & (observed > 0)).sum() == (p > 0.01).sum()  # nothing was cut off


def test_sampled_eos_counts_once_and_a_truncated_response_has_none(tiny):
    model, tokenizer = tiny
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 279
    prompts = [ev.encode_prompt(tokenizer, p["prompt"]) for p in ev.load_problems(HERE / "tiny/test.jsonl")[:64]]
    torch.manual_seed(0)
    model.train()
    short, long = ev.generate(model, prompts, [279], 8), ev.generate(model, prompts, [279], 64, budget=2000)
    assert model.training
    model.eval()
    assert all(r.count(279) == (r[-1] == 279) for r in short + long)
    assert {len(r) for r in short if r[-1] != 279} == {8} and sum(r[-1] == 279 for r in long) > 60
    head = ev.output_head(model, prompts[0])
    mask = ev.score(model, head, prompts, long)[2]
    assert mask.sum(-1).tolist() == [len(r) for r in long] and mask[:, -1].all()  # the eos is scored, what follows it is not


def test_greedy_is_the_argmax_and_a_padded_batch_decodes_like_single_rows(tiny):
    model, tokenizer = tiny
    prompts = [ev.encode_prompt(tokenizer, p["prompt"]) for p in ev.load_problems(HERE / "tiny/test.jsonl")[:8]]
    together = ev.generate(model, prompts, [279], 48, temperature=0)
    for prompt, response in zip(prompts, together):
        assert ev.generate(model, [prompt], [279], 48, temperature=0) == [response]
        assert model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == response


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "gemma3_text"])
def test_rows_that_go_on_when_others_have_ended_keep_their_own_cache_mask_and_logprobs(kind, monkeypatch):
    """At fixed randomness: every draw takes the same quantile of the row's distribution. Guards: a cache of other rows, a mask too short."""
    monkeypatch.setattr(torch, "multinomial", lambda p, num_samples, **_: (p.cumsum(-1) < 0.7).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1))
    model, prompts, stop, sampled, rows = random_model(kind), rows_of(*range(3, 27)), list(range(0, 280, 11)), [], []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    together = ev.generate(model, prompts, stop, 30, logprobs=sampled)
    assert rows[0] == 24 and len(set(rows)) > 3 and sum(rows) < 0.7 * 24 * max(map(len, together))  # the batch got smaller
    assert len(set(map(len, together))) > 4 and max(map(len, together)) > 12
    assert together == [ev.generate(model, [prompt], stop, 30)[0] for prompt in prompts]
    assert ev.generate(model, prompts, stop, 12) == [response[:12] for response in together]  # the limit is that of all rounds together
    _, logprobs, mask = ev.score_all(model, ev.output_head(model, prompts[0]), prompts, together)
    torch.testing.assert_close(torch.tensor(sum(sampled, [])), logprobs[mask], atol=1e-4, rtol=1e-4)


def test_evaluating_leaves_the_random_state_alone(tiny):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model, tokenizer = tiny
    ev.evaluate(model, tokenizer, ev.output_head(model, [1, 2, 3]), ev.load_problems(HERE / "tiny/test.jsonl")[:4], "sample", 16)
    assert torch.equal(before, torch.get_rng_state())


def test_prompt_uses_a_template_that_exists_and_is_plain_without_one(tiny):
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny/base")
    assert tokenizer.decode(ev.encode_prompt(tokenizer, "Q?")) == "Q?\n"
    tokenizer.chat_template = "{% for m in messages %}[{{m.role}}]{{m.content}}{{eos_token}}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    assert tokenizer.decode(ev.encode_prompt(tokenizer, "Q?")) == f"[system]{ev.SYSTEM}<|endoftext|>[user]Q?<|endoftext|>[assistant]"
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}<{{messages[0].content}}>"
    assert tokenizer.decode(ev.encode_prompt(tokenizer, "Q?")) == f"<{ev.SYSTEM}\n\nQ?>"
    tokenizer.chat_template = "{{ raise_exception('broken') }}"
    with pytest.raises(Exception, match="broken"):
        ev.encode_prompt(tokenizer, "Q?")


def test_a_turn_ends_with_the_templates_token_too(tiny):
    model, tokenizer = tiny
    assert ev.stop_ids(model, tokenizer) == [279]
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny/base")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"
    assert ev.stop_ids(model, tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>"), 279]


# --------------------------------------------------------------------------------------------------------------- EM-INF


def released_em_inf(row, delta=0.3, lr=0.1, steps=3, kl_weight=0.05, optimizer="adam"):
    """The released algorithm on one row (V,), by autograd and torch's optimisers, in float64: probabilities (V,)."""
    z = torch.nn.Parameter(row.double().clone())
    start, step = Categorical(logits=row.double()), {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]([z], lr=lr)
    for _ in range(steps):
        now = Categorical(logits=z)
        if now.entropy() < delta:
            break
        step.zero_grad()
        (now.entropy() + kl_weight * torch.distributions.kl_divergence(start, now)).backward()
        step.step()
    return z.detach().softmax(-1)


def some_logits(V=500):
    """Rows from nearly certain to flat, with some in between that fall under 0.3 nats after a step or two, and a language model's tail."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(12, V, generator=g)
    scaled = noise * torch.linspace(0.0, 12.0, 12)[:, None]  # flat, ..., confident
    pairs = torch.full((6, V), -30.0)
    pairs[:, 0], pairs[:, 1] = 0.0, -torch.linspace(1.5, 2.6, 6)  # two tokens: 0.47 to 0.26 nats
    tail = -torch.tensor([[0.9], [1.3], [2.0], [3.0]]) * torch.arange(1, V + 1).log() + 0.01 * noise[:4]
    return torch.cat([scaled, pairs, tail])


@pytest.mark.parametrize("settings", [{}, dict(delta=0.0), dict(delta=1.0, lr=0.3), dict(steps=1), dict(steps=15), dict(kl_weight=0.0),
                                      dict(kl_weight=2.0, steps=10), dict(optimizer="sgd", lr=1.0, steps=10), dict(optimizer="sgd", lr=20.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_minimize_entropy_is_the_released_algorithm(settings, dtype):
    logits = some_logits().to(dtype)
    got = minimize_entropy(logits, **settings).double().softmax(-1)
    wanted = torch.stack([released_em_inf(row, **settings) for row in logits])
    assert (got - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("sharpen", [minimize_entropy, lambda z: minimize_entropy(z, optimizer="sgd", lr=5.0), adaptive_temperature])
def test_sharpening_masked_tokens_stay_masked_and_the_rest_is_as_without_them(sharpen):
    """The released code turns a row with a masked token into nan."""
    logits = some_logits()
    masked = torch.full((len(logits), 900), -torch.inf)
    masked[:, 100:600] = logits
    got = sharpen(masked)
    assert (got[:, :100] == -torch.inf).all() and (got[:, 600:] == -torch.inf).all()
    torch.testing.assert_close(got[:, 100:600].softmax(-1), sharpen(logits).softmax(-1), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("sharpen", [minimize_entropy, adaptive_temperature])
def test_sharpening_a_batch_is_sharpening_its_rows_and_leaves_the_input_alone(sharpen):
    logits = some_logits(V=70_000)  # 22 of these do not go through in one piece
    before = logits.clone()
    got = sharpen(logits)
    assert torch.equal(logits, before) and got.shape == logits.shape
    alone = torch.cat([sharpen(row[None]) for row in logits])  # on several threads float32 sums of a batch are added up in another order
    torch.testing.assert_close(got.softmax(-1), alone.softmax(-1), atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(got, alone, atol=1e-3, rtol=1e-3)
    assert sharpen(logits[:0]).shape == (0, 70_000)
    assert sharpen(logits[:2].double()).dtype == torch.float64 and sharpen(logits[:2].half()).dtype == torch.float32


@pytest.mark.parametrize("sharpen", [minimize_entropy, adaptive_temperature])
def test_rows_under_delta_come_back_bit_for_bit(sharpen):
    logits = some_logits()
    entropy = token_entropy(logits)
    for delta in 0.3, 2.0, 100.0:
        same = (sharpen(logits, delta=delta) == logits).all(-1)
        assert (same == (entropy < delta))[1:].all()  # row 0 is flat: already as it would stay, whatever is done


def test_minimize_entropy_at_the_ends_of_its_settings():
    logits = some_logits()
    assert torch.equal(minimize_entropy(logits, steps=0), logits)
    torch.testing.assert_close(minimize_entropy(logits, lr=0.0), logits, atol=1e-5, rtol=0)
    entropy = lambda **settings: token_entropy(minimize_entropy(logits, **settings))
    assert (entropy() <= token_entropy(logits) + 1e-6).all()
    assert (entropy(delta=0.0, steps=300, kl_weight=0.0)[1:] < 0.05).all()  # without the KL to the one most likely token, from anywhere but a tie
    kl = lambda weight: torch.distributions.kl_divergence(*(Categorical(logits=z) for z in (
        logits, minimize_entropy(logits, delta=0.0, kl_weight=weight, steps=30)))).sum()
    assert kl(5.0) < kl(0.5) < kl(0.0)


def test_gradient_descent_swaps_two_tokens_and_temperature_does_not():
    """Proposition 1: below e^-(H + 1) the more likely of two tokens loses more, so that close ones can change places."""
    p = torch.full((1, 303), 0.5 / 300, dtype=torch.float64)
    p[0, 0], p[0, 1], p[0, 2] = 0.4902, 0.0050, 0.0048
    z = p.log()
    H = token_entropy(z).item()
    assert p[0, 1] < math.exp(-H - 1)  # where the slope of p (log p + H) is negative
    after = minimize_entropy(z, lr=1000.0, steps=1, kl_weight=0.0, optimizer="sgd")
    torch.testing.assert_close(after - z, 1000 * p * (p.log() + H), atol=1e-6, rtol=1e-6)  # y = z + eta p (log p + H)
    assert z[0, 1] > z[0, 2] and after[0, 1] < after[0, 2] and after.argmax() == 0
    cooler = adaptive_temperature(z)
    assert cooler[0, 1] > cooler[0, 2]


@hypothesis.settings(max_examples=3000, deadline=None, derandomize=True)
@hypothesis.given(st.lists(st.floats(-20, 20), min_size=2, max_size=20), st.floats(0, 1000), st.integers(1, 4))
def test_gradient_descent_never_moves_the_top_token_from_its_place(row, lr, steps):
    """Proposition 1. Of tokens at or above e^-H the likelier one gains more, and those below lose."""
    z = torch.tensor([row], dtype=torch.float64)
    after = minimize_entropy(z, delta=0.0, lr=lr, steps=steps, kl_weight=0.0, optimizer="sgd")
    assert after[0, z.argmax()] >= after.max() - 1e-9 * (1 + lr)


def test_adam_keeps_every_order_at_the_released_settings_and_can_lose_the_top_token_at_ten_times_the_rate():
    """Adam divides by the gradient's size, which Proposition 1 rests on. Nothing changes places in 3 steps of 0.1; in 3 steps of 1 it does."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, 10, generator=g, dtype=torch.float64) * 4 * torch.rand(20_000, 1, generator=g, dtype=torch.float64)
    order = z.argsort(-1)
    assert (minimize_entropy(z, delta=0.0).gather(1, order).diff(dim=-1) >= 0).all()
    near_tie = torch.tensor([[0.0, -0.003, -0.004, -0.005, -0.006, -0.007, -0.007, -0.01, -0.01, -0.058]], dtype=torch.float64)
    assert minimize_entropy(near_tie).argmax() == 0 and minimize_entropy(near_tie, lr=1.0).argmax() == 2


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_adaptive_temperature_against_brute_force(alpha):
    logits, taus = some_logits().double(), torch.linspace(0.01, 1.0, 4951, dtype=torch.float64)  # 2e-4 apart
    got, last = adaptive_temperature(logits, alpha), None
    for row, cooler in zip(logits[1:], got[1:]):  # row 0 is flat: no temperature changes it
        H = token_entropy(row)
        target = max(alpha * H, torch.tensor(0.3, dtype=torch.float64))
        if H <= 0.3:
            assert torch.equal(row, cooler)
            continue
        brute = taus[token_entropy(row / taus[:, None]) <= target].max()
        i = row.abs().argmax()
        assert (row[i] / cooler[i]).item() == pytest.approx(brute.item(), abs=1e-3)
        assert token_entropy(cooler) <= target + 1e-9
    torch.testing.assert_close(adaptive_temperature(logits.float(), alpha).double().softmax(-1), got.softmax(-1), atol=1e-4, rtol=1e-3)


def test_adaptive_temperature_keeps_more_entropy_with_a_larger_alpha_and_stays_in_its_range():
    logits = some_logits()
    entropies = torch.stack([token_entropy(adaptive_temperature(logits, alpha, delta=0.01)) for alpha in (0.1, 0.3, 0.5, 0.7, 0.9)])
    assert (entropies.diff(dim=0) >= -1e-5).all() and (entropies.diff(dim=0)[:, 1:8] > 0.01).all()
    torch.testing.assert_close(adaptive_temperature(logits, 0.01, 0.0, tau_min=0.5)[1], logits[1] / 0.5)  # out of reach: tau_min


def test_sharpening_compiles_without_a_break():
    """No branch on a value: torch.compile in full-graph mode and CUDA graphs would refuse one. "eager" needs no C++ compiler."""
    logits = some_logits()
    for sharpen in minimize_entropy, adaptive_temperature:
        compiled = torch.compile(sharpen, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(logits), sharpen(logits), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make, word", [
    (lambda: minimize_entropy(torch.zeros(1, 3), delta=-0.1), "delta -0.1"), (lambda: minimize_entropy(torch.zeros(1, 3), steps=-1), "steps -1"),
    (lambda: EMInf(delta=-1), "delta -1"), (lambda: EMInf(steps=-2), "steps -2"), (lambda: EMInf(optimizer="rmsprop"), "'rmsprop'"),
    (lambda: adaptive_temperature(torch.zeros(1, 3), alpha=1.0), "alpha 1.0"), (lambda: AdaptiveTemperature(alpha=0.0), "alpha 0.0"),
    (lambda: AdaptiveTemperature(tau_min=1.0, tau_max=1.0), "tau_min 1.0"), (lambda: AdaptiveTemperature(delta=-1), "delta -1"),
    (lambda: EMInf()(torch.zeros(2, 5), torch.tensor([[0.0, 1.0], [0.0, torch.nan]])), "row 1"),
    (lambda: AdaptiveTemperature()(torch.zeros(1, 5), torch.tensor([[torch.nan, 1.0]])), "nan"),
])
def test_sharpening_with_bad_settings_or_nan_is_one_clear_error(make, word):
    with pytest.raises(ValueError, match=word) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "gemma3_text"])
@pytest.mark.parametrize("processor", [EMInf, AdaptiveTemperature])
def test_generate_with_a_sharpener_gives_a_padded_batch_what_each_row_gets_alone(kind, processor, monkeypatch):
    """At fixed randomness: every draw takes the same quantile of the row's distribution."""
    def quantile(p, num_samples, **_):
        return (p.cumsum(-1) < 0.7).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)

    monkeypatch.setattr(torch, "multinomial", quantile)
    model, prompts = random_model(kind), rows_of(3, 9, 14)
    together = ev.generate(model, prompts, [279], 12, processors=[processor()])
    assert together == [ev.generate(model, [prompt], [279], 12, processors=[processor()])[0] for prompt in prompts]
    assert together != ev.generate(model, prompts, [279], 12)
    inputs = ev.pad_left(prompts, "cpu")  # and as a user writes it, beside another processor
    output = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=True, top_k=0, max_new_tokens=12,
                            repetition_penalty=1.3, temperature=0.7, logits_processor=[processor()])
    assert output.shape == (3, 26)


def test_what_a_sharpener_has_seen_ends_with_each_response(tiny):
    model, tokenizer = tiny
    prompts = [ev.encode_prompt(tokenizer, p["prompt"]) for p in ev.load_problems(HERE / "tiny/test.jsonl")[:16]]
    em_inf = EMInf(record=True)
    torch.manual_seed(0)
    responses = ev.generate(model, prompts, [279], 64, budget=500, processors=[em_inf])
    seen = torch.cat(em_inf.kept, -1)
    assert seen.shape == (4, sum(map(len, responses))) and not em_inf.seen and em_inf.seconds > 0
    H = ev.score_all(model, ev.output_head(model, prompts[0]), prompts, responses)[0]
    assert seen[0].sum().item() == pytest.approx(H.sum().item(), rel=1e-4)  # before: the model's own
    assert (seen[1] <= seen[0] + 1e-5).all() and torch.equal(seen[2] == 1, seen[0] >= 0.3)


# ------------------------------------------------------------------------------------------------------------- decoders


@pytest.mark.parametrize("name, parsed", [
    ("greedy", (None, "greedy", 0.0)), ("sample", (None, "sample", 0.8)), ("sample@0.1", (None, "sample", 0.1)), ("em-inf", ("em-inf", "sample", 0.8)),
    ("em-inf@0.1", ("em-inf", "sample", 0.1)), ("em-inf+self-consistency@0.5", ("em-inf", "self-consistency", 0.5)),
    ("adaptive-temperature+refine", ("adaptive-temperature", "refine", 0.8)), ("em-inf+greedy", ("em-inf", "greedy", 0.0)),
    *((bad, None) for bad in ("beam", "sample@0", "sample@x", "em-inf+beam", "refine+em-inf", "", "sample@-1", "em-inf+em-inf", "greedy+sample")),
])
def test_decoder_names(name, parsed):
    if parsed:
        assert ev.parse_decoder(name, 0.8) == parsed
    else:
        with pytest.raises(ValueError, match="--decode"):
            ev.parse_decoder(name, 0.8)


def test_self_consistency_keeps_the_majority_and_without_answers_the_most_central_text():
    box = lambda *answers: [rf"so \boxed{{{a}}}" if a else "no idea" for a in answers]
    assert ev.most_agreed(box("3", "0.5", r"\frac{1}{2}", "4")) == 1  # equal in meaning, not in writing
    assert ev.most_agreed(box("", "", "7", "")) == 2 and ev.most_agreed(box("1", "2", "3", "4")) == 0
    assert ev.most_agreed(["abcd", "abcx", "abyx", "zzzzzz"]) == 1
    assert ev.votes(box("1/2", "0.5", "", "7")) == [2, 2, 0, 1]


def test_decoders_spend_what_they_say(tiny, monkeypatch):
    model, tokenizer = tiny
    problems, calls = ev.load_problems(HERE / "tiny/test.jsonl")[:6], []
    inner = ev.generate
    monkeypatch.setattr(ev, "generate", lambda *args: calls.append((args[1], inner(*args))) or calls[-1][1])
    P = sum(p.numel() for p in model.parameters())
    for decoder, times in ("greedy", 1), ("self-consistency", 4), ("refine", 3), ("em-inf+refine", 3):
        calls.clear()
        samples = ev.evaluate(model, tokenizer, ev.output_head(model, [1, 2, 3]), problems, decoder, 24)
        tokens = sum(len(row) for prompts, responses in calls for row in prompts + responses)
        assert sum(len(responses) for _, responses in calls) == 6 * times and sum(s["flops"] for s in samples) == 2 * P * tokens
        if times == 3:  # the last answer counts, and the one before it stands in its prompt
            earlier = tokenizer.decode(calls[-2][1][0], skip_special_tokens=True)
            assert earlier in tokenizer.decode(calls[-1][0][0]) and samples[0]["response"] == tokenizer.decode(calls[-1][1][0], skip_special_tokens=True)


# ------------------------------------------------------------------------------------------------------ problems and grading


@pytest.mark.parametrize("text, box", [
    (r"so \boxed{4}.", "4"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{1} no, \boxed{2}", "2"), (r"\boxed{3} or \boxed{4", None),
    ("4", None), ("", None), (r"\boxed{}", ""), (r"\boxed{\text{a {b} c}} d", r"\text{a {b} c}"), (r"\boxed 4", None), (r"\boxed {4}", "4"),
    (r"\fbox{4}", "4"), (r"\boxed{3}, \fbox{4", None), (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{\left\{1\right.} }", r"\left\{1\right."),
    (r"\boxed{\boxed{5}}", "5"), (r"\boxed{5}}}", "5"), ("\\boxed{\n5\n}", "\n5\n"), (r"\boxed{5\\}", r"5\\"), (r"\boxed", None),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}"), ("\\boxed{" * 10_000, None),
])
def test_last_box(text, box):
    assert ev.last_box(text) == box


ANSWERS = {  # kind: (pairs that mean the same, pairs that do not)
    "fractions": ([(r"\dfrac{1}{2}", r"\frac{1}{2}"), (r"\tfrac12", "0.5"), ("1/2", r"\frac{1}{2}"), (r"-\frac{3}{4}", r"\frac{-3}{4}"),
        (r"\frac{3}{-4}", r"-\frac34"), (r"\frac{6}{8}", r"\frac34"), (r"\frac{\pi}{4}", r"\pi/4"), (r"\frac{1}{2}x", r"\frac{x}{2}"),
        (r"\cfrac{3}{5}", "0.6"), ("12/4", "3")], [
        (r"\frac12", "1/3"), ("3/4", "-3/4")]),
    "mixed numbers": ([(r"1\frac{1}{2}", r"\frac32"), (r"2 \frac{3}{4}", "2.75"), ("1 1/2", "3/2"), (r"-1\frac{1}{2}", "-1.5")], [
        (r"1\frac12", "0.5"), (r"1\frac{1}{2}", "11/2")]),
    "percent": ([(r"50\%", "50"), (r"50\%", "0.5"), ("12.5%", r"12.5\%"), (r"50 \text{ percent}", r"50\%"), (r"150\%", "1.5")], [
        (r"5\%", "50")]),
    "units": ([(r"5\text{ cm}", "5"), (r"5\,\mathrm{cm}", "5"), (r"12 \text{ square units}", "12"), (r"5 \text{ cm}^2", "5"), ("5 cm", "5"),
        ("5 m", "5"), ("10 hours", "10"), (r"3\text{ m/s}", "3"), (r"12\mbox{ inches}^2", "12"), (r"9.8\,\text{m}\,\text{s}^{-2}", "9.8"),
        (r"3 \mathrm{~cm}", "3"), (r"2\sqrt{3}\text{ cm}", r"2\sqrt3")], [
        ("5 cm", "6 cm"), (r"20\text{ minutes}", r"25\text{ minutes}")]),
    "currency": ([(r"\$10", "10"), (r"\$1{,}234.50", "1234.5"), ("$5", "5"), (r"10\text{ dollars}", r"\$10"), ("€7", "7"),
        (r"\$18.90", "18.9")], [
        (r"\$0.75", r"\$7.50")]),
    "thousands": ([("10,000", "10000"), (r"10{,}000", "10000"), (r"10\,000", "10000"), (r"10,\!000", "10000"), ("10 000", "10000"),
        (r"1{,}000{,}000", "1000000"), ("1,234.5", "1234.5"), ("-1,000", "-1000"), ("1,000,000", "10^6")], [
        ("10,000", "10"), ("1,2", "12"), ("3,4,5", "345"), ("12,5", "125"), ("1.000", "1000")]),
    "intervals": ([("[1,2]", r"\left[1,2\right]"), (r"(-\infty, 1) \cup (2, \infty)", r"(2,\infty)\cup(-\infty,1)"),
        (r"x \in [-2,7]", "[-2,7]"), (r"-2 \le x \le 7", "[-2,7]"), ("x > 3", r"(3,\infty)"), ("3 < x", "x > 3"),
        (r"\left( -\infty, \frac{1}{2} \right]", r"(-\infty, 0.5]"), (r"\mathbb{R}", r"(-\infty,\infty)"),
        (r"x \neq 2", r"(-\infty,2)\cup(2,\infty)"), (r"\infty", r"+\infty")], [
        ("(1,2)", "(1,2]"), ("[-2,7)", "[-2,7]"), (r"x \ge 3", "x > 3"), (r"[0,1] \cup [2,3]", "[0,3]"), (r"-\infty", r"\infty"),
        (r"\infty", "1000")]),
    "sets": ([(r"\{1,2,3\}", r"\{3,1,2\}"), ("1,2,3", "3,2,1"), ("1, 2", r"\{1, 2\}"), (r"1 \text{ and } 2", "1,2"), ("x=1, x=2", "1,2"),
        (r"x = 1 \text{ or } x = 2", "1,2"), (r"\{\frac12, 3\}", r"\{3, 0.5\}"), (r"-1,\sqrt{2}", r"\sqrt2,-1"),
        ("1, 2, 3", r"1,2,\text{ and }3"), ("a=1,b=2", "b=2,a=1"), (r"x\in\{1,2\}", "1,2"), ("(1,2),(3,4)", "(3,4),(1,2)")], [
        (r"\{1,2\}", r"\{1,2,3\}"), ("1,2", "1,3"), ("1", "1,2"), ("a=1,b=2", "a=2,b=1")]),
    "tuples": ([("(1,2)", r"\left(1, 2\right)"), (r"(\frac12, 2)", "(0.5, 2)"), ("(x,y)=(1,2)", "(1,2)"), (r"\langle 1,2 \rangle", "(1,2)"),
        ("x=2,y=3", "(2,3)")], [
        ("(1,2)", "(2,1)"), ("(1,2,3)", "(1,3,2)"), ("(1,-2)", "(1,2)"), ("(2,1,2)", "(1,2,2)"), ("(1,2,3)", "(1,2)"),
        ("(1,2),(3,4)", "(2,1),(4,3)")]),
    "matrices": ([(r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
        (r"\begin{pmatrix}\frac12\\0\end{pmatrix}", r"\begin{pmatrix}0.5\\0\end{pmatrix}"),
        (r"\left(\begin{array}{cc}1&2\\3&4\end{array}\right)", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}")], [
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}")]),
    "integers": ([("016", "16"), ("16.0", "16"), ("+5", "5"), ("-0", "0"), ("104.", "104"), (r"\textbf{033}", "33"),
        (r"\textbf{(023) }", "23"), ("5!", "120"), ("{5}", "5")], [
        ("0160", "16"), ("16", "61"), ("6", "16"), ("-13.6", "13.6")]),
    "scientific notation": ([(r"1.5 \times 10^{3}", "1500"), (r"1.5\cdot 10^3", "1500"), ("1.5e3", "1500"),
        ("4.5e33", r"4.5\times 10^{33}"), (r"2.5 \times 10^{-3}", "0.0025"), ("1e-3", r"10^{-3}"), ("6.02E23", r"6.02\times 10^{23}"),
        (r"5.7 * 10^{25}", "5.7e25"), (r"1.6\times10^{-19}", "1.60e-19"), ("3 x 10^8", "300000000"),
        (r"5.6 \times 10^{-4} \text{ m}", "0.00056"), ("0.00034", "3.4e-4"), ("-7.5e5", "-750000"), ("2e", "e+e"),
        (r"10^{20}", "1" + "0" * 20)], [
        ("4.5e33", r"4.5 \times 10^{32}"), ("6.02E23", "6.03e23"), (r"1.6\times10^{-19}", r"9.1\times10^{-31}"),
        (r"1.6\times10^{-19}", "0"), ("4.0e-7", "5.0e-7"), ("0.0000001", "0.0000002"), ("3.3e-5", "3.4e-5"), ("5e3", "5e")]),
    "texts": ([(r"\text{Evelyn}", "Evelyn"), (r"\text{evelyn}", "Evelyn"), (r"\text{Yes}", "yes"), (r"\text{ Monday }", "Monday"),
        (r"\text{the second player}", r"\text{The second player}")], [
        (r"\text{even}", r"\text{odd}"), ("Yes", "No"), (r"\text{June 20}", r"\text{May 20}"), (r"\text{Carla}", r"\text{Evelyn}")]),
    "choices": ([("(B)", "B"), (r"\text{B}", "B"), ("B) 12", "B"), (r"\text{(B)}", "B"), ("B.", "B"), (r"\textbf{(B)}", "B"),
        ("B: 12", "B"), (r"\textbf{(B) }12", "B"), ("B. Mitochondria", "B"), (r"(\text{B})", "B"), (r"\text{(C)}\ 12", "C"),
        (r"\textbf{(A)}\ 13", "13"), ("(A) 3", "(A)")], [
        ("B", "C"), ("(B)", "(C)"), (r"\mathrm{B}", "C"), ("A) 12", "B"), ("A) 12", "B) 12"), ("(A) and (B)", "A"), ("Brazil", "B"),
        ("B+1", "B"), ("AB", "A"), ("C_1", "C"), ("D(2)", "D"), ("B or C", "B"), (r"\text{A, C}", "A")]),
    "equations": ([("x = 5", "5"), ("y = 2x+1", "2x+1"), ("y=2x+1", "y = 1 + 2x"), ("2x + 1 = y", "y = 2x+1"), ("f(x) = x^2", "x^2"),
        (r"\angle A = 60^\circ", "60"), ("n = 3k+1", "3k+1"), ("x^2+y^2=1", "y^2+x^2-1=0"), (r"\nu = \frac{2eV}{h}", r"\frac{2eV}{h}"),
        ("y = -2x + 3", "2x + y = 3")], [
        ("x=5", "y=5"), ("x=5", "6")]),
    "plus or minus": ([(r"\pm 2", "2, -2"), (r"1 \pm \sqrt{2}", r"1+\sqrt2, 1-\sqrt2"), (r"x = \pm 2", r"\pm2"), ("±2", r"\pm 2"),
        (r"\pm 2", r"\{-2,2\}")], [
        (r"\pm 2", "2"), (r"\pm 2", r"\pm 3")]),
    "degrees": ([(r"90^\circ", "90"), (r"90^{\circ}", r"90^\circ"), ("90°", "90"), ("90 degrees", "90")], [
        (r"90^\circ", r"45^\circ")]),
    "decimals": ([("0.333333", r"\frac13"), ("1.414214", r"\sqrt{2}"), (".5", "0.5"), ("1.50", "1.5"), ("0.3333333333", "1/3"),
        ("3.141593", r"\pi"), ("113.097336", r"36\pi")], [
        ("0.33", "1/3"), ("0.1667", "1/6"), ("3.14", r"\pi"), ("1.41", r"\sqrt{2}"), ("0.999", "1"), ("113.1", r"36\pi")]),
    "roots": ([(r"\sqrt{8}", r"2\sqrt{2}"), (r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}"), (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}"),
        (r"\sqrt[3]{8}", "2"), ("√12", r"2\sqrt{3}")], [
        (r"\sqrt{3}", r"\sqrt{2}"), (r"2\sqrt3", r"3\sqrt2")]),
    "expressions": ([("(x+1)^2", "x^2+2x+1"), ("(2x+3)(x-1)", "2x^2+x-3"), ("p - q", "-(q-p)"), (r"\ln 4", r"2\ln 2"), (r"\log_2 8", "3"),
        (r"\binom{5}{2}", "10"), ("3+4i", "4i+3"), ("2^{10}", "1024"), ("1010_2", "1010_{2}"), ("2π", r"2\pi"), ("x·y", "xy"),
        ("x²", "x^2"), (r"\tan^{-1} 2", r"\arctan 2"), (r"v_0 t + \frac{1}{2} a t^2", r"\frac{at^2}{2}+v_0t"),
        (r"\frac{1}{2 n+2}", r"\frac{1}{2(n+1)}"), (r"\arcsin(1.3 \sin \theta)", r"\arcsin{1.3 \sin{\theta}}")], [
        ("x^2+1", "x^2-1"), ("a^2+b^2", "(a+b)^2"), ("-x^2", "(-x)^2"), ("|x|", "x"), ("i", "-i"), ("1+2i", "1-2i"), ("1010_2", "1011_2"),
        ("3:4", "4:3"), (r"36\pi", "36"), (r"\frac{a}{b}", r"\frac{b}{a}"), ("2n", "n"), ("5t", "5"), (r"\frac{g}{2} t", r"\frac{g}{2}")]),
    "typeset, empty, long": ([("−5", "-5"), ("–5", "-5"), ("2−3i", "2-3i"), ("1" * 3000, "1" * 3000), ("+".join("x" * 50), "50x")], [
        ("−5", "5"), ("", ""), ("", "0"), (" ", "0"), (r"\text{}", "0"), (r"\,", "0"), ("}{", "1"), ("\\", "1"), ("\0", "1"),
        (r"\frac{1}{0}", "0"), (r"\frac{1}{0}", r"\frac{2}{0}"), ("1" * 3000, "1" * 2999 + "2"), (str(10**60), str(10**60 + 1)),
        ("12345678901234567890", "12345678901234567891"), ("{" * 1000, "1"), ("x" * 20_000, "1")]),
}
MISJUDGED = [  # (box, answer, truth, why it is left so)
    (r"5\text{ cm}", r"5\text{ m}", False, "units are dropped, right and wrong ones"), (r"1\text{ pm}", r"1\text{ am}", False, "the same"),
    ("2x+1=5", "5", False, "an equation's right side counts, since responses write 2 + 3 = 5"), ("x+y=3", "3", False, "the same"),
    (r"e^{i\pi}", "-1", True, "i alone is read as a real variable"), (r"\sqrt{-4}", "2i", True, "the same"),
    (r"x \le -1 \text{ or } x \ge 2", r"(-\infty,-1]\cup[2,\infty)", True, "inequalities are not united"),
    ("½", "0.5", True, "rare beside LaTeX"),
    (r"\text{all real numbers}", r"\mathbb{R}", True, "no English"), (r"5, \text{ where } x>0", "5", True, "no English"),
    ("281 K", "281", True, "K is a variable, and a unit in \\text or \\mathrm only"), ("0,5", "0.5", True, "a comma is never the point"),
    ("c", "C", False, "math-verify's symbols have no case"), (r"\sqrt{\frac{E}{h^2}}", r"\frac{\sqrt{E}}{h}", True, "h may be negative"),
    (r"0.\overline{3}", "1/3", True, "periods are not read"), (r"E_0 e^{-t}", r"E_0 \exp(-t)", True, "nor is E_0"),
]


@pytest.mark.parametrize("box, answer, same", [
    pytest.param(*pair, same, id=f"{kind}: {pair[0]:.30} {'is' if same else 'is not'} {pair[1]:.30}")
    for kind, both in ANSWERS.items() for same, pairs in zip((True, False), both) for pair in pairs
] + [pytest.param(box, answer, truth, marks=pytest.mark.xfail(reason=why, strict=True)) for box, answer, truth, why in MISJUDGED])
def test_answers_that_mean_the_same_are_the_same(box, answer, same):
    assert ev.same_answer(box, answer) is same


def test_the_order_of_two_answers_does_not_matter():
    for box, answer in ANSWERS["intervals"][0] + ANSWERS["sets"][0] + ANSWERS["equations"][0] + [("2x+1=5", "5")]:
        assert ev.same_answer(answer, box), (answer, box)


@pytest.mark.parametrize("response, answer, right", [
    (r"\boxed{016}", "16", True), (r"\boxed{16}", 16, True), (r"\boxed{4", "4", False), (r"\boxed{4} and then \boxed{5", "4", False),
    ("4", "4", False), (r"\boxed{5} and \boxed{4}", "4", True), (r"\boxed{4} and \boxed{5}", "4", False),
    (r"so \fbox{\frac12}", "0.5", True), (r"\boxed {4}", "4", True), (r"\boxed{}", "", False),
])
def test_only_the_last_box_is_correct_or_not(response, answer, right):
    assert ev.is_correct(response, {"answer": answer}) is right


def test_answers_that_sympy_would_never_be_done_with_are_given_up(monkeypatch):
    monkeypatch.setattr(ev, "parse", partial(ev.parse, parsing_timeout=1))
    start = time.time()
    towers = "9^{9^{9^9}}", r"\frac{" * 80 + "1" + "}{2}" * 80  # the last one is nested too deep for the parser
    assert not any(ev.same_answer(box, "1") for box in towers) and time.time() - start < 12
    monkeypatch.delattr(ev, "parse")
    assert not ev.same_answer("y" * 20_000, "1") and ev.same_answer("7" * 2000, "7" * 2000)  # too long to be parsed


def test_in_a_thread_grading_fails_instead_of_finding_all_answers_wrong():
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="thread"):
        pool.submit(ev.same_answer, "0.123", r"\frac{123}{1000}").result()


def test_problems_of_a_file_keep_their_fields_and_a_solution_gives_its_last_box(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "answer": 7, "level": 3}\n\n{"problem": "b", "solution": "so \\\\boxed{2}, no \\\\boxed{3}"}\n'
                    '{"question": "c", "answer": "x\\n#### 18"}\n{"prompt": "d"}\n')
    a, b, c, d = ev.load_problems(path)
    assert (a["answer"], a["level"], b["prompt"], b["answer"], c["answer"]) == (7, 3, "b", "3", "18") and "answer" not in d
    assert len({x["id"] for x in (a, b, c, d)}) == 4 and ev.is_correct(r"\boxed{7}", a)


def packed(tests, pack=json.dumps):
    return base64.b64encode(zlib.compress(pickle.dumps(pack(tests)))).decode()


STDIN = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}, {"input": "5 5\n", "output": "10\n", "testtype": "stdin"}]
CALLS = [{"input": "[1, 2]\nnull", "output": "3", "testtype": "functional"}, {"input": "[]\ntrue", "output": "0", "testtype": "functional"}]
LCB = dict(question_title="t", question_content="Sum them.", platform="atcoder", contest_id="c", contest_date="2023-06-01",
           difficulty="easy", metadata="{}")
STEP = dict(step_background="Background: adding.", ground_truth_code=None, return_line="    return total")
ROWS = {  # name: (what load_dataset is asked for, rows as the data set has them, with invented contents, the problems they become)
    "numina": (("AI-MO/NuminaMath-CoT", None, "train"), [
        dict(source="orca_math", problem="1+1?", solution="It is \\boxed{2}.", messages=[{"content": "1+1?", "role": "user"}])],
        [dict(id="numina/0", prompt="1+1?", solution="It is \\boxed{2}.", answer="2")]),
    "math500": (("HuggingFaceH4/MATH-500", None, "test"), [
        dict(problem="1+1?", solution="It is \\boxed{2}.", answer="2", subject="Algebra", level=1, unique_id="test/algebra/1.json")],
        [dict(id="math500/0", prompt="1+1?", answer="2", level=1)]),
    "gsm8k": (("openai/gsm8k", "main", "test"), [dict(question="One and 1,233?", answer="It is <<1+1233=1234>>1,234\n#### 1,234")],
        [dict(id="gsm8k/0", prompt="One and 1,233?", answer="1,234")]),
    "amc": (("AI-MO/aimo-validation-amc", None, "train"), [
        dict(id=0, problem="1+1?", answer=142.0, url="u"), dict(id=1, problem="2?", answer=2.5, url="u")],
        [dict(prompt="1+1?", answer="142"), dict(prompt="2?", answer="2.5")]),
    "aime": (("AI-MO/aimo-validation-aime", None, "train"), [dict(id=3, problem="1+1?", solution="\\boxed{002}", answer="2", url="u")],
        [dict(prompt="1+1?", answer="2")]),
    "minerva": (("math-ai/minervamath", None, "test"), [dict(question="How bright is it?", answer="4.5e33")],
        [dict(id="minerva/0", prompt="How bright is it?", answer="4.5e33")]),
    "olympiad": (("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"), [
        dict(id=1606, question="How many?", solution=["Two."], final_answer=["2"], context=None, image_1=None, is_multiple_answer=False,
             unit=None, answer_type="Numerical", error=None),
        dict(id=1607, question="Which?", solution=["These."], final_answer=["$(1,2)$, $(3, 4)$", "$\\frac{1}{2}$"], context="Let $x$ be.",
             image_1=None, is_multiple_answer=True, unit=None, answer_type="Tuple,Numerical", error=None)],
        [dict(id="olympiad/1606", prompt="How many?", answer="2"),
         dict(id="olympiad/1607", prompt="Let $x$ be.\n\nWhich?", answer="(1,2), (3, 4), \\frac{1}{2}")]),
    "ugphysics": (("UGPhysics/ugphysics", "SemiconductorPhysics", "en+zh"), [
        dict(index=1, domain="Modern Physics", subject="Semiconductor Physics", topic="Others", problem="How hot?", solution="So.",
             answers="\\[\n\\boxed{4.88 \\times 10^{23}}\n\\]", answer_type="NV", unit="\\text{K}", is_multiple_answer=False, language="EN",
             level="Knowledge Recall")],
        [dict(id="ugphysics/0", prompt="How hot?", answer="4.88 \\times 10^{23}", unit="\\text{K}", language="EN")]),
    "mmlu-stem": (("cais/mmlu", "all", "test"), [
        dict(question="Who?", subject="world_religions", choices=["a", "b", "c", "d"], answer=0),
        dict(question="What?", subject="college_physics", choices=["red", "green", "blue", "none"], answer=2)],
        [dict(answer="C", prompt="What?\n\nA) red\nB) green\nC) blue\nD) none\n\nAnswer with the letter of the right option.")]),
    "humaneval": (("openai/openai_humaneval", None, "test"), [
        dict(task_id="HumanEval/900", canonical_solution="    return sum(xs)\n", entry_point="add",
             prompt="from typing import List\n\n\ndef helper(x):\n    return x\n\n\ndef add(xs: List[int]) -> int:\n    \"\"\"Sum.\"\"\"\n",
             test="def check(candidate):\n    assert candidate([1, 2]) == helper(3)\n")],
        [dict(id="HumanEval/900", entry_point="add", right="def add(xs):\n    return sum(xs)", wrong="def add(xs):\n    return 0",
              asks="Complete this function:\n```python\nfrom typing")]),
    "mbpp": (("google-research-datasets/mbpp", "sanitized", "test"), [
        dict(source_file="f", task_id=7, prompt="Write a function to double.", code="def twice(x): return 2 * x",
             test_imports=["import math"], test_list=["assert twice(2) == 4", "assert twice(math.pi) > 6"])],
        [dict(id="mbpp/7", right="def twice(x): return 2 * x", wrong="def twice(x): return x", asks="assert twice(2) == 4\nassert")]),
    "leetcode": (("TechxGenus/LeetCode-Contest", None, "train"), [
        dict(task_id="weekly-contest-1-x", url="u", title="x", meta={"difficulty": "Easy"}, prompt="\"\"\"Sum.\"\"\"\nclass Solution:\n",
             prompt_sft="Sum.\n\nPlease complete:\n```python\nclass Solution:\n    def total(self, xs: List[int]):\n        \n```",
             start_time=1,
             test="\nmy_solution = Solution()\n\ntest_input = { \"xs\": [1, 2] }\nassert my_solution.total(**test_input) == 3\n")],
        [dict(id="leetcode/weekly-contest-1-x", asks="Please complete", wrong="class Solution:\n    def total(self, xs): return 2",
              right="class Solution:\n    def total(self, xs: List[int]): return pow(sum(Counter(xs)), 1, 7)")]),  # not math's pow
    "livecodebench": (("lighteval/code_generation_lite", "release_v2", "test"), [
        LCB | dict(question_id="abc1", starter_code="", public_test_cases=json.dumps(STDIN[:1]), private_test_cases=packed(STDIN[1:])),
        LCB | dict(question_id="lc2", starter_code="class Solution:\n    def total(self, xs: List[int], y):\n        ",
                   public_test_cases=json.dumps(CALLS[:1]), private_test_cases=json.dumps(CALLS[1:]), metadata='{"func_name": "total"}')],
        [dict(id="livecodebench/abc1", tests=[{"input": "1 2\n", "output": "3\n"}, {"input": "5 5\n", "output": "10\n"}], asks="stdin"),
         dict(id="livecodebench/lc2", asks="```python\nclass Solution:\n    def total(self, xs: List[int], y):\n```",
              right="class Solution:\n    def total(self, xs: List[int], y): return sum(xs)",
              wrong="class Solution:\n    def total(self, xs, y): return 3")]),
    "scicode": (("SciCode1/SciCode", None, "test"), [
        dict(problem_name="sum", problem_id="90", problem_description_main="Sum all.", problem_background_main="", problem_io="",
             required_dependencies="import math", general_solution=None, general_tests=[], sub_steps=[
                 STEP | dict(step_number="90.1", step_description_prompt="Add two.", function_header="def add(a, b):\n    # Adds",
                             test_cases=["assert add(1, 2) == target"]),
                 STEP | dict(step_number="90.2", step_description_prompt="Add many.", function_header="def total(xs):\n    # Adds all",
                             test_cases=["assert total([1]) == target", "x = [1, 2]\nassert total(x) == target"])])],
        [dict(id="scicode/90.1", after=[], setup="import math", targets=[3],
              right="def add(a, b): return a + b", wrong="def add(a, b): return a",
              asks="Background: adding.\n\nComplete this function:\n```python\ndef add(a, b):\n    # Adds\n    return total\n```"),
         dict(id="scicode/90.2", after=["scicode/90.1"], targets=[1, 3], right="total = sum", wrong="total = len",
              asks="already:\n```python\ndef add(a, b):\n    # Adds\n```\n\nThe next step: Add many.")]),
    "eurus-code": (("PRIME-RL/Eurus-2-RL-Data", None, "train"), [
        dict(data_source="numina_olympiads", ability="math", prompt=[dict(role="user", content="1+1?")], reward_model={}),
        dict(data_source="taco", ability="code", prompt=[dict(role="system", content="You are."), dict(role="user", content="Echo.")],
             reward_model=dict(style="rule", ground_truth='{"inputs": ["1\\n"], "outputs": ["1\\n"]}')),
        dict(data_source="apps", ability="code", prompt=[dict(role="system", content="You are."), dict(role="user", content="Call.")],
             reward_model=dict(style="rule", ground_truth='{"fn_name": "f", "inputs": [[1]], "outputs": [[1]]}'))],
        [dict(id="eurus-code/0", prompt="Echo.", tests=[{"input": "1\n", "output": "1\n"}]), dict(prompt="Call.", tests=None)]),
}


@pytest.mark.parametrize("name", problems.HUB)
def test_rows_of_each_benchmark_become_problems(name, monkeypatch):
    (wanted, rows, expected), asked, targets = ROWS[name], [], []
    monkeypatch.setattr("datasets.load_dataset", lambda path, configuration, split: asked.append((path, configuration, split)) or rows)
    parse = types.SimpleNamespace(process_hdf5_to_tuple=lambda step, count: targets[:count])
    monkeypatch.setitem(sys.modules, "scicode.parse.parse", parse)
    loaded = ev.load_problems(name)
    assert asked == [wanted] and len(loaded) == len(expected)
    for problem, fields in zip(loaded, expected):
        assert isinstance(problem["prompt"], str) and ("answer" in problem) != ("tests" in problem or fields.get("tests", ...) is None)
        targets[:] = fields.pop("targets", [])
        solutions = {fields.pop(key, None): key for key in ("right", "wrong")}
        assert fields.pop("asks", "") in problem["prompt"]
        assert {key: problem.get(key) for key in fields} == fields
        for code, verdict in solutions.items():
            with nullcontext() if verdict == "right" or code is None else pytest.raises(AssertionError):
                exec("\n".join((problem.get("setup", ""), code, problem["tests"])) if code else "", {"__name__": "sandbox"})


def test_what_benchmarks_lack_is_said(monkeypatch, capsys):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **settings: [{"question": "1+1?", "final_answer": ["2"]}])
    with pytest.raises(FileNotFoundError, match="indval.*World Values Survey.*prompt"):
        ev.load_problems("indval")
    with pytest.raises(ValueError, match="olympiad, row 0.*'id'.*final_answer"):
        ev.load_problems("olympiad")
    ev.load_problems("minerva")
    assert "1 problems, not 272" in capsys.readouterr().err
    assert ev.load_problems("someone/something")[0]["prompt"] == "1+1?" and not capsys.readouterr().err


def test_a_pickle_is_read_and_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    assert problems.private_tests(packed(STDIN)) == STDIN == problems.private_tests(json.dumps(STDIN))
    assert problems.private_tests(base64.b64encode(zlib.compress(pickle.dumps(json.dumps(STDIN), protocol=0))).decode()) == STDIN
    with pytest.raises(ValueError, match="one pickled string"):
        problems.private_tests(packed(STDIN, lambda tests: Evil()))
    assert not (tmp_path / "ran").exists()


def test_wilson_interval_and_auroc_against_brute_force():
    low, high = scores.accuracy_interval(0.4, 100)
    for edge in low, high:  # the interval's ends are where the share is 1.96 standard errors away
        assert abs(0.4 - edge) == pytest.approx(1.96 * math.sqrt(edge * (1 - edge) / 100), rel=1e-6)
    assert scores.accuracy_interval(0.0, 9)[0] == pytest.approx(0.0, abs=1e-9)
    values, labels = [0.1, 0.4, 0.4, 0.8, 0.3, 0.4], [0, 1, 0, 1, 0, 1]
    pairs = [(a > b) + 0.5 * (a == b) for a, i in zip(values, labels) if i for b, j in zip(values, labels) if not j]
    assert scores.auroc(values, labels) == pytest.approx(sum(pairs) / len(pairs)) and math.isnan(scores.auroc([1.0], [1]))


# -------------------------------------------------------------------------------------------------------------- scores


def test_pass_at_k_is_the_share_of_subsets_with_a_right_response():
    for n, c in [(5, 0), (5, 1), (5, 3), (5, 5), (7, 2)]:
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert scores.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_calibration_error_of_a_case_worked_by_hand():
    """Bins (0.9, 1]: 0.95 sure, 2 of 3 right; (0.5, 0.6]: 0.55 sure, 1 of 1. ECE = 3/4 |2/3 - 0.95| + 1/4 |1 - 0.55|. An edge belongs below it."""
    ece, rows = scores.calibration([0.92, 0.95, 0.98, 0.55], [1, 0, 1, 1])
    assert ece == pytest.approx(0.75 * (0.95 - 2 / 3) + 0.25 * 0.45) and [count for *_, count in rows] == [1, 3]
    assert [count for *_, count in scores.calibration([1.0, 0.9, 0.1, 1e-9], [1, 1, 0, 0])[1]] == [2, 1, 1]


def test_paired_interval_covers_the_true_difference_at_its_rate():
    """Two models, right on the same easy problems, the second a little better: an interval that ignored the pairs would cover 99 %."""
    rng, covered, width = np.random.default_rng(0), 0, 0.0
    for _ in range(1000):
        p = rng.beta(0.3, 0.3, size=300)
        q = np.clip(p + 0.05, 0, 1)
        _, low, high = scores.paired_interval(rng.random(300) < p, rng.random(300) < q)
        covered += low <= np.clip(p + 0.05, 0, 1).mean() - p.mean() <= high
        width += (high - low) / 1000
    assert 0.93 < covered / 1000 < 0.97 and width < 0.75 * 2 * 1.96 * math.sqrt(2 * 0.25 / 300)


def fake_samples(answers, right=lambda problem, i, entropy: entropy < 0.5, N=4, problems=60, decoder="sample", seed=1):
    """N responses to each problem; answers(problem, i) -> entropy; right decides from it."""
    rows = []
    for p in range(problems):
        for i in range(N):
            H = answers(p, i)
            rows.append({"id": f"p/{p}", "decoder": decoder, "seed": seed, "response": rf"\boxed{{{i}}}", "correct": bool(right(p, i, H)), "answered": True,
                         "truncated": False, "length": 4, "entropy": H, "logprob": -H, "flops": 1.0, "seconds": 0.1, "answer": "0"})
    return rows


def test_diagnosis_follows_the_confidence_within_a_problem():
    rng = np.random.default_rng(0)
    entropy = lambda p, i: 0.1 + 0.2 * i + 0.01 * rng.random()
    greedy = fake_samples(lambda p, i: 0.2, N=1)
    said = lambda right, **more: ev.diagnosis(greedy, fake_samples(entropy, right, **more))["rewards"]["token"]
    assert (best := said(lambda p, i, H: i < 2))["verdict"] == "likely helps" and best["surest"] == {1: 0.5, 2: pytest.approx(5 / 6), 4: 1.0}
    assert said(lambda p, i, H: i > 1)["verdict"] == "harms"
    assert said(lambda p, i, H: i == p % 4)["verdict"] == "too close to call"
    assert said(lambda p, i, H: i < 2 and p < 2)["verdict"] == "too close to call"  # two problems do not tell
    assert [(always := said(lambda p, i, H: True))[key] for key in ("drift", "low", "high", "verdict")] == [0, 0, 0, "too close to call"]
    assert set(always["surest"].values()) == {1.0}
    # the second is right, and a little surer than the last two, but the first is the surest by far: a rise, then a fall
    close = lambda p, i: [0.1, 0.12, 0.9, 0.9][i]
    text = ev.diagnose(greedy, fake_samples(close, lambda p, i, H: i == 1))
    assert text.count("likely helps") == 2 and text.count("Not for long: the surest of 4 is right less often than that of 2") == 2
    harm = ev.diagnose(greedy, fake_samples(entropy, lambda p, i, H: i > 1))
    assert "reward token harms" in harm and "reward sequence harms" in harm and "Not for long" not in harm


def test_diagnosis_on_the_command_line_tells_the_rewards_apart(tmp_path, capsys):
    ev.main(["--diagnose", "--limit", "200", "--n", "4", "--device", "cpu", "--out", str(tmp_path / "a")])
    said = capsys.readouterr().out
    rows = {name: [float(x) for x in re.findall(r"[\d.]+(?=%)", row)] for name, row in re.findall(r"\| (token|sequence) (\|.*)", said)}
    assert rows["token"][0] == rows["sequence"][0] and rows["sequence"][-1] > rows["token"][-1]  # the likelier of 4 is right more often
    assert "EM-RL with reward token likely helps" in said and "EM-RL with reward sequence likely helps" in said
    assert "majority of 4" in said and "200 problems" in said


def test_the_surest_of_k_is_that_of_all_subsets():
    rng = np.random.default_rng(0)
    sure, right = rng.random(7), rng.random(7) < 0.5
    for k in range(1, 8):
        subsets = [max(subset, key=lambda i: sure[i]) for subset in itertools.combinations(range(7), k)]
        assert scores.surest_of_k(sure, right, k) == pytest.approx(np.mean(right[subsets]))


def test_drift_is_what_a_small_tilt_towards_confidence_does_to_accuracy():
    """Against exact distributions over 6 answers to each of 50 problems, tilted until the KL is 1e-4 nats on average."""
    rng = np.random.default_rng(0)
    p, sure, right = rng.dirichlet(np.ones(6), size=50), rng.normal(size=(50, 6)), rng.random((50, 6)) < 0.4
    tilted = lambda eta: (q := p * np.exp(eta * sure)) / q.sum(1, keepdims=True)
    kl = lambda eta: (tilted(eta) * np.log(tilted(eta) / p)).sum(1).mean()
    low, high = 0.0, 1.0
    for _ in range(60):
        low, high = ((low + high) / 2, high) if kl((low + high) / 2) < 1e-4 else (low, (low + high) / 2)
    exact = ((tilted(low) - p) * right).sum(1).mean()
    drawn = [rng.choice(6, size=20_000, p=row) for row in p]
    change, *interval = scores.drift([sure[i][d] for i, d in enumerate(drawn)], [right[i][d] for i, d in enumerate(drawn)], kl=1e-4)
    assert change == pytest.approx(exact, rel=0.05, abs=1e-5) and interval[0] < change < interval[1]
    # by hand: covariances 1/2 and 0, variances 1/2 and 0, so eta = 2; dividing by n would bias what few responses say
    assert scores.drift([[0, 1], [2, 2]], [[False, True], [False, True]], kl=0.5)[0] == pytest.approx(0.5)


def test_an_interrupted_evaluation_goes_on_and_samples_alone_give_the_scores_again(tmp_path, capsys):
    settings = ["--limit", "24", "--decode", "greedy,em-inf", "--seeds", "2", "--n", "2", "--part", "20", "--device", "cpu"]
    ev.main(settings + ["--out", str(tmp_path / "whole")])
    table = capsys.readouterr().out
    assert (tmp_path / "whole/reliability.png").exists()
    folder = tmp_path / "cut"
    ev.main(settings + ["--out", str(folder)])
    text = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.jsonl").write_text("".join(text[:44]) + text[44][:30])  # killed while it wrote a line of the fourth part
    ev.main(["--resume", str(folder)])
    flat = lambda folder: [s["response"] for samples in ev.read_samples(folder).values() for s in samples]
    assert flat(folder) == flat(tmp_path / "whole") and len(flat(folder)) == 120
    capsys.readouterr()
    (folder / "config.json").unlink()
    ev.main(["--regrade", str(folder)])
    again = capsys.readouterr().out
    row = lambda text: [line.rsplit("|", 2)[0] for line in text.splitlines() if line.startswith("| test")]  # without seconds
    assert row(again) == row(table) and len(row(table)) == 2
    ev.main(["--compare", str(tmp_path / "whole"), str(folder)])
    assert capsys.readouterr().out.count("| +0.0% | +0.0% to +0.0% |") == 2


def test_programs_are_graded_with_their_setup_and_the_programs_that_they_come_after():
    program = lambda code: f"Sure:\n```python\n{code}\n```"
    problems = [{"id": "f", "tests": "assert f(2) == 4"}, {"id": "io", "tests": [{"input": "2", "output": "4"}], "setup": "import sys"},
                {"id": "s1", "tests": "assert a() == 1"}, {"id": "s2", "tests": "assert b() == 2", "after": ["s1"]}, {"id": "m", "answer": "2"}]
    responses = [program("def f(x): return 2 * x"), program("print(2 * int(sys.stdin.read()))"), program("def a(): return 1"),
                 program("def b(): return 1 + a()"), r"\boxed{2}"]
    assert ev.grade(problems, responses, allow_code=True) == [True] * 5
    assert ev.grade(problems, responses[1:] + responses[:1], allow_code=True) == [False] * 5
    assert ev.grade(problems, ["none"] * 5, allow_code=True) == [False] * 5
    with pytest.raises(ValueError, match="--allow-code-execution"):
        ev.grade(problems, responses)


def test_evaluations_say_in_one_line_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.jsonl").write_text('{"prompt": "a", "tests": "assert f() == 1"}\n')
    (tmp_path / "none.jsonl").write_text('{"prompt": "a"}\n')
    fails(["--decode", "beam"], "--decode beam", "em-inf", main=ev.main)
    fails(["--data", "code.jsonl"], "code.jsonl", "--allow-code-execution", main=ev.main)
    fails(["--data", "none.jsonl"], "none.jsonl", "no answer", main=ev.main)
    fails(["--n", "0"], "--n 0", main=ev.main)
    fails(["--resume", "nowhere"], "nowhere", main=ev.main)
    fails(["--regrade", "nowhere"], "nowhere", "samples.jsonl", main=ev.main)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text("{}")
    fails(["--out", "old"], "old", "--resume", main=ev.main)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["code.jsonl", "none.jsonl", "old"]


# ------------------------------------------------------------------------------------------------------------------- em_rl.py


def test_reward_by_hand():
    H, l = torch.tensor([[9.0, 1.0, 3.0]]), torch.tensor([[9.0, -2.0, -4.0]])
    mask = torch.tensor([[False, True, True]])  # what stands left of the response is not rewarded
    assert [em_rl.reward(k, H, l, mask, n).item() for k in ("token", "sequence") for n in ("sum", "mean")] == [-4.0, -2.0, -6.0, -3.0]


def test_rloo_is_the_mean_of_the_others():
    r = torch.randn(6, 4, dtype=torch.float64)
    brute = torch.stack([torch.stack([r[b, i] - torch.stack([r[b, j] for j in range(4) if j != i]).mean() for i in range(4)]) for b in range(6)])
    torch.testing.assert_close(em_rl.advantage("rloo", r), brute)
    torch.testing.assert_close(em_rl.advantage("rloo", r + 100), brute)  # a constant added to a prompt's rewards changes nothing
    torch.testing.assert_close(em_rl.advantage("rloo", r).sum(1), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)


def random_batch(B=6, T=5):
    g = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(B, T, generator=g, dtype=torch.float64)
    mask = torch.arange(T) >= T - torch.randint(1, T + 1, (B, 1), generator=g)
    return logprobs, logprobs + torch.randn(B, T, generator=g) * 0.3, torch.randn(B, generator=g, dtype=torch.float64), mask


def test_on_policy_gradient_is_reinforce_with_k3():
    logprobs, ref, A, mask = random_batch()
    x = logprobs.clone().requires_grad_()
    em_rl.policy_loss(x, logprobs, ref, A, mask, mask.sum(), beta=0.1, clip=0.2).backward()
    wanted = -(A[:, None] + 0.1 * ((ref - logprobs).exp() - 1)) * mask / mask.sum()  # d k3 / d logprob = 1 - exp(d)
    torch.testing.assert_close(x.grad, wanted)


def test_micro_batches_add_up_to_the_batch():
    logprobs, ref, A, mask = random_batch()
    whole = em_rl.policy_loss(logprobs, logprobs - 0.1, ref, A, mask, mask.sum(), 0.01, 0.2)
    parts = [em_rl.policy_loss(logprobs[s], logprobs[s] - 0.1, ref[s], A[s], mask[s], mask.sum(), 0.01, 0.2) for s in (slice(0, 1), slice(1, 6))]
    torch.testing.assert_close(whole, sum(parts))  # each divided by its own tokens would not


def test_what_stands_outside_the_mask_never_enters_the_loss():
    logprobs, ref, A, mask = random_batch()
    wanted = em_rl.policy_loss(logprobs, logprobs, ref, A, mask, mask.sum(), 0.01, 0.2)
    logprobs, ref = logprobs.where(mask, -3.0), ref.where(mask, -7.0)
    torch.testing.assert_close(em_rl.policy_loss(logprobs, logprobs, ref, A, mask, mask.sum(), 0.01, 0.2), wanted)


def test_ratio_clip_stops_the_gradient_only_where_it_would_go_further():
    old, A = torch.zeros(4, 1), torch.tensor([1.0, 1.0, -1.0, -1.0])
    x = torch.tensor([[0.5], [-0.5], [0.5], [-0.5]], requires_grad=True)
    em_rl.policy_loss(x, old, None, A, torch.ones(4, 1), 4, 0.0, 0.2).backward()
    assert (x.grad[[0, 3]] == 0).all() and (x.grad[[1, 2]] != 0).all()


def test_k3_is_the_kl_in_expectation():
    p, q = torch.randn(2, 8, dtype=torch.float64).log_softmax(-1)
    d = q - p
    assert (p.exp() * (d.exp() - d - 1)).sum().item() == pytest.approx((p.exp() * (p - q)).sum().item())


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_on_a_bandit_both_rewards_go_for_the_arm_that_is_sure(kind):
    """First token: one of two arms, equally likely. The second token is nearly certain after arm 0 and uniform over 4 after arm 1.
    The gradient is also compared with the exact policy gradient, by enumeration of all 8 responses."""
    torch.manual_seed(0)
    second = torch.tensor([[6.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])

    def policy(theta, arms, tokens):
        H = torch.stack([token_entropy(theta).expand(len(arms)), token_entropy(second)[arms]], 1)  # (n, 2)
        l = torch.stack([theta.log_softmax(-1)[arms], second.log_softmax(-1)[arms, tokens]], 1)
        return H, l, torch.ones_like(l, dtype=torch.bool)

    def gradient(theta, B, N):
        arms = torch.multinomial(theta.softmax(-1), B * N, replacement=True)
        tokens = torch.multinomial(second.softmax(-1)[arms], 1)[:, 0]
        x = theta.clone().requires_grad_()
        H, l, mask = policy(x, arms, tokens)
        A = em_rl.advantage("rloo", em_rl.reward(kind, H, l, mask).detach().view(B, N)).view(-1)
        em_rl.policy_loss(l, l.detach(), None, A, mask, mask.sum(), 0.0, 0.2).backward()
        return x.grad

    theta = torch.zeros(2)
    arms, tokens = torch.cartesian_prod(torch.arange(2), torch.arange(4)).T
    x = theta.clone().requires_grad_()
    H, l, mask = policy(x, arms, tokens)
    p = l.detach().sum(1).exp()
    exact = torch.autograd.grad(-(p * em_rl.reward(kind, H, l, mask).detach() * l.sum(1)).sum() / 2, x)[0]  # / 2 tokens
    assert relative(gradient(theta, 20_000, 4), exact) < 0.1

    for _ in range(60):
        theta = theta - 1.0 * gradient(theta, 64, 4)
    assert theta.softmax(-1)[0] > 0.9


def test_guard_sees_collapse_and_leaves_a_healthy_run_alone():
    rows = lambda key, values: [{"step": i + 1, "length": 20.0, "entropy": 0.2, "truncated": 0.0} | {key: v} for i, v in enumerate(values)]
    assert run.collapsed(rows("length", [20, 20, 21, 25, 30, 34]), 4) is None
    assert "120.0 tokens" in run.collapsed(rows("length", [20, 20, 20, 120, 120, 120]), 4)
    assert "tokens" in run.collapsed(rows("length", [20, 20, 20, 4, 4, 4]), 4)
    assert "entropy rose" in run.collapsed(rows("entropy", [0.2, 0.2, 0.2, 1, 1, 1]), 4)
    assert "the same" in run.collapsed(rows("entropy", [0.2, 0.2, 0.2, 0, 0, 0]), 4)
    assert "truncated" in run.collapsed(rows("truncated", [0, 0, 0, 0.5, 0.6, 0.7]), 4)
    assert run.collapsed(rows("length", [20, 20, 20, 120, 120, 120]), 0) is None and run.collapsed(rows("length", [20, 120]), 4) is None


def test_grpo_by_hand_and_no_signal_where_all_rewards_are_equal():
    r = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    sd = math.sqrt(4 * 0.25 / 3)
    torch.testing.assert_close(em_rl.advantage("grpo", r)[0], torch.tensor([0.5, -0.5, -0.5, 0.5]) / sd, atol=1e-4, rtol=1e-4)
    for kind in "grpo", "rloo":
        assert (em_rl.advantage(kind, r)[1] == 0).all()


def test_consistency_correct_and_the_controls_by_hand():
    texts = [[r"\boxed{0.5}", r"\boxed{\frac{1}{2}}", r"1/2, but no box", r"\boxed{3}"], ["", "", r"\boxed{7", r"\boxed{7}"]]
    mask = torch.ones(2, 4, 3, dtype=torch.bool)
    mask[0, 0, 0] = False
    H, l = torch.full((2, 4, 3), 2.0), torch.full((2, 4, 3), -1.0)
    make = lambda kind, **more: em_rl.reward(kind, H, l, mask, texts=texts, answers=("1/2", "7"), **more).tolist()
    assert make("consistency") == [[0.5, 0.5, 0.0, 0.25], [0.0, 0.0, 0.0, 0.25]]
    assert make("correct") == [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    assert make("length") == [[2.0, 3.0, 3.0, 3.0], [3.0] * 4]
    assert make("correct+token", weight=0.1)[0] == pytest.approx([0.8, 0.8, -0.2, -0.2])
    assert make("correct+sequence", weight=0.1, norm="sum")[0] == pytest.approx([0.8, 0.7, -0.3, -0.3])
    assert len({x for row in make("random") for x in row}) == 8


# ------------------------------------------------------------------------------------------------------------------- em_ft.py


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3_text"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_em_ft_gradient_is_autograd_through_the_whole_logits(kind, beta):
    model, reference = random_model(kind), random_model(kind, seed=1)
    prompts, responses = rows_of(3, 9, 20), rows_of(7, 1, 30, seed=1)
    responses[0][-1] = 279  # the first ends, the others are truncated
    tokens = sum(map(len, responses))
    entropy, logprobs, mask = ev.score(model, ev.output_head(model, prompts[2]), prompts, responses)
    ref_logprobs = ev.score(reference, ev.output_head(reference, prompts[2]), prompts, responses)[1].detach()
    loss = em_ft.loss_of("entropy", entropy, logprobs, ref_logprobs, mask, tokens, beta)
    wanted = 0
    for prompt, response in zip(prompts, responses):
        ids = torch.tensor([prompt + response])
        distribution = Categorical(logits=model(ids).logits[0, len(prompt) - 1 : -1])
        l = distribution.log_prob(torch.tensor(response))
        d = reference(ids).logits.detach()[0, len(prompt) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0] - l
        wanted = wanted + (distribution.entropy() + beta * (d.exp() - 1 - d)).sum() / tokens
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    got, wanted = (torch.cat([g.flatten() for g in torch.autograd.grad(x, list(model.parameters()))]) for x in (loss, wanted))
    assert relative(got, wanted) < 1e-4


def test_the_sequence_rewards_gradient_is_the_token_rewards_plus_em_fts():
    """Summed and in expectation: EM-RL token steers to where the model is sure, EM-FT makes it surer where it is, EM-RL sequence does both.
    By brute force over all responses of at most 4 of 3 tokens, EOS among them, of a policy with logits of its own for every prefix."""
    eos, T = 2, 4
    prefixes = [prefix for t in range(T) for prefix in itertools.product((0, 1), repeat=t)]
    responses = [prefix + (eos,) for prefix in prefixes] + list(itertools.product((0, 1), repeat=T))
    torch.manual_seed(0)
    logits = torch.randn(len(prefixes), 3, dtype=torch.float64, requires_grad=True)
    place = torch.tensor([[0] * (T - len(y)) + [prefixes.index(y[:t]) for t in range(len(y))] for y in responses])  # (B, T): rows end at the right
    tokens = torch.tensor([[0] * (T - len(y)) + list(y) for y in responses])
    mask = torch.arange(T) >= T - torch.tensor([[len(y)] for y in responses])

    def gradient(loss_of):
        log_pi = logits.log_softmax(-1)
        entropy, logprobs = token_entropy(logits)[place] * mask, log_pi[place, tokens] * mask
        p = logprobs.sum(-1).exp().detach()
        assert p.sum().item() == pytest.approx(1)
        return torch.autograd.grad(sum(p[i] * loss_of(i, entropy, logprobs) for i in range(len(responses))), logits)[0]

    def em_rl_loss(kind):
        def loss_of(i, entropy, logprobs):
            r = em_rl.reward(kind, entropy.detach()[None], logprobs.detach()[None], mask[None], "sum")[0, i]
            return em_rl.policy_loss(logprobs[[i]], logprobs[[i]].detach(), None, r[None], mask[[i]], 1, 0.0, 0.2)
        return loss_of

    em_ft_loss = lambda i, entropy, logprobs: em_ft.loss_of("entropy", entropy[[i]], logprobs[[i]], None, mask[[i]], 1, 0.0)
    sequence, token, ft = gradient(em_rl_loss("sequence")), gradient(em_rl_loss("token")), gradient(em_ft_loss)
    torch.testing.assert_close(sequence, token + ft)
    assert min(token.norm(), ft.norm()) > 0.1 * sequence.norm()  # and neither is all of it



@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3_text"])
def test_sft_loss_is_the_one_of_transformers(kind):
    model, prompts, responses = random_model(kind), rows_of(3, 9, 20), rows_of(7, 1, 30, seed=1)
    _, logprobs, mask = ev.score(model, ev.output_head(model, prompts[2]), prompts, responses)
    loss = em_ft.loss_of("sft", torch.zeros_like(logprobs), logprobs, None, mask, mask.sum(), 0.0)
    inputs = ev.pad_left([p + r for p, r in zip(prompts, responses)], "cpu")
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, response in zip(labels, responses):
        row[-len(response) :] = torch.tensor(response)
    wanted = model(**inputs, labels=labels).loss
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    got, wanted = (torch.cat([g.flatten() for g in torch.autograd.grad(x, list(model.parameters()))]) for x in (loss, wanted))
    assert relative(got, wanted) < 1e-4


@pytest.mark.parametrize("script", [em_ft, em_rl])
def test_what_was_sampled_is_scored_at_the_same_temperature(script, tmp_path, monkeypatch):
    """Sampling at 0.9 and scoring at 1, a slip of others. The reference's log-probs count as well."""
    seen = {}
    names = ["roll_out", "score"] + ["score_all"] * hasattr(script, "score_all")
    for name, place in zip(names, (5, 4, 4)):
        inner = getattr(script, name)
        monkeypatch.setattr(script, name, lambda *args, name=name, place=place, inner=inner: seen.setdefault(name, []).append(args[place]) or inner(*args))
    script.main(FAST + ["--val", "none", "--steps", "1", "--beta", "0.1", "--rollouts", "2", "--temperature", "0.7", "--out", str(tmp_path / "run")])
    assert set(seen) == set(names) and {t for calls in seen.values() for t in calls} == {0.7}


# ----------------------------------------------------------------------------------------------------------------- sandbox.py

RIGHT = "f = lambda x: 2 * x\n"
JUMP = """
import sys
def jump(frame, event, _):
    for line in range(9, frame.f_lineno, -1):
        try:
            frame.f_lineno = line
            break
        except ValueError:
            pass
    return jump
"""
HUNT = """
import gc, os, sys
def f(x):
    frame = sys._getframe()
    while frame:
        print(frame.f_locals, frame.f_globals, frame.f_code.co_consts, gc.get_referents(frame))
        frame = frame.f_back
    print(gc.get_objects(), vars(sys.modules["__main__"]), sys.stdin.buffer.peek(), sys.argv, os.environ, flush=True)
    os._exit(0)
"""
HOSTILE = {  # name: a program that must not pass `assert f(1) == 2`; f is lambda x: x unless it says otherwise
    "hangs": "while True: pass",
    "hangs in C": "import time; time.sleep(99)",
    "hangs in its function": "def f(x):\n while True: pass",
    "leaves": "import sys; sys.exit(0)",
    "leaves in its function": "def f(x): raise SystemExit",
    "leaves at once": "import os; os._exit(0)",
    "leaves at once in its function": "import os\ndef f(x): os._exit(0)",
    "leaves from a thread": "import os, threading, time; threading.Thread(target=os._exit, args=(0,)).start(); time.sleep(9)",
    "leaves through atexit": "import atexit, os; atexit.register(os._exit, 0)",
    "leaves through excepthook": "import os, sys; sys.excepthook = lambda *_: os._exit(0)",
    "becomes true": "import os; os.execv('/bin/true', ['true'])",
    "interrupts": "def f(x): raise KeyboardInterrupt",
    "kills itself": "import os; os.kill(os.getpid(), 9); 1 / 0",
    "stops itself": "import os, time; os.kill(os.getpid(), 19); time.sleep(99)",
    "kills its parent": "import os, time; os.kill(os.getppid(), 9); time.sleep(99)",
    "kills its group": "import os; os.kill(0, 9); 1 / 0",
    "ignores signals": "import signal\nfor s in {*range(1, 32)} - {9, 17, 19}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "recurses": "import sys; sys.setrecursionlimit(10**9)\nf = lambda x: f(x)",
    "prints without end": "while True:\n try: print('x' * 2**20)\n except OSError: pass",
    "is right, but prints megabytes": RIGHT + "print('x' * 2**23)",
    "is right, but hides that it prints megabytes": RIGHT + "import os\ntry:\n while os.write(1, bytes(2**20)): pass\nexcept OSError: pass",
    "is right, but takes memory": RIGHT + "import mmap; x = mmap.mmap(-1, 2**33)",
    "takes all memory that there is": "x = []\nwhile True:\n try: x.append(bytearray(2**20))\n except MemoryError: pass",
    "is right, but has a thread that never ends": RIGHT + "import threading, time; threading.Thread(target=time.sleep, args=(99,)).start()",
    "is right, but closes its files": RIGHT + "import os; os.closerange(0, 64)",
    "is right, but closes stdout": RIGHT + "import os; os.dup2(os.open('/dev/null', os.O_WRONLY), 1)",
    "redefines AssertionError": "import builtins; builtins.AssertionError = lambda *_: SystemExit(0)",
    "redefines exec": "import builtins, sys; m = sys.modules['__main__']; builtins.exec = m.exec = lambda *_: None; m.tests = ''",
    "redefines os.write": "import os; w = os.write; os.write = lambda fd, data: w(1, data)\nf = lambda x: 1 / 0",
    "redefines check": "import builtins; check = builtins.check = lambda *_: None",
    "replaces modules": "import sys; sys.modules.update(dict.fromkeys(['os', 'sys', 'marshal', '__main__', 'builtins']))",
    "replaces builtins": "__builtins__ = {}",
    "prints a token": "print('0' * 32, 'passed', 'ok', '1 passed', True, sep='\\n')",
    "writes to all files": "import os\nfor fd in range(64):\n try: os.write(fd, b'0' * 32 + b' passed ok')\n except OSError: pass",
    "skips lines": JUMP + "sys.settrace(jump)",
    "looks for the key": HUNT,
    "looks for the key at once": HUNT + "f(1)",
    "is right if it finds a secret": "import os\nif 'out of reach' in str(os.environ): " + RIGHT,
}
NAMESPACES = {  # only where programs are granted namespaces. MARK is a folder that all may write to, PORT a socket that listens
    "forks without end": "import os\nwhile True:\n try: os.fork()\n except OSError: pass",
    "forks without end and leaves its group": "import os\nwhile True:\n try: os.fork() or os.setsid()\n except OSError: pass",
    "leaves a child that goes on": "import os\nif os.fork(): os._exit(0)",
    "kills everything": "import os; os.kill(-1, 9); 1 / 0",
    "kills by guessing": "import os\nfor pid in range(2, 40000):\n try: os.kill(pid, 9)\n except OSError: pass",
    "fills the disk": "i = 0\nwhile True:\n i += 1\n try: open(str(i), 'wb').write(bytes(2**22))\n except OSError: pass",
    "is right if it can write in MARK": "open('MARK/sandbox-file', 'w'); " + RIGHT,
    "is right if it can write in REPO": "open('REPO/sandbox-file', 'w'); " + RIGHT,
    "is right if it can write to the system": "open('/usr/sandbox-file', 'w'); " + RIGHT,
    "is right if it can write to the root": "open('/sandbox-file', 'w'); " + RIGHT,
    "is right if it can read the tests": "open('REPO/test_entropy.py'); " + RIGHT,
    "is right if it sees processes": "import os; os.listdir('/proc'); " + RIGHT,
    "is right if it can connect": "import socket; socket.create_connection(('127.0.0.1', PORT), 1); " + RIGHT,
    "is right if it can mount": "import ctypes\nif ctypes.CDLL(None).mount(b'x', b'/usr', b'tmpfs', 0, None) == 0: " + RIGHT,
    "leaves a daemon": ("import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n  os.closerange(0, 64)\n  time.sleep(2)\n"
                        "  open('MARK/daemon', 'w')\n os._exit(0)"),
    "leaves a shell": "import os; os.system('(trap \"\" HUP TERM; sleep 98; touch MARK/shell) & # key.pop()')",
}
TASKS = [  # right, wrong, [(arguments, what is right for them)]
    ("lambda a, b: a + b", "lambda a, b: a - b", [((1, 0), 1), ((2, 3), 5)]),
    ("lambda s: s[::-1]", "lambda s: s", [(("a",), "a"), (("abc",), "cba")]),
    ("lambda n: n % 2 == 0", "lambda n: n % 2", [((4,), True), ((7,), False)]),
    ("lambda *x: max(x)", "lambda *x: x[0]", [((3, 1), 3), ((1, 2, 3), 3)]),
    ("lambda n: 1 if n == 0 else n * f(n - 1)", "lambda n: n * f(n - 1)", [((5,), 120)]),
    ("lambda n: n if n < 2 else f(n - 1) + f(n - 2)", "lambda n: n if n < 2 else f(n - 1) + 1", [((3,), 2), ((10,), 55)]),
    ("lambda s: s == s[::-1]", "lambda s: True", [(("abba",), True), (("ab",), False)]),
    ("lambda s: sum(c in 'aeiou' for c in s)", "lambda s: len(s)", [(("banana",), 3)]),
    ("lambda x: sorted(x)", "lambda x: x", [(([3, 1, 2],), [1, 2, 3])]),
    ("lambda x: sorted(set(x))", "lambda x: sorted(x)", [(([2, 1, 2],), [1, 2])]),
    ("lambda a, b: a if b == 0 else f(b, a % b)", "lambda a, b: min(a, b)", [((4, 2), 2), ((12, 18), 6)]),
    ("lambda n: n > 1 and all(n % i for i in range(2, n))", "lambda n: n % 2 == 1", [((7,), True), ((9,), False)]),
    ("lambda s: ' '.join(w.capitalize() for w in s.split())", "lambda s: s.capitalize()", [(("as it is",), "As It Is")]),
    ("lambda x: sum(x) / len(x)", "lambda x: sum(x) // len(x)", [(([1, 2],), 1.5)]),
    ("lambda n: bin(n)[2:]", "lambda n: bin(n)", [((5,), "101")]),
    ("lambda x: [b - a for a, b in zip(x, x[1:])]", "lambda x: [a - b for a, b in zip(x, x[1:])]", [(([1, 4, 9],), [3, 5])]),
    ("lambda x, k: x[-k:] + x[:-k]", "lambda x, k: x[k:] + x[:k]", [(([1, 2, 3], 1), [3, 1, 2])]),
    ("lambda s: max(s, key=s.count)", "lambda s: max(s)", [(("abbcz",), "b")]),
    ("lambda n: sum(map(int, str(n)))", "lambda n: len(str(n))", [((123,), 6)]),
    ("lambda x: x[len(x) // 2]", "lambda x: x[len(x)]", [(([1, 2, 3],), 2)]),
]


def as_job(function, cases, form):
    """A program and its tests, of one of three forms: asserts, HumanEval's check, input and output."""
    if form == "output":
        return f"f = {function}\nprint(f(*eval(input())))", [{"input": f"{args}\n", "output": f"{want}\n"} for args, want in cases]
    asserts = [f"assert f(*{args}) == {want!r}" for args, want in cases]
    return (f"f = {function}", "\n".join(asserts)) if form == "asserts" else (f"g = {function.replace('f(', 'g(')}",
                                                                           "\n    ".join(["def check(f):"] + asserts), "g")


def sandboxed():
    """The processes on this machine that belong to a sandbox: their command lines tell, also after a fork. Linux only."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # has just ended
            if re.search(rb"def confine\(|key\.pop\(\)", path.read_bytes()):
                found.add(path.parent)
    return found


def assert_no_sandbox_is_left():
    left, deadline = sandboxed(), time.time() + 5
    while left and time.time() < deadline:  # those of another run will end
        time.sleep(0.1)
        left &= sandboxed()
    assert not left


@pytest.fixture(params=["namespaces", "limits"])
def confined(request, monkeypatch):
    if request.param == "namespaces" and not sandbox.has_namespaces():
        pytest.skip("this system grants no namespaces")
    if request.param == "limits":
        if os.getuid() == 0:  # its programs run as nobody, and this Python may lie where only root may look
            monkeypatch.setattr(sys, "executable", shutil.which("python3", path="/usr/local/bin:/usr/bin") or sys.executable)
        monkeypatch.setattr(sandbox, "has_namespaces", lambda: False)
        try:
            ran = sandbox.passes("", "pass")
        except RuntimeError:
            ran = False
        if not ran:
            pytest.skip(f"nobody can't run {sys.executable}")
    return request.param


@pytest.mark.parametrize("response, program", [
    ("Sure:\n```python\nf = 1\n```\nDone.", "f = 1"), ("```py\na\n```\n```python\nb\n\nc\n```", "b\n\nc"), ("```\na\n```", "a"),
    ("f = 1", None), ("", None), ("```python\na\n```\nOutput:\n```\n5\n```", "a"), ("```\na\n```\n```\nb\n```", "b"),
    ("```python\na\n```\n```python\nb", None), ("```python\na", None), ("```python\na\n```\n```bash\nls", None), ("```python\n```", ""),
    ("```python\na\n```\n```bash\nls\n```", "a"), ("```cpp\nint a;\n```", None), ("use ```a``` or\n```python\nb\n```", "b"),
    ("1. So:\n   ```python\n   if a:\n       b\n   ```", "if a:\n    b"), ("```Python title=x\na\n```", "a"),
])
def test_sandbox_extracts_the_last_complete_program(response, program):
    assert sandbox.extract_program(response) == program


@pytest.mark.parametrize("output, expected, same", [
    ("1 2\n3\n", "1 2\n3", True), ("1  2 \n3\n\n", " 1 2\n3", True), ("1 2 3", "1 2\n3", False), ("1.50", "1.5", True),
    ("1e2", "100", True), ("", "0", False), ("YES", "yes", False), ("1", "1 1", False), ("nan", "nan", True), ("sNaN", "1", False),
    ("", "\n", True), ("0.1", "0.10000001", False), ("a\r\nb", "a\nb", True), ("1\n2", "1\n3", False), ("1\n2", "1", False),
])
def test_sandbox_compares_output_by_tokens(output, expected, same):
    assert sandbox.same_output(output, expected) is same


def test_sandbox_tells_right_from_wrong_programs(confined):
    jobs = [as_job(function, cases, form) for (right, wrong, cases), form in zip(TASKS, ("asserts", "check", "output") * 7)
            for function in (right, wrong)]
    assert sandbox.grade(jobs) == [True, False] * len(TASKS)


def test_sandbox_lets_ordinary_programs_do_ordinary_things(confined):
    printed = lambda wanted, given="": [{"input": given, "output": wanted}]
    right = {
        "recurses": ("import sys; sys.setrecursionlimit(10**6)\nf = lambda n: 0 if n == 0 else 1 + f(n - 1)", "assert f(5000) == 5000"),
        "prints": ("f = lambda x: print('x' * 10**6) or x", "assert f(1) == 1"),
        "has a main": ("f = lambda x: x\nif __name__ == '__main__': f(int(input()))", "assert f(1) == 1"),
        "has a dataclass": ("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n a: int", "A(1)"),
        "is not ASCII": ("f = lambda: 'é∑'", "assert f() == 'é∑'"),
        "prints what is not ASCII": ("print(input() + '∑')", printed("é∑", "é")),
        "keeps a file": ("open('a', 'w').write('1')\nf = lambda: open('a').read()", "assert f() == '1'"),
        "leaves after its output": ("import sys\nif __name__ == '__main__': print(2)\nsys.exit()", printed("2")),
        "reads much": ("import sys; print(len(sys.stdin.read()))", printed("1000000", "x" * 10**6)),
        "has half a surrogate pair": ("'\ud800'; print(1)", printed("1")),
        "reads nothing": ("print(1)", printed("1", "x" * 10**6)),
    }
    wrong = {
        "fails after its output": ("import sys; print(2); sys.exit(1)", printed("2")),
        "is right for one input of two": ("print(1)", printed("1") + printed("2")),
        "has no f": ("", "def check(f): pass", "f"), "does not parse": ("def", "pass"), "is none": (None, "pass"),
        "has a null": ("\0", "pass"), "is too long": ("#" * 10**6, "pass"),
    }
    if confined == "namespaces":
        right |= {
            "has threads": ("from multiprocessing.pool import ThreadPool\nf = lambda x: ThreadPool(4).map(abs, x)", "assert f([-1])[0]"),
            "has processes": ("from multiprocessing import Pool\nf = lambda x: Pool(2).map(abs, x)", "assert f([-1, 1]) == [1, 1]"),
            "has 16 processes": ("import os, time\ni = 1\ntry:\n while os.fork() or time.sleep(99): i += 1\n"
                                 "except OSError: print(i in (15, 16))", printed("True")),  # one of them is the guard, if it is not root
            "has 64 MiB": ("i = 0\ntry:\n while open(str(i), 'wb').write(bytes(2**22)): i += 1\nexcept OSError: print(i)", printed("16")),
        }
    else:
        wrong |= {"starts a process": ("import os\nif os.fork() == 0: os._exit(0)", "pass")}
    results = dict(zip(right | wrong, sandbox.grade((right | wrong).values())))
    assert results == {**dict.fromkeys(right, True), **dict.fromkeys(wrong, False)}
    with pytest.raises(ValueError, match="any program would pass"):
        sandbox.passes("f = 1", "")


def test_sandbox_lets_no_hostile_program_pass_or_leave_anything(confined, tmp_path, monkeypatch):
    if os.getuid() == 0:
        for folder in tmp_path.parents[:3]:
            folder.chmod(0o755)  # else nobody could not write to MARK anyway
    mark, watched = tmp_path / "mark", [HERE, Path.cwd(), Path.home(), Path(tempfile.gettempdir())]
    mark.mkdir()
    mark.chmod(0o777)
    monkeypatch.setenv("SECRET", "out of reach")
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0)
    state = lambda: (dict(os.environ), os.getcwd(), [signal.getsignal(s) for s in signal.valid_signals()],
                     [resource.getrlimit(limit) for limit in range(9)])
    before, files = state(), [set(folder.iterdir()) for folder in watched]

    programs = HOSTILE | NAMESPACES if confined == "namespaces" else HOSTILE
    tests = "def check(f):\n    assert f(1) == 2\n    return\ncheck(f)\nassert f(1) == 2\nf\n"
    fill = lambda text: text.replace("MARK", str(mark)).replace("REPO", str(HERE)).replace("PORT", str(listener.getsockname()[1]))
    results = sandbox.grade([("f = lambda x: x\n" + fill(text), tests) for text in programs.values()], workers=6, seconds=1)
    assert not [name for name, passed in zip(programs, results) if passed]

    if programs is not HOSTILE:
        time.sleep(2)  # the daemon would have written
    assert_no_sandbox_is_left()
    assert not list(mark.iterdir()) and state() == before
    assert not [path for folder, old in zip(watched, files) for path in set(folder.iterdir()) - old if path.name.startswith("sandbox-")]
    with pytest.raises(BlockingIOError):
        listener.accept()
    listener.close()


def test_sandbox_ends_a_program_when_its_time_is_up(confined):
    started = time.time()
    assert not sandbox.passes("import time; time.sleep(99)", "pass", seconds=0.5)
    assert time.time() - started < 9  # 10.5 if its guard leaves it to us


def test_sandbox_grades_in_parallel_and_in_order():
    jobs = [(f"import time; time.sleep({0.8 - 0.2 * i})", "pass" if i % 2 else "1 / 0") for i in range(4)]
    started = time.time()
    assert sandbox.grade(jobs, workers=4) == [False, True, False, True]
    assert time.time() - started < 1.8  # 2.0 and more one after the other


def test_ctrl_c_leaves_nothing_of_the_sandbox(confined):
    def interrupt(*_):
        raise KeyboardInterrupt

    hang, started, handler = ("while True: pass", "pass"), time.time(), signal.signal(signal.SIGALRM, interrupt)
    try:
        for run in lambda: sandbox.passes(*hang, seconds=60), lambda: sandbox.grade([hang] * 50, seconds=1):
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            with pytest.raises(KeyboardInterrupt):
                run()
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert time.time() - started < 15  # grade waits for what has begun, and only that
    assert_no_sandbox_is_left()


def test_a_sandbox_that_can_not_be_set_up_is_an_error_and_not_a_wrong_program(monkeypatch, capsys):
    def execute(code, stdin, seconds, memory, namespaces):
        if namespaces or broken:
            raise RuntimeError("not permitted")
        return True, b"7\n"

    sandbox.has_namespaces()  # as it is here, before this test breaks it
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "execute", execute)
        broken = False
        assert sandbox.has_namespaces.__wrapped__() is False and "no namespaces" in capsys.readouterr().err
        broken = True
        with pytest.raises(RuntimeError, match="not permitted"):
            sandbox.has_namespaces.__wrapped__()
    monkeypatch.setattr(sandbox, "GUARD", "raise OSError('not permitted')")
    with pytest.raises(RuntimeError, match="not permitted"):
        sandbox.passes("f = 1", "assert f == 1")


# ---------------------------------------------------------------------------------------------------- the scripts, as they are run

FAST = ["--model", str(HERE / "tiny/base"), "--data", str(HERE / "tiny/train.jsonl"), "--val", str(HERE / "tiny/test.jsonl"), "--val-size", "16",
        "--prompts", "4", "--max-new-tokens", "48", "--eval-every", "2", "--save-every", "2", "--lr", "1e-4", "--no-checkpointing", "--device", "cpu"]
TIMINGS = "seconds", "tokens_per_second"


def metrics(folder):
    with (folder / "metrics.csv").open() as f:
        return [{k: v for k, v in row.items() if k not in TIMINGS} for row in csv.DictReader(f)]


def fails(argv, *words, main=em_rl.main, capsys=None):
    """The command ends with a non-zero exit and one line that has these words in it."""
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert isinstance(error.value.code, str) and "\n" not in error.value.code, error.value.code  # sys.exit(str) exits with 1
    assert all(word in error.value.code for word in words), error.value.code


@pytest.mark.parametrize("script", [em_rl, em_ft])
def test_run_is_reproducible_and_a_resumed_run_is_the_uninterrupted_one(tmp_path, script):
    script.main(FAST + ["--steps", "4", "--out", str(tmp_path / "a")])
    script.main(FAST + ["--steps", "4", "--out", str(tmp_path / "b")])
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")  # to the last digit
    script.main(FAST + ["--steps", "2", "--out", str(tmp_path / "c")])
    script.main(["--resume", str(tmp_path / "c"), "--steps", "4"])
    assert metrics(tmp_path / "c") == metrics(tmp_path / "a")
    for name in "config.json", "metrics.csv", "samples.jsonl", "plot.png", "result.json", "checkpoint/state.pt", "checkpoint/config.json":
        assert (tmp_path / "a" / name).stat().st_size > 0
    a, c = (AutoModelForCausalLM.from_pretrained(tmp_path / x / "checkpoint").state_dict() for x in "ac")
    assert all(torch.equal(a[k], c[k]) for k in a)
    result = json.loads((tmp_path / "c/result.json").read_text())
    assert result["final"]["step"] == 4 and result["base"]["step"] == 0
    fails(FAST + ["--out", str(tmp_path / "a")], "finished run", "--resume", main=script.main)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


@pytest.mark.parametrize("script, extra", [
    (em_rl, ["--updates", "2", "--clip", "0.1"]), (em_rl, ["--beta", "0"]), (em_rl, ["--reward", "sequence", "--reward-norm", "sum"]),
    (em_rl, ["--val", "none"]), (em_rl, ["--select", "val"]), (em_rl, ["--checkpointing", "--budget", "300"]),
    (em_rl, ["--reward", "correct", "--advantage", "grpo"]), (em_rl, ["--reward", "consistency"]), (em_rl, ["--reward", "random"]),
    (em_rl, ["--reward", "length"]), (em_rl, ["--reward", "correct+token", "--reward-weight", "0.1"]),
    (em_ft, ["--beta", "0.001", "--rollouts", "4"]), (em_ft, ["--loss", "sft"]), (em_ft, ["--temperature", "0.7", "--checkpointing"]),
])
def test_every_option_runs(tmp_path, script, extra):
    script.main(FAST + ["--steps", "2", "--out", str(tmp_path / "run")] + extra)
    rows = metrics(tmp_path / "run")
    assert rows[-1]["step"] == "2" and math.isfinite(float(rows[-1]["grad_norm"])) and float(rows[-1]["entropy"]) > 0
    assert (tmp_path / "run/best").exists() == ("--select" in extra)
    assert script is em_ft or float(rows[1]["grad_norm"]) == 0 or float(rows[-1]["changed"]) > 0.9


def test_a_run_that_has_logged_no_sample_yet_resumes(tmp_path):
    em_rl.main(FAST + ["--val", "none", "--steps", "1", "--out", str(tmp_path / "run")])  # the first sample comes at step 2
    em_rl.main(["--resume", str(tmp_path / "run"), "--steps", "2"])
    assert [row["step"] for row in metrics(tmp_path / "run")] == ["0", "1", "2"]


def test_micro_batches_of_any_size_give_the_same_step(tmp_path):
    for budget in "160", "100000":  # rollouts fit one batch of 8 x 160 tokens, so both draw the same
        em_rl.main(FAST + ["--steps", "1", "--seed", "3", "--val", "none", "--out", str(tmp_path / budget), "--budget", budget, "--beta", "0.1"])
    a, b = (metrics(tmp_path / budget)[1] for budget in ("160", "100000"))
    for key in "entropy", "reward", "grad_norm", "tokens":
        assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "gemma3_text"])
def test_em_rl_runs_on_architecture(tmp_path, kind):
    random_model(kind).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(HERE / "tiny/base").save_pretrained(tmp_path / "model")
    em_rl.main(["--model", str(tmp_path / "model"), "--data", str(HERE / "tiny/train.jsonl"), "--val", "none", "--steps", "2", "--prompts", "4",
                "--max-new-tokens", "16", "--out", str(tmp_path / "run"), "--device", "cpu"])
    rows = metrics(tmp_path / "run")
    assert float(rows[-1]["changed"]) > 0.9  # at lr 1e-6: the checkpoint is bf16, the weights that are trained are not
    assert float(rows[1]["kl"]) == pytest.approx(0, abs=1e-6) and float(rows[-1]["kl"]) >= 0


def test_ctrl_c_saves_and_the_resumed_run_is_the_uninterrupted_one(tmp_path):
    em_rl.main(FAST + ["--steps", "6", "--out", str(tmp_path / "whole")])
    command = [sys.executable, str(HERE / "em_rl.py")]
    process = subprocess.Popen(command + FAST + ["--steps", "6", "--save-every", "100", "--out", str(tmp_path / "cut")], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    for line in process.stdout:
        if line.startswith("step 1 "):
            process.send_signal(signal.SIGINT)
            break
    output, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and f"--resume {tmp_path / 'cut'}" in errors, errors
    assert 2 <= len(metrics(tmp_path / "cut")) < 7 and not (tmp_path / "cut/result.json").exists()
    fails(FAST + ["--out", str(tmp_path / "cut")], "unfinished run", "--resume")
    em_rl.main(["--resume", str(tmp_path / "cut")])
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_bad_input_is_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1+1"}\n{"prompt": "1+2"}\n')
    model = FAST[:2]
    fails(["--model", "nowhere/at/all", "--data", str(data), "--val", "none"], "nowhere/at/all", "no folder")
    fails(["--model", str(tmp_path), "--data", str(data), "--val", "none"], "can't be loaded")
    fails(["--model", "Qwen/NoSuchModel", "--data", str(data), "--val", "none"], "Qwen/NoSuchModel", "Hub")
    fails(model + ["--data", "missing.jsonl"], "missing.jsonl", "no such file")
    fails(model + ["--data", "someone/some-data"], "someone/some-data", "network")
    fails(model + ["--data", str(data), "--val", str(data)], "no answer")
    fails(model + ["--data", str(data), "--val", "none", "--rollouts", "1"], "--rollouts 1", "at least 2")
    fails(model + ["--data", str(data), "--val", "none", "--prompts", "5"], "--prompts 5", "only 2")
    fails(model + ["--data", str(data), "--val", "none", "--prompts", "2", "--reward", "correct"], str(data), 'no "answer"')
    fails(model + ["--data", str(data), "--val", "none", "--reward", "consistency", "--rollouts", "1"], "--rollouts 1", "at least 2")
    fails(model + ["--data", str(data), "--val", "none", "--reward", "confidence"], "confidence", "token, sequence")
    fails(model + ["--data", str(data), "--val", "none", "--loss", "sft"], str(data), 'no "solution"', main=em_ft.main)
    fails(model + ["--data", str(data), "--val", "none", "--temperature", "0"], "--temperature 0", main=em_ft.main)
    fails(["--resume", str(tmp_path / "no-run")], "no-run", "nothing to resume")
    data.write_text('{"prompt": "1+1"}\n{"prompt": "1+\n')
    fails(model + ["--data", str(data)], "line 2", "not a JSON object")
    data.write_text('{"prompt": "1+1"}\n{"text": "1+2"}\n')
    fails(model + ["--data", str(data)], "line 2", '"prompt"', "text")
    data.write_text("")
    fails(model + ["--data", str(data)], "no problems")
    assert sorted(tmp_path.iterdir()) == [data]


# ------------------------------------------------------------------------------- float32 masters, memory, torchrun's processes


def trained(model, optimizer, steps, lr, clip=1.0, dtype=None):
    """Ten or so steps on seeded random tokens. optimizer None: torch's own AdamW on the model's parameters, gradients rounded to `dtype`."""
    plain = torch.optim.AdamW(model.parameters(), lr=lr) if optimizer is None else None
    rng = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for _ in range(2):  # micro-batches
            ids = torch.randint(0, 200, (4, 12), generator=rng)
            model(input_ids=ids, labels=ids).loss.backward()
        if plain:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            plain.step()
            plain.zero_grad()
        else:
            optimizer.step(clip)
    return model


@pytest.mark.parametrize("offload", [False, True])
def test_masters_in_cpu_memory_or_not_take_the_steps_of_plain_adamw(offload):
    """Stepping one tensor at a time while the others' gradients were still there stepped the later ones many times."""
    plain, ours = random_model("qwen2"), random_model("qwen2")
    optimizer = run.MasterAdamW(ours, 1e-3, offload)
    assert all((m is p) != offload for m, p in zip(optimizer.masters.values(), optimizer.params))
    trained(plain, None, 10, 1e-3)
    trained(ours, optimizer, 10, 1e-3)
    for a, b, m in zip(plain.parameters(), ours.parameters(), optimizer.masters.values()):
        assert (b - a).abs().max() < 1e-6 and torch.equal(b, m) and b.grad is None  # of updates of some 1e-2


def test_bf16_weights_stand_still_at_a_small_rate_and_their_masters_move_like_float32():
    """At lr 1e-6 an update is far under half of a bf16 weight's last digit: without float32 masters training does nothing."""
    start = [p.detach().clone() for p in random_model("qwen2").to(torch.bfloat16).float().parameters()]
    alone, full, ours = (random_model("qwen2").to(torch.bfloat16) for _ in range(3))
    full = full.float()  # from the same, rounded weights
    optimizer = run.MasterAdamW(ours, 1e-6)
    for model, how in (alone, None), (full, None), (ours, optimizer):
        trained(model, how, 10, 1e-6)
    moved = lambda weights: torch.cat([(a.detach().float() - b).flatten() for a, b in zip(weights, start)])
    masters = [optimizer.masters[i] for i in range(len(start))]
    share = lambda weights: (moved(weights) != 0).float().mean()
    assert share(alone.parameters()) < 0.1 < 0.9 < share(masters) and share(full.parameters()) > 0.9
    assert moved(masters).norm().item() == pytest.approx(moved(full.parameters()).norm().item(), rel=0.05)
    assert torch.nn.functional.cosine_similarity(moved(masters), moved(full.parameters()), dim=0) > 0.9  # the gradients are bf16's
    assert all(torch.equal(p, m.to(torch.bfloat16)) for p, m in zip(ours.parameters(), masters))


def test_gradients_of_bf16_weights_are_summed_in_float32():
    """256 + 1 is 256 in bf16: a thousand small micro-batches would be lost on one large one."""
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    optimizer = run.MasterAdamW(model, 1e-3)
    for x in [256.0] + [1.0] * 100:
        model(torch.tensor([[x]], dtype=torch.bfloat16)).sum().backward()
    assert optimizer.sums[0].item() == 356 and model.weight.grad is None
    assert optimizer.step(1.0)[0] == 356


def test_the_processes_shares_are_even_and_each_tensor_has_one_owner(monkeypatch):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers.Qwen2Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                                                                         num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
                                                                         tie_word_embeddings=False), dtype=torch.float32)
    sizes = [p.numel() for p in model.parameters()]
    monkeypatch.setattr(run, "WORLD", 8)
    owner = run.MasterAdamW(model, 1e-6).owner
    shares = [sum(n for i, n in enumerate(sizes) if owner[i] == rank) for rank in range(8)]
    assert sum(shares) == sum(sizes) == 7_615_616_512 and max(shares) < 1.5 * sum(sizes) / 8


def test_the_batches_of_a_rollout_give_the_same_whoever_runs_them(tiny, monkeypatch):
    model, tokenizer = tiny
    prompts = [ev.encode_prompt(tokenizer, p["prompt"]) for p in ev.load_problems(HERE / "tiny/test.jsonl")[:40]]
    respond = lambda: ev.generate(model, prompts, [279], 24, budget=500)
    torch.manual_seed(0)
    whole, state = respond(), torch.get_rng_state()
    parts = {}
    monkeypatch.setattr(ev, "WORLD", 3)
    for rank in 0, 1, 2:
        monkeypatch.setattr(ev, "RANK", rank)
        monkeypatch.setattr(ev, "gather", lambda mine: parts.update(mine) or dict.fromkeys(range(40)) | mine)
        torch.manual_seed(0)
        respond()
        assert torch.equal(torch.get_rng_state(), state)  # so that the processes go on in step
    assert [parts[i] for i in range(40)] == whole and len(set(map(tuple, whole))) > 10


@pytest.mark.parametrize("script", [em_rl, em_ft])
def test_two_processes_give_the_metrics_of_one_and_one_goes_on_where_two_stopped(tmp_path, script):
    settings = FAST + ["--prompts", "8", "--budget", "160", "--beta", "0.01", "--steps"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script.__file__]
    done = subprocess.run([*two, *settings, "2", "--out", str(tmp_path / "two")], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 2 | entropy") == 1 and (tmp_path / "two/checkpoint/state1.pt").exists()
    script.main(["--resume", str(tmp_path / "two"), "--steps", "3"])
    script.main(settings + ["3", "--out", str(tmp_path / "one")])
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        for key in a:
            assert a[key] == b[key] or float(a[key]) == pytest.approx(float(b[key]), rel=1e-5, abs=1e-5), (key, a, b)


def test_a_bf16_run_with_offloaded_masters_resumes_as_if_it_had_not_stopped(tmp_path):
    settings = FAST + ["--val", "none", "--dtype", "bfloat16", "--offload", "--steps"]
    em_rl.main(settings + ["2", "--out", str(tmp_path / "cut")])
    em_rl.main(["--resume", str(tmp_path / "cut"), "--steps", "4"])
    em_rl.main(settings + ["4", "--out", str(tmp_path / "whole")])
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert AutoConfig.from_pretrained(tmp_path / "cut/checkpoint").dtype == torch.bfloat16


def test_what_does_not_fit_is_offloaded_or_refused_with_the_gigabytes(tmp_path, monkeypatch, capsys):
    sizes = 1, True, 16_384, 131_072
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers.Qwen2Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                                                                         num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
                                                                         tie_word_embeddings=False), dtype=torch.bfloat16)
    here, besides = run.memory(model, "cuda", 1, True, *sizes[1:])
    assert here["weights"] == here["reference"] == 15_231_233_024 and besides == {"masters and Adam": 12 * 7_615_616_512}
    assert 60e9 < sum(here.values()) < 80e9
    have = {"cuda": 80e9, "cpu": 128e9, "the CPU": 128e9}
    monkeypatch.setattr(run, "memory_of", have.get)
    offload, said = run.fit(model, "cuda", 1, None, *sizes[1:])
    assert offload and "of 80 GB on cuda" in said and "91.4 of 128 GB on the CPU: masters and Adam 91.4" in said
    with pytest.raises(ValueError, match="164 of 80 GB on cuda.*--offload"):
        run.fit(model, "cuda", 1, False, *sizes[1:])
    have["cpu"] = have["the CPU"] = 64e9
    with pytest.raises(ValueError, match="91.4 of 64 GB on the CPU"):
        run.fit(model, "cuda", 1, None, *sizes[1:])
    have["cuda"] = 200e9
    assert run.fit(model, "cuda", 1, None, *sizes[1:])[0] is False
    have["cpu"] = 1e6
    monkeypatch.chdir(tmp_path)
    fails(FAST + ["--out", "run"], "of 0.001 GB on cpu", "--budget")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_offloaded_masters_take_the_same_steps_and_the_gap_is_small(tmp_path):
    for name in "offload", "no-offload":
        em_rl.main(FAST[:-2] + ["--val", "none", "--steps", "3", "--device", "cuda", f"--{name}", "--out", str(tmp_path / name)])
    a, b = (metrics(tmp_path / name) for name in ("offload", "no-offload"))
    for x, y in zip(a[1:], b[1:]):
        assert float(x["changed"]) > 0.9 and float(x["gap"]) < 0.05
        assert float(x["reward"]) == pytest.approx(float(y["reward"]), abs=0.02)


def test_rollouts_are_paged_only_where_flash_attention_works(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for there in True, False:
        monkeypatch.setattr(rollouts, "is_flash_attn_2_available", lambda there=there: there)
        monkeypatch.setattr(rollouts, "is_kernels_available", lambda: False)
        assert rollouts.choose(None, "cuda", torch.bfloat16) == ("paged" if there else "generate")
        assert rollouts.choose(None, "cuda", torch.float32) == rollouts.choose(None, "cpu", torch.float32) == "generate"
        assert rollouts.choose("paged", "cpu", torch.float32) == "paged"


def test_a_gpu_without_bf16_trains_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native, dtype in (True, torch.bfloat16), (False, torch.float32):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, native=native: native or including_emulation)
        assert ev.set_up() == ("cuda", dtype) and ev.set_up("cpu") == ("cpu", torch.float32)


# ------------------------------------------------------------------------------------------------------------ paged rollouts


def test_a_gap_between_sampler_and_trainer_that_grows_is_said():
    rows = [{"step": 0, "gap": ""}] + [{"step": i, "gap": 0.01} for i in range(1, 9)]
    assert run.drifted(rows) is None and run.drifted(rows[:2]) is None
    assert "0.05 nats" in run.drifted(rows + [{"step": 9, "gap": 0.05}])


def test_a_run_with_paged_rollouts_logs_a_small_gap_and_another_process_does_its_share(tmp_path, monkeypatch):
    em_rl.main(FAST + ["--val", "none", "--steps", "2", "--rollouts-with", "paged", "--max-new-tokens", "16", "--out", str(tmp_path / "run")])
    assert all(0 <= float(row["gap"]) < 1e-4 for row in metrics(tmp_path / "run")[1:])
    prompts, parts = [[1, 2], [3, 4], [5, 6]] * 2, {}
    monkeypatch.setattr(rollouts, "generate_paged", lambda model, mine, *_, logprobs, **__: logprobs.extend([-p[0]] for p in mine) or mine)
    monkeypatch.setattr(rollouts, "WORLD", 2)
    monkeypatch.setattr(rollouts, "gather", lambda mine: parts.update(mine) or parts)
    for rank in 1, 0:
        monkeypatch.setattr(rollouts, "RANK", rank)
        with suppress(KeyError):  # the first has not got the other's yet
            assert rollouts.roll_out("paged", None, prompts, [9], 4, 1.0, 0) == (prompts, [[-1], [-3], [-5]] * 2)
    assert len(parts) == 6


def tiny_prompts(tokenizer, count):
    return [ev.encode_prompt(tokenizer, p["prompt"]) for p in ev.load_problems(HERE / "tiny/test.jsonl")[:count]]


def same_distribution(a, b):
    """p-value of the chi-square test that two samples of one size come from one distribution; outcomes seen less than 10 times are one."""
    counts = [(a.count(x), b.count(x)) for x in {*a, *b}]
    cells = [c for c in counts if sum(c) >= 10] + [tuple(map(sum, zip((0, 0), *(c for c in counts if sum(c) < 10))))]
    chi2 = sum((m - n) ** 2 / (m + n) for m, n in cells if m + n)
    return torch.special.gammaincc(torch.tensor((sum(m + n > 0 for m, n in cells) - 1) / 2), torch.tensor(chi2 / 2)).item()


def test_paged_rollouts_have_generates_distribution_eos_and_truncation_included(tiny):
    """Guards: a first token that all rollouts of a prompt share, a default top-k, an EOS lost or doubled, prompts mixed up."""
    model, tokenizer = tiny
    prompts = [p for p in tiny_prompts(tokenizer, 16) for _ in range(256)]
    torch.manual_seed(0)
    plain, paged = ev.generate(model, prompts, [279], 8), rollouts.generate_paged(model, prompts, [279], 8)
    for sample in plain, paged:
        assert len(sample) == 4096 and all(r.count(279) == (r[-1] == 279) for r in sample)
        assert {len(r) for r in sample if r[-1] != 279} == {8} and 0.3 < sum(r[-1] == 279 for r in sample) / 4096 < 0.5
    of_prompts = lambda sample, f: [(i // 256, f(r)) for i, r in enumerate(sample)]
    for f in tuple, len, lambda r: r[0], lambda r: r[-1] == 279:
        assert same_distribution(of_prompts(plain, f), of_prompts(paged, f)) > 1e-3
    assert all(len(set(map(tuple, paged[i : i + 256]))) > 1 for i in range(0, 4096, 256))  # rollouts of one prompt differ
    assert same_distribution(of_prompts(plain, tuple), of_prompts(paged[256:] + paged[:256], tuple)) < 1e-3  # and the test has teeth


@pytest.mark.parametrize("sampler", [ev.generate, rollouts.generate_paged])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_samplers_logprobs_are_the_trainers_and_the_first_of_several_stops_ends_a_response(tiny, sampler, temperature):
    model, tokenizer = tiny
    prompts = [p for p in tiny_prompts(tokenizer, 15) for _ in range(3)]
    prompts, stop, sampled = prompts[::2] + prompts[1::2], [279, 44, 50], ["of an earlier step"]  # rollouts of a prompt not side by side
    torch.manual_seed(0)
    responses = sampler(model, prompts, stop, 6, temperature, logprobs=sampled)
    assert [len(r) for r in sampled] == [len(r) for r in responses] and max(map(len, responses)) == 6
    assert not any(set(r[:-1]) & set(stop) for r in responses) and len({r[-1] for r in responses} & set(stop)) > 1
    assert all(r[-1] in stop for r in responses if len(r) < 6)
    head = ev.output_head(model, prompts[0])
    _, logprobs, mask = ev.score_all(model, head, prompts, responses, temperature or 1.0)
    torch.testing.assert_close(torch.tensor(sum(sampled, [])), logprobs[mask], atol=1e-4, rtol=0)
    assert rollouts.sampler_gap(sampled, logprobs, mask) < 1e-5
    assert rollouts.sampler_gap(sampled, *ev.score_all(model, head, prompts, responses, 0.5)[1:]) > 0.02  # scored at another temperature


def test_paged_rollouts_leave_the_model_and_the_random_state_as_before_and_are_reproducible(tiny):
    """Guards: the eval mode, the seed and the paged attention that transformers leaves behind, and a checkpoint's own sampling settings."""
    model, tokenizer = ev.load_model(HERE / "tiny/base", "cpu")
    prompts = [p for p in tiny_prompts(tokenizer, 8) for _ in range(2)]
    model.set_attn_implementation("eager")  # transformers has to put another in its place
    model.train()
    torch.manual_seed(3)
    first = rollouts.generate_paged(model, prompts, [279], 12)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    torch.randint(2**31, ())
    assert torch.equal(after, torch.get_rng_state())  # one number was drawn, and no more
    assert model.training and model.config._attn_implementation == "eager"
    assert rollouts.generate_paged(model, prompts, [279], 12) != first
    own = transformers.GenerationConfig(do_sample=True, temperature=0.1, top_k=1, top_p=0.1, repetition_penalty=3.0, min_new_tokens=5,
                                        max_new_tokens=3, suppress_tokens=list(range(48, 58)), eos_token_id=44, num_return_sequences=2)
    model.generation_config, said = own, own.to_dict()
    torch.manual_seed(3)
    assert rollouts.generate_paged(model, prompts, [279], 12) == first
    assert model.generation_config is own and own.to_dict() == said
    assert rollouts.generate_paged(model, [], [279], 12) == []


@pytest.mark.parametrize("what", ["a failing forward pass", "a lost response", "Ctrl-C", "no start"])
def test_paged_rollouts_that_fail_say_so_and_leave_the_model_as_before(what, monkeypatch):
    """Guards: partial results taken for all, and a model left in paged attention with a thread at work in it."""
    model, tokenizer = ev.load_model(HERE / "tiny/base", "cpu")
    model.set_attn_implementation("eager")
    model.train()
    own, manager = model.generation_config, transformers.ContinuousBatchingManager
    if what == "a failing forward pass":
        calls = itertools.count()
        model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0 if next(calls) == 5 else None)
        error, words = RuntimeError, "prompt [0-7]: .*division by zero.*--rollouts-with generate"
    elif what == "a lost response":
        monkeypatch.setattr(manager, "get_result", lambda self, timeout: self._generation_thread.join(0.1))
        monkeypatch.setattr(manager, "is_running", lambda self: False)
        error, words = RuntimeError, "after 0 of 8 responses.*--rollouts-with generate"
    elif what == "Ctrl-C":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # runs of earlier tests have left theirs
        monkeypatch.setattr(manager, "get_result", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        error, words = KeyboardInterrupt, None
    else:
        monkeypatch.setattr(manager, "warmup", lambda _: (_ for _ in ()).throw(MemoryError("Memory footprint 2 is more than 1")))
        error, words = RuntimeError, "can't start: Memory footprint.*--rollouts-with generate"
    torch.manual_seed(0)
    with pytest.raises(error, match=words):
        rollouts.generate_paged(model, tiny_prompts(tokenizer, 8), [279], 64)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    torch.randint(2**31, ())
    assert torch.equal(after, torch.get_rng_state()) and model.training and model.config._attn_implementation == "eager"
    assert model.generation_config is own and not [t for t in threading.enumerate() if "_run_generation_loop" in t.name]


def test_paged_rollouts_in_a_cache_too_small_for_all_are_whole(tiny, monkeypatch):
    """Guards: responses cut or scored wrongly where transformers throws a cache away and computes it again, and one-token prompts."""
    class Tight(transformers.ContinuousBatchingConfig):
        def __setattr__(self, name, value):
            super().__setattr__(name, {"num_blocks": 6, "page_size": 16}.get(name, value))

    from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
    thrown, real = [], OffloadingManager.offload_requests
    monkeypatch.setattr(OffloadingManager, "offload_requests", lambda self: thrown.append(1) or real(self))
    monkeypatch.setattr(rollouts, "ContinuousBatchingConfig", Tight)
    model, prompts, sampled = random_model("qwen2"), [p for p in rows_of(20, 25, 1) for _ in range(4)], []
    torch.manual_seed(0)
    responses = rollouts.generate_paged(model, prompts, [279], 40, logprobs=sampled)
    _, logprobs, mask = ev.score_all(model, ev.output_head(model, prompts[0]), prompts, responses)
    assert thrown and sum(len(r) == 40 for r in responses) > 4 and rollouts.sampler_gap(sampled, logprobs, mask) < 1e-4


def test_paged_rollouts_refuse_a_model_that_would_be_sampled_wrongly():
    """Guards: Gemma 2's soft cap on attention, which transformers' paged eager attention leaves out without a word."""
    model = random_model("gemma2")
    with pytest.raises(RuntimeError, match="soft cap on attention"):
        rollouts.generate_paged(model, rows_of(5), [279], 4)
    assert model.config._attn_implementation == "eager"


# -------------------------------------------------------------------------------------------------------------------- tiny/


def test_the_shipped_problems_are_what_prepare_makes():
    train, test = prepare.make_problems(seed=0)
    for name, problems in ("train", train), ("test", test):
        assert [json.loads(line) for line in (HERE / f"tiny/{name}.jsonl").read_text().splitlines()] == problems
    assert len(test) == 512 and not {p["prompt"] for p in train} & {p["prompt"] for p in test}


def test_the_shipped_tokenizer_is_what_prepare_makes_and_says_what_tiktoken_says(tmp_path):
    encoding, _ = prepare.make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny/base")  # beside a config.json: AutoTokenizer cuts a Qwen2 model's text Qwen2's way
    assert (tmp_path / "tokenizer.json").read_text() == (HERE / "tiny/base/tokenizer.json").read_text()
    for text in "Mod 10, left to right: 7+5*3-8\n7+5=2, \\boxed{8}<|endoftext|>", "any text: żółw, 数学\n\n\t{}", "":
        ids = tokenizer(text)["input_ids"]
        assert ids == encoding.encode(text, allowed_special="all") and tokenizer.decode(ids) == text


def test_the_answers_and_solutions_are_right():
    for problem in prepare.make_problems(seed=0)[1]:
        chain, digit = problem["prompt"].split(": ")[1], None
        for i, character in enumerate(chain):
            if character.isdigit():
                digit = int(character) if digit is None else eval_step(digit, chain[i - 1], int(character))
        assert str(digit) == problem["answer"] == ev.last_box(problem["solution"])


def eval_step(a, op, b):
    return (a + b if op == "+" else a - b if op == "-" else a * b) % 10


def test_the_base_model_is_small_and_the_corpus_has_its_three_styles():
    assert sum(f.stat().st_size for f in (HERE / "tiny/base").iterdir()) < 3e6
    rng = prepare.random.Random(0)
    responses = [prepare.document(rng, prepare.HABITS, 1.0, ())[1] for _ in range(2000)]
    share = lambda f: sum(map(f, responses)) / 2000
    assert share(lambda r: ev.last_box(r) is not None) == 1
    assert share(lambda r: r.startswith("\\boxed")) == pytest.approx(np.mean(list(prepare.HABITS["direct"].values())), abs=0.04)
    assert share(lambda r: "=" not in r and "," in r) == pytest.approx(prepare.HABITS["rambling"], abs=0.02)  # and the rest is worked


def test_findings_jobs_have_their_own_names_and_folders_and_wait_only_for_jobs_that_are_there():
    for settings in findings.FULL, findings.QUICK:
        jobs, uses = findings.plan(settings, (1, 2), Path("runs/x"), list(report.TABLES))
        assert len({job["out"] for job in jobs.values()}) == len(jobs) and all(set(job["after"]) <= set(jobs) for job in jobs.values())
        assert len(uses["kl", "0.001"]) == 2 and uses["kl", "0.001"] == uses["training", "EM-RL token run"] == uses["norm", "token, mean"]
        few, _ = findings.plan(settings, (1, 2), Path("runs/x"), ["diversity"])
        assert set(few) < set(jobs) and all(set(job["after"]) <= set(few) for job in few.values())


def test_findings_numbers_survive_their_csv_and_look_as_they_should(tmp_path):
    found = {("kl", "0.001", "greedy"): ("share", [0.5, 0.25, 1.0]), ("rise", "token, β = 0.5", "guard step"): ("step", [12.0, float("nan")])}
    findings.write_csv(tmp_path / "findings.csv", found)
    read = findings.read_csv(tmp_path / "findings.csv")
    assert read.keys() == found.keys()
    for key, (unit, values) in found.items():
        assert read[key][0] == unit and read[key][1] == pytest.approx(values, nan_ok=True)
    assert report.cell("share", [0.5, 0.7]) == "60.0% ± 14.1%" and report.cell("share", [0.5]) == "50.0%"
    assert report.cell("change of share", [-0.1, 0.3]) == "+10.0% ± 28.3%" and report.cell("step", [12.0, float("nan")]) == "12, never"
    assert report.cell("sign", [-1.0]) == "harms" and report.cell("share", [float("nan")]) == ""
    assert report.table("kl", found, ["0.001"], ["greedy", "T = 1"], "β").splitlines()[2] == "| 0.001 | 58.3% ± 38.2% |"
    assert report.compared([0.5, 0.5], [0.515, 0.515]) == "level with"  # 512 problems do not tell 1.5 points
    assert report.compared([0.9, 0.92], [0.5, 0.53]) == "above" and report.compared([0.1], [0.5]) == "below"
    assert report.verdict([("A", True), ("B", False)]) == "The miniature agrees that A; it does not agree that B."


def test_the_readmes_numbers_are_those_of_findings_csv_and_its_line_counts_those_of_the_scripts():
    """Tables stand under <!-- table: experiment; first column; metrics, ... --> and numbers before <!--experiment|setting|metric-->."""
    readme, course, found = (HERE / "README.md").read_text(), (HERE / "COURSE.md").read_text(), findings.read_csv(HERE / "tiny/findings.csv")
    tables = re.findall(r"<!-- table: (.*?); (.*?); (.*?) -->\n\n(.*?)\n\n", readme, re.DOTALL)
    for experiment, first, metrics, shown in tables:
        settings = list(dict.fromkeys(setting for e, setting, _ in found if e == experiment))
        assert shown == report.table(experiment, found, settings, metrics.split(", "), first)
    numbers = re.findall(r"([+-]?[\d.]+)( %| points)?<!--(.*?)-->", readme + course)
    assert len(tables) == 2 and len(numbers) > 10
    for number, percent, key in numbers:
        mean = np.mean(found[tuple(key.split("|"))][1]) * (100 if percent else 1)
        assert float(number) == pytest.approx(mean, abs=0.5001 * 10.0 ** -len(number.partition(".")[2])), key
    measured = readme[readme.index("## What it finds") : readme.index("## A model of your own")]
    told = re.sub(r"[+-]?[\d.]+( %| points)?<!--.*?-->|^\|.*$|β = [\d.]+|0\.1 nats", "", measured, flags=re.MULTILINE)
    assert not re.findall(r"\d+\.\d+", told), "a number that no command has printed"
    for script, lines in re.findall(r"`(em_\w+\.py)` \|.*\| (\d+) lines \|", readme):
        assert int(lines) == len((HERE / script).read_text().splitlines())


def test_findings_md_is_what_its_csv_says():
    found = findings.read_csv(HERE / "tiny/findings.csv")
    text = report.report(found, 0, 3, "")
    own = (HERE / "tiny/findings.md").read_text()
    assert own[own.index("## ") :] == text[text.index("## ") :] and "uncommitted" not in own


def test_findings_guard_stops_where_the_run_would_have_been():
    rows = [{"step": step, "entropy": 0.5 if step >= 10 else 0.1, "length": 20, "truncated": 0.0} for step in range(20)]
    assert report.guard_stop(rows) == 12  # the mean of steps 10 to 12 is 5 times the first three's, that of 9 to 11 is 3.7 times
    assert report.guard_stop(rows[:12]) is None


def test_findings_do_not_start_twice_in_a_folder_nor_beside_the_jobs_of_a_killed_one(tmp_path):
    held = findings.lock(tmp_path)
    job = findings.start(dict(command=["-S", "-c", "import time; time.sleep(100)"], done=tmp_path / "done"), tmp_path / "log", held)
    with pytest.raises(SystemExit, match="in use by another"):
        findings.execute({}, 1, tmp_path)
    held.close()
    with pytest.raises(SystemExit, match="jobs of one that was killed"):
        findings.execute({}, 1, tmp_path)
    job.kill()
    job.wait()
    assert findings.execute({}, 1, tmp_path) == 0


def test_findings_skip_what_is_finished_and_stop_at_what_fails(tmp_path):
    def job(name, code, after=()):
        out = tmp_path / f"{name}.txt"
        return dict(command=["-S", "-c", code.format(out)], out=out, done=out, after=list(after), cost=1)

    jobs = {"made": job("made", "raise SystemExit('made again')"), "new": job("new", "open('{}', 'w')", ["made"])}
    jobs["made"]["out"].write_text("kept")
    findings.execute(jobs, 2, tmp_path)
    assert jobs["made"]["out"].read_text() == "kept" and jobs["new"]["out"].exists()
    jobs |= {"bad": job("bad", "print(); raise ValueError('what went wrong')"), "later": job("later", "open('{}', 'w')", ["bad"])}
    with pytest.raises(RuntimeError, match="^bad failed .*what went wrong$"):
        findings.execute(jobs, 2, tmp_path)
    assert not jobs["later"]["out"].exists()
    measured = tmp_path / "measured.json"
    measured.write_text(json.dumps({"spec": {"n": 4}, "result": 1}))
    assert findings.finished(dict(done=measured, spec={"n": 4})) and not findings.finished(dict(done=measured, spec={"n": 16}))
