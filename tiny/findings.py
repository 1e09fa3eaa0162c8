"""
What the README says about the tiny model, measured: the paper's tables in miniature, and where entropy minimisation goes wrong.

    python tiny/findings.py                     # 3 seeds: 65 minutes on 2 CPU cores
    python tiny/findings.py --quick             # every experiment in little, 1 seed: 6 minutes
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
import fcntl
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
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval as ev
import run
from em_inf import DECODERS, AdaptiveTemperature, EMInf
from report import REWARDS, SHARPENED, TABLES, VERDICTS, figures, guard_stop, idea, report

FULL = dict(seeds=3, steps=40, every=10, val=512, samples=16, kl=(0, 0.001, 0.5, 1.5), rollouts=(2, 4, 8, 16),
            delta=(0.05, 0.1, 0.3, 0.5, 1.0), descent=(1, 3, 5, 10, 15), rise_steps=100, rise_every=10,
            worlds=(100, 75, 50, 25, 0), habit_steps=1500, diagnosed=512, answers=8)
QUICK = dict(seeds=1, steps=8, every=8, val=64, samples=8, kl=(0, 0.001, 1.5), rollouts=(2, 4), delta=(0.05, 0.3, 1.0),
             descent=(1, 10), rise_steps=20, rise_every=5, worlds=(100, 50, 0), habit_steps=150, diagnosed=64, answers=8)
TOKEN, SEQUENCE = "em_rl.py --reward token", "em_rl.py --reward sequence"
METHODS = {  # name in the table: script and flags
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
}
SWEEPS = {"kl": (TOKEN, "--beta", 0.001), "rollouts": (SEQUENCE, "--rollouts", 4)}  # the default's run is that of the training table
SUM = " --reward-norm sum"
NORMS = {"token, mean": TOKEN, "token, sum": TOKEN + SUM, "sequence, mean": SEQUENCE, "sequence, sum": SEQUENCE + SUM}
FAST = " --lr 1e-3"  # ten times the default: a fall within minutes
RISE = {"token": TOKEN, "token, fast": TOKEN + FAST, "token, fast, β = 0.5": f"{TOKEN + FAST} --beta 0.5", "sequence, fast": SEQUENCE + FAST}
DECODE = f"{DECODERS},adaptive-temperature+self-consistency,em-inf+refine".split(",")
WORLD = "--lr 1e-4 --prompts 64 --max-new-tokens 64 --budget 8192 --no-checkpointing"  # what a model other than tiny/base must be told

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
            base = dict(name=f"evaluate base {seed}", model="tiny/base", **evaluate(s["samples"]))
            ask(experiment, "base", **base)
            for method, flags in METHODS.items():
                if experiment == "training" or method in SHARPENED:
                    name = train(experiment, f"{method} run", flags, seed, steps)
                    ask(experiment, method, f"evaluate {name}", after=[name], model=str(folder / name / "checkpoint"),
                        **evaluate(s["samples"] if method in SHARPENED else 4))
        for experiment, (flags, option, default) in SWEEPS.items():
            for value in s[experiment]:
                train(experiment, str(value), flags if value == default else f"{flags} {option} {value}", seed, steps)
        for setting, flags in NORMS.items():
            train("norm", setting, flags, seed, steps)
        ask("rise", "base", **base)
        for setting, flags in RISE.items():
            train("rise", setting, flags, seed, f"--guard 0 --steps {s['rise_steps']} --eval-every {s['rise_every']}")
        decode = dict(kind="decode", model="tiny/base", seed=seed, problems=s["val"])
        ask("decoding", "all", f"decoding {seed}", 40, **decode, decoders={name: [name, {}] for name in DECODE})
        for experiment, key in ("delta", "delta"), ("descent", "steps"):
            ask(experiment, "all", f"{experiment} {seed}", 20, **decode, decoders={str(v): ["em-inf", {key: v}] for v in s[experiment]})
        for share in s["worlds"]:
            name = f"world-{share}-{s['habit_steps']}"
            for reward, flags in zip(REWARDS, (TOKEN, SEQUENCE)):
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
    s = ev.summary(samples)
    result = {"pass": {1: s["accuracy"], **s["pass"]}} | ev.diagnosis(answers("greedy"), samples)
    for reward, (key, sign) in ev.CONFIDENCE.items():
        for name, right in ("worked, right", True), ("worked, wrong", False):
            own = [sign * x[key] for x in samples if "=" in x["response"] and x["correct"] == right]
            result["rewards"][reward][name] = float(np.mean(own)) if own else np.nan
    return result


def write(path, text):
    """Replaced in one go: a kill at any moment leaves the old file or the new one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


