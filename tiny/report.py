"""
Tables, sentences and figures from what findings.py has measured. Nothing is run here, but for the base model in the first figure.

`found` is {(experiment, setting, metric): (unit, values by seed)}, the contents of findings.csv.
"""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval as ev
import run

LABELLED = "SFT", "RLOO", "GRPO"  # training reads labels
REWARDS = "token", "sequence"
GUARD = 4.0  # the default of --guard
SHARPENED = "base", "SFT", "RLOO", "EM-FT", "EM-RL token", "EM-RL sequence"
VERDICTS = {"likely helps": 1, "too close to call": 0, "harms": -1}
UNITS = {"share": ".1%", "change of share": "+.1%", "nats/token": ".3f", "tokens": ".1f", "1e9": ".2f", "factor": ".2f",
         "seconds": ".1f", "": ".3f", "count": ".1f"}  # how a table shows them
TRAINED = "greedy|T = 1|entropy|length|FLOPs"
FIGURES = {"training": "training", "kl": "ablations", "rise": "rise", "fails": "fails", "diversity": "diversity"}  # experiment: picture above its table
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
        "Rise and fall (fast: ten times the learning rate)", "EM-RL", "peak at step|peak greedy|greedy|T = 1|length|guard stops at step|greedy there",
        "The paper stops after about 100 steps by validation accuracy; later work finds that such rewards improve a model for some steps "
        "and then ruin it."),
    "fails": (
        "When it fails", "confident answers that are right, %", "greedy|T = 1|majority over greedy",
        "The paper: EM-RL takes Qwen2.5-Math-7B from 24.9 to 42.9, Llama-3.1-8B-Instruct on MATH from 40.6 to no more than 41.6; its sign "
        "of that is best-of-4 over greedy, +13.4 % against +7.5 %."),
    "diversity": (
        "Calibration and diversity, T = 1", "model", "greedy|pass@1|pass@2|pass@4|pass@8|pass@16|distinct answers|ECE|AUROC",
        "The paper (AMC, Qwen2.5-Math-7B): ECE 64.9 before EM-RL, 43.5 (sequence) and 44.7 (token) after; pass@k it does not report."),
}
MORE = {  # a second table: (its heading, is a setting in it?, first column, metrics)
    "rise": ("Asked of the base model before training: what is a worked answer paid, right or wrong, and how often is the surest of k answers "
             "right? The harder a reward is pushed, the further to the right in its row a model should end:",
             lambda setting: setting.startswith("base"), "reward",
             "worked, right|worked, wrong|surest of 1|surest of 2|surest of 4|surest of 8|surest of 16"),
    "fails": ("What the diagnosis forecasts (accuracy at T = 1, of the first 0.1 nats of KL a response, with its 95 % interval), and what "
              "EM-RL then gained. A gain within 2 points has no sign:", lambda setting: "," in setting, "confident answers that are right, %; reward",
              "forecast|from|to|diagnosis|AUROC|surest of 2|surest of 4|surest of 8|gain greedy|gain T = 1|sign right (greedy)|sign right (T = 1)"),
}


def guard_stop(rows, factor=GUARD):
    """The step after which the guard would have ended a run with these rows; None: never."""
    return next((rows[i - 1]["step"] for i in range(1, len(rows) + 1) if run.collapsed(rows[:i], factor)), None)


