"""
What the README says about the tiny model, measured: the paper's tables in miniature, and where
entropy minimisation goes wrong.

    python tiny/findings.py                     # 3 seeds: 65 minutes on 2 CPU cores
    python tiny/findings.py --quick             # all in little, 1 seed: 5 minutes
    python tiny/findings.py --only training,kl  # some of the experiments

Runs em_rl.py, em_ft.py, prepare.py and measurements of its own, as many at a time as there are
cores. All of it goes to runs/findings/ (--quick: runs/findings-quick/), and what is there is
not made again: after Ctrl-C the same command goes on. Remove the folder to start afresh, say
after a change of tiny/base.

At the end it writes tiny/findings.md (tables), tiny/findings.csv (each seed's numbers) and
figures in assets/. With --quick or --only these go to the folder of the runs, so that the
committed ones stay.
"""
import argparse
import csv
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from report import REWARDS, TABLES, VERDICTS, figures, report, settings_of, unit_of

from em_inf import DECODERS, AdaptiveTemperature, EMInf, decode_and_grade
from entropy import output_head
from eval import load_model, load_problems
from tasks.arguments import Help, positive_int
from tasks.files import replace_file
from tasks.prompts import encode_prompt
from tasks.scores import CONFIDENCE, diagnosis, summary
from training.run import checkpoint_of, collapsed, read_rows

ROOT = Path(__file__).resolve().parent.parent
FULL = dict(seeds=3, problems=512, steps=40, rise_steps=100, every=10, habit_steps=1500)
QUICK = dict(seeds=1, problems=64, steps=8, rise_steps=20, every=4, habit_steps=150)
TOKEN, SEQUENCE = "em_rl.py --reward token", "em_rl.py --reward sequence"
FAST = "--guard 0 --lr 1e-3"  # ten times the default, so that a fall comes within minutes
RUNS = {  # experiment: {setting: script and flags}; what several share is run once
    "training": {
        "SFT": "em_ft.py --loss sft",
        "RLOO": "em_rl.py --reward correct",
        "GRPO": "em_rl.py --reward correct --advantage grpo",
        "SC-RL": "em_rl.py --reward consistency",
        "EM-FT": "em_ft.py",
        "EM-FT + KL": "em_ft.py --beta 0.001",
        "EM-FT + KL, N = 4": "em_ft.py --beta 0.001 --rollouts 4",
        "EM-RL sequence": SEQUENCE,
        "EM-RL token": TOKEN,
        "control: random": "em_rl.py --reward random",
        "control: length": "em_rl.py --reward length",
    },
    "kl": {
        "0": f"{TOKEN} --beta 0",
        "0.001": TOKEN,  # the default
        "0.5": f"{TOKEN} --beta 0.5",
        "1.5": f"{TOKEN} --beta 1.5",
    },
    "rollouts": {
        "2": f"{SEQUENCE} --rollouts 2",
        "4": SEQUENCE,  # the default
        "8": f"{SEQUENCE} --rollouts 8",
        "16": f"{SEQUENCE} --rollouts 16",
    },
    "norm": {
        "token, mean": TOKEN,
        "token, sum": f"{TOKEN} --reward-norm sum",
        "sequence, mean": SEQUENCE,
        "sequence, sum": f"{SEQUENCE} --reward-norm sum",
    },
    "rise": {
        "token": f"{TOKEN} --guard 0",
        "token, fast": f"{TOKEN} {FAST}",
        "token, fast, β = 0.5": f"{TOKEN} {FAST} --beta 0.5",
        "sequence, fast": f"{SEQUENCE} {FAST}",
    },
}
DECODE = f"{DECODERS},adaptive-temperature+self-consistency,em-inf+refine".split(",")
DECODINGS = {  # experiment: {setting: (decoder, settings of EM-INF)}
    "decoding": {decoder: (decoder, {}) for decoder in DECODE},
    "delta": {f"{x}": ("em-inf", {"delta": x}) for x in (0.05, 0.1, 0.3, 0.5, 1.0)},
    "descent": {f"{x}": ("em-inf", {"steps": x}) for x in (1, 3, 5, 10, 15)},
}
SHARPENED = "SFT", "RLOO", "EM-FT", "EM-RL token", "EM-RL sequence"  # asked for diversity
WORLDS = 100, 75, 50, 25, 0  # percent of the problems whose confident answers are right
WORLD = (  # what a model other than tiny/base must be told
    "--data tiny/train.jsonl --val tiny/test.jsonl --lr 1e-4 --prompts 64 --max-new-tokens 64 "
    "--budget 8192 --rollout-batch 256 --no-checkpointing"
)

