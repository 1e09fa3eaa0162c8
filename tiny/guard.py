"""
When to stop, without labels: is there a signal that sees when a run begins to fall?

    python tiny/guard.py   # 56 runs of some 80 s each, as many at a time as there are cores

em_rl.py trains the tiny model with nine rewards at ten times its learning rate ("fast"), where a
fall comes within minutes, and with five of them at its own ("slow"), for 100 steps: from tiny/base
("base"), and from a model whose confident answers are right for half of the problems only ("half",
of prepare.py --aligned 0.5), with seeds 1 and 2. `signals` has what each step shows without labels.
The runs go to runs/guard/, and what is finished there is kept: after Ctrl-C the same command goes
on. At the end it writes tiny/guard.md.

The rule was written down before a run of the judging half was looked at:

- A signal is the mean of a candidate over the last 3 steps. It stops a run at the first step, from
  the third on, where it is above a threshold or, if low values are bad, below a share of its
  highest value so far, or of its value in the first 3 steps.
- Greedy accuracy is that of 256 held-out problems, every 5 steps. That of a stop is the last one
  measured before it.
- A stop is late if greedy is then 5 points or more below its peak until then. A run that is never
  stopped is late if it ends 5 points or more below its peak.
- A stop is early if greedy is later more than 2 points above that of the stop.
- Half of the runs choose: seed 1 from "base" and seed 2 from "half". Each candidate gets the
  threshold that stops none of them early and the fewest late, and of several the middle one. The
  candidate with the fewest late stops is the best; of several it is the first in the table.
- The other runs judge. The best becomes the guard if it stops none of them early, and at most half
  as many late as without a guard.
"""
import argparse
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from jobs import Job, execute

import em_rl
from entropy import output_head, score_all
from eval import generate, load_model, stop_ids
from tasks.answers import last_box
from tasks.arguments import Help, positive_int
from tasks.files import replace_file
from training.run import read_rows

ROOT = Path(__file__).resolve().parent.parent
STEPS = 100  # of a run
BUDGET = 3.0  # nats a response: a fixed budget of KL, judged beside the candidates
REWARDS = "token sequence self-certainty majority exact consistency random length format".split()
CANDIDATES = {  # name: how a threshold stops a run
    "kl_response": "above",  # KL to the model that the run began with, nats a response
    "kl_token": "above",  # the same, nats a token
    "agreement": "above",  # share of the most common answer in a group, mean over groups
    "top_answer": "above",  # share of the most common answer over all prompts
    "base_greedy": "below, of its highest",  # share that has the initial model's greedy answer
    "answer_entropy": "below, of its first",  # entropy of the answers over all prompts, nats
    "dependence_token": "below, of its highest",  # log-prob less that under another prompt, nats
    "dependence_response": "below, of its highest",  # the same of a whole response
    "distinct": "below, of its first",  # share of the responses that differ
}

# ------------------------------------------------------------------------------- the runs


def signals(model, base, tokenizer, prompts, responses, logprobs, n):
    """{candidate: number} of a step, from B prompts (token ids), the n responses to each, side by
    side, and their log-probs (B*n, T) in nats. Answers are compared as text; over all prompts to
    have none counts as one. A response's other prompt is the next one of the batch."""
    same = [prompt for prompt in prompts for _ in range(n)]
    other = same[n:] + same[:n]
    head, base_head = output_head(model, prompts[0]), output_head(base, prompts[0])
    _, base_logprobs, mask = score_all(base, base_head, same, responses)
    _, other_logprobs, _ = score_all(model, head, other, responses)
    kl = logprobs.sum(1) - base_logprobs.sum(1)  # (B*n,)
    dependence = logprobs.sum(1) - other_logprobs.sum(1)
    greedy, _, _ = generate(base, prompts, stop_ids(base, tokenizer), 64, temperature=0, rows=256)
    greedy = tokenizer.batch_decode(greedy, skip_special_tokens=True)
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    boxes = [last_box(text) for text in texts]
    shares = torch.tensor(list(Counter(boxes).values())).double() / len(boxes)
    agree = agree_with_base = 0
    for i, text in enumerate(greedy):
        counts = Counter(boxes[i * n : (i + 1) * n])
        del counts[None]  # having no answer is no agreement
        agree += max(counts.values(), default=0)
        agree_with_base += counts[last_box(text)]
    return {
        "kl_response": kl.mean().item(),
        "kl_token": (kl.sum() / mask.sum()).item(),
        "agreement": agree / len(boxes),
        "top_answer": shares.max().item(),
        "base_greedy": agree_with_base / len(boxes),
        "answer_entropy": -(shares * shares.log()).sum().item(),
        "dependence_token": (dependence.sum() / mask.sum()).item(),
        "dependence_response": dependence.mean().item(),
        "distinct": len(set(texts)) / len(boxes),
    }


