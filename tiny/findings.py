"""
What the README says about the tiny model, measured: the paper's tables in miniature, and where entropy minimisation goes wrong.

    python tiny/findings.py                     # 3 seeds: some 140 minutes of one core's work, half as long on two
    python tiny/findings.py --quick             # every experiment in little, 1 seed: some 16 minutes of one core's work
    python tiny/findings.py --only training,kl  # some of them

Runs em_rl.py and em_ft.py with their defaults plus the flags below, prepare.py, and measurements of its own, as many at a time as there
are cores, each on one thread. Everything goes to runs/findings/ (--quick: runs/findings-quick/), and what is there is not made again:
after Ctrl-C the same command goes on. Remove the folder to start afresh (after a change of tiny/base, say).

At the end it writes tiny/findings.md (tables), tiny/findings.csv (the same numbers, with each seed's) and assets/findings-*.png; with
--quick or --only these go to the folder of the runs, so that the committed ones stay. Whether the miniature agrees with the paper is
decided by the numbers: "above" and "below" mean by more than 2 sd of the difference, and by 2 points at least.
"""
import argparse
import csv
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval as ev
import run
from em_inf import DECODERS, AdaptiveTemperature, EMInf

FULL = dict(seeds=3, steps=40, every=10, val=512, samples=16, kl=(0, 0.001, 0.5, 1.5), rollouts=(2, 4, 8, 16),
            delta=(0.05, 0.1, 0.3, 0.5, 1.0), descent=(1, 3, 5, 10, 15), rise_steps=100, rise_every=10,
            worlds=(100, 75, 50, 25, 0), habit_steps=1500, diagnosed=512, answers=8)
QUICK = dict(seeds=1, steps=10, every=10, val=128, samples=4, kl=(0, 0.001, 1.5), rollouts=(2, 4, 8), delta=(0.05, 0.3, 1.0),
             descent=(1, 10), rise_steps=25, rise_every=5, worlds=(100, 50, 0), habit_steps=300, diagnosed=128, answers=8)
TOKEN, SEQUENCE = "em_rl.py --reward token", "em_rl.py --reward sequence"
METHODS = {  # name in the table: (script and flags, does training read labels?)
    "SFT": ("em_ft.py --loss sft", True),
    "RLOO": ("em_rl.py --reward correct", True),
    "GRPO": ("em_rl.py --reward correct --advantage grpo", True),
    "SC-RL": ("em_rl.py --reward consistency", False),
    "EM-FT": ("em_ft.py", False),
    "EM-FT + KL": ("em_ft.py --beta 0.001", False),
    "EM-FT + KL, N = 4": ("em_ft.py --beta 0.001 --rollouts 4", False),
    "EM-RL sequence": (SEQUENCE, False),
    "EM-RL token": (TOKEN, False),
    "control: random": ("em_rl.py --reward random", False),
    "control: length": ("em_rl.py --reward length", False),
}
SWEEPS = {"kl": (TOKEN, "--beta", 0.001), "rollouts": (SEQUENCE, "--rollouts", 4)}  # the default's run is that of the training table
SUM = " --reward-norm sum"
NORMS = {"token, mean": TOKEN, "token, sum": TOKEN + SUM, "sequence, mean": SEQUENCE, "sequence, sum": SEQUENCE + SUM}
FAST = " --lr 1e-3"  # ten times the default: a fall within minutes
RISE = {"token": TOKEN, "token, fast": TOKEN + FAST, "token, fast, β = 0.5": f"{TOKEN + FAST} --beta 0.5", "sequence, fast": SEQUENCE + FAST}
GUARD = 4.0  # the default of --guard
DECODE = f"{DECODERS},adaptive-temperature+self-consistency,em-inf+refine".split(",")
WORLD = "--lr 1e-4 --prompts 64 --max-new-tokens 64 --budget 8192 --no-checkpointing"  # what a model other than tiny/base must be told
REWARDS = {"token": TOKEN, "sequence": SEQUENCE}
SHARPENED = "base", "SFT", "RLOO", "EM-FT", "EM-RL token", "EM-RL sequence"
VERDICTS = {"likely helps": 1, "unlikely to matter": 0, "harms": -1}
UNITS = {"share": ".1%", "change of share": "+.1%", "nats/token": ".3f", "tokens": ".1f", "1e9": ".2f", "factor": ".2f",
         "seconds": ".1f", "": ".3f", "count": ".1f"}  # how a table shows them
