"""
What the README says about the tiny model, measured: the paper's tables in miniature, the questions
that its readers ask, and where entropy minimisation goes wrong.

    python findings/findings.py          # 3 seeds: an hour and a half on 2 CPU cores
    python findings/findings.py --quick  # all in little, with one seed

An experiment has settings, for example the weights of the KL. `plan` lists, for each setting and
seed, a job and which of the numbers that the job finds belong to the setting. The jobs are runs of
em_rl.py, em_ft.py, tiny/prepare.py and measure.py, as many at a time as there are cores. Their
results go to runs/findings/ (with --quick to runs/findings-quick/). A finished job is not
done again: after Ctrl-C the same command goes on. Remove the folder to measure everything anew, for
example after a change of tiny/base.

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
from report import DELTAS, fill, made_by, read_csv, sign_of_gains, write_csv

from em_inf import DECODERS, SHARPENERS
from engine.arguments import Help, positive_int
from engine.files import replace_file
from engine.run import command, read_rows
from tasks.scores import CONFIDENCE

ROOT = Path(__file__).resolve().parent.parent
FULL = dict(seeds=(1, 2, 3), problems=512, steps=40, zoo_steps=100, habits=1500, school=1,
            batches=1000)  # `problems` are held out; `school` divides the steps of pretraining
QUICK = dict(seeds=(1,), problems=64, steps=4, zoo_steps=8, habits=50, school=20, batches=20)
# experiment; setting or method; script and flags. What several share is run once
RUNS = """\
training; SFT; em_ft.py --loss sft
training; RLOO; em_rl.py --reward correct
training; GRPO; em_rl.py --reward correct --advantage grpo
training; SC-RL; em_rl.py --reward consistency
training; EM-FT; em_ft.py
training; EM-FT + KL; em_ft.py --beta 0.001
training; EM-FT + KL, N = 4; em_ft.py --beta 0.001 --rollouts 4
training; EM-RL sequence; em_rl.py --reward sequence
training; EM-RL token; em_rl.py --reward token
training; control: random; em_rl.py --reward random
training; control: length; em_rl.py --reward length
kl; 0; em_rl.py --reward token --beta 0
kl; 0.001; em_rl.py --reward token
kl; 0.5; em_rl.py --reward token --beta 0.5
kl; 1.5; em_rl.py --reward token --beta 1.5
rollouts; 2; em_rl.py --reward sequence --rollouts 2
rollouts; 4; em_rl.py --reward sequence
rollouts; 8; em_rl.py --reward sequence --rollouts 8
rollouts; 16; em_rl.py --reward sequence --rollouts 16
norm; token, mean; em_rl.py --reward token
norm; token, sum; em_rl.py --reward token --reward-norm sum
norm; sequence, mean; em_rl.py --reward sequence
norm; sequence, sum; em_rl.py --reward sequence --reward-norm sum
coef; 0.1; em_rl.py --reward token --entropy-coef=0.1
coef; 0.001; em_rl.py --reward token --entropy-coef=0.001
coef; 0; em_rl.py --reward token
coef; -0.01; em_rl.py --reward token --entropy-coef=-0.01
coef; -0.1; em_rl.py --reward token --entropy-coef=-0.1
coef; exact; em_rl.py --reward token --entropy-coef exact
labels; correct; em_rl.py --reward correct
labels; token; em_rl.py --reward token
labels; correct+token; em_rl.py --reward correct+token
labels; correct+sequence; em_rl.py --reward correct+sequence
several; EM-FT; em_ft.py
several; token; em_rl.py --reward token
several; sequence; em_rl.py --reward sequence
several; token, β = 0.5; em_rl.py --reward token --beta 0.5
several; token, c = 0.01; em_rl.py --reward token --entropy-coef 0.01
several; EM-FT, β = 0.5; em_ft.py --beta 0.5
several; correct; em_rl.py --reward correct
fails; token; em_rl.py --reward token
fails; sequence; em_rl.py --reward sequence
capability; EM-FT; em_ft.py
capability; token; em_rl.py --reward token
capability; sequence; em_rl.py --reward sequence
"""
ZOO = (  # rewards; each at the default learning rate and at ten times that
    "token", "sequence", "self-certainty", "majority", "consistency", "empo", "correct",
    "format", "random", "length", "token --entropy-coef exact", "token --beta 0.5",
)
DIVERSE = "SFT", "RLOO", "EM-FT", "EM-RL token", "EM-RL sequence"  # of "training", 16 answers each
SHARES = 100, 75, 50, 25, 0  # percent of the problems whose confident answers are right
SCHOOLS = 500, 1000, 2000, 4000, 8000  # steps of pretraining; the last is tiny/base
AS_TINY = (  # what the scripts set by themselves for tiny/base, and for no other model
    "--lr 1e-4 --prompts 64 --max-new-tokens 64 --budget 8192 --rollout-batch 256 "
    "--no-recompute"
)
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


def runs_of(*experiments):
    """Triples of experiment, setting and script with flags, of RUNS."""
    rows = [line.split("; ") for line in RUNS.splitlines()]
    return [row for row in rows if row[0] in experiments]


def forecast(settings, experiment, name, base):
    """What a base model's answers forecast, and what each method then gains from there."""
    model, after = (base.out, [base]) if base else ("tiny/base", [])
    asked = ask(settings, f"answers {experiment} {name}", model, *after, seed=1, n=8)
    yield experiment, f"{name}", asked, "answers"
    for _, method, flags in runs_of(experiment):
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
    for experiment, method, flags in runs_of("several"):
        run = train(settings, flags, seed, base, data=base.out)
        yield experiment, method, ask_trained(settings, run, **spec), "answers"


def training(settings, seed):
    """Runs from tiny/base, and answers of the models that they make."""
    asked = ask(settings, f"answers base {seed}", "tiny/base", seed=seed, n=16)
    yield "training", "base", train(settings, "em_rl.py --reward token", seed), "base"
    yield "training", "base", asked, "pass@4"
    yield "diversity", "base", asked, "answers"
    for reward in CONFIDENCE:
        yield "surest", reward, asked, reward
    experiments = "training", "kl", "rollouts", "norm", "coef", "labels"
    for experiment, setting, flags in runs_of(*experiments):
        run = train(settings, flags, seed, every=5 if experiment == "labels" else 10)
        yield experiment, setting, run, "run"
        if experiment == "training":
            asked = ask_trained(settings, run, seed=seed, n=16 if setting in DIVERSE else 4)
            yield "training", setting, asked, "pass@4"
            if setting in DIVERSE:
                yield "diversity", setting, asked, "answers"


def zoo(settings, seed):
    """Long runs without the guard: where does each reward rise and fall?"""
    for name in ZOO:
        for speed, lr in ("", "1e-4"), (", fast", "1e-3"):
            flags = f"em_rl.py --reward {name} --prompts 32 --guard 0 --lr {lr}"
            if speed or seed == 1:  # little happens at the default rate: one seed is enough
                run = train(settings, flags, seed, steps=settings["zoo_steps"])
                yield "zoo", name.replace(" --", ", ") + speed, run, "run"


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
