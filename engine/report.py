"""
The end of a run, for people: a table, three problems before and after, and a figure.
"""
import functools
import json
import math
import sys
from pathlib import Path

import numpy as np

from engine.files import append_jsonl, read_config, read_jsonl, replace_file
from tasks.scores import calibration_of, summary

SAMPLE = {int: "step", str: "set prompt response"}  # the fields of a line of samples.jsonl


def summarize(folder, rows, size):
    """Print base, peak and final accuracy on `size` held-out problems, what follows from them, and
    three problems; write result.json."""
    settings = read_config(folder)
    measured = [row for row in rows if "val_greedy" in row]
    result, peak = {}, None
    if measured:
        peak = max(measured, key=lambda row: (row["val_greedy"], row["step"]))
        first = "first" if measured[0]["step"] else "base"  # --val may have come later
        which = {first: measured[0], "peak": peak, "final": measured[-1]}
        print("\n| held out | step | greedy | T = 1 |\n|---|---|---|---|")
        for name, row in which.items():
            result[name] = {key: row[key] for key in ("step", "val_greedy", "val_sampled")}
            shares = f"{row['val_greedy']:.1%} | {row['val_sampled']:.1%}"
            print(f"| {name} | {row['step']} | {shares} |")
    replace_file(folder / "result.json", json.dumps(result, indent=1) + "\n")
    if measured:
        print("\nThe final model is the last one; no labels chose it. To find the peak "
              "needs labels.")
        for line in losses(measured[0], peak, measured[-1], size, settings):
            print(line)
        show_samples(folder, measured[-1]["step"])
    else:
        print("\nNobody has looked whether the model got better or worse: there were no held-out "
              "problems. Give some by --val, or compare it with the base model by eval.py.")
    print(f"\nmodel: {folder / 'checkpoint'}, figure: {folder / 'plot.png'}")
    if settings["keep_best"]:
        print(f"best on the held-out set, as labels say: {kept(folder / 'best', peak)}")


def losses(first, peak, final, size, settings):
    """What to say of a run that ends below its beginning, or below its peak by more than chance: a
    list of lines. Chance is the 95 % interval of a difference of two shares of `size` problems."""
    lines = []
    start, top, end = first["val_greedy"], peak["val_greedy"], final["val_greedy"]

    def chance(a, b):
        return 1.96 * math.sqrt((a * (1 - a) + b * (1 - b)) / size)

    if end < start:
        before = f"that of step {first['step']}" if first["step"] else "the base model"
        doubt = ", a difference which may be chance" if start - end <= chance(start, end) else ""
        lines.append(f"The final model is worse than {before}: {end:.1%} of the held-out problems "
                     f"are right, greedy, and {start:.1%} were{doubt}.")
    if top > start and top - end > chance(top, end):
        lines.append(f"The final model is well below the peak: {end:.1%} are right, and {top:.1%} "
                     f"were at step {peak['step']}.")
    if lines and "chance" not in lines[-1]:
        exact = ", or --entropy-coef exact" if "entropy_coef" in settings else ""
        lines.append(f"What helps: an --lr below {settings['lr']:g}, fewer --steps, a KL penalty "
                     f"(--beta 0.5){exact}; and --keep-best, which keeps the model of the peak.")
    return lines


def kept(best, peak):
    """What --keep-best has kept in the folder `best`: words for the last line of a run."""
    if not (best / "row.json").exists():
        if peak is None or peak["step"] == 0:
            return "the base model"
        return f"that of step {peak['step']}, which was not kept, as --keep-best came later"
    row = json.loads((best / "row.json").read_text(encoding="utf-8"))
    told = f"{best}, of step {row['step']} ({row['val_greedy']:.1%} greedy)"
    if (row["step"], row["val_greedy"]) != (peak["step"], peak["val_greedy"]):
        told += (". The run was killed after that step and repeated it with another result: its "
                 f"peak is now step {peak['step']}, whose model is not kept")
    return told


