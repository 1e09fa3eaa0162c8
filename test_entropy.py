"""
The mathematics, against independent references. A test's name says the bug it guards against.
H stands for entropies and L for log-probs of tokens, in nats.
"""
import itertools
import json
import math
import os
from argparse import Namespace
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import pad
from torch.testing import assert_close
from transformers import AutoTokenizer

import em_ft
import em_rl
import entropy
from em_inf import (
    AdaptiveTemperature,
    EMInf,
    adaptive_temperature,
    minimize_entropy,
    minimize_in_few_passes,
)
from em_rl import advantage, entropy_weight
from engine.load import load_model
from engine.optimizer import MasterAdamW
from engine.run import read_rows
from engine.sampler import generate
from entropy import batches, entropy_and_logprob, k3, output_head, score, score_all, token_entropy
from tasks.errors import UserError
from tasks.problems import load_problems
from tests.models import ARCHITECTURES, FEW, TINY_BASE, random_model, rows_of

# torch.compile loads what torch itself has given up
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
cases = pytest.mark.parametrize
FOUR = AutoTokenizer.from_pretrained(TINY_BASE)("4")["input_ids"][0]
PROBLEMS = {p["prompt"]: p for p in load_problems(FEW)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def relative(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


def gradient(loss, inputs):
    """Of a number, in all inputs, as one vector."""
    grads = torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


# -------------------------------------- entropy.py


@cases("scale", [0.01, 1.0, 30.0])
@cases("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_entropy_has_no_eps_and_is_computed_in_float32(dtype, scale):
    logits = (torch.randn(3, 150_000) * scale).to(dtype)
    wanted = Categorical(logits=logits.double()).entropy()
    assert_close(token_entropy(logits).double(), wanted, atol=5e-5, rtol=0)


def test_masked_logits_add_nothing_to_entropy_or_gradient():
    z = torch.randn(5, 9).double()
    masked = pad(z, (0, 3), value=-torch.inf).requires_grad_()
    H = token_entropy(masked)
    assert_close(H, token_entropy(z))
    logprobs = z.log_softmax(-1)
    wanted = -logprobs.exp() * (logprobs + H.detach()[:, None])
    assert_close(gradient(H.sum(), [masked]).view(5, 12), pad(wanted, (0, 3)))


def test_k3_is_the_kl_in_expectation_and_never_negative():
    p, q = torch.randn(2, 8).double().log_softmax(-1)
    assert_close((p.exp() * k3(p, q)).sum(), (p.exp() * (p - q)).sum())
    assert (k3(p, q) >= 0).all()


def test_k3_of_close_models_is_not_rounding():
    """Guards against exp(d) - d - 1, which was logged as kl -2.653e-09."""
    d = torch.logspace(-9, 1, 2001)
    p, q = torch.zeros(4002, requires_grad=True), torch.cat([d, -d])
    exact = torch.zeros(4002, dtype=torch.float64, requires_grad=True)
    value, wanted = k3(p, q), k3(exact, q.double())
    assert (value >= 0).all()
    assert_close(value.double(), wanted, rtol=1e-6, atol=4e-9)
    assert_close(gradient(value.sum(), [p]).double(), gradient(wanted.sum(), [exact]))


def head_inputs(N=7, D=5, V=11, dtype=torch.float64):
    """hidden, weight, targets (the first and last token among them), bias."""
    targets = torch.randint(V, (N,))
    targets[:2] = torch.tensor([0, V - 1])
    floats = torch.randn(N, D), torch.randn(V, D), torch.randn(V)
    hidden, weight, bias = [x.to(dtype).requires_grad_() for x in floats]
    return hidden, weight, targets, bias


def whole(hidden, weight, targets, bias=0.0, scale=1.0, softcap=None, temperature=1.0):
    """Entropy and log-prob by way of the whole logits."""
    logits = (hidden @ weight.T + bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    policy = Categorical(logits=logits / temperature)
    return policy.entropy(), policy.log_prob(targets)


@cases("block", [1, 3, 12, None])
@cases("biased", [True, False])
@cases("head", [
    {},
    dict(scale=0.3),
    dict(softcap=2.0),
    dict(temperature=0.6),
    dict(scale=1.7, softcap=2.0, temperature=0.6),
])
def test_blocks_give_values_and_gradients_of_whole_logits(head, biased, block):
    h, w, t, b = head_inputs()
    inputs = (h, w, b) if biased else (h, w)
    got = torch.stack(entropy_and_logprob(h, w, t, *inputs[2:], block=block, **head))
    wanted = torch.stack(whole(h, w, t, *inputs[2:], **head))
    assert_close(got, wanted)
    a = torch.randn(2, 7).double()
    assert_close(gradient((a * got).sum(), inputs), gradient((a * wanted).sum(), inputs))


def test_no_tokens_times_vocabulary_is_made_and_no_needless_gradient(monkeypatch):
    h, w, t, b = head_inputs(N=64, D=8, V=5000)
    made, original = [], entropy.finish_logits

    def finish(block, *head):
        made.append(block.numel())
        return original(block, *head)

    monkeypatch.setattr(entropy, "finish_logits", finish)
    H, L = entropy_and_logprob(h.detach(), w, t, b.detach(), block=2000)
    kept = [x.numel() for x in H.grad_fn.saved_tensors]
    assert max(kept) == w.numel() < 64 * 5000
    (H + L).sum().backward()
    assert max(made) <= 2000
    assert sum(made) == 2 * 64 * 5000
    assert w.grad is not None and h.grad is None and b.grad is None


@pytest.fixture
def compile_here(monkeypatch):
    """What is compiled on a GPU is compiled on this CPU, by inductor as there."""
    try:
        torch.compile(torch.exp)(torch.zeros(1))
    except Exception as error:
        pytest.skip(f"torch.compile does not work here: {error}")
    for module in "entropy", "em_inf":
        monkeypatch.setattr(f"{module}.can_compile", lambda device, V: True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters


def test_compiled_blocks_give_values_and_gradients_of_eager_ones(compile_here, monkeypatch):
    """The compiler's code has a comparison where the eager one has a scatter."""
    h, w, t, b = head_inputs(N=8, V=64, dtype=torch.float32)
    head = dict(scale=1.7, softcap=2.0, temperature=0.6)
    got = torch.stack(entropy_and_logprob(h, w, t, b, block=128, **head))  # 4 blocks of 8 x 16
    a = torch.randn(2, 8)
    grads = gradient((a * got).sum(), (h, w, b))
    assert compile_here["stats"]["unique_graphs"] == 2 and not compile_here["graph_break"]
    monkeypatch.setattr(entropy, "can_compile", lambda device, V: False)
    wanted = torch.stack(entropy_and_logprob(h, w, t, b, block=128, **head))
    assert_close(got, wanted)
    assert_close(grads, gradient((a * wanted).sum(), (h, w, b)))


def test_where_no_compiler_works_a_warning_says_so(monkeypatch):
    """Triton without a C compiler must not end a run that needs neither."""

    def fail(function):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(entropy, "has_triton", lambda: True)
    tried = entropy.can_compile.__wrapped__
    assert not tried(torch.device("cpu"), 5000) and not tried(torch.device("cuda"), 280)
    with pytest.warns(UserWarning, match="no C compiler"):
        assert not tried(torch.device("cuda"), 5000)


@cases("dtype", [torch.float32, torch.bfloat16])
def test_bf16_is_summed_in_float32_and_autocast_is_followed(dtype):
    h, w, t, b = head_inputs(N=512, D=16, V=100, dtype=dtype)
    H, L = whole(h.double(), w.double(), t, b.double())
    exact = gradient((H + L).mean(), (h, w, b))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        H, L = entropy_and_logprob(h, w, t, b, block=200)
    assert H.dtype == L.dtype == torch.float32
    assert relative(gradient((H + L).mean(), (h, w, b)), exact) < 0.02
    with pytest.raises(ValueError, match="bfloat16.*float32"):
        entropy_and_logprob(h.bfloat16(), w.float(), t, b)


@cases("bad", [-1, 11, -100, 2**40])
def test_a_target_that_is_no_token_raises_as_gather_does(bad):
    h, w, t, b = head_inputs()
    t[3] = bad
    with pytest.raises(RuntimeError):
        (h @ w.T).gather(-1, t[:, None])
    with pytest.raises(ValueError, match=rf"{bad}.* 0 \.\. 10"):
        entropy_and_logprob(h, w, t, b)


@cases("outer", [True, False])
def test_a_second_derivative_is_refused_and_not_silently_wrong(outer):
    h, w, t, b = head_inputs()
    H, L = entropy_and_logprob(h, w, t, b)
    loss = (H * L if outer else H + L).sum() + h.pow(3).sum()
    with pytest.raises(RuntimeError):
        grad, = torch.autograd.grad(loss, h, create_graph=True)
        grad.square().sum().backward()


# ------------------------------ models and padding


def policy_of(model, prompt, response, temperature):
    """A response's entropies and log-probs (T,), by all logits of that row alone."""
    logits = model(torch.tensor([prompt + response])).logits[0]
    policy = Categorical(logits=logits[len(prompt) - 1 : -1] / temperature)
    return policy.entropy(), policy.log_prob(torch.tensor(response))


@cases("temperature", [1.0, 0.6])
@cases("kind", ARCHITECTURES)
def test_padded_rows_head_and_shift_are_as_in_whole_logits_alone(kind, temperature):
    model = random_model(kind)
    prompts, responses = rows_of(3, 9, 20, 1), rows_of(7, 1, 12, 30, seed=1)
    responses[0][2] = responses[0][-1] = 279  # pad == eos changes nothing
    head = output_head(model, prompts[2])
    rows = score(model, head, prompts, responses, temperature)
    H, L, mask = rows
    assert mask.sum(1).tolist() == [7, 1, 12, 30]
    assert not H[~mask].any() and not L[~mask].any()
    a, b = torch.randn(2, 4, 30)
    total = 0.0
    for i, response in enumerate(responses):
        n = len(response)
        alone = policy_of(model, prompts[i], response, temperature)
        assert_close((H[i, :n], L[i, :n]), alone, atol=1e-4, rtol=1e-4)
        total += (a[i, :n] * alone[0] + b[i, :n] * alone[1]).sum()
    parameters = list(model.parameters())
    got = gradient((a * H + b * L).sum(), parameters)
    assert relative(got, gradient(total, parameters)) < 1e-4
    micro = score_all(model, head, prompts, responses, temperature, budget=20)
    assert_close(micro, rows, atol=1e-5, rtol=1e-5)


def test_an_unknown_output_head_is_an_error():
    model = random_model("llama")
    model.lm_head.register_forward_hook(lambda head, inputs, logits: logits**3)
    with pytest.raises(ValueError, match="LlamaForCausalLM.*nats"):
        output_head(model, rows_of(12)[0])


def test_batches_keep_the_budget_the_count_and_every_index():
    lengths = [5, 100, 7, 7, 30, 1]
    assert batches(lengths, 32) == [[1], [4], [2, 3, 0, 5]]
    assert batches(lengths, 32, count=2) == [[1], [4], [2, 3], [0, 5]]
    assert batches(lengths, 20, [5, 2]) == [[2, 5]]


# ------------------------------------------ EM-INF


def released_em_inf(row, delta=0.3, lr=0.1, steps=3, kl_weight=0.05, optimizer="adam"):
    """The released algorithm on one row (V,), by autograd, in float64: probabilities (V,)."""
    z = torch.nn.Parameter(row.double().clone())
    start = Categorical(logits=row.double())
    kind = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
    descent = kind([z], lr=lr)
    for _ in range(steps):
        policy = Categorical(logits=z)
        if policy.entropy() < delta:
            break
        descent.zero_grad()
        (policy.entropy() + kl_weight * kl_divergence(start, policy)).backward()
        descent.step()
    return z.detach().softmax(-1)


def some_logits(V=500):
    """Rows from flat to nearly certain, and pairs of tokens of 0.47 to 0.26 nats."""
    scaled = torch.randn(12, V) * torch.linspace(0.0, 12.0, 12)[:, None]
    pairs = torch.full((6, V), -30.0)
    pairs[:, 0] = 0.0
    pairs[:, 1] = -torch.linspace(1.5, 2.6, 6)
    return torch.cat([scaled, pairs])


@cases("dtype", [torch.float32, torch.float16, torch.float64])
@cases("settings", [
    {}, dict(delta=0.0), dict(delta=1.0, lr=0.3), dict(steps=15),
    dict(kl_weight=0.0), dict(kl_weight=2.0, steps=10), dict(steps=0),
    dict(optimizer="sgd", lr=1.0, steps=10), dict(optimizer="sgd", lr=20.0),
])
def test_minimize_entropy_is_the_released_algorithm(settings, dtype):
    logits = some_logits().to(dtype)
    got = minimize_entropy(logits, **settings).double().softmax(-1)
    wanted = torch.stack([released_em_inf(row, **settings) for row in logits])
    assert (got - wanted).abs().max() < 1e-5


@cases("steps", [1, 3, 20])
@cases("settings", [
    {}, dict(delta=0.0, kl_weight=0.0), dict(kl_weight=2.0), dict(optimizer="sgd", lr=1.0),
])
def test_recomputed_steps_are_those_of_kept_moments(settings, steps):
    """What a GPU compiles takes all steps anew in each pass, from two sums of each step."""
    settings = dict(delta=0.3, lr=0.1, kl_weight=0.05, optimizer="adam", steps=steps) | settings
    logits = pad(some_logits(), (7, 5), value=-torch.inf).bfloat16()
    got = minimize_in_few_passes.__wrapped__(logits, **settings)
    wanted = minimize_entropy(logits, **settings)
    assert torch.equal(got == -torch.inf, wanted == -torch.inf)
    assert (got.softmax(-1) - wanted.softmax(-1)).abs().max() < 1e-5
    same = token_entropy(logits) < settings["delta"]
    assert torch.equal(got[same], logits[same].float())


@cases("optimizer, lr", [("adam", 0.1), ("sgd", 1.0)])
def test_compiled_steps_are_the_eager_ones(optimizer, lr, compile_here, monkeypatch):
    logits = pad(some_logits(V=50), (7, 7), value=-torch.inf).bfloat16()
    got = minimize_entropy(logits, lr=lr, steps=2, optimizer=optimizer)
    assert compile_here["stats"]["unique_graphs"] == 1 and not compile_here["graph_break"]
    monkeypatch.setattr("em_inf.can_compile", lambda device, V: False)
    wanted = minimize_entropy(logits, lr=lr, steps=2, optimizer=optimizer)
    assert torch.equal(got == -torch.inf, wanted == -torch.inf)
    assert (got.softmax(-1) - wanted.softmax(-1)).abs().max() < 1e-5


@cases("sharpen", [
    minimize_entropy,
    lambda z: minimize_entropy(z, optimizer="sgd", lr=5.0),
    adaptive_temperature,
])
def test_masked_tokens_stay_so_and_a_batch_is_its_rows(sharpen):
    """The released code makes a row with a masked token nan, and sums over the batch."""
    logits = some_logits(V=5000)
    masked = pad(logits, (100, 300), value=-torch.inf)
    got = sharpen(masked)
    assert torch.equal(got == -torch.inf, masked == -torch.inf)
    assert torch.equal(masked[:, 100:-300], logits)  # the input is left alone
    alone = torch.cat([sharpen(row[None]) for row in logits])
    assert_close(got[:, 100:-300].softmax(-1), alone.softmax(-1), atol=1e-6, rtol=1e-3)
    assert sharpen(logits[:0]).shape == (0, 5000)


@cases("sharpen", [minimize_entropy, adaptive_temperature])
@cases("delta", [0.3, 2.0, 100.0])
def test_rows_under_delta_come_back_bit_for_bit(sharpen, delta):
    logits = some_logits()[1:]  # nothing changes the flat row
    same = (sharpen(logits, delta=delta) == logits).all(-1)
    assert torch.equal(same, token_entropy(logits) < delta)


def test_descent_swaps_two_tokens_and_temperature_does_not():
    """Proposition 1: of two tokens below e^-(H + 1) the likelier loses more."""
    p = torch.full((1, 303), 0.5 / 300).double()
    p[0, :3] = torch.tensor([0.4902, 0.0050, 0.0048])
    z, H = p.log(), Categorical(p).entropy().item()
    y = minimize_entropy(z, lr=1000.0, steps=1, kl_weight=0.0, optimizer="sgd")
    assert_close(y - z, 1000 * p * (p.log() + H), atol=1e-6, rtol=1e-6)
    assert y[0, 1] < y[0, 2]
    assert adaptive_temperature(z)[0, :3].diff().max() < 0


@cases("lr", [0.1, 1.0, 30.0, 1000.0])
@cases("steps", [1, 4])
def test_descent_never_moves_the_top_token(lr, steps):
    """Proposition 1: of tokens at or above e^-H the likelier gains more; those below lose."""
    z = 5 * torch.randn(9999, 6).double() * torch.rand(9999, 1)
    z = z.round(decimals=1)  # near ties
    y = minimize_entropy(z, delta=0.0, lr=lr, steps=steps, kl_weight=0.0, optimizer="sgd")
    top = y.gather(1, z.argmax(1, keepdim=True))
    assert (y - top).max() <= 1e-9 * (1 + lr)


def test_adam_keeps_every_order_but_not_at_ten_times_the_rate():
    z = 4 * torch.randn(20_000, 10).double() * torch.rand(20_000, 1)
    y = minimize_entropy(z, delta=0.0).gather(1, z.argsort(-1))
    assert (y.diff(dim=-1) >= 0).all()
    ties = torch.tensor([[0.0, -3, -4, -5, -6, -7, -7, -10, -10, -58]]).double() / 1000
    assert minimize_entropy(ties).argmax() == 0
    assert minimize_entropy(ties, lr=1.0).argmax() == 2


@cases("alpha, delta, low", [(0.1, 0.3, 0.01), (0.9, 0.3, 0.01), (0.1, 0, 0.5)])
def test_adaptive_temperature_is_that_of_brute_force(alpha, delta, low):
    logits = some_logits().double()[1:]  # nothing changes the flat row
    taus = torch.linspace(low, 1.0, 1000).double()
    for row, cooler in zip(logits, adaptive_temperature(logits, alpha, delta, tau_min=low)):
        H = token_entropy(row)
        cool = taus[token_entropy(row / taus[:, None]) <= max(alpha * H, delta)]
        wanted = 1.0 if H <= delta else max(cool.tolist(), default=low)
        ratio = (row / cooler)[row.abs().argmax()].item()
        assert ratio == pytest.approx(wanted, abs=2e-3)


NAN = torch.tensor([[0.0, 1.0], [0.0, torch.nan]])


@cases("make, words", [
    (lambda: minimize_entropy(NAN, delta=-0.1), "delta -0.1"),
    (lambda: EMInf(optimizer="rmsprop"), "'rmsprop'"),
    (lambda: AdaptiveTemperature(tau_min=1.0), "tau_min 1.0"),
    (lambda: EMInf()(None, NAN), "nan in row 1"),
    (lambda: AdaptiveTemperature()(None, NAN[1:]), "nan in row 0"),
])
def test_bad_settings_or_nan_are_one_clear_error(make, words):
    with pytest.raises((ValueError, UserError), match=words) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_processor_is_its_function_and_counts_what_it_has_done():
    logits = some_logits()
    H = token_entropy(logits)
    for processor in EMInf(), AdaptiveTemperature():
        got = torch.cat([processor(None, rows) for rows in logits.split(5)])
        assert_close(got, processor.function(logits))
        assert processor.rows == len(H)
        assert processor.changed == (H >= 0.3).sum()
        assert_close(processor.before, H.sum().item())
        assert_close(processor.after, token_entropy(got).sum().item())


# -------------------------- rewards and advantages


def rollout_of(H, L, K, mask, texts=(), problems=(), N=4):
    """A rollout of given entropies, log-probs and means over a vocabulary of 1: log V = 0."""
    return SimpleNamespace(
        entropy=H, logprobs=L, mean_logprobs=-K, mask=mask, V=1, N=N, texts=texts,
        problems=problems,
    )


def test_rewards_by_hand_and_nothing_behind_the_mask():
    texts = [r"\boxed{0.5}", r"\boxed{\frac{1}{2}}", "1/2", r"\boxed{3}"]
    texts += ["", "", r"\boxed{7", r"\boxed{7}"]
    texts += [r"\boxed{1}", r"\boxed{2}", r"\boxed{2.0}", r"\boxed{1}"]
    texts += [r"\boxed{1}", r"\boxed{2}", r"\boxed{3}", ""]
    problems = [{"answer": "1/2"}] * 4 + [{"answer": "7"}] * 4 + [{"answer": "2"}] * 8
    H, L, K, mask = torch.ones(4, 16, 3)
    mask[0, 2] = 0
    H[0], L[0], K[0] = torch.tensor([[1.0, 3.0, 9.0], [-2.0, -4.0, 9.0], [5.0, 1.0, 9.0]])
    rollout = rollout_of(H, L, K, mask, texts, problems)
    for name, first, *others in [
        ("token", [-2, -1, -1, -1], [-1] * 4, [-1] * 4, [-1] * 4),
        ("sequence", [-3, 1, 1, 1], [1] * 4, [1] * 4, [1] * 4),
        ("self-certainty", [3, 1, 1, 1], [1] * 4, [1] * 4, [1] * 4),
        ("majority", [1, 1, 0, 0], [0, 0, 0, 1], [1] * 4, [1, 1, 1, 0]),
        ("consistency", [0.5, 0.5, 0, 0.25], [0, 0, 0, 0.25], [0.5] * 4, [0.25] * 3 + [0]),
        ("empo", [0.5, 0.5, 0, 0.25], [0] * 4, [0.5] * 4, [0] * 4),
        ("format", [1, 1, 0, 1], [0, 0, 0, 1], [1] * 4, [1, 1, 1, 0]),
        ("correct", [1, 1, 0, 0], [0, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 0]),
        ("correct+token", [-1, 0, -1, -1], [-1, -1, -1, 0], [-1, 0, 0, -1], [-1, 0, -1, -1]),
        ("correct+sequence", [-2, 2, 1, 1], [1, 1, 1, 2], [1, 2, 2, 1], [1, 2, 1, 1]),
        ("length", [2, 3, 3, 3], [3] * 4, [3] * 4, [3] * 4),
    ]:
        got = em_rl.REWARDS[name](rollout).view(4, 4)
        assert got.tolist() == [first, *others], name
    draws = [em_rl.REWARDS["random"](rollout) for _ in range(4)]
    assert len(torch.stack(draws).unique()) == 64


@cases("name", [name for name in em_rl.REWARDS if "correct" not in name])
def test_no_reward_but_correct_reads_a_label(name):
    got = []
    rows = torch.rand(3, 8, 5)
    for problem in {}, {"answer": "1"}:
        torch.manual_seed(0)
        texts = [r"\boxed{1}", "2"] * 4
        rollout = rollout_of(*rows, torch.ones(8, 5), texts, [problem] * 8)
        got.append(em_rl.REWARDS[name](rollout))
    assert torch.equal(*got)


@cases("shift", [0, 100])
def test_advantages_by_hand_and_a_shift_changes_nothing(shift):
    rewards = torch.tensor([[1.0, 0.0, 0.0, 4.0]]).double()
    wanted = torch.tensor([[-1.0, -5.0, -5.0, 11.0]]).double() / 3
    assert_close(advantage("rloo", rewards + shift), wanted)
    wanted *= 0.75 / math.sqrt(10.75 / 3)  # the variance divides by N - 1
    assert_close(advantage("grpo", rewards + shift), wanted, atol=1e-5, rtol=1e-5)


@cases("kind", ["rloo", "grpo"])
def test_no_signal_where_all_rewards_are_equal(kind):
    rewards = torch.linspace(-500, -0.1, 100)[:, None].repeat(1, 3)
    assert advantage(kind, rewards).abs().max() < 1e-3


@cases("name", ["token", "sequence"])
def test_on_a_bandit_both_rewards_go_for_the_sure_arm(name):
    """Two arms. What follows arm 0 is nearly certain, and after arm 1 it is any of 4."""
    after = torch.tensor([[6.0, 0, 0, 0], [0.0, 0, 0, 0]])
    theta = torch.zeros(2, requires_grad=True)
    for _ in range(60):
        first = Categorical(logits=theta.expand(64, 4, 2))
        arms = first.sample()
        second = Categorical(logits=after[arms])
        H = torch.stack([first.entropy(), second.entropy()], -1)
        L = torch.stack([first.log_prob(arms), second.log_prob(second.sample())], -1)
        rollout = rollout_of(H.view(256, 2), L.view(256, 2), H, torch.ones(256, 2))
        r = em_rl.REWARDS[name](rollout).detach().view(64, 4)
        objective = (advantage("rloo", r)[..., None] * L).mean()
        theta.data += gradient(objective, [theta])
    assert theta.softmax(-1)[0] > 0.9


def test_the_sequence_rewards_gradient_is_the_token_rewards_plus_em_fts():
    """Summed, and in expectation over all responses of at most 3 tokens (2 is EOS) of a policy
    with logits of its own for every prefix."""
    prefixes = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    responses = [prefix + (2,) for prefix in prefixes]
    responses += itertools.product((0, 1), repeat=3)
    logits = torch.randn(7, 3).double().requires_grad_()
    sequence, token, em_ft, exact = 0.0, 0.0, 0.0, 0.0
    for response in responses:
        places = [prefixes.index(response[:t]) for t in range(len(response))]
        policy = Categorical(logits=logits[places])
        H, L = policy.entropy().sum(), policy.log_prob(torch.tensor(response)).sum()
        p = L.exp().detach()
        sequence -= p * L.detach() * L
        token -= p * -H.detach() * L
        em_ft += p * H
        weight = entropy_weight(None, Namespace(entropy_coef="exact", reward_norm="sum"))
        exact -= p * (-H.detach() * L + weight * H)  # em_rl.py's objective
    grads = [gradient(loss, [logits]) for loss in (sequence, token, em_ft, exact)]
    assert_close(grads[0], grads[1] + grads[2])
    assert_close(grads[0], grads[3])
    assert min(grads[1].norm(), grads[2].norm()) > 0.1


# ---------- the gradients of em_rl.py and em_ft.py


@pytest.fixture
def first_step(tmp_path, monkeypatch):
    """Runs a script's first step, in two updates of several micro-batches: its responses,
    `policy_of` each, noise put on their log-probs, and each update's weights and gradient.
    Of its EOS the model is sure, so a loss could lose it unseen: with a digit among `stop` many
    responses end at a token that has a gradient."""
    clip = MasterAdamW.clip

    def run(script, flags, temperature=1.0, noise=0.0, stop=(279,)):
        seen = SimpleNamespace(weights=[], gradients=[], prompts=[], responses=[])

        def spy(optimizer, max_norm):
            seen.weights.append([p.detach().clone() for p in optimizer.params])
            seen.gradients.append(torch.cat([p.grad.flatten() for p in optimizer.params]))
            return clip(optimizer, max_norm)

        def sample(model, prompts, *args, N, **settings):
            rollout = generate(model, prompts, *args, N=N, **settings)
            seen.prompts = [prompt for prompt in prompts for _ in range(N)]
            seen.responses = rollout.responses
            seen.noise = noise * torch.randn(rollout.mask.shape)
            garbage = 9.0 * ~rollout.mask  # behind its own
            rollout.entropy += garbage
            rollout.mean_logprobs += garbage
            rollout.logprobs += seen.noise + garbage
            return rollout

        monkeypatch.setattr(MasterAdamW, "clip", spy)
        monkeypatch.setattr(script, "generate", sample)
        monkeypatch.setattr(script, "stop_ids", lambda model, tokenizer: list(stop))
        monkeypatch.setattr(script.report, "plot", lambda *_: None)
        script.main((  # with a seed by which rewards differ in both updates
            f"--out {tmp_path}/run --device cpu --data {FEW} --val none --prompts 4 --rollouts 3 "
            "--steps 1 --seed 2 --updates 2 --lr 1e-2 --budget 100 --max-new-tokens 28 "
            f"--temperature {temperature} {flags}"
        ).split())
        model = load_model(TINY_BASE, "cpu")[0].double()
        rows = zip(seen.prompts, seen.responses)
        with torch.no_grad():
            seen.start = [policy_of(model, *row, temperature) for row in rows]
        return seen

    return run


def check_gradients(seen, objective, beta, temperature):
    """Against -sum(objective(i, H, L) - beta KL) / tokens, without padding or batches."""
    model = load_model(TINY_BASE, "cpu")[0].double()
    updates = range(6), range(6, 12)
    for weights, got, rows in zip(seen.weights, seen.gradients, updates, strict=True):
        for p, weight in zip(model.parameters(), weights):
            p.data.copy_(weight)
        total, num_tokens = 0.0, 0
        for i in rows:
            H, L = policy_of(model, seen.prompts[i], seen.responses[i], temperature)
            d = seen.start[i][1] - L
            kl = d.exp() - 1 - d
            total += (objective(i, H, L) - beta * kl).sum()
            num_tokens += len(L)
        wanted = gradient(-total / num_tokens, list(model.parameters()))
        assert relative(got, wanted) < 3e-4


@cases("name, norm, kind, beta, temperature, noise", [
    ("token", "mean", "rloo", 0, 1, 0),
    ("token --entropy-coef 0.3", "mean", "rloo", 0, 0.7, 0),
    ("token --entropy-coef exact", "mean", "rloo", 0, 1, 0),
    ("token --entropy-coef exact", "sum", "grpo", 0.5, 1, 0.3),
    ("self-certainty", "mean", "rloo", 0, 0.7, 0),
    ("self-certainty", "sum", "grpo", 0.5, 1, 0),
    ("token", "sum", "rloo", 0.5, 0.7, 0),
    ("token", "mean", "rloo", 0.5, 1, 0.3),
    ("sequence", "mean", "rloo", 0, 0.7, 0),
    ("sequence", "mean", "grpo", 0, 0.7, 0.3),
    ("correct+token", "mean", "rloo", 0, 1, 0),
    ("correct+sequence", "sum", "grpo", 0.5, 0.7, 0.3),
])
def test_em_rl_gradient_is_plain_ppo_of_rows_alone(
    first_step, name, norm, kind, beta, temperature, noise
):
    flags = f"--reward {name} --reward-norm {norm} --advantage {kind} --beta {beta}"
    flags += " --clip 0.1 --recompute --rollout-batch 5"
    seen = first_step(em_rl, flags, temperature, noise, stop=(279, FOUR))
    assert any(response[-1] == FOUR for response in seen.responses)
    tokenizer = load_model(TINY_BASE, "cpu")[1]
    name, _, coef = name.partition(" --entropy-coef ")
    model = load_model(TINY_BASE, "cpu")[0].double()
    old, r, clipped = [], torch.zeros(12), []
    for i, (H, L) in enumerate(seen.start):
        old.append(L + seen.noise[i, : len(L)])
        prompt, response = seen.prompts[i], seen.responses[i]
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        certainty = -(logits / temperature).log_softmax(-1).mean(-1) - math.log(logits.shape[-1])
        text, problem = tokenizer.decode(response), PROBLEMS[tokenizer.decode(prompt).strip()]
        mask = torch.ones(1, len(L))
        rows = H.detach()[None], old[i].detach()[None], certainty.detach()[None]
        r[i] = em_rl.REWARDS[name](rollout_of(*rows, mask, [text], [problem], N=1))
        r[i] *= len(L) if norm == "sum" else 1
    A = advantage(kind, r.view(4, 3)).flatten()

    def surrogate(i, H, L):
        ratio = (L - old[i]).exp()
        bounded = ratio.clamp(max=1.1) if A[i] > 0 else ratio.clamp(min=0.9)
        clipped.append((bounded != ratio).any().item())
        weight = -1 / (len(L) if norm == "mean" else 1) if coef == "exact" else float(coef or 0)
        return A[i] * bounded + weight * H

    check_gradients(seen, surrogate, beta, temperature)
    assert any(clipped[6:]) and any(clipped[:6]) == (noise > 0)


@cases("beta, temperature", [(0, 1), (0.5, 0.7)])
def test_em_ft_gradient_is_autograd_through_whole_logits(first_step, beta, temperature):
    seen = first_step(em_ft, f"--beta {beta}", temperature, stop=(279, FOUR))
    check_gradients(seen, lambda i, H, L: -H, beta, temperature)


def test_a_sampled_eos_counts_once_and_truncated_ones_have_none(first_step, tmp_path):
    responses = first_step(em_rl, "--max-new-tokens 20").responses
    row = read_rows(tmp_path / "run/metrics.csv")[-1]
    assert row["length"] == pytest.approx(sum(map(len, responses)) / 12)
    ended = [response[-1] == 279 for response in responses]
    assert 0 < sum(ended) < 12
    assert row["truncated"] == pytest.approx(1 - sum(ended) / 12)
    for response, end in zip(responses, ended):
        assert response.count(279) == end
        assert end or len(response) == 20


def test_sft_gradient_is_that_of_transformers_loss(first_step, tmp_path):
    """A solution that is too long is cut, and has no EOS then."""
    some = list(PROBLEMS.values())[:12]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, some)), encoding="utf-8")
    flags = "--loss sft --updates 1 --rollouts 1 --prompts 12 --data"
    seen = first_step(em_ft, f"{flags} {tmp_path}/some.jsonl")
    model, tokenizer = load_model(TINY_BASE, "cpu")
    total, num_tokens = 0.0, 0
    for problem in some:
        prompt = tokenizer(problem["prompt"] + "\n")["input_ids"]
        solution = (tokenizer(problem["solution"])["input_ids"] + [279])[:28]
        labels = torch.tensor([[-100] * len(prompt) + solution])
        loss = model(torch.tensor([prompt + solution]), labels=labels).loss
        total += loss * len(solution)
        num_tokens += len(solution)
    wanted = gradient(total / num_tokens, list(model.parameters()))
    assert relative(seen.gradients[0], wanted) < 1e-4
