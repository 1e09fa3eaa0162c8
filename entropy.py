"""
Entropy of a language model's next-token distribution: pure tensor functions. No model, no input, no output.

Natural logarithms throughout, so every entropy and log-probability is in nats. Shapes: B rows or responses, T tokens,
N = B x T token positions, D width of the hidden states, V vocabulary.

With z the logits, p = softmax(z) and H = -sum_j p_j log p_j, everything here rests on two gradients:

    dH / dz_i          = -p_i (log p_i + H)
    d log p_t / dz_i   = [i = t] - p_i
"""
import functools
import math

import torch
import torch.nn.functional as F


def token_entropy(logits):
    """Entropy of softmax(logits) in nats: (..., V) -> (...).

    Differentiable. Computed in float32 (float64 stays float64). A logit of -inf is a masked token: it contributes nothing to
    the entropy, and its gradient is zero. (`-(p * (p + eps).log())`, often seen, is not the entropy: at V = 150 K an eps of
    1e-9 alone shifts it.)
    """
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)  # z - logsumexp(z)
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0.0)).sum(-1)


def k3(logprobs, ref_logprobs):
    """Estimate of KL(policy || reference) in nats from log-probs of tokens that the policy has sampled: (...), (...) -> (...).

    exp(d) - d - 1 with d = log ref - log policy: unbiased, and never negative. The released trainer's "low variance" KL.
    """
    d = ref_logprobs - logprobs
    return d.exp() - d - 1


