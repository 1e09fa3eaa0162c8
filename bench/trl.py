"""
Seconds of a step of em_rl.py beside TRL's RLOOTrainer, on a CPU.

    pip install trl && python bench/trl.py    # 3 pairs of 12 steps, each on one thread
    python bench/trl.py --threads 2           # on two, which should then be idle

Both train the tiny model with em_rl.py's defaults, in processes of their own, in turn. TRL
does not give entropies to its reward function, which therefore runs the model once more. TRL's
seconds go from one call of it to the next.

Equal: the threads, each step's prompts and their tokens, 4 responses of at most 64 tokens,
temperature 1, beta 0.001 and a reference model, AdamW at 1e-4, gradient norm at most 1, one
update a batch.
Not equal: the objective. TRL takes the KL out of the reward, and divides by responses where
ours divides by tokens. So only step 1's rewards should agree, but for the sampling.
"""
import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

import numpy as np
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # in place of bench/, where this file is the "trl" to import
from trl import RLOOConfig, RLOOTrainer  # noqa: E402

from engine.run import read_rows, write_rows  # noqa: E402
from entropy import output_head, score_all  # noqa: E402
from tasks.problems import load_problems  # noqa: E402


def train_with_trl(args):
    """Leaves a metrics.csv in --out, as em_rl.py does."""
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tiny/base")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/base")
    train = load_problems(str(ROOT / "tiny/train.jsonl"))
    train = random.Random(args.seed).sample(train, len(train))
    order = np.random.default_rng((args.seed, 0)).permutation(len(train))  # em_rl.py's
    prompts = [train[i]["prompt"] + "\n" for i in order[: 64 * args.steps]]
    head = output_head(model, tokenizer(prompts[0])["input_ids"])
    rows = [{"step": 0}]
    calls = []

    def reward(prompts, completion_ids, **others):
        calls.append(time.time())
        ids = tokenizer(prompts)["input_ids"]
        entropy, _, mask = score_all(model, head, ids, completion_ids)
        rewards = -entropy.sum(-1) / mask.sum(-1)
        row = {"step": len(rows), "tokens": mask.sum().item(), "reward": rewards.mean().item()}
        rows.append(row)
        return rewards.tolist()

    config = RLOOConfig(
        args.out, max_steps=args.steps, per_device_train_batch_size=256, num_generations=4,
        max_completion_length=64, beta=0.001, learning_rate=1e-4, weight_decay=0.01,
        lr_scheduler_type="constant", shuffle_dataset=False, seed=args.seed, use_cpu=True,
        bf16=False, gradient_checkpointing=False, save_strategy="no",
        cache_implementation="static",  # faster here than the dynamic one
    )
    data = Dataset.from_dict({"prompt": prompts})
    RLOOTrainer(model, reward, config, data, processing_class=tokenizer).train()
    for row, start, end in zip(rows[2:], calls, calls[1:]):
        row["seconds"] = end - start
    write_rows(Path(args.out, "metrics.csv"), rows)


def measure(script, flags, threads):
    """Run a script: its median seconds a step, after two steps that warm up."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / script), *flags.split(), "--out", f"{folder}/run"]
        threads = {"OMP_NUM_THREADS": str(threads)}  # without it em_rl.py would take one
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", env=os.environ | threads
        )
        if done.returncode:
            sys.exit(done.stderr)
        rows = read_rows(Path(folder, "run/metrics.csv"))
    seconds = median(row["seconds"] for row in rows[3:])
    tokens = mean(row["tokens"] for row in rows[3:])
    print(f"{script} | {seconds:.3f} s, {tokens:,.0f} tokens a step | "
          f"reward of step 1 {rows[1]['reward']:.3f}", flush=True)
    return seconds


def main():
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--pairs", type=int, default=3)
    add("--steps", type=int, default=12)
    add("--threads", type=int, default=1, help="of each side")
    add("--seed", type=int, help=argparse.SUPPRESS)
    add("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out:
        return train_with_trl(args)
    ratios = []
    for seed in range(1, args.pairs + 1):
        flags = f"--steps {args.steps} --seed {seed} "
        ours = flags + "--val none --device cpu --guard 0"
        ours = measure("em_rl.py", ours, args.threads)
        ratios.append(ours / measure("bench/trl.py", flags, args.threads))
    print(f"ours takes {median(ratios):.2f} of TRL's seconds: {[round(r, 2) for r in ratios]}")


if __name__ == "__main__":
    main()