TRAINED = "greedy|T = 1|entropy|length|FLOPs"
TABLES = {  # experiment: (heading, first column, metrics, the paper's counterpart)
    "training": (
        "Training", "method", "greedy|T = 1|pass@4|peak greedy|entropy|length|FLOPs",
        "The paper (Qwen2.5-Math-7B, average of five maths sets): base 24.9, SFT 25.7, RLOO 43.9, GRPO 42.1, SC-RL 40.7, EM-FT 40.2, with "
        "KL 39.6, with KL and N = 4 41.7, EM-RL sequence 41.6, token 42.9."),
    "decoding": (
        "Decoding", "decoder", "accuracy|entropy|FLOPs|FLOPs (greedy = 1)|seconds",
        "The paper (Qwen2.5-Math-7B-Instruct, average of five maths sets): sampling at 0.1 44.2, greedy 45.1, refinement 44.2, "
        "self-consistency 45.4, adaptive temperature 45.3, EM-INF 46.4; EM-INF matches self-consistency at about a third of its compute."),
    "kl": ("Weight of the KL, EM-RL token", "β", TRAINED,
           "The paper (average of five maths sets): β = 0 39.0, 0.001 39.5, 0.5 28.2, 1.5 25.8; base 24.9."),
    "rollouts": ("Responses a prompt, EM-RL sequence", "N", TRAINED,
                 "The paper (average of five maths sets): N = 4 41.6, 8 41.1, 16 39.4."),
    "norm": ("Sum or mean over a response's tokens", "reward", TRAINED,
             "The paper's formulas sum and its released code averages; it does not compare the two."),
    "delta": ("EM-INF: entropy to stop at, 10 steps", "δ, nats", "accuracy|entropy", "The paper: δ from 0.1 to 0.5 works best."),
    "descent": ("EM-INF: steps of descent, δ = 0.3", "steps", "accuracy|entropy|seconds",
                "The paper: 5 to 15 steps are enough; its released code takes 3."),
    "rise": (
        "Rise and fall (fast: ten times the learning rate)", "EM-RL", "peak at step|peak greedy|greedy|T = 1|guard stops at step|greedy there",
        "The paper stops after about 100 steps by validation accuracy; later work finds that such rewards improve a model for some steps "
        "and then ruin it."),
    "fails": (
        "When it fails", "confident answers that are right, %",
        "greedy|T = 1|majority over greedy|AUROC|right is surer|from|to|diagnosis|"
        "sign right (greedy)|sign right (T = 1)",
        "The paper: EM-RL takes Qwen2.5-Math-7B from 24.9 to 42.9, Llama-3.1-8B-Instruct on MATH from 40.6 to no more than 41.6; its sign "
        "of that is best-of-4 over greedy, +13.4 % against +7.5 %."),
    "diversity": (
        "Calibration and diversity, T = 1", "model", "greedy|pass@1|pass@2|pass@4|pass@8|pass@16|distinct answers|ECE|AUROC",
        "The paper (AMC, Qwen2.5-Math-7B): ECE 64.9 before EM-RL, 43.5 (sequence) and 44.7 (token) after; pass@k it does not report."),
}

# ---------------------------------------------------------------------------------------------------------------- the jobs


def slug(text):
    return re.sub(r"[^\w.]+", "-", text).strip("-")


def plan(s, seeds, folder, only):
    """All jobs by name, and {(experiment, setting): names of its jobs, a seed each}. A job: command, out (what it makes), done (what
    `out` is renamed to or, of a training run, the file that ends it), after (jobs it waits for), cost (seconds on one core), spec."""
    jobs, uses, data = {}, {}, ["--data", str(folder / "train.jsonl"), "--val", str(folder / "test.jsonl"), "--val-size", str(s["val"])]

    def add(experiment, setting, name, **job):
        if experiment in only:
            jobs.setdefault(name, job)
            uses.setdefault((experiment, setting), []).append(name)
        return name

    def train(experiment, setting, flags, seed, more, world=None):
        command, n = f"{flags} {more}", re.search(r"--rollouts (\d+)", flags)
        name = slug(f"{world or ''} {command} {seed}")
        cost = 10 + int(re.search(r"--steps (\d+)", more)[1]) * (0.23 * int(n[1] if n else 4) if "em_rl" in flags else 0.5)
        command = command.split() + data + (["--model", str(folder / world), *WORLD.split()] if world else [])
        return add(experiment, setting, name, command=command + ["--seed", str(seed), "--device", "cpu"], out=folder / name,
                   done=folder / name / "result.json", after=[world] if world else [], cost=cost)

    def ask(experiment, setting, name, cost, after=(), **spec):
        out = folder / f"{slug(name)}.json"
        return add(experiment, setting, slug(name), spec=spec | {"data": str(folder / "test.jsonl"), "out": str(out)}, out=out, done=out,
                   after=list(after), cost=cost)

    steps = f"--steps {s['steps']} --eval-every {s['every']}"
    for seed in seeds:
        for experiment in "training", "diversity":
            evaluate = lambda n: dict(cost=10 + n * s["val"] / 340, kind="evaluate", seed=seed, problems=s["val"], n=n)
            ask(experiment, "base", f"evaluate base {seed}", model="tiny/base", **evaluate(s["samples"]))
            for method, (flags, _) in METHODS.items():
                if experiment == "training" or method in SHARPENED:
                    name = train(experiment, f"{method} run", flags, seed, steps)
                    ask(experiment, method, f"evaluate {name}", after=[name], model=str(folder / name / "checkpoint"),
                        **evaluate(s["samples"] if method in SHARPENED else 4))
        for experiment, (flags, option, default) in SWEEPS.items():
            for value in s[experiment]:
                train(experiment, str(value), flags if value == default else f"{flags} {option} {value}", seed, steps)
        for setting, flags in NORMS.items():
            train("norm", setting, flags, seed, steps)
        for setting, flags in RISE.items():
            train("rise", setting, flags, seed, f"--guard 0 --steps {s['rise_steps']} --eval-every {s['rise_every']}")
        decode = dict(kind="decode", model="tiny/base", seed=seed, problems=s["val"])
        ask("decoding", "all", f"decoding {seed}", 40, **decode, decoders={name: [name, {}] for name in DECODE})
        for experiment, key in ("delta", "delta"), ("descent", "steps"):
            ask(experiment, "all", f"{experiment} {seed}", 20, **decode, decoders={str(v): ["em-inf", {key: v}] for v in s[experiment]})
        for share in s["worlds"]:
            name = f"world-{share}-{s['habit_steps']}"
            for reward, flags in REWARDS.items():
                train("fails", f"{share}, {reward}", flags, seed, f"--steps {s['steps']} --eval-every {s['steps']}", name)
    for share in s["worlds"]:
        name = f"world-{share}-{s['habit_steps']}"
        out, options = folder / f"{name}.new", f"--start tiny/base --aligned {share / 100} --habit-steps {s['habit_steps']}".split()
        add("fails", f"{share} world", name, command=["tiny/prepare.py", *options, "--out", str(out)], out=out, done=folder / name,
            after=[], cost=10 + 0.16 * s["habit_steps"])
        ask("fails", f"{share} diagnosis", f"diagnosis {name}", 20, [name], kind="diagnose", model=str(folder / name), seed=1,
                problems=s["diagnosed"], n=s["answers"])
    return jobs, uses


