"""
Entropy of a language model's next-token distribution: of logits, of hidden states, and of
a model's responses.

Logarithms are natural throughout, so every entropy and log-probability is in nats.
Shapes: b responses, T tokens of the longest, M tokens of all of them, L tokens with the prompts,
D width of the hidden states, V vocabulary.

With z the logits, p = softmax(z) and H = -sum_j p_j log p_j, all here rests on two gradients:

    dH / dz_i          = -p_i (log p_i + H)
    d log p_y / dz_i   = [i = y] - p_i    for a token y of the vocabulary
"""
import functools
import inspect
import math
import warnings
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils._triton import has_triton
from tqdm import tqdm


def at_least_float32(x):
    """The tensor in float32, or as it is where it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@functools.cache
def can_compile(device, V):
    """Does torch.compile work here, and is a vocabulary V worth its seconds? It needs a GPU,
    Triton and a C compiler, so it is tried."""
    try:
        wanted = device.type == "cuda" and V >= 4096 and has_triton()
        return wanted and torch.compile(torch.exp)(torch.zeros(1, device=device)).item() == 1
    except Exception as error:
        warnings.warn(f"torch.compile fails, so entropies take longer: {error}", stacklevel=2)
        return False


def compiled(function):
    """The function of x (..., V), whose elementwise passes are one where it can be compiled."""
    compile_once = functools.cache(torch.compile)

    @functools.wraps(function)
    def wrapper(x, *others):
        can = len(x) and can_compile(x.device, x.shape[-1])
        return (compile_once(function) if can else function)(x, *others)

    return wrapper


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
    return d.expm1() - d  # for a small d, exp(d) - d - 1 would round to -6e-8


# -------------------------------------------------------- entropy without the logits


def entropy_and_logprob(
    hidden, weight, targets, bias=None, scale=1.0, softcap=None, temperature=1.0, block=None
):
    """Entropy and log-prob of targets, straight from the last hidden states.

    Takes the hidden states (M, D) of M tokens, weight (V, D), targets (M,) and perhaps a bias
    (V,), and gives entropy (M,) and log-prob (M,), in nats. The result is the same as

        logits = scale * (hidden @ weight.T + bias)
        logits = softcap * tanh(logits / softcap)    # Gemma; None leaves it out
        logprobs = (logits / temperature).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        logprob = logprobs.gather(-1, targets[:, None])[:, 0]

    and both are differentiable in hidden, weight and bias, but the (M, V) logits never
    exist. Forward and backward work through blocks of `block` logits: by default 2^20 on a
    CPU, which fit its cache, and 2^26 on a GPU. The backward makes each block once more, so
    there are 4 matrix products instead of 3, in the memory of one block and the gradients.
    Chunking under autograd would save nothing: it keeps every chunk until the backward.

    Entropies, log-probs and the gradients' sums over blocks are float32 (float64 for float64
    input). The matrix products run in the input's dtype, or in autocast's where that is on.
    Logits must be finite. Raises ValueError where dtypes differ or a target is not a row of
    the weight, and RuntimeError for a second derivative.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    elif hidden.dtype != weight.dtype:
        told = f"hidden is {hidden.dtype} and weight {weight.dtype}"
        raise ValueError(f"{told}: give both one dtype, or turn autocast on")
    if len(targets) and not 0 <= targets.min() <= targets.max() < len(weight):
        told = f"targets go from {targets.min()} to {targets.max()}"
        raise ValueError(f"{told}: they must be in 0 .. {len(weight) - 1}")
    block = block or (2**20 if device == "cpu" else 2**26)
    head = scale, softcap, temperature
    return _EntropyAndLogprob.apply(hidden, weight, bias, targets, head, block)


