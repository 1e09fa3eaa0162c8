"""
What the README says about the tiny model, measured: the paper's tables in miniature, the questions
that its readers ask, and where entropy minimisation goes wrong.

    python findings/findings.py          # 3 seeds: an hour and a half on 2 CPU cores
    python findings/findings.py --quick  # all in little, with one seed

An experiment has settings, for example the weights of the KL. experiments.csv has those that are
training runs. `plan` lists, for each setting and seed, a job and which of the numbers that the job
finds belong to the setting. The jobs are runs of em_rl.py, em_ft.py, tiny/prepare.py and
measure.py, as many at a time as there are cores. Their results go to runs/findings/ (with --quick
to runs/findings-quick/). A finished job is not done again: after Ctrl-C the same command goes on.
Remove the folder to measure everything anew, for example after a change of tiny/base.

At the end each seed's numbers go to findings/findings.csv and the figures to assets/. The numbers
are filled into findings/findings.md, README.md and course/README.md, whose comments say which
number belongs where. With --quick the CSV, findings.md and the figures go to the folder of the
runs, and the committed files stay as they are.
"""
import argparse
import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from figures import draw_all
from jobs import Job, execute
from measure import examples, of_run
from report import DELTAS, fill, made_by, read_csv, rows_of, sign_of_gains, write_csv

from em_inf import DECODERS, SHARPENERS
from engine.arguments import Help, positive_int
from engine.files import replace_file
from engine.run import command, read_rows
from tasks.scores import CONFIDENCE

ROOT = Path(__file__).resolve().parent.parent
FULL = dict(seeds=(1, 2, 3), problems=512, steps=40, zoo_steps=100, habits=1500, school=1,
            batches=1000)  # `problems` are held out; `school` divides the steps of pretraining
QUICK = dict(seeds=(1,), problems=64, steps=4, zoo_steps=8, habits=50, school=20, batches=20)
DIVERSE = "SFT", "RLOO", "EM-FT", "EM-RL token", "EM-RL sequence"  # of "training", 16 answers each
SHARES = 100, 75, 50, 25, 0  # percent of the problems whose confident answers are right
SCHOOLS = 500, 1000, 2000, 4000, 8000  # steps of pretraining; the last is tiny/base
# what the scripts set by themselves for tiny/base, and for no other model
AS_TINY = "--lr 1e-4 --prompts 64 --max-new-tokens 64 --budget 8192 --rollout-batch 256"
AS_TINY += " --no-recompute"
DECODE = f"{DECODERS},adaptive-temperature+self-consistency,em-inf+refine".split(",")
DECODINGS = {  # {experiment: {name: (decoder, settings of EM-INF)}}
    "decoding": {decoder: (decoder, {}) for decoder in DECODE},
    "descent": {f"{steps}": ("em-inf", {"steps": steps}) for steps in (1, 3, 5, 10, 15)},
    "shift": {name: (name, {}) for name in ("greedy", "sample", *SHARPENERS)},
    "threshold": {"none": ("sample", {})}
    | {name: ("em-inf", {"delta": delta}) for name, delta in DELTAS.items()},
}
FAMILIES = {  # of problems, {experiment: {setting: arguments of `tiny.prepare.chain`}}
    "shift": {f"{length}": {"lengths": [length]} for length in range(3, 11)},
    "threshold": {
        "short": {"lengths": [2, 3]},
        "long": {"lengths": [5, 6]},
        "sums": {"signs": "+-"},
        "products": {"signs": "*"},
    },
}

# ----------------------------------------------------------------------------- kinds of job


def job(settings, name, command, *after):
    """The job "python COMMAND" (a list), with a place for its results."""
    return Job(settings["folder"] / re.sub(r"[^\w.=-]+", "-", name), command, after)


def habits(settings, name, flags):
    """A base model that learns other habits than tiny/base."""
    command = f"tiny/prepare.py --start tiny/base --habit-steps {settings['habits']} {flags}"
    return job(settings, name, command.split())