def measure(spec):
    """What a measurement's JSON asks for, as a dict; runs in a process of its own."""
    problems = ev.load_problems(spec["data"])[: spec["problems"]]
    model, tokenizer = ev.load_model(spec["model"], "cpu")
    head = ev.output_head(model, ev.encode_prompt(tokenizer, problems[0]["prompt"]))

    def answers(decoder, n=1, **settings):
        sharpen = {"em-inf": functools.partial(EMInf, **{"steps": 10, **settings}), "adaptive-temperature": AdaptiveTemperature}
        asked = [problem for problem in problems for _ in range(n)]
        return ev.evaluate(model, tokenizer, head, asked, decoder, 64, spec["seed"], 2**16, sharpen=sharpen)

    if spec["kind"] == "diagnose":
        return ev.diagnosis(answers("greedy"), answers("sample", spec["n"]))
    if spec["kind"] == "decode":
        results = {name: ev.summary(answers(decoder, **settings)) for name, (decoder, settings) in spec["decoders"].items()}
        return {name: {key: r[key] for key in ("accuracy", "entropy", "flops", "seconds")} for name, r in results.items()}
    samples = answers("sample", spec["n"])
    r, boxes = ev.summary(samples), [set(map(ev.last_box, texts)) for texts in ev.by_problem(samples, "response").values()]
    return {"pass": {"1": r["accuracy"], **r["pass"]}, "ece": float(r["ece"]), "auroc": r["auroc"],
            "greedy": ev.summary(answers("greedy"))["accuracy"], "distinct": float(np.mean(list(map(len, boxes))))}


def write(path, text):
    """Replaced in one go: a kill at any moment leaves the old file or the new one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


def finished(job):
    return job["done"].exists() and ("spec" not in job or json.loads(job["done"].read_text())["spec"] == job["spec"])


def start(job, logs):
    """A job's process: from its beginning, or a training run from its checkpoint."""
    command = job.get("command") or ["tiny/findings.py", "--measure", json.dumps(job["spec"])]
    if job["done"].name == "result.json":
        try:
            run.checkpoint_of(job["out"])
            command = command + ["--resume", str(job["out"])]
        except FileNotFoundError:
            shutil.rmtree(job["out"], ignore_errors=True)  # stopped before its first checkpoint: the script would refuse the folder
            command = command + ["--out", str(job["out"])]
    with open(f"{logs}.out", "w") as out, open(f"{logs}.err", "w") as err:  # a session of its own: Ctrl-C reaches this script alone
        return subprocess.Popen([sys.executable, *command], env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=out, stderr=err,
                                start_new_session=True)


