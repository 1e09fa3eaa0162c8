"""
EM-RL on the tiny model, with a student's functions: one step of em_rl.py without what surrounds it.
"""
import random
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from engine.load import load_model
from engine.optimizer import MasterAdamW
from engine.sampler import generate
from entropy import output_head
from eval import evaluate
from tasks.problems import load_problems
from tasks.prompts import encode_problem, stop_ids

TINY = Path(__file__).resolve().parents[2] / "tiny"
B, N = 64, 4  # prompts of a step, and responses to each


def objective_of(student, model, prompts, responses, stop):
    """EM-RL's objective, a scalar, of N responses to each of B prompts (lists of token ids), a
    prompt's N side by side."""
    T = max(len(response) for response in responses)
    ids = [p + r + stop[:1] * (T - len(r)) for p, r in zip(prompts, responses)]  # padded by a stop
    ids = pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    start = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    place = start - 1 + torch.arange(T + 1)  # of a prompt's last token, and of the response
    row = torch.arange(len(ids))[:, None]
    logits, ids = model(input_ids=ids).logits[row, place], ids[row, place]  # (B*N, T + 1, V)

    mask = student.response_mask(ids[:, 1:], stop)  # (B*N, T)
    entropy = student.token_entropy(logits[:, :-1])
    logprobs = student.token_logprobs(logits, ids)
    rewards = student.token_reward(entropy, mask).view(-1, N)
    advantages = student.rloo_advantage(rewards).flatten()
    return sum(
        student.policy_objective(logprobs[some], advantages[some], mask[some], mask.sum())
        for some in torch.arange(len(ids)).split(100)  # micro-batches; the last one is smaller
    )


def train(student, steps, num_problems):
    """Train, and print greedy accuracy on held-out problems: -> by how much it has risen."""
    model, tokenizer = load_model(str(TINY / "base"), "cpu")
    problems, held_out = load_problems(TINY / "train.jsonl"), load_problems(TINY / "test.jsonl")
    head = output_head(model, encode_problem(tokenizer, problems[0]))
    stop, optimizer, accuracies = stop_ids(model, tokenizer), MasterAdamW(model, lr=1e-4), []
    for step in range(steps + 1):
        if step % 5 == 0 or step == steps:
            samples = evaluate(
                model, tokenizer, head, held_out[:num_problems], temperature=0, max_new_tokens=64,
                batch_size=512,
            )
            accuracies.append(sum(sample["correct"] for sample in samples) / len(samples))
            print(f"step {step:2} | greedy accuracy {accuracies[-1]:.1%}", flush=True)
        if step == steps:
            return accuracies[-1] - accuracies[0]
        torch.manual_seed(step)
        prompts = []
        for problem in random.Random(step).sample(problems, B):
            prompts += [encode_problem(tokenizer, problem)] * N
        rollout = generate(model, prompts[::N], stop, max_new_tokens=64, N=N, batch_size=256)
        objective = objective_of(student, model, prompts, rollout.responses, stop)
        (-objective).backward()
        optimizer.clip(1.0)
        optimizer.step()
        optimizer.zero_grad()