# ------------------------------------------------------------------------------- the plan


class Job(NamedTuple):
    """A process, "python COMMAND --out OUT", that waits for the jobs `after`."""

    out: Path
    command: list
    after: tuple


def plan(settings, folder):
    """All that is measured, once a seed: yields (experiment, setting, job, part). The numbers
    of a setting are that part of what the job has found (`result_of`)."""
    seeds = range(1, settings["seeds"] + 1)

    def job(name, command, *after):
        return Job(folder / re.sub(r"[^\w.]+", "-", name), command, after)

    def train(flags, seed, steps="steps", world=None):
        flags = f"{flags} --steps {settings[steps]} --eval-every {settings['every']}"
        command = f"{flags} --seed {seed} --device cpu --val-size {settings['problems']}"
        if world is None:
            return job(f"{flags} {seed}", command.split())
        command = f"{command} --model {world.out} {WORLD}"
        return job(f"{world.out.name} {flags} {seed}", command.split(), world)

    def ask(name, *after, **spec):
        spec["problems"] = settings["problems"]
        return job(f"{name}.json", ["tiny/findings.py", "--measure", json.dumps(spec)], *after)

    for share in WORLDS:
        flags = f"--start tiny/base --habit-steps {settings['habit_steps']}"
        command = f"tiny/prepare.py {flags} --aligned {share / 100}"
        world = job(f"world {share}", command.split())
        asked = ask(f"answers world {share}", world, model=str(world.out), seed=1, n=8)
        yield "fails", f"{share}", asked, "answers"
        for reward, flags in ("token", TOKEN), ("sequence", SEQUENCE):
            yield "fails", f"{share}, {reward}", asked, reward
            for seed in seeds:
                yield "fails", f"{share}, {reward}", train(flags, seed, world=world), "gains"
    for seed in seeds:
        asked = ask(f"answers base {seed}", model="tiny/base", seed=seed, n=16)
        yield "training", "base", train(TOKEN, seed), "base"
        yield "training", "base", asked, "pass@4"
        yield "diversity", "base", asked, "answers"
        for reward in REWARDS:
            yield "rise", f"base, {reward}", asked, reward
        for experiment, runs in RUNS.items():
            steps = "rise_steps" if experiment == "rise" else "steps"
            for setting, flags in runs.items():
                yield experiment, setting, train(flags, seed, steps), "run"
        for method, flags in RUNS["training"].items():
            run = train(flags, seed)
            n = 16 if method in SHARPENED else 4
            name = f"answers {run.out.name}"
            asked = ask(name, run, model=f"{run.out}/checkpoint", seed=seed, n=n)
            yield "training", method, asked, "pass@4"
            if method in SHARPENED:
                yield "diversity", method, asked, "answers"
        for experiment, decoders in DECODINGS.items():
            asked = ask(f"{experiment} {seed}", model="tiny/base", seed=seed, decoders=decoders)
            for setting in decoders:
                yield experiment, setting, asked, setting


def jobs_of(uses):
    """The jobs that these uses need, each once, and those first that wait for no other."""
    jobs = {}
    for _, _, job, _ in uses:
        for needed in (*job.after, job):
            jobs[needed.out] = needed
    return sorted(jobs.values(), key=lambda job: len(job.after))


# ------------------------------------------------------------------------------- the jobs


def lock(folder):
    """An open file that locks the folder until it is closed, here and in every job that has
    inherited it: those of a findings.py that was killed go on."""
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"findings.py: {folder} is in use by another findings.py, or by jobs of one "
                 "that was killed: wait for them, or end them")
    return file