def cell(unit, values):
    """Mean ± sd as a table shows them."""
    if unit == "sign":
        return {value: word for word, value in VERDICTS.items()}[values[0]]
    if unit == "yes":
        return "no sign" if np.isnan(values[0]) else "yes" if values[0] else "no"
    if unit == "step":
        return ", ".join("never" if np.isnan(value) else f"{value:.0f}" for value in values)
    values = [value for value in values if not np.isnan(value)]
    if not values:
        return ""
    return f"{np.mean(values):{UNITS[unit]}}" + (f" ± {np.std(values, ddof=1):{UNITS[unit].strip('+')}}" if len(values) > 1 else "")


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
        runs = [x for x in settings if not x.startswith("base")]
        surest = {r: [v(f"base, {r}", metric) for e, x, metric in found if (e, x) == (experiment, f"base, {r}") and metric.startswith("surest")]
                  for r in REWARDS}
        falls = lambda r: compared(surest[r][-1], max(surest[r], key=np.mean)) == "below"
        return [(f"accuracy falls after its peak ({x})", compared(v(x), v(x, "peak greedy")) == "below") for x in runs] + [
            (f"the guard stops before greedy accuracy has fallen ({x})", compared(v(x, "greedy there"), v(x, "peak greedy")) != "below")
            for x in runs if not np.isnan(v(x, "guard stops at step")).any()] + [
            (f"the base model's surest of k foretell {'a' if falls(r) else 'no'} fall ({r}, fast)",
             falls(r) == (compared(v(f"{r}, fast"), v(f"{r}, fast", "peak greedy")) == "below")) for r in REWARDS]
    if experiment == "fails":
        shares = [x for x in settings if x.isdigit()]
        gain = lambda share: np.concatenate([v(f"{share}, {reward}", f"gain {key}") for reward in REWARDS for key in ("greedy", "T = 1")])
        signs = [v(f"{x}, {reward}", f"sign right ({key})")[0] for x in shares for reward in REWARDS for key in ("greedy", "T = 1")]
        right, there = np.nansum(signs), np.sum(~np.isnan(signs))
        return [("EM helps where confident answers are right", compared(gain(shares[0]), [0.0]) == "above"),
                ("EM does not help where they are wrong", compared(gain(shares[-1]), [0.0]) != "above"),
                (f"one can tell before training (the forecast has the sign of {right:.0f} of the {there} gains that have one)", right == there)]
    most = max((metric for _, _, metric in found if metric.startswith("pass@")), key=lambda metric: int(metric[5:]))
    return [(f"EM-RL {r} lowers the calibration error", is_(f"EM-RL {r}", "below", "base", "ECE")) for r in REWARDS] + [
        (f"{x} costs diversity ({most} falls)", is_(x, "below", "base", most)) for x in SHARPENED if x.startswith("EM")]


def table(experiment, found, settings, metrics, first):
    """Markdown; a setting without a metric leaves its cell empty."""
    units = {metric: unit for (e, _, metric), (unit, _) in found.items() if e == experiment}
    title = lambda metric: f"{metric}, {units[metric]}" if units[metric] in ("nats/token", "nats", "tokens", "1e9") else metric
    labels = {name: "yes" if name in LABELLED else "" if name == "base" else "no" for name in settings} if experiment == "training" else {}
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
        more, inside, label, others = MORE.get(experiment, ("", lambda setting: False, "", ""))
        lines += ["", f"## {heading}"]
        if experiment in FIGURES:
            lines += ["", f"![{heading}](../assets/findings-{FIGURES[experiment]}.png)"]
        lines += ["", table(experiment, found, [x for x in settings if not inside(x)], metrics.split("|"), first)]
        if more:
            lines += ["", more, "", table(experiment, found, list(filter(inside, settings)), others.split("|"), label)]
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
        names = settings_of("training")
        for metric, (color, _, marker), offset in zip(("greedy", "T = 1"), STYLES, (-0.12, 0.12)):
            means, sds = middle(found, "training", names, metric)
            axis.errorbar(means, np.arange(len(names)) + offset, xerr=sds, color=color, marker=marker, linestyle="", capsize=3,
                          markerfacecolor=color if metric == "greedy" else "white")
            axis.annotate(metric, (means[0], 0), (0, 9), textcoords="offset points", color=color, ha="center")
            axis.axvline(means[0], color=color, linestyle=":", linewidth=1)
        ticks = [f"{name} (labels)" if name in LABELLED else name for name in names]
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
            metrics = ("greedy", "T = 1") if experiment in ("kl", "rollouts") else ("accuracy",)
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
        ks = [metric for e, x, metric in found if (e, x) == ("rise", f"base, {REWARDS[0]}") and metric.startswith("surest")]
        figure, axes = plt.subplots(2, 2, figsize=(9.6, 6), layout="constrained")
        kinds = [("val_greedy", "accuracy, greedy", "share right, %", 100), ("val_sampled", "accuracy, T = 1", "share right, %", 100),
                 ("entropy", "entropy of its own samples", "nats per token", 1)]
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
            axis.set(title=title, xlabel="step", ylabel=unit, ylim=(0, 105 if scale == 100 else None))
            label_ends(axis, steps[-1], ends, rises)
        axis, ends = axes[1][1], []
        for reward, (color, line, marker) in zip(REWARDS, (STYLES[1], STYLES[3])):  # those of the fast runs
            means, sds = zip(*(middle(found, "rise", [f"base, {reward}"], k) for k in ks))
            axis.errorbar(range(len(ks)), np.ravel(means), np.ravel(sds), color=color, linestyle=line, marker=marker, capsize=3)
            axis.annotate(f"the surest by\n{reward}", (len(ks) - 1, means[-1][0]), (9, 0), textcoords="offset points", color=color, va="center")
        axis.set(title="before training: is the surest of k right?", xlabel="k answers of the base model", ylabel="share right, %", ylim=(0, 105),
                 xticks=range(len(ks)), xticklabels=[k.split()[-1] for k in ks])
        save(figure, "rise")

    if "fails" in have:
        shares = sorted((int(x) for x in settings_of("fails") if x.isdigit()))
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.4), layout="constrained", width_ratios=(1.25, 1))
        kinds, ends = [(reward, metric) for metric in ("greedy", "T = 1") for reward in REWARDS], []
        for (reward, metric), (color, line, marker) in zip(kinds, STYLES):
            settings = [f"{share}, {reward}" for share in shares]
            means, sds = middle(found, "fails", settings, f"gain {metric}")
            left.errorbar(shares, means, sds, color=color, linestyle=line, marker=marker, capsize=3)
            ends.append(means[-1])
            if metric == "T = 1":
                forecast, low, high = (middle(found, "fails", settings, key)[0] for key in ("forecast", "from", "to"))
                right.errorbar(forecast, means, sds, [np.subtract(forecast, low), np.subtract(high, forecast)], color=color, linestyle="",
                               marker=marker, capsize=2)
                side = dict(token=(7, -10, "left", "▲"), sequence=(-7, 5, "right", "◆"))[reward]
                for x, y, share in zip(forecast, means, shares):
                    right.annotate(f"{share} %", (x, y), side[:2], textcoords="offset points", color=color, fontsize=9, ha=side[2])
                right.text(0.5, 0.08 + 0.08 * (reward == "token"), f"{side[3]} reward {reward}", transform=right.transAxes, color=color)
        left.set(xlabel="confident answers that are right, %", ylabel="EM-RL's gain, points", xticks=shares, xlim=(-8, 108), title="What EM-RL gains")
        right.set(xlabel="forecast: the first 0.1 nats of KL, points", ylabel="EM-RL's gain at T = 1, points",
                  title="T = 1, and what the diagnosis had said")
        right.axvline(0, color="black", linewidth=1)
        for axis in left, right:
            axis.axhline(0, color="black", linewidth=1)
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