def held_out(step, problems, greedy, sampled, folder):
    """What eval.evaluate_held_out writes, prints and gives, from the samples (`eval.graded`)."""
    lines = []
    for problem, sample in list(zip(problems, greedy))[:12]:
        keep = {"response": sample["response"], "correct": sample["correct"]}
        lines.append({"step": step, "set": "held out", "prompt": problem["prompt"]} | keep)
    append_jsonl(folder / "samples.jsonl", lines)
    greedy, sampled = summary(greedy), summary(sampled)
    print(f"step {step} | held-out greedy {greedy['accuracy']:.1%} "
          f"[{greedy['low']:.1%}, {greedy['high']:.1%}] | T = 1 {sampled['accuracy']:.1%}",
          flush=True)
    return {
        "val_greedy": greedy["accuracy"], "val_sampled": sampled["accuracy"],
        "val_entropy": sampled["entropy"], "val_length": greedy["length"],
        "val_truncated": greedy["truncated"],
    }


def show_samples(folder, last_step):
    """Print three held-out problems, those first whose answer has become right or wrong."""
    samples = read_jsonl(folder / "samples.jsonl", SAMPLE)
    samples = [sample for sample in samples if "correct" in sample]  # the held-out ones
    before = [sample for sample in samples if sample["step"] == 0]
    after = [sample for sample in samples if sample["step"] == last_step]
    pairs = sorted(zip(before, after), key=lambda pair: pair[0]["correct"] == pair[1]["correct"])
    for base, trained in pairs[:3]:
        print(f"\n{base['prompt']}")
        for name, sample in (("base", base), ("trained", trained)):
            verdict = "right" if sample["correct"] else "wrong"
            print(f"  {name:8} {verdict}  {sample['response']}")


def no_reason_to_stop(draw):
    """A decorator for what draws a figure into a folder. Where it can't be drawn (a wrong
    MPLBACKEND, a broken matplotlibrc, a file that another program has open) a line says why."""

    @functools.wraps(draw)
    def wrapper(data, folder):
        try:
            import matplotlib

            with matplotlib.rc_context({"text.parse_math": False}):  # a name may have a $ in it
                draw(data, folder)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".split("\n")[0][:160]
            print(f"no figure in {folder}: {reason}", file=sys.stderr)

    return wrapper


def drawable(name):
    """The name of a file whose bytes are no characters here, with their numbers instead."""
    return name.encode(errors="backslashreplace").decode()


@no_reason_to_stop
def plot(rows, folder):
    """Entropy, held-out accuracy and length against steps: plot.png."""
    from matplotlib.figure import Figure  # not pyplot, which would change a notebook's backend

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)

    def line(axis, key, **style):
        measured = [row for row in rows if key in row]
        steps = [row["step"] for row in measured]
        axis.plot(steps, [row[key] for row in measured], **style)

    left, middle, right = axes
    line(left, "entropy", color="C0")
    left.set(title="Entropy of its own samples", ylabel="nats per token", ylim=(0, None))
    line(middle, "val_greedy", color="C2", marker="o", label="greedy")
    line(middle, "val_sampled", color="C1", marker="s", linestyle="--", label="T = 1")
    middle.set(title="Held-out accuracy", ylabel="share right", ylim=(0, 1.02))
    if any("val_greedy" in row for row in rows):
        middle.legend(frameon=False, loc="lower right")
    line(right, "length", color="C4")
    right.set(title="Response length", ylabel="tokens", ylim=(0, None))
    for axis in axes:
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    config = read_config(folder)
    name = drawable("/".join(Path(config["model"]).parts[-2:]))
    what = config.get("reward") or config["loss"]
    figure.suptitle(f"{config['script']}, {what}: {name}", fontsize=10)
    figure.savefig(folder / "plot.png", dpi=130)


@no_reason_to_stop
def reliability_plot(results, folder):
    """Accuracy against confidence, a line for each of {name: samples}, its bins as dots:
    reliability.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="calibrated")
    for i, (name, samples) in enumerate(results.items()):
        ece, rows = calibration_of(samples)
        confidence, accuracy, count = np.transpose(rows)
        axis.plot(confidence, accuracy, color=f"C{i}", label=f"{drawable(name)} (ECE {ece:.2f})")
        area = 8 + 300 * count / len(samples)
        axis.scatter(confidence, accuracy, area, color=f"C{i}", alpha=0.7)
    axis.set_xlabel("confidence: exp(mean log-prob of the answer's tokens)")
    axis.set_ylabel("share right")
    axis.set_title("Is the model as often right as it is sure?")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "reliability.png", dpi=130)