def run_job(job, folder, held):
    """Run a job, unless it is finished: the seconds that it took. RuntimeError if it fails."""
    name = job.out.name
    finished = folder / f"logs/{name}.finished"
    if finished.exists():
        command, seconds = json.loads(finished.read_text())
        if command == job.command:
            return seconds
    flag = "--resume"
    try:
        checkpoint_of(job.out)
    except FileNotFoundError:  # what has no checkpoint yet would be in the way
        flag = "--out"
        shutil.rmtree(job.out, ignore_errors=True)
    started = time.time()
    log = folder / f"logs/{name}.txt"
    with log.open("w") as file:
        code = subprocess.run(
            [sys.executable, *job.command, flag, job.out], stdout=file, stderr=file,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, pass_fds=[held.fileno()],
        ).returncode
    if code:
        raise RuntimeError(f"{name} failed with exit code {code}; the end of {log}:\n"
                           + log.read_text()[-300:])
    seconds = time.time() - started
    replace_file(finished, json.dumps([job.command, seconds]))
    return seconds


def execute(jobs, at_a_time, folder):
    """Run the jobs: the seconds that they took in all. RuntimeError for the first that fails,
    when those that run beside it have ended."""
    held = lock(folder)
    (folder / "logs").mkdir(exist_ok=True)
    futures = {}

    def in_turn(job):
        for needed in job.after:  # it stands earlier in the queue, so that it has begun
            futures[needed.out].result()
        return run_job(job, folder, held)

    pool = ThreadPoolExecutor(at_a_time)
    try:
        for job in jobs:
            futures[job.out] = pool.submit(in_turn, job)
        done = as_completed(futures.values())
        bar = tqdm(done, total=len(jobs), desc="findings", unit="job", smoothing=0)
        return sum(future.result() for future in bar)
    finally:
        pool.shutdown(cancel_futures=True)
        held.close()


# ---------------------------------------------------------------------------- the numbers


def measure(spec):
    """Put the test problems to a model: {part: {metric: value}}. A part is a setting of the
    spec's "decoders" or, without them, one of `of_answers`."""
    problems = load_problems("tiny/test.jsonl")[: spec["problems"]]
    model, tokenizer = load_model(spec["model"], "cpu")
    head = output_head(model, encode_prompt(tokenizer, problems[0]["prompt"]))

    def answer(problems, decoder, **settings):
        em_inf = EMInf(**({"steps": 10} | settings))
        sharpeners = {"em-inf": em_inf, "adaptive-temperature": AdaptiveTemperature()}
        return decode_and_grade(
            model, tokenizer, head, problems, decoder, max_new_tokens=64,
            seed=spec["seed"], rows=512, sharpeners=sharpeners,
        )

    if "n" in spec:
        return of_answers(answer(problems, "greedy"), answer(problems * spec["n"], "sample"))
    parts = {}
    for setting, (decoder, settings) in spec["decoders"].items():
        numbers = summary(answer(problems, decoder, **settings))
        part = {key: numbers[key] for key in ("accuracy", "entropy", "seconds")}
        part["FLOPs"] = numbers["flops"] / 1e9
        parts[setting] = part
        if "greedy" in parts:
            part["FLOPs (greedy = 1)"] = part["FLOPs"] / parts["greedy"]["FLOPs"]
    return parts


def of_answers(greedy, sampled):
    """What graded answers say: greedy ones, and n to each problem at T = 1."""
    found = diagnosis(greedy, sampled)
    answers = {
        "greedy": found["greedy"],
        "T = 1": found["sampled"],
        "majority over greedy": found["majority"] - found["greedy"],
        "distinct answers": found["distinct"],
        "ECE": found["ece"],
        "AUROC": found["rewards"]["token"]["auroc"],
        "pass@1": found["sampled"],
    }
    for k, share in summary(sampled)["pass"].items():
        answers[f"pass@{k}"] = share
    parts = {"answers": answers, "pass@4": {"pass@4": answers["pass@4"]}}
    for reward, (key, sign) in CONFIDENCE.items():
        forecast = found["rewards"][reward]
        parts[reward] = {
            "forecast": forecast["drift"],
            "from": forecast["low"],
            "to": forecast["high"],
            "diagnosis": VERDICTS[forecast["verdict"]],
            "AUROC": forecast["auroc"],
        }
        for k, share in forecast["surest"].items():
            parts[reward][f"surest of {k}"] = share
        for name, right in ("worked, right", True), ("worked, wrong", False):
            some = [x for x in sampled if "=" in x["response"] and x["correct"] == right]
            mean = np.mean([x[key] for x in some]) if some else np.nan
            parts[reward][name] = sign * mean
    return parts