def entropy_and_logprob(hidden, weight, targets, bias=None, scale=1.0, softcap=None, temperature=1.0, block=None):
    """Entropy and log-probability straight from the last hidden states: (N, D), (V, D), (N,) -> (N,), (N,), in nats.

    The same as

        logits = scale * (hidden @ weight.T + bias)
        logits = softcap * tanh(logits / softcap)      # Gemma's soft-capping; None leaves it out
        logprobs = (logits / temperature).log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1), logprobs.gather(-1, targets[:, None])[:, 0]

    and differentiable in both results with respect to hidden, weight and bias, but the (N, V) logits never exist: forward and
    backward work through blocks of `block` logits (by default 2^20 on a CPU, which fit its cache, and 2^26 on a GPU), and the
    backward makes each block once more. So there are 4 matrix products instead of 3, in the memory of a block and the gradients.
    Chunking under autograd would save nothing: autograd keeps every chunk until the backward.

    Entropies, log-probs and the sums of gradients over blocks are float32 (float64 for float64 input); the matrix products run in
    the input's dtype, or in autocast's where that is on. Logits must be finite.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    elif hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: give both one dtype, or turn autocast on")
    block = block or (2**20 if device == "cpu" else 2**26)
    return _EntropyAndLogprob.apply(hidden, weight, bias, targets, scale, softcap, temperature, block)


class _EntropyAndLogprob(torch.autograd.Function):
    @staticmethod
    def blocks(N, V, block):
        """Slices (rows, columns) that tile N x V with at most `block` elements each, all columns of some rows before the next rows.
        Tall blocks, because each of them reads its columns of the weight and adds to their gradient."""
        height = min(N, 2 * math.isqrt(block))
        width = max(1, block // max(1, height))
        for i in range(0, N, height or 1):
            for j in range(0, V, width):
                yield slice(i, min(i + height, N)), slice(j, min(j + width, V))

    @staticmethod
    def logits(hidden, weight, bias, scale, softcap, temperature):
        """One block of logits in float32, divided by the temperature."""
        z = F.linear(hidden, weight, bias)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if softcap is not None:
            return z.mul_(scale / softcap).tanh_().mul_(softcap / temperature)
        return z if scale == temperature else z.mul_(scale / temperature)

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, softcap, temperature, block):
        ctx.head, ctx.block, (N, V) = (scale, softcap, temperature), block, (len(hidden), len(weight))
        # per row, over the columns so far: the largest logit m, s = sum exp(z - m), t = sum exp(z - m) (z - m), the target's logit
        m, s, t, target = hidden.new_zeros(4, N, 1, dtype=torch.promote_types(hidden.dtype, torch.float32))
        m.fill_(-torch.inf)
        for i, j in _EntropyAndLogprob.blocks(N, V, block):
            z = _EntropyAndLogprob.logits(hidden[i], weight[j], None if bias is None else bias[j], *ctx.head)
            column = targets[i, None] - j.start
            inside = (column >= 0) & (column < z.shape[1])
            target[i] = torch.where(inside, z.gather(-1, column.clamp(0, z.shape[1] - 1)), target[i])
            new = torch.maximum(m[i], z.amax(-1, keepdim=True))
            shift = (m[i] - new).clamp_(min=-1e4)  # not -inf at the first block, where s and t are 0
            p = z.sub_(new).exp()
            t[i] = shift.exp() * (t[i] + shift * s[i]) + torch.linalg.vecdot(p, z)[:, None]
            s[i] = shift.exp() * s[i] + p.sum(-1, keepdim=True)
            m[i] = new
        entropy, lse = s.log() - t / s, m + s.log()  # (N, 1)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, lse)
        return entropy[:, 0], (target - lse)[:, 0]

    @staticmethod
    def backward(ctx, grad_entropy, grad_logprob):
        hidden, weight, bias, targets, entropy, lse = ctx.saved_tensors
        scale, softcap, temperature = ctx.head
        zeros = lambda x, needed: torch.zeros_like(x, dtype=entropy.dtype) if needed else None
        grad_hidden, grad_weight, grad_bias = map(zeros, (hidden, weight, bias), ctx.needs_input_grad)
        a, b = grad_entropy[:, None], grad_logprob[:, None]
        offset = a * (lse - entropy) - b
        for i, j in _EntropyAndLogprob.blocks(len(hidden), len(weight), ctx.block):
            z = _EntropyAndLogprob.logits(hidden[i], weight[j], None if bias is None else bias[j], *ctx.head)
            slope = None if softcap is None else 1 - (z * (temperature / softcap)).square_()  # derivative of the soft cap
            # dL/dz = -a p (log p + H) - b p, and b more at the target, with log p = z - lse
            p = (z - lse[i]).exp_()
            grad = z.mul_(-a[i]).add_(offset[i]).mul_(p)
            column = targets[i, None] - j.start
            inside = (column >= 0) & (column < z.shape[1])
            grad.scatter_add_(-1, column.clamp(0, z.shape[1] - 1), b[i] * inside)
            if slope is not None:
                grad.mul_(slope)
            if scale != temperature:
                grad.mul_(scale / temperature)
            if grad_bias is not None:
                grad_bias[j] += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[i] += grad @ weight[j]
            if grad_weight is not None:
                grad_weight[j] += grad.T @ hidden[i]
        cast = lambda grad, like: None if grad is None else grad.to(like.dtype)
        return *map(cast, (grad_hidden, grad_weight, grad_bias), (hidden, weight, bias)), None, None, None, None, None


# ------------------------------------------------------------------------------------------------------------ EM-INF, for decoding


def in_cache(function):
    """On a CPU, call a row-wise function of (B, V) logits for some 2^18 logits at a time, which stay in its cache: 0.6 of the time."""
    @functools.wraps(function)
    def wrapper(logits, *args, **settings):
        rows = max(1, 2**18 // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
        if len(logits) <= rows:
            return function(logits, *args, **settings)
        return torch.cat([function(part, *args, **settings) for part in logits.split(rows)])
    return wrapper


def softmax_and_entropy(z):
    """(B, V) finite logits, none far above 0 -> softmax (B, V), its entropy in nats (B, 1) and the logs of its normaliser (B, 1)."""
    p = z.exp()
    total = p.sum(-1, keepdim=True)
    p.div_(total)
    return p, total.log() - torch.linalg.vecdot(p, z)[:, None], total.log()


@in_cache
@torch.no_grad()
def minimize_entropy(logits, delta=0.3, lr=0.1, steps=3, kl_weight=0.05, optimizer="adam"):
    """EM-INF: take each row's logits a few steps downhill in their own entropy (paper, section 4): (B, V) -> (B, V).

        loss = H(softmax(z)) + kl_weight KL(softmax(logits) || softmax(z)),    z = logits at the start

    A row stops as soon as its entropy is under delta (nats), and one that starts under it comes back as it was. `optimizer` is "adam",
    as in the released code (betas 0.9 and 0.999, eps 1e-8), or "sgd", plain gradient descent, as in the paper's Proposition 1. Under
    "sgd" the most likely token keeps its place, and less likely ones below e^-(H + 1) can change theirs. Adam divides each gradient by its
    own size: a token more likely than e^-H rises by some lr a step, every other one falls by it. So at the released settings nothing
    changes places (in 20,000 random rows of 10 tokens); at lr 1 near ties do, the first place included.

    A logit of -inf (a masked token) stays -inf; a row with nan becomes nan. Computed in float32 (float64 stays float64), which is also what
    comes back. No Python branch looks at a value: torch.compile and CUDA graphs take it as it is. Raises ValueError for settings out of range.

    Closed-form gradients and Adam, in 13 passes over the logits a step. Holding the unlikely tokens still is faster under some 1.5 nats and
    slower above (bench/em_inf.py); it is left out, since it needs to look at values.
    """
    if not (delta >= 0 and steps >= 0 and lr >= 0 and kl_weight >= 0 and optimizer in ("adam", "sgd")):
        raise ValueError(f"minimize_entropy: delta {delta}, lr {lr}, steps {steps} and kl_weight {kl_weight} must not be negative, "
                         f"and optimizer {optimizer!r} must be adam or sgd")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if steps == 0:
        return logits.clone()
    top = logits.amax(-1, keepdim=True)
    z = (logits - top).clamp_(min=-1e4)  # finite, so that a masked token's p log p is 0
    start, entropy, norm = softmax_and_entropy(z)
    hold = torch.zeros_like(top).masked_fill_(entropy < delta, torch.inf)  # (B, 1): a stopped row's steps are divided by infinity
    untouched = (hold > 0) | (logits == -torch.inf)
    p, m, v = start, torch.zeros_like(z), torch.zeros_like(z)
    for t in range(1, steps + 1):
        # -dloss/dz = p (log p + H) - kl_weight (p - start), with log p = z - norm
        grad = (z + (entropy - norm - kl_weight)).mul_(p).add_(start, alpha=kl_weight)
        if optimizer == "adam":
            m.lerp_(grad, 0.1)
            v.mul_(0.999).addcmul_(grad, grad, value=0.001)
            bias = math.sqrt(1 - 0.999**t)
            z.addcdiv_(m, v.sqrt().add_(1e-8 * bias + hold), value=lr * bias / (1 - 0.9**t))
        else:
            z.addcdiv_(grad, 1 + hold, value=lr)
        if t < steps:
            p, entropy, norm = softmax_and_entropy(z)
            hold.masked_fill_(entropy < delta, torch.inf)
    return torch.where(untouched, logits, z.add_(top))


@in_cache
@torch.no_grad()
def adaptive_temperature(logits, alpha=0.5, delta=0.3, tau_min=0.01, tau_max=1.0, iterations=20):
    """Divide each row by the largest temperature tau in [tau_min, tau_max] at which its entropy is at most max(alpha H, delta), with H its
    entropy as it is, in nats (paper, Algorithm 1): (B, V) -> (B, V).

    A row with H <= delta comes back as it was. Where no tau does it (a tie for the first place), tau is tau_min. Entropy rises with tau,
    so each of the `iterations` halves the interval, for all rows at once: 20 of them find tau within 1e-6. Precision, -inf and nan as in
    `minimize_entropy`. Raises ValueError for settings out of range.
    """
    if not (0 < alpha < 1 and delta >= 0 and 0 < tau_min < tau_max and iterations >= 0):
        raise ValueError(f"adaptive_temperature: alpha {alpha} must be inside (0, 1), delta {delta} and iterations {iterations} not negative, "
                         f"and tau_min {tau_min} above 0 and below tau_max {tau_max}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = (logits - logits.amax(-1, keepdim=True)).clamp_(min=-1e4)
    entropy = softmax_and_entropy(z)[1]  # (B, 1)
    target = (alpha * entropy).clamp(min=delta)
    low, high = torch.full_like(entropy, tau_min), torch.full_like(entropy, tau_max)
    for _ in range(iterations):
        middle = (low + high) / 2
        met = softmax_and_entropy(z / middle)[1] <= target
        low, high = torch.where(met, middle, low), torch.where(met, high, middle)
    return torch.where(entropy <= delta, logits, logits / low)
