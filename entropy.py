"""
Entropy of a language model's next-token distribution: of logits, of hidden states, and of
a model's responses.

Logarithms are natural throughout, so every entropy and log-probability is in nats.
Shapes: B responses, T tokens, D width of the hidden states, V vocabulary.

With z the logits, p = softmax(z) and H = -sum_j p_j log p_j, everything here rests
on two gradients:

    dH / dz_i          = -p_i (log p_i + H)
    d log p_y / dz_i   = [i = y] - p_i    for a token y of the vocabulary
"""
import inspect
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm


def at_least_float32(x):
    """The tensor in float32, or as it is where it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_entropy(logits):
    """Entropy of softmax(logits) in nats: (..., V) -> (...).

    Differentiable, and computed in float32 (float64 stays float64). A logit of -inf
    is a masked token: it adds nothing to the entropy, and its gradient is zero.

    The often seen `-(p * (p + eps).log())` is not the entropy: with a vocabulary of
    150,000 an eps of 1e-9 alone shifts it.
    """
    logprobs = at_least_float32(logits).log_softmax(-1)  # z - logsumexp(z)
    finite = logprobs.masked_fill(logprobs == -torch.inf, 0.0)
    return -(logprobs.exp() * finite).sum(-1)


def k3(logprobs, ref_logprobs):
    """Estimate KL(policy || reference) from log-probs of sampled tokens.

    (...), (...) -> (...), nats: exp(d) - d - 1 with d = log ref - log policy. It is never
    negative. Where the policy has sampled the tokens, its expected value is KL(policy ||
    reference), and its expected gradient is that of the other direction, KL(reference ||
    policy). The released trainer calls it low_var_kl.
    """
    d = ref_logprobs - logprobs
    return d.expm1() - d  # exp(d) - d - 1 rounds to -6e-8 where d is small


# -------------------------------------------------------- entropy without the logits


def entropy_and_logprob(
    hidden,
    weight,
    targets,
    bias=None,
    scale=1.0,
    softcap=None,
    temperature=1.0,
    block=None,
):
    """Entropy and log-prob of targets, straight from the last hidden states.

    Takes the hidden states (T, D) of T tokens, weight (V, D), targets (T,) and perhaps a bias
    (V,), and gives entropy (T,) and log-prob (T,), in nats. The result is the same as

        logits = scale * (hidden @ weight.T + bias)
        logits = softcap * tanh(logits / softcap)    # Gemma; None leaves it out
        logprobs = (logits / temperature).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        logprob = logprobs.gather(-1, targets[:, None])[:, 0]

    and both are differentiable in hidden, weight and bias, but the (T, V) logits never
    exist. Forward and backward work through blocks of `block` logits: by default 2^20
    on a CPU, which fit its cache, and 2^26 on a GPU. The backward makes each block once
    more, so there are 4 matrix products instead of 3, in the memory of one block and
    the gradients. Chunking under autograd would save nothing, because autograd keeps
    every chunk until the backward.

    Entropies, log-probs and the gradients' sums over blocks are float32 (float64 for
    float64 input). The matrix products run in the input's dtype, or in autocast's where
    that is on. Logits must be finite. Raises ValueError where dtypes differ or a
    target is not a row of the weight, and RuntimeError for a second derivative.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    elif hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}: "
            "give both one dtype, or turn autocast on"
        )
    V = len(weight)
    if len(targets) and not 0 <= targets.min() <= targets.max() < V:
        low, high = targets.min().item(), targets.max().item()
        raise ValueError(f"targets go from {low} to {high}: they must be in 0 .. {V - 1}")
    block = block or (2**20 if device == "cpu" else 2**26)
    return _EntropyAndLogprob.apply(
        hidden, weight, bias, targets, scale, softcap, temperature, block
    )