def of_run(rows):
    """What the rows of a run's metrics.csv say."""
    measured = [row for row in rows if "val_greedy" in row]
    last = measured[-1]
    peak = max(measured, key=lambda row: row["val_greedy"])  # the first of the best
    stop = guard_stop(rows)
    until = [row["val_greedy"] for row in measured if row["step"] <= stop]
    return {
        "greedy": last["val_greedy"],
        "T = 1": last["val_sampled"],
        "entropy": last["val_entropy"],
        "length": last["val_length"],
        "FLOPs": sum(row["flops"] for row in rows[1:]) / 1e9,
        "peak at step": peak["step"],
        "peak greedy": peak["val_greedy"],
        "guard stops at step": stop,
        "greedy there": until[-1] if until else np.nan,
    }


def guard_stop(rows, factor=4.0):
    """The step after which the guard, as it is by default, would have ended a run; or nan."""
    for i, row in enumerate(rows):
        if collapsed(rows[: i + 1], factor):
            return row["step"]
    return np.nan


def result_of(job):
    """{part: {metric: value}} of a finished measurement (see `measure`) or training run."""
    if job.out.suffix == ".json":
        return json.loads(job.out.read_text())
    rows = read_rows(job.out / "metrics.csv")
    run, base = of_run(rows), of_run(rows[:1])
    gains = {f"gain {key}": run[key] - base[key] for key in ("greedy", "T = 1")}
    return {"run": run, "base": base, "gains": gains}


def collect(uses):
    """{(experiment, setting, metric): values by seed}."""
    found = {}
    for experiment, setting, job, part in uses:
        for metric, value in result_of(job)[part].items():
            found.setdefault((experiment, setting, metric), []).append(float(value))
    for setting in settings_of(found, "fails", "forecast"):
        for key in "greedy", "T = 1":
            gain = np.mean(found["fails", setting, f"gain {key}"])
            right = gain * found["fails", setting, "forecast"][0] > 0
            # 512 problems leave 2 points open
            sign = np.nan if abs(gain) <= 0.02 else float(right)
            found["fails", setting, f"sign right ({key})"] = [sign]
    return found


def write_csv(path, found):
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow("experiment setting metric unit values".split())
        for key, values in found.items():
            shown = " ".join(f"{value:.6g}" for value in values)
            out.writerow([*key, unit_of(key[2]), shown])


def read_csv(path):
    found = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            key = row["experiment"], row["setting"], row["metric"]
            found[key] = [float(value) for value in row["values"].split()]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--quick", action="store_true", help="the settings under QUICK: less of everything")
    add("--seeds", type=positive_int, help="seeds 1 to SEEDS, not those under FULL or QUICK")
    add("--jobs", type=positive_int, default=os.cpu_count(), help="at a time, one core each")
    add("--only", default=",".join(TABLES), help="experiments, with commas")
    add("--measure", metavar="JSON", help="one measurement; so the script calls itself")
    add("--out", type=Path, help="where its result goes")
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.measure:
        return replace_file(args.out, json.dumps(measure(json.loads(args.measure)), indent=1))
    only = args.only.split(",")
    for experiment in only:
        if experiment not in TABLES:
            parser.error(f"--only {experiment}: there are {', '.join(TABLES)}")
    settings = QUICK if args.quick else FULL
    settings = settings | {"seeds": args.seeds or settings["seeds"]}
    folder = Path("runs/findings-quick" if args.quick else "runs/findings")
    folder.mkdir(parents=True, exist_ok=True)
    uses = [use for use in plan(settings, folder) if use[0] in only]
    try:
        seconds = execute(jobs_of(uses), args.jobs, folder)
    except KeyboardInterrupt:
        sys.exit("findings.py: stopped; the same command goes on")
    except RuntimeError as error:
        sys.exit(f"findings.py: {error}")
    found = collect(uses)
    rises = {}
    for experiment, setting, job, part in uses:
        if experiment == "rise" and part == "run":
            rises.setdefault(setting, []).append(read_rows(job.out / "metrics.csv"))
    shipped = not args.quick and set(only) == set(TABLES)
    command = " ".join(["python tiny/findings.py", *sys.argv[1:]])
    text = report(found, seconds / 60, settings["seeds"], command)
    tables = Path("tiny") if shipped else folder
    replace_file(tables / "findings.md", text)
    write_csv(tables / "findings.csv", found)
    figures(found, rises, Path("assets") if shipped else folder)
    print(text)


if __name__ == "__main__":
    main()