def train(settings, flags, seed, base=None, data="tiny", steps=None, every=10):
    """A training run: from tiny/base, or from the model that the job `base` makes."""
    flags += f" --steps {steps or settings['steps']} --eval-every {every} --seed {seed}"
    command = f"{flags} --device cpu --val-size {settings['problems']}"
    if base is None:
        return job(settings, flags, command.split())
    command += f" --model {base.out} --data {data}/train.jsonl --val {data}/test.jsonl {AS_TINY}"
    return job(settings, f"{base.out.name} {flags}", command.split(), base)


def ask(settings, name, model, *after, **spec):
    """A measurement of a model, which the jobs `after` make: `measure` explains `spec`."""
    spec |= {"model": str(model), "problems": settings["problems"]}
    return job(settings, f"{name}.json", ["findings/measure.py", json.dumps(spec)], *after)


def ask_trained(settings, run, **spec):
    return ask(settings, f"answers {run.out.name}", run.out / "checkpoint", run, **spec)


# ---------------------------------------------------------------------- what is measured


def plan(settings):
    """All that is measured: yields (experiment, setting, job, part), for each seed. The numbers
    of the setting are that part of what the job finds (`result_of`)."""
    for share in SHARES:
        base = habits(settings, f"world {share}", f"--aligned {share / 100}")
        yield from forecast(settings, "fails", share, base)
    for steps in SCHOOLS:
        flags = f"--habit-steps {settings['habits']} --steps {steps // settings['school']}"
        base = job(settings, f"school {steps}", f"tiny/prepare.py {flags}".split())
        yield from forecast(settings, "capability", steps, base if steps < 8000 else None)
    for seed in settings["seeds"]:
        yield from several_answers(settings, seed)
        yield from training(settings, seed)
        yield from zoo(settings, seed)
        yield from decoding(settings, seed)
    for norm in "sum", "mean":
        spec = dict(norm=norm, batches=settings["batches"])
        asked = ask(settings, f"variance {norm}", "tiny/base", **spec)
        for estimator in "sequence", "token", "token + exact", "entropy's own":
            yield "variance", f"{estimator}, {norm}", asked, estimator


def runs_of(experiment):
    """Pairs of a setting and its script with flags."""
    return [(row["setting"], row["command"]) for row in rows_of("experiments.csv", experiment)]


def forecast(settings, experiment, name, base):
    """What a base model's answers forecast, and what each method then gains from there."""
    model, after = (base.out, [base]) if base else ("tiny/base", [])
    asked = ask(settings, f"answers {experiment} {name}", model, *after, seed=1, n=8)
    yield experiment, f"{name}", asked, "answers"
    for method, flags in runs_of(experiment):
        reward = "sequence" if method == "sequence" else "token"
        yield experiment, f"{name}, {method}", asked, reward
        for seed in settings["seeds"]:
            yield experiment, f"{name}, {method}", train(settings, flags, seed, base), "gains"


def several_answers(settings, seed):
    """Problems of three right answers each: how many of them does a model find?"""
    base = habits(settings, "world several", "--several")
    spec = dict(seed=seed, n=16, data=f"{base.out}/test.jsonl")
    asked = ask(settings, f"several base {seed}", base.out, base, **spec)
    yield "several", "base", asked, "answers"
    for method, flags in runs_of("several"):
        run = train(settings, flags, seed, base, data=base.out)
        yield "several", method, ask_trained(settings, run, **spec), "answers"