def finished(job):
    return job["done"].exists() and ("spec" not in job or json.loads(job["done"].read_text())["spec"] == job["spec"])


def lock(folder):
    """An open file that locks the folder until it is closed, in every job that inherits it too: those of a killed findings.py go on."""
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"findings.py: {folder} is in use by another findings.py, or by jobs of one that was killed: wait for them, or end them")
    return file


def start(job, logs, held):
    """A job's process: from its beginning, or a training run from its checkpoint. It holds the lock as long as it runs."""
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
                                start_new_session=True, pass_fds=[held.fileno()])


def execute(jobs, at_a_time, folder):
    """Run what is not finished, the long ones first. Raises RuntimeError for the first that fails; the others end with it."""
    held = lock(folder)
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
                running[start(jobs[ready[0]], folder / "logs" / ready[0], held)] = ready[0], time.time()
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
        held.close()
    return sum(seconds.get(name, 0) for name in jobs)


# ------------------------------------------------------------------------------------------------------------- the numbers


def evaluated(rows):
    return [row for row in rows if row["val_greedy"] != ""]

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
        "ECE": ("", r["ece"]), "AUROC": ("", r["rewards"]["token"]["auroc"]), "distinct answers": ("count", r["distinct"]),
        "greedy": ("share", r["greedy"])}


def of_surest(r):
    return {f"surest of {k}": ("share", share) for k, share in r["surest"].items()} | {
        key: ("nats/token", r[key]) for key in ("worked, right", "worked, wrong") if key in r}


def of_diagnosis(r):
    return {metric: ("change of share", r[key]) for metric, key in {"forecast": "drift", "from": "low", "to": "high"}.items()} | {
        "AUROC": ("", r["auroc"]), "diagnosis": ("sign", VERDICTS[r["verdict"]])}


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
            elif experiment == "rise" and result:
                for reward in REWARDS:
                    keep(experiment, f"base, {reward}", of_surest(result["rewards"][reward]))
            elif experiment == "fails" and result:
                share = setting.removesuffix(" diagnosis")
                keep(experiment, share, {"greedy": ("share", result["greedy"]), "T = 1": ("share", result["sampled"]),
                                         "majority over greedy": ("change of share", result["majority"] - result["greedy"])})
                for reward in REWARDS:
                    keep(experiment, f"{share}, {reward}", of_diagnosis(result["rewards"][reward]) | of_surest(result["rewards"][reward]))
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
    for setting in [setting for e, setting, metric in found if (e, metric) == ("fails", "forecast")]:
        for key in "greedy", "T = 1":  # a gain of 2 points or less has no sign: 512 problems leave that much open
            gain, forecast = (float(np.mean(found["fails", setting, metric][1])) for metric in (f"gain {key}", "forecast"))
            keep("fails", setting, {f"sign right ({key})": ("yes", np.nan if abs(gain) <= 0.02 else gain * forecast > 0)})
    order = {setting: i for i, setting in enumerate(["base", *METHODS])}  # the training table's; the others are as planned
    return dict(sorted(found.items(), key=lambda item: (list(TABLES).index(item[0][0]), order.get(item[0][1], 0)))), rises

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
    idea(Path("assets/idea.png") if shipped else folder / "idea.png")
    print(text)


if __name__ == "__main__":
    main()
