"""
Seconds of engine.sampler.generate, of it on transformers' DynamicLayer, and model.generate.

    python bench/rollouts.py

First a step of the tiny model, then 64 rows x 1,024 tokens that never stop. One thread,
medians of rounds in turns, after a first.
"""
import argparse
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
from engine.load import load_model  # noqa: E402
from tasks.problems import load_problems  # noqa: E402
from tasks.prompts import encode_problem, stop_ids  # noqa: E402

LAYERS = {"ours": GrowingLayer, "DynamicLayer": DynamicLayer, "model.generate": None}


def sample(layer, model, tokenizer, prompts, stop, length):
    if layer:
        sampler.GrowingLayer = layer
        return sampler.generate(model, prompts, stop, length, N=4, batch_size=256)
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    model.generate(
        **inputs.to(model.device), do_sample=True, top_k=0, max_new_tokens=length,
        num_return_sequences=4, eos_token_id=stop, pad_token_id=0,
    )


def compare(rounds, *settings):
    seconds = {name: [] for name in LAYERS}
    for seed in range(rounds + 1):
        for name, layer in LAYERS.items():
            torch.manual_seed(seed)
            started = time.perf_counter()
            sample(layer, *settings)
            seconds[name].append(time.perf_counter() - started)
    for name, spent in seconds.items():
        ratios = [ours / other for ours, other in zip(seconds["ours"], spent)]
        print(f"{name:14} {median(spent[1:]):.2f} s; ours takes {median(ratios[1:]):.2f} of it")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(ROOT / "tiny/base"))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, "cpu")
    torch.set_num_threads(1)
    problems = load_problems(str(ROOT / "tiny/train.jsonl"))[:64]
    prompts = [encode_problem(tokenizer, problem) for problem in problems]
    compare(args.rounds, model, tokenizer, prompts, stop_ids(model, tokenizer), 64)
    compare(args.rounds, model, tokenizer, prompts[:16], [len(tokenizer)], 1024)


if __name__ == "__main__":
    main()