def watched(rows, folder):
    """A `generate` for em_rl.py that notes each step's signals in `rows`, and changes nothing.
    The folder has the model that the run begins with."""
    base, tokenizer = load_model(folder, "cpu")

    def generate_and_note(model, prompts, *args, n, **settings):
        responses, entropy, logprobs = generate(model, prompts, *args, n=n, **settings)
        with torch.random.fork_rng([]):
            seen = signals(model, base, tokenizer, prompts, responses, logprobs, n)
        rows.append({"step": len(rows) + 1} | seen)
        return responses, entropy, logprobs

    return generate_and_note


def train(folder):
    """Make the run that the folder's name says, and its candidates.csv."""
    shutil.rmtree(folder, ignore_errors=True)  # what was interrupted
    reward, rate, world, seed = folder.name.rsplit("-", 3)
    reward = reward.replace("exact", "token --entropy-coef exact")
    flags = f"--reward {reward} --lr {1e-3 if rate == 'fast' else 1e-4} --seed {seed} --guard 0 "
    flags += f"--steps {STEPS} --save-every {STEPS} --val-size 256 --device cpu --out"
    model = ROOT / "tiny/base" if world == "base" else folder.parent / "half"
    rows = []
    em_rl.TINY["model"] = str(model)  # both models want the same settings
    em_rl.generate = watched(rows, model)
    em_rl.main([*flags.split(), str(folder)])
    lines = [",".join(rows[0])]
    for row in rows:
        lines.append(",".join(map(str, row.values())))
    replace_file(folder / "candidates.csv", "\n".join(lines) + "\n")


# ---------------------------------------------------------------------- the rule, and the tables


class Run(NamedTuple):
    greedy: dict  # {step: percent}
    kl: list  # nats a response, mean over 3 steps; from step 0 on, where it is 0
    alarms: dict  # {candidate: its highest signal so far, from step 3 on}; a stop is for good
    early: np.ndarray  # points of greedy that a stop at step 0, 1, 2 ... loses by being too early,
    late: np.ndarray  # and by being too late; the last place is that of no stop at all


def read_run(folder):
    """A share that a signal should not fall below is negative, so that more is always worse.
    Raises ValueError where a file is damaged."""
    rows = read_rows(folder / "candidates.csv")
    signals, alarms, early, late = {}, {}, [], []
    for name, kind in CANDIDATES.items():
        values = np.array([row[name] for row in rows])
        signal = np.array([values[max(0, i - 2) : i + 1].mean() for i in range(len(rows))])
        signals[name] = signal
        if kind == "below, of its highest":
            signal = -signal / np.maximum.accumulate(signal)
        elif kind == "below, of its first":
            signal = -signal / signal[2]
        alarms[name] = np.maximum.accumulate(signal[2:])
    metrics = read_rows(folder / "metrics.csv")
    greedy = {row["step"]: 100 * row["val_greedy"] for row in metrics if "val_greedy" in row}
    for stop in range(len(rows) + 2):
        until = [value for step, value in greedy.items() if step <= stop]
        after = [value for step, value in greedy.items() if step > stop]
        early.append(max([until[-1], *after]) - until[-1])
        late.append(max(until) - until[-1])
    kl = [0, *signals["kl_response"]]
    return Run(greedy, kl, alarms, early=np.array(early), late=np.array(late))


def stop_at(run, name, threshold):
    """The step at which one or several thresholds stop a run; its length + 1 if they never do."""
    return np.searchsorted(run.alarms[name], threshold, side="right") + 3


def judge(runs, name, threshold):
    """How many runs one or several thresholds stop (early, late)."""
    stops = [stop_at(run, name, threshold) for run in runs]
    early = sum(run.early[stop] > 2 for run, stop in zip(runs, stops))
    late = sum(run.late[stop] >= 5 for run, stop in zip(runs, stops))
    return early, late


def choose(runs, name):
    """A candidate's threshold, by the rule. The highest one stops no run, so none early."""
    thresholds = np.unique(np.concatenate([run.alarms[name] for run in runs]))
    early, late = judge(runs, name, thresholds)
    tied = thresholds[(early == 0) & (late == late[early == 0].min())]
    return tied[np.abs(tied - (tied[0] + tied[-1]) / 2).argmin()]


