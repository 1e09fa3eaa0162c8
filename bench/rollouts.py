"""
Tokens a second of engine.sampler.generate, beside transformers' model.generate.

    python bench/rollouts.py                                           # the tiny model
    python bench/rollouts.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct  # a real one

Of the tiny model, first a step's rollouts, then 64 rows x 1,024 tokens that never stop, in which
our sampler is also tried on transformers' DynamicLayer, which copies itself at every token. Of a
real model, 8 prompts x 4 rows x 128 tokens that never stop, in float32 and in bfloat16. All in
turns, after four tokens that warm up; seconds are medians of the rounds.
"""
import argparse
import functools
import sys
import time
from pathlib import Path
from statistics import median

import torch
from transformers.cache_utils import DynamicLayer

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # in place of bench/, whose entropy.py eval.py would import
from engine import sampler  # noqa: E402
from engine.cache import GrowingLayer  # noqa: E402
from engine.load import load_model, set_up  # noqa: E402
from tasks.problems import load_problems  # noqa: E402
from tasks.prompts import encode_problem, stop_ids  # noqa: E402

TINY = str(ROOT / "tiny/base")
PROBLEMS = load_problems(str(ROOT / "tiny/train.jsonl"))


def ours(model, tokenizer, prompts, stop, length):
    return sampler.generate(model, prompts, stop, length, N=4, batch_size=256)


def on_dynamic_layers(*settings):
    """`ours` without the cache that grows in place."""
    sampler.GrowingLayer = DynamicLayer
    try:
        return ours(*settings)
    finally:
        sampler.GrowingLayer = GrowingLayer


def transformers(model, tokenizer, prompts, stop, length, **settings):
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    model.generate(
        **inputs.to(model.device), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
        repetition_penalty=1.0, max_new_tokens=length, num_return_sequences=4,
        eos_token_id=stop, pad_token_id=0, **settings,
    )


def compare(rounds, length, ways):
    """Print each way's seconds, and how many times as fast as the first it is."""
    seconds = {name: [] for name in ways}
    for seed in range(rounds + 1):
        for name, way in ways.items():
            torch.manual_seed(seed)
            started = time.perf_counter()
            way(length if seed else 4)  # warms up at first
            seconds[name].append(time.perf_counter() - started)
    first = seconds[next(iter(ways))][1:]
    for name, (_, *spent) in seconds.items():
        ratio = median([a / b for a, b in zip(first, spent)])
        print(f"  {name:30} {median(spent):7.2f} s, {ratio:.2f} times as fast as the first")


def tiny(rounds):
    torch.set_num_threads(1)
    model, tokenizer = load_model(TINY, "cpu")
    prompts = [encode_problem(tokenizer, problem) for problem in PROBLEMS[:64]]
    for title, some, stop, length in (
        ("a step's rollouts", prompts, stop_ids(model, tokenizer), 64),
        ("64 rows x 1,024 tokens", prompts[:16], [len(tokenizer)], 1024),
    ):
        print(title)
        ways = {}
        for way in transformers, on_dynamic_layers, ours:
            ways[way.__name__] = functools.partial(way, model, tokenizer, some, stop)
        compare(rounds, length, ways)


def real(rounds, name, length):
    device, _ = set_up()
    ways = {}
    for dtype in torch.float32, torch.bfloat16:
        model, tokenizer = load_model(name, device, dtype)
        prompts = [encode_problem(tokenizer, problem) for problem in PROBLEMS[:8]]
        never = [len(tokenizer) + 10**6]  # no token's id
        for way in transformers, ours:
            ways[f"{way.__name__}, {dtype}"] = functools.partial(
                way, model, tokenizer, prompts, never
            )
    print(f"32 rows x {length} tokens of {name}, {torch.get_num_threads()} threads")
    compare(rounds, length, ways)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; without it the tiny model")
    parser.add_argument("--tokens", type=int, default=128, help="of a response of a real model")
    parser.add_argument("--rounds", type=int, help="without it 5, or 1 for a real model")
    args = parser.parse_args()
    if args.model:
        real(args.rounds or 1, args.model, args.tokens)
    else:
        tiny(args.rounds or 5)


if __name__ == "__main__":
    main()