def training(settings, seed):
    """Runs from tiny/base, and answers of the models that they make."""
    asked = ask(settings, f"answers base {seed}", "tiny/base", seed=seed, n=16)
    yield "training", "base", train(settings, "em_rl.py --reward token", seed), "base"
    yield "training", "base", asked, "pass@4"
    yield "diversity", "base", asked, "answers"
    for reward in CONFIDENCE:
        yield "surest", reward, asked, reward
    for setting, flags in runs_of("training"):
        run = train(settings, flags, seed)
        yield "training", setting, run, "run"
        asked = ask_trained(settings, run, seed=seed, n=16 if setting in DIVERSE else 4)
        yield "training", setting, asked, "pass@4"
        if setting in DIVERSE:
            yield "diversity", setting, asked, "answers"
    for experiment in "kl", "rollouts", "norm", "coef", "labels":
        for setting, flags in runs_of(experiment):
            run = train(settings, flags, seed, every=5 if experiment == "labels" else 10)
            yield experiment, setting, run, "run"


def zoo(settings, seed):
    """Long runs without the guard: where does each reward rise and fall?"""
    for name, flags in runs_of("zoo"):
        for speed, lr in ("", "1e-4"), (", fast", "1e-3"):
            if speed or seed == 1:  # little happens at the default rate: one seed is enough
                long = f"{flags} --prompts 32 --guard 0 --lr {lr}"
                run = train(settings, long, seed, steps=settings["zoo_steps"])
                yield "zoo", name + speed, run, "run"


def decoding(settings, seed):
    """Decoders of tiny/base, on the held-out problems or on families of problems."""
    for experiment, decoders in DECODINGS.items():
        families = FAMILIES.get(experiment, {})
        spec = dict(seed=seed, decoders=decoders, families=families)
        asked = ask(settings, f"{experiment} {seed}", "tiny/base", **spec)
        for setting in families or decoders:
            yield experiment, setting, asked, setting
    base = habits(settings, "world 0", "--aligned 0.0")  # its confident answers are wrong
    spec = dict(seed=seed, decoders=DECODINGS["threshold"], families={"misaligned": {}})
    asked = ask(settings, f"misaligned {seed}", base.out, base, **spec)
    yield "threshold", "misaligned", asked, "misaligned"


# ---------------------------------------------------------------------------- the numbers


def result_of(job):
    """{part: {metric: value}} of a finished measurement (see `measure`) or training run."""
    if job.out.suffix == ".json":
        return json.loads(job.out.read_text(encoding="utf-8"))
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
    return found | sign_of_gains(found)


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--quick", action="store_true", help="the settings under QUICK: less of everything")
    add("--jobs", type=positive_int, default=os.cpu_count(), help="at a time, one core each")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    folder = Path("runs/findings-quick" if args.quick else "runs/findings")
    folder.mkdir(parents=True, exist_ok=True)
    settings = (QUICK if args.quick else FULL) | {"folder": folder}
    uses = list(plan(settings))
    seconds = execute([job for _, _, job, _ in uses], args.jobs, folder)
    found = collect(uses)
    curves, models = {}, {"base": "tiny/base"}
    for experiment, setting, job, _ in uses:
        if experiment == "zoo":
            curves.setdefault(setting, []).append(read_rows(job.out / "metrics.csv"))
        if experiment == "training" and setting in ("RLOO", "EM-FT", "EM-RL token"):
            models.setdefault(setting, job.out / "checkpoint")  # of the first seed
    command_line = "python findings/findings.py" + " --quick" * args.quick
    texts = {
        "made by": made_by(command_line, len(settings["seeds"]), seconds / 60),
        "examples": examples(models),
    }
    tables, pictures = (folder, folder) if args.quick else (Path("findings"), Path("assets"))
    write_csv(tables / "findings.csv", found)
    found = read_csv(tables / "findings.csv")  # rounded, and the texts must agree with it
    report = fill(Path("findings/findings.md").read_text(encoding="utf-8"), found, texts)
    replace_file(tables / "findings.md", report)
    draw_all(found, curves, pictures)
    if not args.quick:
        for path in Path("README.md"), Path("course/README.md"):
            replace_file(path, fill(path.read_text(encoding="utf-8"), found))
    print(report)


if __name__ == "__main__":
    main()