def markdown(rows):
    """A table of rows of cells, the heads first."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def table_of_runs(runs, best, threshold):
    rows = ["run|peak at step|greedy, %|at the end|KL at the peak, nats|at the end".split("|")]
    for guard in best, f"{BUDGET:g} nats":
        rows[0] += [f"{guard}: stop at step", "lost early, points", "lost late"]
    for name, run in runs.items():
        peak, end = max(run.greedy, key=run.greedy.get), max(run.greedy)
        numbers = run.greedy[peak], run.greedy[end], run.kl[peak], run.kl[end]
        cells = [f"{number:.1f}" for number in numbers]
        for stop in stop_at(run, best, threshold), stop_at(run, "kl_response", BUDGET):
            cells += ["never" if stop > end else stop]
            cells += [f"{run.early[stop]:.1f}", f"{run.late[stop]:.1f}"]
        rows.append([name, peak, *cells])
    return markdown(rows)


def report(runs):
    """guard.md, from {name: Run}."""
    choosing, judging = {}, {}
    for name, run in runs.items():
        half = choosing if name.endswith(("base-1", "half-2")) else judging
        half[name] = run
    guards = {name: (name, choose(choosing.values(), name)) for name in CANDIDATES}
    guards |= {"KL budget": ("kl_response", BUDGET), "no guard": ("kl_response", np.inf)}
    rows = ["guard|stops|threshold|choosing: early|late|judging: early|late".split("|")]
    counts = {}
    for guard, (name, x) in guards.items():
        counts[guard] = *judge(choosing.values(), name, x), *judge(judging.values(), name, x)
        rows.append([guard, CANDIDATES[name], f"{abs(x):.3g}", *counts[guard]])
    best = min(CANDIDATES, key=lambda name: counts[name][1])
    early, late = counts[best][2:]
    falls = counts["no guard"][3]
    passes = early == 0 and late <= falls / 2
    text = (f"Without a guard {falls} of {len(judging)} judging runs are late. The best candidate, "
            f"`{best}`, stops {early} early and {late} late: it "
            f"{'becomes the guard' if passes else 'fails, and there is no new guard'}.")
    if not passes:
        early, late = counts["KL budget"][2:]
        text += (" What remains is to watch the KL to the initial model, with care: a fixed budget "
                 f"of {BUDGET:g} nats a response stops {early} early and {late} late.")
    peaks = []
    for run in runs.values():
        peak = max(run.greedy, key=run.greedy.get)
        if run.greedy[peak] > run.greedy[0] + 2:
            peaks.append(run.kl[peak])
    if peaks:
        text += (f" Where greedy gains more than 2 points ({len(peaks)} runs), the KL at its peak "
                 f"is {min(peaks):.1f} to {max(peaks):.1f} nats a response.")
    for name, run in runs.items():
        if name.startswith("random"):
            stop = stop_at(run, *guards[best])
            text += (f"\n- The control {name} loses {run.late[-1]:.0f} points without a guard, and "
                     f"{run.late[stop]:.0f} with `{best}`.")
    parts = ["# When to stop, without labels", "Written by `python tiny/guard.py`, which says:"]
    parts += [f"```text\n{__doc__.strip()}\n```", "## The candidates", markdown(rows), text]
    parts += ["## The choosing half", table_of_runs(choosing, *guards[best])]
    parts += ["## The judging half", table_of_runs(judging, *guards[best])]
    return "\n\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--jobs", type=positive_int, default=os.cpu_count(), help="runs at a time, one core each")
    add("--train", action="store_true", help="one run; so the script calls itself")
    add("--out", "--resume", type=Path, default="runs/guard", help="folder of the runs, or "
        "with --train of the one run")
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.train:
        return train(args.out.resolve())
    half = Job(args.out / "half", "tiny/prepare.py --start tiny/base --aligned 0.5".split(), ())
    jobs = []
    for seed in 1, 2:
        for world, needed in ("base", ()), ("half", (half,)):
            names = [f"{reward}-fast-{world}-{seed}" for reward in REWARDS]
            names += [f"{reward}-slow-{world}-{seed}" for reward in REWARDS[:5]]
            for name in names:
                jobs.append(Job(args.out / name, ["tiny/guard.py", "--train"], needed))
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        execute(jobs, args.jobs, args.out)
        runs = {job.out.name: read_run(job.out) for job in jobs}
    except KeyboardInterrupt:
        sys.exit("guard.py: stopped; the same command goes on")
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"guard.py: {error}")
    text = report(runs)
    replace_file(ROOT / "tiny/guard.md", text)
    print(text)


if __name__ == "__main__":
    main()
