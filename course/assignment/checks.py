"""
What grade.py asks of each function. `check_NAME` raises Wrong, with what a teacher would say.

The references are independent: torch.distributions, autograd, torch.optim, and means over tokens
that are picked one row at a time.
"""
import math

import torch
from torch.distributions import Categorical

BITS = "This is in bits, the right value divided by log 2. Take the natural logarithm."
PADDING = "Padding is counted. Only tokens where the mask is True belong to a response."
SIGN = "The sign is wrong."
LENGTHS = torch.tensor([5, 1, 3])  # of three responses
MASK = torch.arange(5) < LENGTHS[:, None]


class Wrong(Exception):
    """What is wrong, in words for the student."""


def refuse(mistaken, words):
    if mistaken:
        raise Wrong(words)


def tensor(result):
    refuse(not torch.is_tensor(result), f"It returns a {type(result).__name__}, and no tensor.")
    return result.double()


def numbers(*shape):
    """Random numbers with one decimal, none of them 0."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.sign() * (x.abs() + 0.1).round(decimals=1)


def equal(got, value):
    return got.shape == value.shape and torch.allclose(got, value, rtol=1e-6, atol=1e-15)


def judge(got, want, args, *mistakes):
    """Wrong unless a result is `want`, with its shape and, if it has one, its gradient in the first
    of `args` ({name: argument}). A mistake is a pair: words, and the value to which it leads."""
    changed = want.is_floating_point() and tensor(got).dtype != got.dtype
    refuse(changed, f"It is {got.dtype} for arguments of float64: keep their dtype.")
    got, want = tensor(got), want.double()
    for words, value in mistakes:
        refuse(equal(got, value), words)
    refuse(got.shape != want.shape,
           f"The shape is {tuple(got.shape)}, and should be {tuple(want.shape)}.")
    off = ~torch.isclose(got, want, rtol=1e-6, atol=1e-15)
    if off.any():
        row = off.nonzero()[0, 0] if want.dim() else ...  # the first that is wrong
        shown = [f"{name} {arg[row].tolist()}" for name, arg in args.items()]
        for digits in 6, 12:
            mine, right = ([float(f"{x:.{digits}g}") + 0.0 for x in y[row].flatten()]
                           for y in (got, want))
            if mine != right:
                break
        raise Wrong(f"With {', '.join(shown)} the result is {mine}, and should be {right}.")
    refuse(got.requires_grad and not want.requires_grad, "The values are right, but a gradient "
           "flows through them. They have to be constants.")
    refuse(want.requires_grad and not got.requires_grad, "The values are right, but no gradient "
           "flows through them.")
    if want.requires_grad:
        x = next(iter(args.values()))
        grads = [torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in (got, want)]
        refuse(not equal(*grads), "The values are right, and their gradient is not: a part of it "
               "is cut off (detach, no_grad, clamp), or it is nan.")


def check_token_entropy(function):
    z = numbers(2, 3, 4).requires_grad_()
    sure = torch.tensor([[1000.0, 0, 0], [20.0, 0, 0]], dtype=torch.float64)
    want, found = Categorical(logits=z).entropy(), tensor(function(sure)).flatten()
    refuse(found.isnan().any(), "It is nan for logits [1000, 0, 0]: a p rounds to 0, and 0 times "
           "log 0 is nan. Compute log p from the logits, and not from p.")
    refuse(found[0] < 0, "It is below 0 for logits [1000, 0, 0], and no entropy is. An eps inside "
           "the logarithm does this: it changes every log p. Compute log p from the logits, and "
           "you need no eps.")
    judge(function(z), want, {"logits": z}, (BITS, want / math.log(2)), (SIGN, -want))
    judge(found, Categorical(logits=sure).entropy(), {"logits": sure})


def check_token_logprobs(function):
    ids = torch.tensor([[3, 1, 4, 0], [2, 0, 1, 2]])
    for z in numbers(2, 4, 5).requires_grad_(), 1000 * numbers(2, 4, 5):
        want = Categorical(logits=z[:, :-1]).log_prob(ids[:, 1:])
        same = Categorical(logits=z).log_prob(ids)
        back = Categorical(logits=z[:, 1:]).log_prob(ids[:, :-1])
        shift = "Off by one: the logits at a place are about the token behind that place."
        mistakes = [(shift, value) for value in (same, same[:, 1:], same[:, :-1], back)]
        mistakes.append((BITS, want / math.log(2)))
        judge(function(z, ids), want, {"logits": z, "ids": ids}, *mistakes)


def check_response_mask(function):
    ids = torch.tensor([
        [3, 0, 5, 7, 0, 0],  # the padding is 0, which is also an ordinary token
        [4, 2, 9, 7, 7, 7],  # the padding is a stop id
        [7, 7, 7, 7, 7, 7], [9, 3, 3, 7, 9, 0], [1, 2, 3, 0, 5, 6],
    ])
    want = torch.arange(6) < torch.tensor([4, 3, 1, 1, 6])[:, None]
    got = tensor(function(ids, [7, 9]))
    if got.shape == want.shape:
        refuse(not got[[0, 1, 2, 3], [3, 2, 0, 0]].any(), "The end is forgotten: the stop token "
               "belongs to the response. The model has drawn it, and has to learn when to stop.")
        extra = (got.bool() & ~want).any(1)
        refuse(extra.any(), f"Padding is counted, of ids {ids[extra].tolist()} with stop ids 7 and "
               "9: nothing behind the first stop token belongs to the response.")
    judge(got, want, {"stop ids 7 and 9, ids": ids})


def check_token_reward(function, name="entropy", sign=-1):
    x = (-sign * numbers(3, 5).abs()).requires_grad_()
    want = sign * torch.stack([row[own].mean() for row, own in zip(x, MASK)])
    judge(function(x, MASK), want.detach(), {name: x, "mask": MASK}, (SIGN, -want),
          ("This is the sum over the tokens, and not the mean.", want * LENGTHS),
          (PADDING, sign * x.mean(1)), (PADDING, sign * (x * MASK).mean(1)))


def check_sequence_reward(function):
    check_token_reward(function, "logprobs", 1)


def check_rloo_advantage(function):
    for r in numbers(3, 4), numbers(2, 2):
        N, want = r.shape[1], torch.zeros_like(r)
        for i in range(N):
            want[:, i] = r[:, i] - r[:, [k for k in range(N) if k != i]].mean(1)
        own = "The own reward is in the baseline: it is the mean of the other N - 1 rewards."
        judge(function(r), want, {"rewards": r}, (SIGN, -want), (own, r - r.mean(1, keepdim=True)),
              ("There is no baseline: these are the rewards.", r),
              ("The baseline mixes prompts, and each has a row of its own.", r - r.mean()))


def check_policy_objective(function):
    check_objective(function, {"logprobs": -numbers(3, 5).abs(), "advantages": numbers(3)})


def check_em_ft_objective(function):
    check_objective(function, {"entropy": numbers(3, 5).abs()})


def check_objective(function, args):
    """Both are a sum of x (B, T), the first argument, with weights (B,)."""
    x, num_tokens = next(iter(args.values())).requires_grad_(), 30  # in this micro-batch are 9
    weights = args.get("advantages", torch.tensor([-1.0] * 3))
    sums = weights * torch.stack([row[own].sum() for row, own in zip(x, MASK)])
    want = sums.sum() / num_tokens
    mean = ("A mean of means: divide by num_tokens, which is of the whole update, and not by what "
            "is in this micro-batch. Else a token of a small micro-batch weighs more.")
    judge(function(*args.values(), MASK, num_tokens), want, args | {"mask": MASK},
          (SIGN + " This is the loss, and the objective is maximised.", -want),
          (mean, sums.sum() / 9), (mean, (sums / LENGTHS).mean()),
          ("It is not divided by num_tokens.", sums.sum()),
          (PADDING, (weights[:, None] * x).sum() / num_tokens))


def check_em_inf_step(function):
    z = numbers(3, 4)
    z[1:] = torch.tensor([[3.8, 0, 0, 0], [5, 0, 0, 0]])  # under delta after a step, and at once
    m = v = torch.zeros_like(z)
    rows = [row.clone().requires_grad_() for row in z]
    adams = [torch.optim.Adam([row], lr=0.1) for row in rows]
    for step in 1, 2, 3:
        for row, adam in zip(rows, adams):
            adam.zero_grad()
            entropy = Categorical(logits=row).entropy()
            entropy.backward()
            if entropy >= 0.3:
                adam.step()
        want, given = torch.stack(rows).detach(), (z.clone().requires_grad_(), m.clone(), v.clone())
        result = function(*given, step)
        refuse(not all(map(torch.equal, given, (z, m, v))), "It changes logits, m or v in place. "
               "Return new ones.")
        refuse(type(result) is not tuple or len(result) != 3, "Return three: logits, m and v.")
        low = Categorical(logits=z).entropy() < 0.3
        moved = tensor(result[0]) - z
        refuse(moved[low].any(), "A row whose entropy is under delta has moved.")
        bias = "The bias is not corrected: m goes with 1 - 0.9^step, and v with 1 - 0.999^step."
        judge(result[0], want, {"logits": z}, ("Uphill: this step raises the entropy. To minimise, "
              "go against the gradient.", 2 * z - want), (bias, z + 0.1 * (want - z)),
              (bias, z + 10**0.5 * (want - z)))  # of m alone, and of both, at step 1
        z, m, v = result
