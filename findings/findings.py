"""
What the README says about the tiny model, measured: the paper's tables in miniature, what its
readers still asked for, and where entropy minimisation goes wrong.

    python findings/findings.py                     # 3 seeds: an hour and a half on 2 CPU cores
    python findings/findings.py --quick             # all in little, with one seed
    python findings/findings.py --only training,kl  # some of the experiments

Runs em_rl.py, em_ft.py, prepare.py and measurements of its own, as many at a time as there are
cores. All of it goes to runs/findings/ (--quick: runs/findings-quick/), and what is there is
not made again: after Ctrl-C the same command goes on. Remove the folder to start afresh, say
after a change of tiny/base.

At the end it writes each seed's numbers to findings/findings.csv, figures to assets/, and puts the
numbers into findings/findings.md, README.md and course/README.md, whose comments say which number
belongs where. With --quick or --only the first three go to the folder of the runs, and the
committed files stay as they are.
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
from report import DELTAS, fill, made_by, read_csv, sign_of_gains, write_csv

from em_inf import DECODERS, SHARPENERS
from engine.arguments import Help, comma_list, positive_int
from engine.files import replace_file
from engine.run import command, read_rows
from tasks.errors import UserError
from tasks.scores import CONFIDENCE

ROOT = Path(__file__).resolve().parent.parent
FULL = dict(seeds=3, problems=512, steps=40, zoo_steps=100, habits=1500, school=1, batches=1000)
QUICK = dict(seeds=1, problems=64, steps=4, zoo_steps=8, habits=50, school=20, batches=20)
TOKEN, SEQUENCE = "em_rl.py --reward token", "em_rl.py --reward sequence"
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
    "coef": {
        "0.1": f"{TOKEN} --entropy-coef=0.1",
        "0.001": f"{TOKEN} --entropy-coef=0.001",
        "0": TOKEN,
        "-0.01": f"{TOKEN} --entropy-coef=-0.01",
        "-0.1": f"{TOKEN} --entropy-coef=-0.1",
        "exact": f"{TOKEN} --entropy-coef exact",
    },
    "labels": {
        "correct": "em_rl.py --reward correct",
        "token": TOKEN,
        "correct+token": "em_rl.py --reward correct+token",
        "correct+sequence": "em_rl.py --reward correct+sequence",
    },
}
DIVERSE = "SFT", "RLOO", "EM-FT", "EM-RL token", "EM-RL sequence"  # asked for diversity
ZOO = (
    "token", "sequence", "self-certainty", "majority", "consistency", "empo", "correct",
    "format", "random", "length", "token --entropy-coef exact", "token --beta 0.5",
)
METHODS = {"EM-FT": "em_ft.py", "token": TOKEN, "sequence": SEQUENCE}
SEVERAL = METHODS | {
    "token, β = 0.5": f"{TOKEN} --beta 0.5",
    "token, c = 0.01": f"{TOKEN} --entropy-coef 0.01",
    "EM-FT, β = 0.5": "em_ft.py --beta 0.5",
    "correct": "em_rl.py --reward correct",
}
SHARES = 100, 75, 50, 25, 0  # percent of the problems whose confident answers are right
SCHOOLS = 500, 1000, 2000, 4000, 8000  # steps of pretraining; the last is tiny/base
WORLD = (  # what a model other than tiny/base must be told
    "--lr 1e-4 --prompts 64 --max-new-tokens 64 --budget 8192 --rollout-batch 256 "
    "--no-recompute"
)
DECODE = f"{DECODERS},adaptive-temperature+self-consistency,em-inf+refine".split(",")
DECODINGS = {  # experiment: {setting: (decoder, settings of EM-INF)}
    "decoding": {decoder: (decoder, {}) for decoder in DECODE},
    "descent": {f"{steps}": ("em-inf", {"steps": steps}) for steps in (1, 3, 5, 10, 15)},
    "shift": {name: (name, {}) for name in ("greedy", "sample", *SHARPENERS)},
    "threshold": {"none": ("sample", {})}
    | {name: ("em-inf", {"delta": delta}) for name, delta in DELTAS.items()},
}
FAMILIES = {  # experiment: {family of problems: what `chain` is told}
    "shift": {f"{length}": {"lengths": [length]} for length in range(3, 11)},
    "threshold": {
        "short": {"lengths": [2, 3]},
        "long": {"lengths": [5, 6]},
        "sums": {"signs": "+-"},
        "products": {"signs": "*"},
    },
}
ESTIMATORS = "sequence", "token", "token + exact", "entropy's own"  # of a gradient

# ------------------------------------------------------------------------------- the plan


def plan(settings, folder):
    """All that is measured: yields (experiment, setting, job, part), for each seed. The numbers
    of a setting are that part of what the job has found (`result_of`)."""
    seeds = range(1, settings["seeds"] + 1)

    def job(name, command, *after):
        return Job(folder / re.sub(r"[^\w.=-]+", "-", name), command.split(), after)

    def train(flags, seed, world=None, data="tiny", steps=settings["steps"], every=10):
        flags = f"{flags} --steps {steps} --eval-every {every} --seed {seed}"
        command = f"{flags} --device cpu --val-size {settings['problems']}"
        if world is None:
            return job(flags, command)
        command += f" --model {world.out} --data {data}/train.jsonl --val {data}/test.jsonl"
        return job(f"{world.out.name} {flags}", f"{command} {WORLD}", world)

    def ask(name, *after, **spec):
        spec["problems"] = settings["problems"]
        command = ["findings/measure.py", json.dumps(spec)]
        return job(f"{name}.json", "", *after)._replace(command=command)

    def trained_and_asked(name, world, methods, experiment):
        """A base model's answers, and what each method makes of it."""
        model, after = ("tiny/base", ()) if world is None else (str(world.out), (world,))
        asked = ask(f"answers {experiment} {name}", *after, model=model, seed=1, n=8)
        yield experiment, name, asked, "answers"
        for method, flags in methods.items():
            reward = "sequence" if method == "sequence" else "token"
            yield experiment, f"{name}, {method}", asked, reward
            for seed in seeds:
                yield experiment, f"{name}, {method}", train(flags, seed, world), "gains"

    # worlds whose confident answers are right on a share of the problems
    habits = f"--habit-steps {settings['habits']}"
    worlds = {}
    for share in SHARES:
        flags = f"--start tiny/base {habits} --aligned {share / 100}"
        worlds[share] = job(f"world {share}", f"tiny/prepare.py {flags}")
        methods = {"token": TOKEN, "sequence": SEQUENCE}
        yield from trained_and_asked(f"{share}", worlds[share], methods, "fails")
    # base models of different ability
    for steps in SCHOOLS:
        flags = f"{habits} --steps {steps // settings['school']}"
        world = None if steps == 8000 else job(f"school {steps}", f"tiny/prepare.py {flags}")
        yield from trained_and_asked(f"{steps}", world, METHODS, "capability")
    # a world of several right answers
    world = job("world several", f"tiny/prepare.py --start tiny/base {habits} --several")
    data = str(world.out)
    for seed in seeds:
        spec = dict(seed=seed, n=16, data=f"{data}/test.jsonl")
        asked = ask(f"several base {seed}", world, model=data, **spec)
        yield "several", "base", asked, "answers"
        for method, flags in SEVERAL.items():
            run = train(flags, seed, world, data)
            asked = ask(f"answers {run.out.name}", run, model=f"{run.out}/checkpoint", **spec)
            yield "several", method, asked, "answers"
    # tiny/base
    for seed in seeds:
        asked = ask(f"answers base {seed}", model="tiny/base", seed=seed, n=16)
        yield "training", "base", train(TOKEN, seed), "base"
        yield "training", "base", asked, "pass@4"
        yield "diversity", "base", asked, "answers"
        for reward in CONFIDENCE:
            yield "surest", reward, asked, reward
        for name in ZOO:
            for speed, lr in ("", "1e-4"), (", fast", "1e-3"):
                flags = f"em_rl.py --reward {name} --prompts 32 --guard 0 --lr {lr}"
                run = train(flags, seed, steps=settings["zoo_steps"])
                if speed or seed == 1:  # little happens at the default rate
                    yield "zoo", name.replace(" --", ", ") + speed, run, "run"
        for experiment, runs in RUNS.items():
            for setting, flags in runs.items():
                every = 5 if experiment == "labels" else 10
                yield experiment, setting, train(flags, seed, every=every), "run"
        for method, flags in RUNS["training"].items():
            run = train(flags, seed)
            n = 16 if method in DIVERSE else 4
            name = f"answers {run.out.name}"
            asked = ask(name, run, model=f"{run.out}/checkpoint", seed=seed, n=n)
            yield "training", method, asked, "pass@4"
            if method in DIVERSE:
                yield "diversity", method, asked, "answers"
        for experiment, decoders in DECODINGS.items():
            families = FAMILIES.get(experiment, {})
            spec = dict(seed=seed, decoders=decoders)
            asked = ask(f"{experiment} {seed}", model="tiny/base", **spec, families=families)
            for setting in families or decoders:
                yield experiment, setting, asked, setting
        world = worlds[0]  # its confident answers are wrong
        spec = dict(seed=seed, decoders=DECODINGS["threshold"], model=str(world.out))
        asked = ask(f"misaligned {seed}", world, **spec, families={"misaligned": {}})
        yield "threshold", "misaligned", asked, "misaligned"
    for norm in "sum", "mean":
        flags = f"findings/variance.py --norm {norm} --batches {settings['batches']}"
        variance = job(f"variance {norm}.json", flags)
        for estimator in ESTIMATORS:
            yield "variance", f"{estimator}, {norm}", variance, estimator


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
    add("--seeds", type=positive_int, help="seeds 1 to SEEDS, not those under FULL or QUICK")
    add("--jobs", type=positive_int, default=os.cpu_count(), help="at a time, one core each")
    add("--only", type=comma_list, help="experiments, with commas; without it all of them")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    settings = QUICK if args.quick else FULL
    settings = settings | {"seeds": args.seeds or settings["seeds"]}
    folder = Path("runs/findings-quick" if args.quick else "runs/findings")
    folder.mkdir(parents=True, exist_ok=True)
    uses = list(plan(settings, folder))
    known = list(dict.fromkeys(experiment for experiment, *_ in uses))
    for experiment in args.only or []:
        if experiment not in known:
            parser.error(f"--only {experiment}: there are {', '.join(known)}")
    uses = [use for use in uses if use[0] in (args.only or known)]
    try:
        seconds = execute([job for _, _, job, _ in uses], args.jobs, folder)
    except KeyboardInterrupt:
        sys.exit("findings.py: stopped; the same command goes on")
    except (UserError, RuntimeError) as error:
        sys.exit(f"findings.py: {error}")
    found = collect(uses)
    curves, models = {}, {"base": "tiny/base"}
    for experiment, setting, job, part in uses:
        if experiment == "zoo":
            curves.setdefault(setting, []).append(read_rows(job.out / "metrics.csv"))
        elif part == "run" and setting in ("EM-FT", "EM-RL token", "RLOO"):
            models.setdefault(setting, job.out / "checkpoint")  # of the first seed
    command = " ".join(["python findings/findings.py", *sys.argv[1:]])
    texts = {
        "made by": made_by(command, settings["seeds"], seconds / 60),
        "examples": examples(models),
    }
    shipped = not args.quick and not args.only
    tables, pictures = (Path("tiny"), Path("assets")) if shipped else (folder, folder)
    write_csv(tables / "findings.csv", found)
    found = read_csv(tables / "findings.csv")  # rounded, and the texts must agree with it
    report = fill(Path("findings/findings.md").read_text(encoding="utf-8"), found, texts)
    replace_file(tables / "findings.md", report)
    draw_all(found, curves, pictures)
    if shipped:
        for path in Path("README.md"), Path("course/README.md"):
            replace_file(path, fill(path.read_text(encoding="utf-8"), found))
    print(report)


if __name__ == "__main__":
    main()