def execute(jobs, at_a_time, folder):
    """Run what is not finished, the long ones first. Raises RuntimeError for the first that fails; the others end with it."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    clock = folder / "seconds.json"  # of each job, pieces of interrupted ones included
    seconds, running = json.loads(clock.read_text()) if clock.exists() else {}, {}
    done = {name for name, job in jobs.items() if finished(job)}
    waiting = sorted(jobs.keys() - done, key=lambda name: (-jobs[name]["cost"], name))
    bar = tqdm(total=len(jobs), initial=len(done), desc="findings", unit="job", smoothing=0)

    def stopped(process):
        name, started = running.pop(process)
        seconds[name] = seconds.get(name, 0) + time.time() - started
        write(clock, json.dumps(seconds, indent=1) + "\n")
        return name

    try:
        while waiting or running:
            for process in [process for process in running if process.poll() is not None]:
                name = stopped(process)
                job = jobs[name]
                if process.returncode == 0 and job["out"].name == f"{job['done'].name}.new":
                    job["out"].rename(job["done"])
                if process.returncode or not finished(job):
                    lines = (folder / f"logs/{name}.err").read_text().strip().splitlines()
                    raise RuntimeError(f"{name} failed (exit code {process.returncode}): {lines[-1] if lines else 'it said nothing'}")
                done.add(name)
                bar.update()
            ready = [name for name in waiting if set(jobs[name]["after"]) <= done]
            if ready and len(running) < at_a_time:
                waiting.remove(ready[0])
                running[start(jobs[ready[0]], folder / "logs" / ready[0])] = ready[0], time.time()
            else:
                time.sleep(0.2)
    finally:
        bar.close()
        for process in running:
            process.terminate()  # training finishes its step and saves
        for process in list(running):
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            stopped(process)
    return sum(seconds.get(name, 0) for name in jobs)


# ------------------------------------------------------------------------------------------------------------- the numbers


def evaluated(rows):
    return [row for row in rows if row["val_greedy"] != ""]


def guard_stop(rows, factor=GUARD):
    """The step after which the guard would have ended a run with these rows; None: never."""
    return next((rows[i - 1]["step"] for i in range(1, len(rows) + 1) if run.collapsed(rows[:i], factor)), None)


def of_run(rows):
    """{metric: (unit, value)} of one training run."""
    first, last = evaluated(rows)[0], evaluated(rows)[-1]
    peak, stop = max(evaluated(rows), key=lambda row: (row["val_greedy"], -row["step"])), guard_stop(rows)
    there = [row["val_greedy"] for row in evaluated(rows) if stop and row["step"] <= stop]
    return {"greedy": ("share", last["val_greedy"]), "T = 1": ("share", last["val_sampled"]), "peak greedy": ("share", peak["val_greedy"]),
            "entropy": ("nats/token", last["val_entropy"]), "length": ("tokens", last["val_length"]),
            "peak at step": ("step", peak["step"]),
            "FLOPs": ("1e9", sum(row["flops"] for row in rows if row["step"]) / 1e9), "guard stops at step": ("step", stop or np.nan),
            "greedy there": ("share", there[-1] if there else np.nan),
            "gain greedy": ("change of share", last["val_greedy"] - first["val_greedy"]),
            "gain T = 1": ("change of share", last["val_sampled"] - first["val_sampled"])}


def of_evaluation(r):
    return {f"pass@{k}": ("share", share) for k, share in r["pass"].items()} | {
        "ECE": ("", r["ece"]), "AUROC": ("", r["auroc"]), "distinct answers": ("count", r["distinct"]), "greedy": ("share", r["greedy"])}


def of_diagnosis(r):
    shares = {"greedy": "greedy", "T = 1": "sampled", "right is surer": "within", "from": "low", "to": "high"}
    return {metric: ("share", r[key]) for metric, key in shares.items()} | {
        "majority over greedy": ("change of share", r["majority"] - r["greedy"]), "AUROC": ("", r["auroc"]),
        "diagnosis": ("sign", VERDICTS[r["verdict"]])}


def collect(jobs, uses):
    """{(experiment, setting, metric): (unit, values by seed)}, and the rows of the runs of "rise" by setting."""
    found, rises = {}, {}

    def keep(experiment, setting, metrics, only=None):
        for metric in only or metrics:
            found.setdefault((experiment, setting, metric), (metrics[metric][0], []))[1].append(float(metrics[metric][1]))

    for (experiment, setting), names in uses.items():
        of_runs = ["gain greedy", "gain T = 1"] if experiment == "fails" else TABLES[experiment][2].replace("pass@4|", "").split("|")
        for job in (jobs[name] for name in names):
            result = json.loads(job["done"].read_text())["result"] if "spec" in job else None
            if experiment == "diversity" and result:
                keep(experiment, setting, of_evaluation(result))
            elif experiment == "training" and result:
                keep(experiment, setting, of_evaluation(result), ["pass@4"])
            elif experiment == "fails" and result:
                keep(experiment, setting.removesuffix(" diagnosis"), of_diagnosis(result))
            elif result:
                for name, r in result.items():
                    relative = {"FLOPs (greedy = 1)": ("factor", r["flops"] / result["greedy"]["flops"])} if "greedy" in result else {}
                    keep(experiment, name, {"accuracy": ("share", r["accuracy"]), "entropy": ("nats/token", r["entropy"]), **relative,
                                            "FLOPs": ("1e9", r["flops"] / 1e9), "seconds": ("seconds", r["seconds"])})
            elif job["done"].name == "result.json" and experiment != "diversity":
                rows = run.read_rows(job["out"] / "metrics.csv")
                if setting == "EM-RL token run":
                    keep("training", "base", of_run(rows[:1]), of_runs)
                if experiment == "rise":
                    rises.setdefault(setting, []).append(rows)
                keep(experiment, setting.removesuffix(" run"), of_run(rows), of_runs)
    for share in [setting for e, setting, metric in found if (e, metric) == ("fails", "diagnosis")]:
        for key in "greedy", "T = 1":  # 2 points: less is within the noise of 512 problems
            gain = float(np.mean([found["fails", f"{share}, {reward}", f"gain {key}"][1] for reward in REWARDS]))
            right = found["fails", share, "diagnosis"][1][0] == (gain > 0.02) - (gain < -0.02)
            keep("fails", share, {f"sign right ({key})": ("yes", right)})
    order = {setting: i for i, setting in enumerate(["base", *METHODS])}  # the training table's; the others are as planned
    return dict(sorted(found.items(), key=lambda item: (list(TABLES).index(item[0][0]), order.get(item[0][1], 0)))), rises


def cell(unit, values):
    """Mean ± sd as a table shows them."""
    if unit == "sign":
        return {value: word for word, value in VERDICTS.items()}[values[0]]
    if unit == "yes":
        return "yes" if values[0] else "no"
    if unit == "step":
        return ", ".join("never" if np.isnan(value) else f"{value:.0f}" for value in values)
    values = [value for value in values if not np.isnan(value)]
    if not values:
        return ""
    return f"{np.mean(values):{UNITS[unit]}}" + (f" ± {np.std(values, ddof=1):{UNITS[unit].strip('+')}}" if len(values) > 1 else "")


def write_csv(path, found):
    with path.open("w", newline="") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow("experiment setting metric unit mean sd seeds values".split())
        for key, (unit, values) in found.items():
            sd = f"{np.std(values, ddof=1):.6g}" if len(values) > 1 else ""
            out.writerow([*key, unit, f"{np.mean(values):.6g}", sd, len(values), " ".join(f"{value:.6g}" for value in values)])


def read_csv(path):
    with path.open(newline="") as f:
        return {tuple(row[:3]): (row[3], [float(value) for value in row[-1].split()]) for row in list(csv.reader(f))[1:]}


# ------------------------------------------------------------------------------------------- does the miniature agree with the paper?


def compared(a, b):
    """How a's mean lies to b's: "above", "below" or "level with". 2 points at least: 512 problems alone leave that much open."""
    spread = np.sqrt(sum(np.var(x, ddof=1) for x in (a, b) if len(x) > 1))
    difference = np.mean(a) - np.mean(b)
    return "level with" if abs(difference) <= max(0.02, 2 * spread) else "above" if difference > 0 else "below"


def verdict(claims):
    """One sentence of [(what the paper says, does it hold here?)]."""
    sides = [[claim for claim, holds in claims if bool(holds) is side] for side in (True, False)]
    words = ("agrees", ", and that "), ("does not agree", ", or that ")
    parts = [f"{word} that {more.join(side)}" for (word, more), side in zip(words, sides) if side]
    return f"The miniature {'; it '.join(parts)}."


def claims(experiment, found):
    """[(what the paper, or what later work says, does it hold here?)], decided by the numbers."""
    v = lambda setting, metric="greedy": found[experiment, setting, metric][1]
    is_ = lambda a, how, b, metric="greedy": compared(v(a, metric), v(b, metric)) == how
    settings = list(dict.fromkeys(setting for e, setting, _ in found if e == experiment))
    if experiment == "training":
        return [(f"EM-RL {r} comes close to RLOO or beats it (greedy)", not is_(f"EM-RL {r}", "below", "RLOO")) for r in REWARDS] + [
            ("EM-FT improves greedy decoding", is_("EM-FT", "above", "base")),
            ("EM-FT improves sampling at T = 1", is_("EM-FT", "above", "base", "T = 1")),
            ("SFT gains less than EM-FT", is_("SFT", "below", "EM-FT")),
            ("SC-RL stays under EM-RL token", is_("SC-RL", "below", "EM-RL token")),
            ("a random reward gains nothing", not is_("control: random", "above", "base")),
            ("a reward for length gains nothing", not is_("control: length", "above", "base"))]
    if experiment == "decoding":
        cost = np.mean(v("em-inf", "FLOPs")) / np.mean(v("self-consistency", "FLOPs"))
        return [("EM-INF beats sampling at the same temperature", is_("em-inf", "above", "sample", "accuracy")),
                ("EM-INF beats greedy decoding", is_("em-inf", "above", "greedy", "accuracy")),
                ("EM-INF beats adaptive temperature", is_("em-inf", "above", "adaptive-temperature", "accuracy")),
                (f"EM-INF is not below self-consistency at about a third of its compute (here {cost:.2f})",
                 cost < 0.4 and not is_("em-inf", "below", "self-consistency", "accuracy")),
                ("refinement does not beat greedy decoding", not is_("refine", "above", "greedy", "accuracy"))]
    if experiment == "kl":
        strong = [x for x in settings if float(x) > 0.1]
        return [(f"β = {x} costs much of the gain", is_(x, "below", "0.001")) for x in strong] + [
            ("no KL at all is as good as β = 0.001", is_("0", "level with", "0.001"))]
    if experiment == "rollouts":
        return [(f"{n} responses a prompt are no better than 4", not is_(n, "above", "4")) for n in settings if int(n) > 4]
    if experiment == "norm":
        return [(f"the released mean does better than the formulas' sum ({r})", is_(f"{r}, mean", "above", f"{r}, sum")) for r in REWARDS]
    if experiment == "delta":
        best = max(settings, key=lambda x: np.mean(v(x, "accuracy")))
        return [(f"δ between 0.1 and 0.5 is best (here {best})", 0.1 <= float(best) <= 0.5)]
    if experiment == "descent":
        last = max(settings, key=int)
        enough = [n for n in settings if 5 <= int(n) < int(last)]
        return [(f"{n} steps are enough (not below {last})", not is_(n, "below", last, "accuracy")) for n in enough] + [
            (f"fewer than 3 ({n}) are not enough", is_(n, "below", last, "accuracy")) for n in settings if int(n) < 3]
    if experiment == "rise":
        return [(f"accuracy falls after its peak ({x})", compared(v(x), v(x, "peak greedy")) == "below") for x in settings] + [
            (f"the guard stops before greedy accuracy has fallen ({x})", compared(v(x, "greedy there"), v(x, "peak greedy")) != "below")
            for x in settings if not np.isnan(v(x, "guard stops at step")).any()]
    if experiment == "fails":
        shares = [x for x in settings if x.isdigit()]
        gain = lambda share: np.concatenate([v(f"{share}, {reward}", f"gain {key}") for reward in REWARDS for key in ("greedy", "T = 1")])
        right = sum(v(x, f"sign right ({key})")[0] for x in shares for key in ("greedy", "T = 1"))
        return [("EM helps where confident answers are right", compared(gain(shares[0]), [0.0]) == "above"),
                ("EM does not help where they are wrong", compared(gain(shares[-1]), [0.0]) != "above"),
                (f"one can tell before training (here in {right:.0f} of {2 * len(shares)} cases)", right == 2 * len(shares))]
    most = max((metric for _, _, metric in found if metric.startswith("pass@")), key=lambda metric: int(metric[5:]))
    return [(f"EM-RL {r} lowers the calibration error", is_(f"EM-RL {r}", "below", "base", "ECE")) for r in REWARDS] + [
        (f"{x} costs diversity ({most} falls)", is_(x, "below", "base", most)) for x in SHARPENED if x.startswith("EM")]


def table(experiment, found, settings, metrics, first):
    """Markdown; a setting without a metric leaves its cell empty."""
    units = {metric: unit for (e, _, metric), (unit, _) in found.items() if e == experiment}
    title = lambda metric: f"{metric}, {units[metric]}" if units[metric] in ("nats/token", "nats", "tokens", "1e9") else metric
    labels = {"base": ""} | {name: "yes" if reads else "no" for name, (_, reads) in METHODS.items()} if experiment == "training" else {}
    rows = [[first] + ["labels"] * bool(labels) + [title(metric) for metric in metrics if metric in units]]
    rows.append(["---"] * len(rows[0]))
    for setting in settings:
        cells = [found.get((experiment, setting, metric)) for metric in metrics if metric in units]
        rows.append([setting] + [labels.get(setting)] * bool(labels) + [cell(*x) if x else "" for x in cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def report(found, minutes, seeds, command):
    """The text of findings.md."""
    git = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()
    changed = " + uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    lines = ["# Findings on the tiny model", "", f"Made by `{command}` at commit {git('rev-parse', '--short', 'HEAD')}{changed}: mean ± sd "
             f"of {seeds} seed{'s' * (seeds > 1)}, torch {torch.__version__}, transformers {transformers.__version__}; {minutes:.0f} "
             f"minutes of work, each job on one of {os.cpu_count()} CPU cores. tiny/findings.csv has every seed's numbers."]
    for experiment, (heading, first, metrics, paper) in TABLES.items():
        settings = list(dict.fromkeys(setting for e, setting, _ in found if e == experiment))
        if not settings:
            continue
        if experiment == "fails":
            settings = sorted((x for x in settings if x.isdigit()), key=int, reverse=True)
        lines += ["", f"## {heading}", "", table(experiment, found, settings, metrics.split("|"), first)]
        if experiment == "fails":
            pairs = [f"{share}, {reward}" for share in settings for reward in REWARDS]
            lines += ["", "What EM-RL then gained:", "", table(experiment, found, pairs, ["gain greedy", "gain T = 1"], f"{first}; reward")]
        lines += ["", paper, "", verdict(claims(experiment, found))]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------------- the figures

STYLES = [("#12355b", "-", "o"), ("#d1495b", "--", "s"), ("#2e8b57", "-.", "^"), ("#7b5ea7", ":", "D"),
          ("#666666", (0, (5, 1, 1, 1, 1, 1)), "v"), ("#b8860b", (0, (1, 1)), "P")]


def middle(found, experiment, settings, metric, scale=100):
    """(means, sds) over seeds, in percent unless `scale` says otherwise."""
    values = [scale * np.array(found[experiment, setting, metric][1]) for setting in settings]
    return [x.mean() for x in values], [x.std(ddof=1) if len(x) > 1 else 0 for x in values]


def spread(values, gap, top=np.inf):
    """Positions near the values, in their order, at least `gap` apart and not above `top`."""
    order, places = np.argsort(values, kind="stable"), np.sort(np.array(values, float))
    for _ in range(500):
        places = np.minimum(places, top)
        for i in range(len(places) - 1):
            push = max(0, gap - (places[i + 1] - places[i])) / 2
            places[i], places[i + 1] = places[i] - push, places[i + 1] + push
    return places[np.argsort(order, kind="stable")]


def label_ends(axis, x, ends, labels, gap=0.08, side="left"):
    """Name the lines at their ends, moved apart where they would overlap; `gap` is a share of the axis' height, `side` that of the text
    where the line is."""
    low, high = axis.get_ylim()
    for y, place, text, style in zip(ends, spread(ends, gap * (high - low), high), labels, STYLES):
        offset = 9 if side == "left" else -9, (place - y) / (high - low) * axis.bbox.height * 72 / axis.figure.dpi
        axis.annotate(text, (x, y), offset, textcoords="offset points", color=style[0], va="center", ha=side)


def figures(found, rises, folder):
    """findings-*.png of the experiments that there are."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.titlesize": 10.5, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.grid": True, "grid.alpha": 0.25})
    have = {experiment for experiment, _, _ in found}
    settings_of = lambda experiment: list(dict.fromkeys(setting for e, setting, _ in found if e == experiment))

    def save(figure, name):
        figure.savefig(folder / f"findings-{name}.png", dpi=130)
        plt.close(figure)

    if "training" in have:
        figure, axis = plt.subplots(figsize=(9, 4.6), layout="constrained")
        names = ["base", *METHODS]
        for metric, (color, _, marker), offset in zip(("greedy", "T = 1"), STYLES, (-0.12, 0.12)):
            means, sds = middle(found, "training", names, metric)
            axis.errorbar(means, np.arange(len(names)) + offset, xerr=sds, color=color, marker=marker, linestyle="", capsize=3,
                          markerfacecolor=color if metric == "greedy" else "white")
            axis.annotate(metric, (means[0], 0), (0, 9), textcoords="offset points", color=color, ha="center")
            axis.axvline(means[0], color=color, linestyle=":", linewidth=1)
        ticks = ["base"] + [f"{name} (labels)" if reads else name for name, (_, reads) in METHODS.items()]
        axis.set(yticks=range(len(names)), yticklabels=ticks, ylim=(len(names) - 0.5, -0.9), xlim=(0, 103), title="After training",
                 xlabel="held-out accuracy, %; dotted: the base model")
        save(figure, "training")

    panels = [x for x in ("kl", "rollouts", "delta", "descent") if x in have]
    if panels:
        figure, axes = plt.subplots(1, len(panels), figsize=(2.5 * len(panels), 3.1), layout="constrained", sharey=True, squeeze=False)
        titles = dict(kl=("EM-RL token", "weight β of the KL"), rollouts=("EM-RL sequence", "responses a prompt, N"),
                      delta=("EM-INF, 10 steps", "δ, nats"), descent=("EM-INF, δ = 0.3", "steps of descent"))
        for axis, experiment in zip(axes[0], panels):
            settings = settings_of(experiment)
            metrics = ("greedy", "T = 1") if experiment in SWEEPS else ("accuracy",)
            for metric, (color, line, marker) in zip(metrics, STYLES if len(metrics) == 2 else STYLES[1:]):
                means, sds = middle(found, experiment, settings, metric)
                axis.errorbar(range(len(settings)), means, sds, color=color, linestyle=line, marker=marker, capsize=3)
                below = metric != "greedy" and means[0] > 12
                axis.annotate("T = 1" if metric == "accuracy" else metric, (0, means[0]), (-4, -16 if below else 8), color=color,
                              textcoords="offset points")
            axis.set(xticks=range(len(settings)), xticklabels=settings, xlabel=titles[experiment][1], title=titles[experiment][0],
                     xlim=(-0.4, len(settings) - 0.6), ylim=(0, 112))
        axes[0][0].set(ylabel="held-out accuracy, %", yticks=range(0, 101, 20))
        save(figure, "ablations")

    if rises:
        figure, axes = plt.subplots(2, 2, figsize=(9.6, 6), layout="constrained", sharex=True)
        kinds = [("val_greedy", "accuracy, greedy", "share right, %", 100), ("val_sampled", "accuracy, T = 1", "share right, %", 100),
                 ("entropy", "entropy of its own samples", "nats per token", 1), ("length", "length of its own samples", "tokens", 1)]
        for axis, (key, title, unit, scale) in zip(axes.flat, kinds):
            ends = []
            for (setting, runs), (color, line, _) in zip(rises.items(), STYLES):
                steps = [row["step"] for row in runs[0] if row[key] != ""]
                values = scale * np.array([[row[key] for row in rows if row[key] != ""] for rows in runs])
                mean, sd = values.mean(0), values.std(0, ddof=1) if len(runs) > 1 else 0 * values[0]
                axis.plot(steps, mean, color=color, linestyle=line, linewidth=1.8)
                axis.fill_between(steps, mean - sd, mean + sd, color=color, alpha=0.15, linewidth=0)
                for stop in filter(None, map(guard_stop, runs)):
                    axis.plot(stop, np.interp(stop, steps, mean), marker="X", markersize=8, color=color, markeredgecolor="white")
                ends.append(mean[-1])
            top = 105 if scale == 100 else None
            axis.set(title=title, ylabel=unit, ylim=(0, top))
            axis.set_ylim(0, axis.get_ylim()[1])
            label_ends(axis, steps[-1], ends, rises)
        for axis in axes[1]:
            axis.set_xlabel(f"step; X: where the guard, at {GUARD:.0f}, would stop a run")
        save(figure, "rise")

    if "fails" in have:
        shares = sorted((int(x) for x in settings_of("fails") if x.isdigit()))
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.4), layout="constrained", sharey=True, width_ratios=(1.25, 1))
        kinds = [(reward, metric) for metric in ("greedy", "T = 1") for reward in REWARDS]
        surer, low, high = (middle(found, "fails", map(str, shares), key)[0] for key in ("right is surer", "from", "to"))
        ends = []
        intervals = np.array([np.subtract(surer, low), np.subtract(high, surer)])
        for (reward, metric), (color, line, marker) in zip(kinds, STYLES):
            means, sds = middle(found, "fails", [f"{share}, {reward}" for share in shares], f"gain {metric}")
            left.errorbar(shares, means, sds, color=color, linestyle=line, marker=marker, capsize=3)
            right.errorbar(surer, means, sds, intervals, color=color, linestyle="", marker=marker, capsize=2, elinewidth=0.8)
            ends.append(means[-1])
        bottom, top = left.get_ylim()
        left.set(xlabel="confident answers that are right, %", ylabel="EM-RL's gain, points", xticks=shares, xlim=(-10, 110),
                 ylim=(bottom, top + 0.22 * (top - bottom)), title="Gain, and what the diagnosis said before")
        places = spread(surer, 0.13 * np.subtract(*right.get_xlim()[::-1]))
        for x, share in enumerate(shares):
            word = cell(*found["fails", str(share), "diagnosis"]).replace("likely ", "likely\n")
            left.text(share, left.get_ylim()[1], word, ha="center", va="top", fontsize=9)
            right.text(places[x], left.get_ylim()[1], f"{share} %", ha="center", va="top", fontsize=9,
                       bbox=dict(facecolor="white", edgecolor="none", pad=1))
        right.set(xlabel="pairs in which the right answer is the surer, % (bars: 95 %)", title="The same gain against the diagnosis")
        for axis in left, right:
            axis.axhline(0, color="black", linewidth=1)
        right.axvline(50, color="black", linewidth=1)
        label_ends(left, shares[-1], ends, map(", ".join, kinds))
        save(figure, "fails")

    if "diversity" in have:
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained", width_ratios=(1.5, 1))
        ks = sorted({int(metric[5:]) for e, _, metric in found if e == "diversity" and metric.startswith("pass@")})
        ends = []
        for name, (color, line, marker) in zip(SHARPENED, STYLES):
            means, sds = zip(*(middle(found, "diversity", [name], f"pass@{k}") for k in ks))
            left.errorbar(range(len(ks)), np.ravel(means), np.ravel(sds), color=color, linestyle=line, marker=marker, capsize=3)
            ends.append(means[0][0])
        left.set(xticks=range(len(ks)), xticklabels=ks, xlabel="k answers a problem at T = 1", ylabel="pass@k, %", ylim=(None, 103),
                 title="One right answer among k", xlim=(-0.45 * len(ks), len(ks) - 0.8))
        label_ends(left, 0, ends, SHARPENED, 0.065, "right")  # at k = 1, since at the other end they meet
        means, sds = middle(found, "diversity", SHARPENED, "ECE", 1)
        right.barh(range(len(SHARPENED)), means, xerr=sds, color=[style[0] for style in STYLES], height=0.6, capsize=3)
        right.set(yticks=range(len(SHARPENED)), yticklabels=SHARPENED, ylim=(len(SHARPENED) - 0.5, -0.5), title="Calibration",
                  xlabel="expected calibration error at T = 1")
        save(figure, "diversity")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the settings under QUICK: one seed, fewer steps, problems and values")
    parser.add_argument("--seeds", type=int, help=f"seeds 1 to SEEDS (default: {FULL['seeds']}; with --quick {QUICK['seeds']})")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="jobs at a time, one core each (default: all cores, %(default)s)")
    parser.add_argument("--only", default=",".join(TABLES), help="experiments, with commas (default: all, %(default)s)")
    parser.add_argument("--measure", metavar="JSON", help="one measurement, in a process of its own; this is how the script starts them")
    args = parser.parse_args()
    if args.measure:
        os.chdir(ROOT)
        spec = json.loads(args.measure)
        return write(Path(spec["out"]), json.dumps({"spec": spec, "result": measure(spec)}, indent=1) + "\n")
    settings, only = QUICK if args.quick else FULL, args.only.split(",")
    seeds = settings["seeds"] if args.seeds is None else args.seeds
    if unknown := set(only) - set(TABLES):
        sys.exit(f"findings.py: --only {', '.join(sorted(unknown))}: there are {', '.join(TABLES)}")
    if min(seeds, args.jobs) < 1:
        sys.exit(f"findings.py: --seeds {seeds} and --jobs {args.jobs}: 1 or more")
    os.chdir(ROOT)
    folder = Path("runs/findings-quick" if args.quick else "runs/findings")
    folder.mkdir(parents=True, exist_ok=True)
    for name in "train.jsonl", "test.jsonl":  # copies, since prepare.py writes the originals again while others would read them
        if not (folder / name).exists():
            write(folder / name, (ROOT / "tiny" / name).read_text())
    jobs, uses = plan(settings, range(1, seeds + 1), folder, only)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        work = execute(jobs, args.jobs, folder)
    except KeyboardInterrupt:
        sys.exit(f"findings.py: stopped; go on with: python tiny/findings.py {' '.join(sys.argv[1:])}".rstrip())
    except RuntimeError as error:
        sys.exit(f"findings.py: {error}")
    found, rises = collect(jobs, uses)
    shipped = not args.quick and set(only) == set(TABLES)
    text = report(found, work / 60, seeds, f"python tiny/findings.py {' '.join(sys.argv[1:])}".strip())
    write((Path("tiny") if shipped else folder) / "findings.md", text)
    write_csv((Path("tiny") if shipped else folder) / "findings.csv", found)
    figures(found, rises, Path("assets") if shipped else folder)
    print(text)


if __name__ == "__main__":
    main()
