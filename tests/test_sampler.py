"""The sampler: transformers' tokens, the scorer's numbers, on every kind of model."""
import math
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicLayer

import em_inf
from engine import cache, sampler
from engine.cache import GrowingLayer, Static
from engine.sampler import draw_by_cdf, generate
from entropy import output_head, score_all
from tasks.errors import UserError
from tests.models import ARCHITECTURES, random_model, rows_of

STOPS = list(range(0, 280, 13))
STATIC = "qwen2 qwen3 llama cohere granite phi gpt2 smollm3 glm4 qwen3_moe deepseek_v3".split()
MODELS = [(kind, {}) for kind in ARCHITECTURES]
MODELS += [("gemma3_text", dict(sliding_window=width)) for width in (4, 64)]


def reference(model, prompts, stop, max_new_tokens, temperature, *processors):
    """What transformers' generate answers, left-padded, up to a stop token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[-1] * (width - len(p)) + p for p in prompts])
    rows = model.generate(
        input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(), eos_token_id=stop,
        do_sample=temperature > 0, temperature=temperature or 1.0, top_k=0,
        max_new_tokens=max_new_tokens, pad_token_id=stop[0], logits_processor=list(processors),
    )[:, width:].tolist()
    ends = [[t for t, token in enumerate(row, 1) if token in stop] for row in rows]
    return [row[: min(end, default=len(row))] for row, end in zip(rows, ends)]


@pytest.mark.parametrize("kind, settings", MODELS)
def test_tokens_are_transformers_and_scores_the_trainers(kind, settings, monkeypatch):
    """Guards: another row's cache, mask or position; dropout; scores of sharpened logits; pads
    that reach the first tokens through a convolution (prompts are left-padded)."""
    def quantile(p, num_samples=1):  # no chance is left
        return (p.cumsum(-1) < 0.7).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)

    def draw(z, temperature):
        return quantile((z / temperature).softmax(-1)) if temperature else greedy(z, 0)

    greedy = sampler.draw
    monkeypatch.setattr(sampler, "draw", draw)
    monkeypatch.setattr(torch, "multinomial", quantile)  # transformers'
    model, prompts = random_model(kind, **settings), rows_of(3, 20, 11, 30)
    head, em = output_head(model, prompts[0]), em_inf.EMInf()
    for how in ([279], 24, 0), (STOPS, 24, 0.7, em):
        sharpen = em.sharpen if em in how else None
        rollout = generate(model.train(), prompts, *how[:3], sharpen=sharpen)
        together = rollout.responses
        assert model.training and together == reference(model.eval(), prompts, *how)
        for prompt, response in zip(prompts, together):
            alone = generate(model, [prompt], *how[:3], N=2, sharpen=sharpen).responses
            assert alone == [response] * 2
        scored = score_all(model, head, prompts, together, how[2] or 1.0)
        assert torch.equal(rollout.mask, scored.mask)
        for name in "entropy", "logprobs":
            ours, theirs = getattr(rollout, name), getattr(scored, name)
            torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)
    assert together != generate(model, prompts, *how[:3]).responses


@pytest.mark.parametrize("kind", STATIC)
def test_a_static_cache_gives_the_growing_ones_tokens(kind, monkeypatch):
    """Guards: keys at a wrong place; a mask that shows padding, or places to come; rows that have
    ended, and go on; rows that leave or a room that grows, with another row's keys."""
    model, prompts = random_model(kind, seed=3), rows_of(3, 20, 11, 30)
    growing = generate(model, prompts, STOPS, 40, 0, N=2)
    monkeypatch.setattr(cache, "ROOM", 8)
    monkeypatch.setattr(sampler, "ON_CPU", (4, 0.7))
    monkeypatch.setattr(sampler, "next_step", Static)
    static = generate(model, prompts, STOPS, 40, 0, N=2)
    assert static.responses == growing.responses
    assert len({len(response) for response in static.responses}) > 2
    assert torch.equal(static.mask, growing.mask)
    for name in "entropy", "logprobs", "mean_logprobs":
        torch.testing.assert_close(
            getattr(static, name), getattr(growing, name), atol=1e-5, rtol=0
        )