def blocks_of(T, V, block):
    """Slices (rows, columns) that tile T x V with at most `block` elements each.

    All columns of some rows come before the next rows. Blocks are tall, because each
    of them reads its columns of the weight and adds to their gradient.
    """
    height = max(1, min(T, 2 * math.isqrt(block)))
    width = max(1, block // height)
    for top in range(0, T, height):
        for left in range(0, V, width):
            yield slice(top, min(top + height, T)), slice(left, min(left + width, V))


def block_of_logits(hidden, weight, bias, scale, softcap, temperature):
    """(t, D), (v, D), (v,) -> (t, v): one block, divided by the temperature."""
    z = at_least_float32(F.linear(hidden, weight, bias))
    if softcap is not None:
        return z.mul_(scale / softcap).tanh_().mul_(softcap / temperature)
    return z if scale == temperature else z.mul_(scale / temperature)


def find_targets(targets, columns):
    """Where the targets stand in a block: their column, clamped into it, and whether
    they are in it at all: (t,) -> (t, 1), (t, 1)."""
    column = targets[:, None] - columns.start
    width = columns.stop - columns.start
    inside = (column >= 0) & (column < width)
    return column.clamp(0, width - 1), inside


class _EntropyAndLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, softcap, temperature, block):
        ctx.head = scale, softcap, temperature
        ctx.block = block
        T, V = len(hidden), len(weight)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        # The softmax of a row, one block of its logits z after the other. Over the blocks so far,
        #     m = max z,    s = sum exp(z - m),    u = sum exp(z - m) (z - m).
        # When the maximum moves by d = m - m' <= 0, exp(z - m') is e^d exp(z - m) and z - m' is
        # (z - m) + d. So s becomes e^d s, and u becomes e^d (u + d s). At the end
        # log p = z - m - log s, whose mean under p gives H = log s - u / s.
        m, s, u, target = hidden.new_zeros(4, T, 1, dtype=dtype)
        m.fill_(-torch.inf)
        for rows, columns in blocks_of(T, V, block):
            some_bias = None if bias is None else bias[columns]
            z = block_of_logits(hidden[rows], weight[columns], some_bias, *ctx.head)  # (t, v)
            column, inside = find_targets(targets[rows], columns)
            target[rows] = torch.where(inside, z.gather(-1, column), target[rows])
            new_m = torch.maximum(m[rows], z.amax(-1, keepdim=True))
            d = (m[rows] - new_m).clamp_(min=-1e4)  # -inf at first, where s = u = 0
            e = z.sub_(new_m).exp()
            u[rows] = d.exp() * (u[rows] + d * s[rows]) + torch.linalg.vecdot(e, z)[:, None]
            s[rows] = d.exp() * s[rows] + e.sum(-1, keepdim=True)
            m[rows] = new_m
        entropy = s.log() - u / s  # (T, 1)
        lse = m + s.log()  # (T, 1), logsumexp of the row
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, lse)
        return entropy[:, 0], (target - lse)[:, 0]

    @staticmethod
    def backward(ctx, grad_entropy, grad_logprob):
        if torch.is_grad_enabled():  # with create_graph=True
            raise RuntimeError("entropy_and_logprob has no second derivative")
        hidden, weight, bias, targets, entropy, lse = ctx.saved_tensors
        scale, softcap, temperature = ctx.head
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = entropy.dtype  # sums over blocks are float32, whatever the weights are
        grad_hidden = torch.zeros_like(hidden, dtype=dtype) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None
        a, b = grad_entropy[:, None], grad_logprob[:, None]
        offset = a * (lse - entropy) - b
        for rows, columns in blocks_of(len(hidden), len(weight), ctx.block):
            some_bias = None if bias is None else bias[columns]
            z = block_of_logits(hidden[rows], weight[columns], some_bias, *ctx.head)  # (t, v)
            if softcap is not None:
                slope = 1 - (z * (temperature / softcap)).square_()  # of tanh
            # dL/dz = -a p (log p + H) - b p, and b more at the target; log p = z - lse
            p = (z - lse[rows]).exp_()
            grad = z.mul_(-a[rows]).add_(offset[rows]).mul_(p)
            column, inside = find_targets(targets[rows], columns)
            grad.scatter_add_(-1, column, b[rows] * inside)
            if softcap is not None:
                grad.mul_(slope)
            if scale != temperature:
                grad.mul_(scale / temperature)
            if needs_bias:
                grad_bias[columns] += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if needs_hidden:
                grad_hidden[rows] += grad @ weight[columns]
            if needs_weight:
                grad_weight[columns] += grad.T @ hidden[rows]
        grad_hidden = grad_hidden.to(hidden.dtype) if needs_hidden else None
        grad_weight = grad_weight.to(weight.dtype) if needs_weight else None
        grad_bias = grad_bias.to(bias.dtype) if needs_bias else None
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


# ------------------------------------------------------------ of a model's responses


