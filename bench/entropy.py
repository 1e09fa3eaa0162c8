"""
Memory and seconds of entropy_and_logprob beside the naive way, forward and backward.

    python bench/entropy.py          # 2,048 tokens x 50,000 words, 512 wide, float32, CPU
    python bench/entropy.py --device cuda --dtype bfloat16 \\
        --tokens 16384 --vocab 152064 --width 3584

Memory is what a step needs above its inputs, gradients included: the high-water mark of a
fresh process, or of the GPU's allocator. Seconds are medians of 5 rounds that take turns,
after a first one. Error: ||g - g_naive|| / ||g_naive|| of the worse gradient.
"""
import argparse
import multiprocessing
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # in place of bench/, where this file is the "entropy" to import
from entropy import entropy_and_logprob  # noqa: E402


def naive(hidden, weight, targets):
    logprobs = (hidden @ weight.T).float().log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return entropy, logprobs.gather(-1, targets[:, None])[:, 0]


VERSIONS = {"naive": naive, "ours": entropy_and_logprob}


def make_inputs(args, tokens, vocab):
    """hidden (N, D), weight (V, D) and targets (N,); logits have standard deviation 3."""
    torch.manual_seed(0)
    device, dtype = args.device, getattr(torch, args.dtype)
    hidden = torch.randn(tokens, args.width, device=device, dtype=dtype)
    weight = torch.randn(vocab, args.width, device=device, dtype=dtype)
    weight.mul_(3 / args.width**0.5)
    targets = torch.randint(vocab, (tokens,), device=device)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def step(name, hidden, weight, targets):
    hidden.grad = weight.grad = None
    entropy, logprob = VERSIONS[name](hidden, weight, targets)
    (entropy.mean() - 0.5 * logprob.mean()).backward()


def high_water(device):
    """The most bytes that this process has held so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory(name, args):
    inputs = make_inputs(args, args.tokens, args.vocab)
    step(name, *make_inputs(args, 64, 64))  # loads what a first call loads
    before = high_water(args.device)
    step(name, *inputs)
    return high_water(args.device) - before


def main():
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--device", default="cpu")
    add("--dtype", default="float32")
    add("--tokens", type=int, default=2048)
    add("--vocab", type=int, default=50_000)
    add("--width", type=int, default=512)
    args = parser.parse_args()
    if args.device == "cpu" and not find_spec("resource"):
        sys.exit("bench/entropy.py: on a CPU it needs Linux or macOS, which know a high-water mark")

    megabytes = {}
    for name in VERSIONS:
        with multiprocessing.get_context("spawn").Pool(1) as process:
            megabytes[name] = process.apply(memory, (name, args)) / 1e6
    hidden, weight, targets = make_inputs(args, args.tokens, args.vocab)
    seconds = {name: [] for name in VERSIONS}
    grads = {}
    for _ in range(6):
        for name in VERSIONS:
            started = time.perf_counter()
            step(name, hidden, weight, targets)
            weight.grad.sum().item()  # waits for a GPU
            seconds[name].append(time.perf_counter() - started)
            grads[name] = hidden.grad, weight.grad
    for name in VERSIONS:
        print(f"{name:5} {megabytes[name]:7,.0f} MB  {median(seconds[name][1:]):.3f} s")
    pairs = zip(grads["ours"], grads["naive"])
    error = max((ours - right).norm() / right.norm() for ours, right in pairs)
    ratios = [ours / naive for ours, naive in zip(seconds["ours"], seconds["naive"])]
    print(f"ours takes {megabytes['ours'] / megabytes['naive']:.3f} of the memory and "
          f"{median(ratios[1:]):.2f} of the time; error {error:.1e}")


if __name__ == "__main__":
    main()
