"""
Entropy of a language model's next-token distribution: pure tensor functions. No model, no input, no output.

Natural logarithms throughout, so every entropy and log-probability is in nats. Shapes: B rows or responses, T tokens,
N = B x T token positions, D width of the hidden states, V vocabulary.

With z the logits, p = softmax(z) and H = -sum_j p_j log p_j, everything here rests on two gradients:

    dH / dz_i          = -p_i (log p_i + H)
    d log p_t / dz_i   = [i = t] - p_i
"""
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


def entropy_and_logprob(hidden, weight, targets, bias=None, scale=1.0, softcap=None, temperature=1.0, rows=None):
    """Entropy and log-probability straight from the last hidden states: (N, D), (V, D), (N,) -> (N,), (N,), in nats.

    The same as

        logits = scale * (hidden @ weight.T + bias)
        logits = softcap * tanh(logits / softcap)      # Gemma's soft-capping; None leaves it out
        logprobs = (logits / temperature).log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1), logprobs.gather(-1, targets[:, None])[:, 0]

    and differentiable in both results with respect to hidden, weight and bias, but the (N, V) logits never exist: forward
    and backward work through `rows` rows at a time (by default about 128 MB of logits on a GPU, 8 MB on a CPU), and the
    backward computes each block of logits once more. That is one more matrix product (4 instead of 3) for N / rows times
    less memory. Chunking under autograd would save nothing: autograd keeps every chunk until the backward.

    Entropy, log-prob and gradient sums are float32 (float64 for float64 input); the matrix products run in the input's
    dtype, or in autocast's where that is on. Logits must be finite.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    elif hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: give both one dtype, or turn autocast on")
    if rows is None:
        rows = max(1, (2**21 if device == "cpu" else 2**25) // weight.shape[0])
    return _EntropyAndLogprob.apply(hidden, weight, bias, targets, scale, softcap, temperature, rows)


class _EntropyAndLogprob(torch.autograd.Function):
    @staticmethod
    def logits(hidden, weight, bias, scale, softcap, temperature):
        """One block of logits, (rows, V), in float32; divided by the temperature."""
        z = F.linear(hidden, weight, bias)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if softcap is not None:
            return z.mul_(scale / softcap).tanh_().mul_(softcap / temperature)
        return z if scale == temperature else z.mul_(scale / temperature)

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, softcap, temperature, rows):
        ctx.head, ctx.rows = (scale, softcap, temperature), rows
        entropy, logprob, lse = hidden.new_empty(3, len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for i in range(0, len(hidden), rows):
            z = _EntropyAndLogprob.logits(hidden[i : i + rows], weight, bias, *ctx.head)  # (rows, V)
            target_logit = z.gather(-1, targets[i : i + rows, None])[:, 0]
            logp = z.log_softmax(-1)
            logprob[i : i + rows] = logp.gather(-1, targets[i : i + rows, None])[:, 0]
            lse[i : i + rows] = target_logit - logprob[i : i + rows]
            entropy[i : i + rows] = -torch.linalg.vecdot(torch.exp(logp, out=z), logp)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, lse)
        return entropy, logprob

    @staticmethod
    def backward(ctx, grad_entropy, grad_logprob):
        hidden, weight, bias, targets, entropy, lse = ctx.saved_tensors
        scale, softcap, temperature = ctx.head
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=entropy.dtype) if need_weight else None  # summed over blocks in float32
        grad_bias = torch.zeros_like(bias, dtype=entropy.dtype) if need_bias else None
        for i in range(0, len(hidden), ctx.rows):
            s = slice(i, i + ctx.rows)
            h, a, b = hidden[s], grad_entropy[s, None], grad_logprob[s, None]
            z = _EntropyAndLogprob.logits(h, weight, bias, *ctx.head)  # (rows, V)
            slope = None if softcap is None else 1 - (z * (temperature / softcap)).square_()  # derivative of the soft cap
            # -a p (log p + H) - b p, and b more at the target; log p = z - lse
            p = (z - lse[s, None]).exp_()
            grad_z = z.mul_(-a).add_(a * (lse - entropy)[s, None] - b).mul_(p)
            grad_z.scatter_add_(-1, targets[s, None], b)
            if slope is not None:
                grad_z.mul_(slope)
            if scale != temperature:
                grad_z.mul_(scale / temperature)
            if need_bias:
                grad_bias += grad_z.sum(0)
            grad_z = grad_z.to(h.dtype)
            if need_hidden:
                grad_hidden[s] = grad_z @ weight
            if need_weight and grad_weight.dtype == h.dtype:
                grad_weight.addmm_(grad_z.T, h)
            elif need_weight:
                grad_weight += grad_z.T @ h
        cast = lambda grad, like: None if grad is None else grad.to(like.dtype)
        return grad_hidden, cast(grad_weight, weight), cast(grad_bias, bias), None, None, None, None, None