def logits_in_blocks(hidden, weight, bias, targets, size):
    """hidden @ weight.T + bias in blocks of at most `size` logits. Yields the slices of rows
    and columns, the block (t, v), the target's column in it and whether it is in it (t, 1).

    All columns of some rows come before the next rows. Blocks are tall, because each reads its
    columns of the weight and adds to their gradient, and a power of two wide, because products
    of odd widths are slow on a GPU.
    """
    height = max(1, min(len(hidden), 2 * math.isqrt(size)))
    width = 2 ** (max(1, size // height).bit_length() - 1)
    memory = hidden.new_empty(height * width)  # one for all: new memory takes time
    for top in range(0, len(hidden), height):
        for left in range(0, len(weight), width):
            rows, columns = slice(top, top + height), slice(left, left + width)
            column = targets[rows, None] - left
            inside = (column >= 0) & (column < width)
            column = column.clamp(0, min(width, len(weight) - left) - 1)
            x, w = hidden[rows], weight[columns]
            block = memory[: len(x) * len(w)].view(len(x), len(w))
            torch.mm(x, w.T, out=block)
            if bias is not None:
                block += bias[columns]
            yield rows, columns, block, column, inside


def finish_logits(block, scale, softcap, temperature):
    """From the matrix product to the logits of the softmax, in place where it is float32."""
    z = at_least_float32(block)
    if softcap is not None:
        return z.mul_(scale / softcap).tanh_().mul_(softcap / temperature)
    return z if scale == temperature else z.mul_(scale / temperature)


@compiled
def add_block(block, column, inside, sums, *head):
    """One more block (t, v) of t rows' logits z. The sums (4, t, 1) over all so far are

        m = max z,    s = sum exp(z - m),    u = sum exp(z - m) (z - m),    target = z_target.

    When the maximum moves by d = m - m' <= 0, exp(z - m') is e^d exp(z - m) and z - m' is
    (z - m) + d. So s becomes e^d s, and u becomes e^d (u + d s).
    """
    m, s, u, target = sums
    z = finish_logits(block, *head)
    target = torch.where(inside, z.gather(-1, column), target)
    new_m = torch.maximum(m, z.amax(-1, keepdim=True))
    d = (m - new_m).clamp(min=-1e4)  # -inf at first, where s = u = 0
    z -= new_m  # in place, as a block more costs time: from here on z means z - m'
    e = z.exp()
    u = d.exp() * (u + d * s) + torch.linalg.vecdot(e, z)[:, None]
    s = d.exp() * s + e.sum(-1, keepdim=True)
    return torch.stack([new_m, s, u, target])


@compiled
def gradient_of_block(block, column, inside, lse, entropy, a, b, scale, softcap, temperature):
    """dL / dblock (t, v), in the block's dtype. With a = dL/dH and b = dL/dlogprob of its rows
    (t, 1), dL/dz is -a p (log p + H) - b p, and b more at the target; log p = z - lse."""
    z = finish_logits(block, scale, softcap, temperature)
    slope = 1 if softcap is None else 1 - (z * (temperature / softcap)).square_()  # of tanh
    p = (z - lse).exp_()
    grad = z.mul_(-a).add_(a * (lse - entropy) - b).mul_(p)  # in the memory of z
    if torch.compiler.is_compiling():  # there a scatter would be a pass of its own
        grad += b * (inside & (column == torch.arange(z.shape[1], device=z.device)))
    else:
        grad.scatter_add_(-1, column, b * inside)
    if softcap is not None or scale != temperature:
        grad.mul_(slope * (scale / temperature))
    return grad.to(block.dtype)


class _EntropyAndLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, head, size):
        ctx.head, ctx.size = head, size
        sums = at_least_float32(hidden.new_zeros(4, len(hidden), 1))
        sums[0] = -torch.inf
        for rows, _, *some in logits_in_blocks(hidden, weight, bias, targets, size):
            sums[:, rows] = add_block(*some, sums[:, rows], *head)
        m, s, u, target = sums
        entropy = s.log() - u / s  # the mean of -log p = log s - (z - m) under p
        lse = m + s.log()
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, lse)
        return entropy[:, 0], (target - lse)[:, 0]

    @staticmethod
    def backward(ctx, grad_entropy, grad_logprob):
        if torch.is_grad_enabled():  # with create_graph=True
            raise RuntimeError("entropy_and_logprob has no second derivative")
        hidden, weight, bias, targets, entropy, lse = ctx.saved_tensors
        a, b = grad_entropy[:, None], grad_logprob[:, None]
        dtype = entropy.dtype  # sums over blocks are float32, whatever the weights are
        inputs = zip((hidden, weight, bias), ctx.needs_input_grad)
        grads = [torch.zeros_like(x, dtype=dtype) if needed else None for x, needed in inputs]
        grad_hidden, grad_weight, grad_bias = grads
        for rows, columns, *some in logits_in_blocks(hidden, weight, bias, targets, ctx.size):
            grad = gradient_of_block(*some, lse[rows], entropy[rows], a[rows], b[rows], *ctx.head)
            if grad_bias is not None:
                grad_bias[columns] += grad.sum(0, dtype=dtype)
            if grad_hidden is not None:
                grad_hidden[rows] += grad @ weight[columns]
            if grad_weight is not None:
                grad_weight[columns] += grad.T @ hidden[rows]
        return *grads, None, None, None  # autograd casts them to the dtypes of the inputs


# ------------------------------------------------------------ of a model's responses


