"""
The paper's training table in miniature: every way of training, on the tiny world, from the same base model and prompts.

    python tiny/findings.py                     # 3 seeds each; 30 minutes on 2 CPU cores that had other work
    python tiny/findings.py --seeds 1           # a first look

Runs em_ft.py and em_rl.py with their defaults plus the flags below, as many at a time as there are cores, each on one thread, into
runs/findings/. A run that has ended is not made again, so that an interrupted table goes on where it stopped; remove the folder to
start afresh (after a change of tiny/base, say). Prints a Markdown table; --out FILE writes it, too.
"""
import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import run

METHODS = {  # name in the table: (script and flags, does training read labels?)
    "SFT": ("em_ft.py --loss sft", True),
    "RLOO": ("em_rl.py --reward correct", True),
    "GRPO": ("em_rl.py --reward correct --advantage grpo", True),
    "SC-RL": ("em_rl.py --reward consistency", False),
    "EM-FT": ("em_ft.py", False),
    "EM-FT + KL": ("em_ft.py --beta 0.001", False),
    "EM-FT + KL, N = 4": ("em_ft.py --beta 0.001 --rollouts 4", False),
    "EM-RL sequence": ("em_rl.py --reward sequence", False),
    "EM-RL token": ("em_rl.py --reward token", False),
    "control: random": ("em_rl.py --reward random", False),
    "control: length": ("em_rl.py --reward length", False),
}


def train(job):
    """Run one (name, seed) unless it has ended before; return its metrics rows."""
    name, seed = job
    folder = HERE.parent / "runs/findings" / f"{name}-{seed}".replace(" ", "").replace(":", "-").replace("+", "-").replace(",", "-")
    if not (folder / "result.json").exists():
        command = [sys.executable, *METHODS[name][0].split(), "--seed", str(seed), "--device", "cpu"]
        command += ["--resume", str(folder)] if (folder / "checkpoint/state.pt").exists() else ["--out", str(folder)]
        done = subprocess.run(command, cwd=HERE.parent, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"findings.py: {' '.join(command[1:])} failed: {done.stderr.strip().splitlines()[-1]}")
    return run.read_rows(folder / "metrics.csv")


def cell(values, form):
    return f"{np.mean(values):{form}} ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else f"{values[0]:{form}}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to SEEDS (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: the cores, %(default)s)")
    parser.add_argument("--out", type=Path, help="file for the table")
    args = parser.parse_args()
    jobs = [(name, seed) for name in METHODS for seed in range(1, args.seeds + 1)]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(jobs, tqdm(pool.map(train, jobs), total=len(jobs), desc="training runs", unit="run")))

    lines = ["| | labels | greedy | T = 1 | peak greedy | entropy, nats/token | length, tokens | FLOPs, 1e9 |", "|---|---|---|---|---|---|---|---|"]
    for name in ["base", *METHODS]:
        runs = [results["EM-RL token" if name == "base" else name, seed] for seed in range(1, args.seeds + 1)]
        rows = [[row for row in rows if row["val_greedy"] != ""] for rows in runs]  # those that were evaluated
        last = [evaluated[0 if name == "base" else -1] for evaluated in rows]
        peak = [last[i]["val_greedy"] if name == "base" else max(row["val_greedy"] for row in evaluated) for i, evaluated in enumerate(rows)]
        flops = [0.0 if name == "base" else sum(row["flops"] for row in rows if row["step"]) / 1e9 for rows in runs]
        lines.append(f"| {name} | {'' if name == 'base' else 'yes' if METHODS[name][1] else 'no'} | {cell([r['val_greedy'] for r in last], '.1%')} | "
                     f"{cell([r['val_sampled'] for r in last], '.1%')} | {cell(peak, '.1%')} | {cell([r['val_entropy'] for r in last], '.3f')} | "
                     f"{cell([r['val_length'] for r in last], '.1f')} | {np.mean(flops):.0f} |")
    table = "\n".join(lines)
    print(table)
    if args.out:
        args.out.write_text(table + "\n")