def test_a_static_step_compiles_to_one_graph(monkeypatch):
    """A CUDA graph needs what torch.compile's fullgraph checks: no look at the host. With
    inductor as backend the tokens are the same, but it compiles for ten seconds."""
    model, prompts = random_model("qwen2", num_hidden_layers=1), rows_of(3, 5)
    growing = generate(model, prompts, [], 12, 0, N=2).responses
    compiled = torch.compile(Static.run, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(Static, "run", compiled)
    monkeypatch.setattr(sampler, "next_step", Static)
    assert generate(model, prompts, [], 12, 0, N=2).responses == growing


def p_value(first, second):
    """Chi-square: have two samples of one size one distribution?"""
    a, b = Counter(first), Counter(second)
    chi2 = sum((a[x] - b[x]) ** 2 / (a[x] + b[x]) for x in a | b)
    return torch.special.gammaincc(*torch.tensor([len(a | b) - 1, chi2]) / 2).item()


def test_samples_have_transformers_distribution_whatever_the_checkpoint_says():
    model = random_model("qwen2", vocab_size=4, eos_token_id=3, pad_token_id=3)
    prompts = [[1, 2, 2, 0], [2, 1]]
    torch.manual_seed(0)
    theirs = reference(model, [p for p in prompts for _ in range(2048)], [3], 3, 1.0)
    vars(model.generation_config).update(top_k=1, temperature=0.1, repetition_penalty=3.0)
    ours = generate(model, prompts, [3], 3, N=2048, batch_size=4096).responses
    cold = generate(model, prompts, [3], 3, 0.7, N=2048).responses
    for outcome in tuple, len, lambda response: response[-1] == 3:
        a, b, c = [[(i // 2048, outcome(r)) for i, r in enumerate(x)] for x in (theirs, ours, cold)]
        assert p_value(a, b) > 1e-3 > p_value(a, c)


def test_a_prompt_is_run_once_and_ended_rows_leave():
    model, prompts, shapes = random_model("qwen2"), rows_of(9, 4, 6), []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, x: shapes.append([*x[0].shape]))
    responses = generate(model, prompts, STOPS, 20, N=8).responses
    alive = [sum(len(response) > t for response in responses) for t in range(1, 20)]
    assert shapes == [[3, 9]] + [[rows, 1] for rows in alive] and alive[-1] > 0
    for *others, last in responses:
        assert (last in STOPS or len(others) == 19) and not set(others) & set(STOPS)
    shapes.clear()
    generate(model, prompts, STOPS, 20, N=8, batch_size=17)
    assert [shape for shape in shapes if shape[1] > 1] == [[2, 9], [1, 4]]


def test_frozen_weights_are_not_multiplied_once_for_each_row():
    """Guards against 27 GB for 100 prompts of a 0.5 B model with adapters, (rows, D, V)."""
    model = random_model("llama").requires_grad_(False)
    V, D = model.get_output_embeddings().weight.shape
    shapes = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            shapes.update(tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor))
            return function(*args, **(kwargs or {}))

    with Watch():
        generate(model, rows_of(30, 9, 6), [], 3)
    assert (D, V) in shapes and (3, D, V) not in shapes


def test_a_growing_layer_holds_what_transformers_layer_holds():
    """Guards against a buffer whose rows stay where they were when rows change places."""
    ours, theirs, rows = GrowingLayer(), DynamicLayer(), 2
    changes = {1: [0, 0, 0, 1, 1, 1], 20: [5, 4, 3, 2, 1, 0], 280: [0, 3, 4]}
    for t in range(290):
        new = torch.randn(2, rows, 2, 1, 4)
        for a, b in zip(ours.update(*new), theirs.update(*new)):
            assert torch.equal(a, b)
        for layer in ours, theirs:
            if t in changes:
                layer.reorder_cache(torch.tensor(changes[t]))
        rows = len(ours.keys)


@pytest.mark.parametrize("V", [1500, 4096])  # with a last block that is full, or is not
def test_tokens_of_a_large_vocabulary_are_drawn_with_their_probabilities(V):
    torch.manual_seed(0)
    probs = (2 * torch.randn(V)).softmax(-1)
    probs[5:300] = 0  # two whole blocks, and parts of two
    probs[-1] = 2e-5
    probs = probs / probs.sum()
    draws = torch.cat([draw_by_cdf(probs.expand(10_000, V))[:, 0] for _ in range(40)])
    counts, expected = torch.bincount(draws, minlength=V).float(), len(draws) * probs
    assert counts[5:300].sum() == 0  # never a token that was masked
    rare = expected < 5  # those stand together in one cell of the chi-square test
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    chi_square = ((counts - expected) ** 2 / expected).sum()
    cells = len(counts) - 1
    assert abs(chi_square - cells) < 4 * math.sqrt(2 * cells)


@pytest.mark.parametrize("temperature, vocab_size", [(0, 280), (1, 280), (1, 2000)])
def test_weights_that_are_broken_end_in_one_line(temperature, vocab_size):
    """Guards against torch.multinomial's own error, which a GPU does not survive."""
    model = random_model("qwen2", vocab_size=vocab_size)
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(UserError, match="not finite at token 1"):
        generate(model, [[1, 2]], [], 4, temperature, N=2)


def test_the_last_token_that_can_be_drawn_is_neither_padding_nor_masked(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: torch.full(shape, 1 - 2**-53,
                                                                           dtype=torch.float64))
    probs = torch.zeros(2, 1500)
    probs[:, 3] = 1.0
    assert draw_by_cdf(probs).tolist() == [[3], [3]]
    logits = torch.randn(64, 1536, generator=torch.Generator().manual_seed(0))
    logits[:, -100:] = -torch.inf  # most of the last block, whose sum may be rounded up
    probs = logits.softmax(-1)
    assert probs.gather(1, draw_by_cdf(probs)).min() > 0