def output_head(model, prompt):
    """How this model turns hidden states into logits: weight, bias, scale and softcap, which
    are keyword arguments of `entropy_and_logprob`.

    Checked once against the model's own logits on `prompt` (token ids). Raises ValueError where
    the two disagree. A logit scale hides under several names, and some models multiply by it
    where others divide, so it is found by trying.
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
        logits = model(input_ids=ids).logits[0, :-1]  # (L - 1, V)
        hidden = model.base_model(input_ids=ids).last_hidden_state[0, :-1]  # (L - 1, D)
        if hidden.shape[-1] != head.weight.shape[-1]:
            raise ValueError(f"{name}: more than an output head on top of its base model")
        entropy = token_entropy(logits)
        logprob = logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]

        def gap(scale):  # nats
            got = entropy_and_logprob(hidden, head.weight, targets, head.bias, scale, softcap)
            return max((got[0] - entropy).abs().max(), (got[1] - logprob).abs().max()).item()

        error, scale = min((gap(scale), scale) for scale in scales)
    tolerance = 1e-3 if hidden.dtype == torch.float32 else 0.2
    if not error <= tolerance:
        raise ValueError(
            f"{name}: its output head is more than weight, bias, scale and soft cap: log-probs are "
            f"off by {error:.3g} nats, where {tolerance} are allowed; see entropy.output_head"
        )
    return dict(weight=head.weight, bias=head.bias, scale=scale, softcap=softcap)


def batches(lengths, budget, indices=None, count=None):
    """Lists of indices (all, or those given), the longest sequences first, so that rows of a
    batch are of similar length. In a batch rows x longest is at most `budget` tokens, though
    a lone long sequence is let through; with `count` it has at most so many rows."""
    indices = range(len(lengths)) if indices is None else indices
    groups, longest = [], 0
    for i in sorted(indices, key=lambda i: -lengths[i]):
        full = groups and (len(groups[-1]) + 1) * longest > budget
        if not groups or full or len(groups[-1]) == count:
            groups.append([])
            longest = lengths[i]
        groups[-1].append(i)
    return groups


class Scores(NamedTuple):
    """What a model says of the tokens of b responses, of which the longest has T: (b, T) each.
    A row has its own tokens first, and zeros behind them."""

    entropy: torch.Tensor  # of the distribution of the token, nats
    logprobs: torch.Tensor  # of the token, nats
    mask: torch.Tensor  # True where there is a token


def score(model, head, prompts, responses, temperature=1.0, some=None):
    """Entropy and log-prob of every token of b responses to b prompts (lists of token ids), or
    of `some` of them, a list of indices: -> Scores, differentiable. `head` comes from
    `output_head`. Padding is on the right, where causal attention does not see it, so no
    attention mask is needed."""
    if some is not None:
        prompts, responses = [prompts[i] for i in some], [responses[i] for i in some]
    ids = [torch.tensor(p + r) for p, r in zip(prompts, responses)]
    ids = pad_sequence(ids, batch_first=True).to(model.device)  # (b, L)
    start = torch.tensor([len(p) for p in prompts], device=model.device)[:, None]
    length = torch.tensor([len(r) for r in responses], device=model.device)[:, None]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (b, L, D)
    place = torch.arange(1, ids.shape[1], device=model.device)  # of each token but the first
    is_response = (place >= start) & (place < start + length)  # (b, L - 1)
    states = hidden[:, :-1][is_response]  # (M, D): what predicts each response token
    targets = ids[:, 1:][is_response]
    entropy, logprobs = entropy_and_logprob(
        states, targets=targets, temperature=temperature, **head
    )
    mask = torch.arange(length.max(), device=model.device) < length  # (b, T)
    zeros = torch.zeros_like(mask, dtype=torch.float32)
    entropy = zeros.masked_scatter(mask, entropy.float())
    logprobs = zeros.masked_scatter(mask, logprobs.float())
    return Scores(entropy, logprobs, mask)


@torch.no_grad()
def score_all(model, head, prompts, responses, temperature=1.0, budget=2**15):
    """`score` without a graph, in micro-batches of at most 2 x `budget` tokens: nothing is kept
    for a backward, so twice as many fit."""
    zeros = torch.zeros(len(responses), max(map(len, responses)), device=model.device)
    whole = Scores(zeros, zeros.clone(), zeros.bool())
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses)]
    for micro in tqdm(batches(lengths, 2 * budget), desc="score", leave=False, delay=5):
        scores = score(model, head, prompts, responses, temperature, micro)
        for all_rows, rows in zip(whole, scores):
            all_rows[micro, : rows.shape[1]] = rows
    return whole