def output_head(model, prompt):
    """How this model turns hidden states into logits: keyword arguments of
    `entropy_and_logprob`, namely weight, bias, scale and softcap.

    Checked once against the model's own logits on `prompt` (token ids). Raises ValueError
    where the two disagree. A logit scale hides under several names, and some models
    multiply by it where others divide, so it is found by trying.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    name = type(model).__name__
    if head is None or model.base_model is model:
        raise ValueError(f"{name}: no output head on top of a base model")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{name}: its forward takes no position_ids")
    scales = [1.0]
    for key in ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"):
        if value := getattr(config, key, None):
            scales += [float(value), 1 / float(value)]
    softcap = getattr(config, "final_logit_softcapping", None)
    some = prompt[:64] if len(prompt) > 1 else prompt * 2  # a few are enough, one is not
    ids = torch.tensor([some], device=model.device)
    targets = ids[0, 1:]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]  # (T - 1, V)
        hidden = model.base_model(input_ids=ids).last_hidden_state[0, :-1]  # (T - 1, D)
        if hidden.shape[-1] != head.weight.shape[-1]:
            raise ValueError(f"{name}: more than an output head on top of its base model")
        entropy = token_entropy(logits)
        logprob = logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]

        def gap(scale):  # nats
            got = entropy_and_logprob(hidden, head.weight, targets, head.bias, scale, softcap)
            return max((got[0] - entropy).abs().max(), (got[1] - logprob).abs().max()).item()

        scale = min(scales, key=gap)
        error = gap(scale)
    tolerance = 1e-3 if hidden.dtype == torch.float32 else 0.2
    if not error <= tolerance:
        raise ValueError(
            f"{name}: its output head is more than weight, bias, scale "
            f"and soft cap: recomputed log-probs are off by {error:.3g} nats, where "
            f"{tolerance} are allowed; see entropy.output_head"
        )
    return dict(
        weight=head.weight,
        bias=head.bias,
        scale=scale,
        softcap=softcap,
    )


def batches(lengths, budget, indices=None, count=None):
    """Lists of indices (all, or those given), the longest sequences first, so that rows of a
    batch are of similar length. In a batch rows x longest is at most `budget` tokens, though
    a lone long sequence is let through; with `count` it has at most so many rows."""
    indices = range(len(lengths)) if indices is None else indices
    groups = []
    longest = 0
    for i in sorted(indices, key=lambda i: -lengths[i]):
        full = groups and (len(groups[-1]) + 1) * longest > budget
        if not groups or full or len(groups[-1]) == count:
            groups.append([])
            longest = lengths[i]
        groups[-1].append(i)
    return groups


class Scores(NamedTuple):
    """What a model says of the tokens of B responses, of which the longest has T: (B, T) each.
    A row has its own tokens first, and zeros behind them."""

    entropy: torch.Tensor  # of the distribution of the token, nats
    logprobs: torch.Tensor  # of the token, nats
    mask: torch.Tensor  # True where there is a token


def score(model, head, prompts, responses, temperature=1.0, some=None):
    """Entropy and log-prob of every token of B responses to B prompts (lists of token ids), or
    of `some` of them, a list of indices: -> Scores, differentiable.

    `head` comes from `output_head`. Padding is on the right. Causal attention does not see it,
    so no attention mask is needed.
    """
    if some is not None:
        prompts, responses = [prompts[i] for i in some], [responses[i] for i in some]
    ids = [torch.tensor(p + r) for p, r in zip(prompts, responses)]
    ids = pad_sequence(ids, batch_first=True).to(model.device)  # (B, L)
    start = torch.tensor([len(p) for p in prompts], device=model.device)[:, None]
    length = torch.tensor([len(r) for r in responses], device=model.device)[:, None]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, L, D)
    place = torch.arange(1, ids.shape[1], device=model.device)  # of each token but the first
    is_response = (place >= start) & (place < start + length)  # (B, L - 1)
    states = hidden[:, :-1][is_response]  # (tokens, D): what predicts each response token
    targets = ids[:, 1:][is_response]
    entropy, logprobs = entropy_and_logprob(
        states, targets=targets, temperature=temperature, **head
    )
    mask = torch.arange(length.max(), device=model.device) < length  # (B, T)
    zeros = torch.zeros_like(mask, dtype=torch.float32)
    entropy = zeros.masked_scatter(mask, entropy.float())
    logprobs = zeros.masked_scatter(mask, logprobs.float())
    return Scores(entropy, logprobs, mask)


@torch.no_grad()
def score_all(model, head, prompts, responses, temperature=1.0, budget=2**15):
    """`score` without a graph, in micro-batches of at most 2 x `budget` tokens: nothing is kept
    for a backward, so twice as many fit."""
    T = max(len(response) for response in responses)
    entropy = torch.zeros(len(responses), T, device=model.device)
    logprobs = torch.zeros_like(entropy)
    mask = torch.zeros_like(entropy, dtype=torch.bool)
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses)]
    for micro in tqdm(batches(lengths, 2 * budget), desc="score", leave=False, delay=5):
        scores = score(model, head, prompts, responses, temperature, micro)
        longest = scores.mask.shape[1]
        entropy[micro, :longest] = scores.entropy
        logprobs[micro, :longest] = scores.logprobs
        mask[micro, :longest] = scores.mask
    return Scores(entropy, logprobs, mask)
