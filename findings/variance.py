"""
How noisy is the gradient of an EM-RL reward? The same 16 prompts are sampled many times.

    python findings/measure.py '{"model": "tiny/base", "norm": "sum", "batches": 2000}' --out FILE

With "norm": "sum" the sequence reward has the expected gradient of the token reward and the
entropy's own together ("token + exact", see `em_rl.entropy_weight`). The latter should vary less,
since it averages each token's log-prob over all tokens that might have been drawn. An estimate is
the gradient of a mean over 16 prompts of tiny/train.jsonl and 4 responses to each.
"""
import argparse

import torch
from tqdm import tqdm

from em_rl import REWARDS, advantage, entropy_weight
from engine.sampler import generate
from entropy import score
from tasks.problems import load_problems
from tasks.prompts import encode_problem, stop_ids

N = 4  # responses to each of 16 prompts


def estimates(model, head, prompts, stop, norm):
    """Sample the prompts (token ids) once: {estimator: gradient (P,), float64}, P parameters."""
    rollout = generate(model, prompts, stop, 64, N=N, batch_size=len(prompts) * N)
    prompts = [prompt for prompt in prompts for _ in range(N)]
    new = score(model, head, prompts, rollout.responses)  # (B*N, T)
    args = argparse.Namespace(entropy_coef="exact", reward_norm=norm)
    objectives = {"entropy's own": entropy_weight(new.mask, args) * new.entropy}
    for name in "token", "sequence":
        rewards = REWARDS[name](rollout)  # (B*N,)
        if norm == "sum":
            rewards = rewards * new.mask.sum(1)
        objectives[name] = advantage("rloo", rewards.view(-1, N)).view(-1, 1) * new.logprobs
    gradients = {}
    for name, objective in objectives.items():
        objective = (objective * new.mask).sum() / len(prompts)
        parts = torch.autograd.grad(objective, list(model.parameters()), retain_graph=True)
        gradients[name] = torch.cat([part.flatten() for part in parts]).double()
    gradients["token + exact"] = gradients["token"] + gradients["entropy's own"]
    return gradients


def of_gradients(model, tokenizer, head, norm, batches):
    """{estimator: its "variance", the mean squared distance from the mean, all weights together;
    and the "squared mean", the squared norm of the mean without what noise adds to it}."""
    problems = load_problems("tiny/train.jsonl")[:16]
    prompts = [encode_problem(tokenizer, problem) for problem in problems]
    stop = stop_ids(model, tokenizer)
    torch.manual_seed(0)
    sums, squares, found = {}, {}, {}
    for _ in tqdm(range(batches), desc="batches", unit="batch"):
        for name, gradient in estimates(model, head, prompts, stop, norm).items():
            sums[name] = sums.get(name, 0) + gradient
            squares[name] = squares.get(name, 0) + gradient.square().sum().item()
    for name, total in sums.items():
        squared = (total / batches).square().sum().item()
        variance = (squares[name] - batches * squared) / (batches - 1)
        found[name] = {"variance": variance, "squared mean": squared - variance / batches}
    return found
