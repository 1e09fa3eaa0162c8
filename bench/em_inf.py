"""
EM-INF's step beside the released way, and beside the sampling that follows it anyway.

    python bench/em_inf.py                       # 16 x 152,064 float32 logits on a CPU
    python bench/em_inf.py --device cuda --rows 64

    released    autograd and torch.optim.Adam, row by row
    ours        em_inf.minimize_entropy
    EMInf       ours where a row needs it, and a check for nan
    sampling    softmax and multinomial

The token of rank r has the logit -a log r, as a language model's tail has, with a such that
rows have entropies from 0.33 to 6.3 nats. Medians of 7 rounds that take turns, after a first.
"""
import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # in place of bench/, where this file is the "em_inf" to import
from em_inf import EMInf, minimize_entropy  # noqa: E402


def released(logits, delta=0.3, lr=0.1, steps=3, kl_weight=0.05):
    results = []
    for row in logits.split(1):
        z = torch.nn.Parameter(row.clone())
        start = row.softmax(-1)
        adam = torch.optim.Adam([z], lr=lr)
        for _ in range(steps):
            adam.zero_grad()
            logprobs = z.log_softmax(-1)
            entropy = -(logprobs.exp() * logprobs).sum()
            if entropy < delta:
                break
            kl = F.kl_div(logprobs, start, reduction="sum")
            (entropy + kl_weight * kl).backward()
            adam.step()
        results.append(z.detach())
    return torch.cat(results)


def sampling(logits):
    return torch.multinomial(logits.softmax(-1), 1)


def main():
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--device", default="cpu")
    add("--rows", type=int, default=16)
    add("--vocab", type=int, default=152_064)
    args = parser.parse_args()
    torch.manual_seed(0)
    log_rank = torch.arange(1, args.vocab + 1, dtype=torch.float64).log()
    slopes = 4 / torch.linspace(1, 3.5, args.rows)
    exact = torch.stack([-a * log_rank[torch.randperm(args.vocab)] for a in slopes])
    right = released(exact).softmax(-1)
    logits = exact.float().to(args.device)
    versions = {
        "released": released,
        "ours": minimize_entropy,
        "EMInf": EMInf().sharpen,
        "sampling": sampling,
    }
    times = {name: [] for name in versions}
    for _ in range(8):
        for name, function in versions.items():
            started = time.perf_counter()
            function(logits)[0, 0].item()  # waits for a GPU
            times[name].append(1e3 * (time.perf_counter() - started))
    for name in versions:
        ratios = [ours / other for ours, other in zip(times["ours"], times[name])]
        ms = median(times[name][1:])
        print(f"{name:9} {ms:6.1f} ms, of which ours takes {median(ratios[1:]):.2f}")
    error = (minimize_entropy(logits).double().softmax(-1).cpu() - right).abs().max()
    print(f"ours and released in float64: probabilities differ by {error:.1e}")


if __name__ == "__main__":
    main()