def idea(path, prompt="Mod 10, left to right: 9+5-2-3+8-9+7"):
    """idea.png: the entropy of every token of three answers that the base model gives to one problem of the test set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    model, tokenizer = ev.load_model(str(ROOT / "tiny/base"), "cpu")
    ids, problem = ev.encode_prompt(tokenizer, prompt), next(p for p in ev.load_problems(ROOT / "tiny/test.jsonl") if p["prompt"] == prompt)
    torch.manual_seed(0)
    responses = ev.generate(model, [ids] * 16, ev.stop_ids(model, tokenizer), 64)
    entropy, _, _ = ev.score_all(model, ev.output_head(model, ids), [ids] * 16, responses)
    kinds = {"works step by step": lambda text: "=" in text, "blurts": lambda text: text[0] == "\\", "rambles": lambda text: text[1] == ","}
    figure, axes = plt.subplots(3, 1, figsize=(9.6, 5.2), layout="constrained", sharex=True, sharey=True)
    for axis, (kind, fits), (color, *_) in zip(axes, kinds.items(), [STYLES[2], STYLES[1], STYLES[4]]):
        texts = [tokenizer.decode(response, skip_special_tokens=True) for response in responses]
        i = next(i for i, text in enumerate(texts) if fits(text) and ev.is_correct(text, problem) == (kind == "works step by step"))
        tokens, values = [tokenizer.decode([token]).replace("<|endoftext|>", "end").strip() for token in responses[i]], entropy[i][-len(responses[i]):]
        axis.bar(range(len(tokens)), values, color=color, width=0.75)
        axis.set_title(f"{kind}: {values.mean():.2f} nats per token, {'right' if ev.is_correct(texts[i], problem) else 'wrong'}", loc="left", color=color)
        for x, token in enumerate(tokens):
            axis.text(x, -0.12, token.replace("\\boxed{", "box{"), ha="center", va="top", fontsize=9, rotation=90 if len(token) > 3 else 0)
        axis.set(xticks=[], xlim=(-0.7, 51.9), ylim=(0, 2.4), ylabel="nats")
        axis.grid(axis="x", visible=False)
    figure.suptitle(f"{prompt}     How unsure is the model of each token of its answer?", fontsize=10.5)
    figure.savefig(path, dpi=130)
    plt.close(figure)
