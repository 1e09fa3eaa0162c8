"""
Tables, sentences and figures of what findings.py has measured.

`found` is what findings.csv holds: {(experiment, setting, metric): values by seed}.
"""
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import transformers

matplotlib.use("Agg")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import matplotlib.pyplot as plt

from eval import generate, is_correct, load_model, load_problems
from tasks.prompts import encode_prompt, stop_ids

ROOT = Path(__file__).resolve().parent.parent
REWARDS = "token", "sequence"
LABELS = {"base": "", "SFT": "yes", "RLOO": "yes", "GRPO": "yes"}  # the others read none
KS = 1, 2, 4, 8, 16  # answers to a problem
VERDICTS = {"likely helps": 1, "too close to call": 0, "harms": -1}
UNITS = {  # unit: how a table shows it, and the metrics that have it; all others are shares
    "share": (".1%", ""),
    "change of share": ("+.1%", "majority over greedy|forecast|from|to|gain greedy|gain T = 1"),
    "nats/token": (".3f", "entropy|worked, right|worked, wrong"),
    "tokens": (".1f", "length"),
    "1e9": (".2f", "FLOPs"),
    "factor": (".2f", "FLOPs (greedy = 1)"),
    "seconds": (".1f", "seconds"),
    "count": (".1f", "distinct answers"),
    "": (".3f", "ECE|AUROC"),
    "step": ("", "peak at step|guard stops at step"),
    "sign": ("", "diagnosis"),
    "yes": ("", "sign right (greedy)|sign right (T = 1)"),
}


class Table(NamedTuple):
    heading: str
    first: str  # the first column's heading
    metrics: str  # the other columns
    paper: str = ""
    figure: str = ""  # findings-FIGURE.png stands above


TRAINED = "greedy|T = 1|entropy|length|FLOPs"
TABLES = {
    "training": Table(
        "Training", "method", "greedy|T = 1|pass@4|peak greedy|entropy|length|FLOPs",
        "The paper (Qwen2.5-Math-7B, average of five maths sets): base 24.9, SFT 25.7, RLOO "
        "43.9, GRPO 42.1, SC-RL 40.7, EM-FT 40.2, with KL 39.6, with KL and N = 4 41.7, EM-RL "
        "sequence 41.6, token 42.9.", "training"),
    "decoding": Table(
        "Decoding", "decoder", "accuracy|entropy|FLOPs|FLOPs (greedy = 1)|seconds",
        "The paper (Qwen2.5-Math-7B-Instruct, average of five maths sets): sampling at 0.1 "
        "44.2, greedy 45.1, refinement 44.2, self-consistency 45.4, adaptive temperature 45.3, "
        "EM-INF 46.4; EM-INF matches self-consistency at about a third of its compute."),
    "kl": Table(
        "Weight of the KL, EM-RL token", "β", TRAINED,
        "The paper (average of five maths sets): β = 0 39.0, 0.001 39.5, 0.5 28.2, 1.5 25.8; "
        "base 24.9.", "ablations"),
    "rollouts": Table(
        "Responses a prompt, EM-RL sequence", "N", TRAINED,
        "The paper (average of five maths sets): N = 4 41.6, 8 41.1, 16 39.4."),
    "norm": Table(
        "Sum or mean over a response's tokens", "reward", TRAINED,
        "The paper's formulas sum and its released code averages; it does not compare the two."),
    "delta": Table(
        "EM-INF: entropy to stop at, 10 steps", "δ, nats", "accuracy|entropy",
        "The paper: δ from 0.1 to 0.5 works best."),
    "descent": Table(
        "EM-INF: steps of descent, δ = 0.3", "steps", "accuracy|entropy|seconds",
        "The paper: 5 to 15 steps are enough; its released code takes 3."),
    "rise": Table(
        "Rise and fall (fast: ten times the learning rate)", "EM-RL",
        "peak at step|peak greedy|greedy|T = 1|length|guard stops at step|greedy there",
        "The paper stops after about 100 steps by validation accuracy; later work finds that "
        "such rewards improve a model for some steps and then ruin it.", "rise"),
    "fails": Table(
        "When it fails", "confident answers that are right, %",
        "greedy|T = 1|majority over greedy",
        "The paper: EM-RL takes Qwen2.5-Math-7B from 24.9 to 42.9, Llama-3.1-8B-Instruct on "
        "MATH from 40.6 to no more than 41.6; its sign of that is best-of-4 over greedy, "
        "+13.4 % against +7.5 %.", "fails"),
    "diversity": Table(
        "Calibration and diversity, T = 1", "model",
        "greedy|pass@1|pass@2|pass@4|pass@8|pass@16|distinct answers|ECE|AUROC",
        "The paper (AMC, Qwen2.5-Math-7B): ECE 64.9 before EM-RL, 43.5 (sequence) and 44.7 "
        "(token) after; pass@k it does not report.", "diversity"),
}
SECOND_TABLES = {
    "rise": Table(
        "Asked of the base model before training: what is a worked answer paid, right or "
        "wrong, and how often is the surest of k answers right? The harder a reward is pushed, "
        "the further to the right in its row a model should end:", "reward",
        "worked, right|worked, wrong|"
        "surest of 1|surest of 2|surest of 4|surest of 8|surest of 16"),
    "fails": Table(
        "What the diagnosis forecasts (accuracy at T = 1, of the first 0.1 nats of KL a "
        "response, with its 95 % interval), and what EM-RL then gained. A gain within 2 points "
        "has no sign:", "confident answers that are right, %; reward",
        "forecast|from|to|diagnosis|AUROC|surest of 2|surest of 4|surest of 8|"
        "gain greedy|gain T = 1|sign right (greedy)|sign right (T = 1)"),
}
CLAIMS = {  # of the paper or of later work: claim, settings, relation, other, metric
    "training": [
        ("{} comes close to RLOO or beats it (greedy)",
         "EM-RL token|EM-RL sequence", "not below", "RLOO", "greedy"),
        ("EM-FT improves greedy decoding", "EM-FT", "above", "base", "greedy"),
        ("EM-FT improves sampling at T = 1", "EM-FT", "above", "base", "T = 1"),
        ("SFT gains less than EM-FT", "SFT", "below", "EM-FT", "greedy"),
        ("SC-RL stays under EM-RL token", "SC-RL", "below", "EM-RL token", "greedy"),
        ("a random reward gains nothing", "control: random", "not above", "base", "greedy"),
        ("a reward for length gains nothing", "control: length", "not above", "base", "greedy"),
    ],
    "decoding": [
        ("EM-INF beats sampling at the same temperature",
         "em-inf", "above", "sample", "accuracy"),
        ("EM-INF beats greedy decoding", "em-inf", "above", "greedy", "accuracy"),
        ("EM-INF beats adaptive temperature",
         "em-inf", "above", "adaptive-temperature", "accuracy"),
        ("EM-INF is not below self-consistency",
         "em-inf", "not below", "self-consistency", "accuracy"),
        ("refinement does not beat greedy decoding",
         "refine", "not above", "greedy", "accuracy"),
    ],
    "kl": [
        ("β = {} costs much of the gain", "0.5|1.5", "below", "0.001", "greedy"),
        ("no KL at all is as good as β = 0.001", "0", "level with", "0.001", "greedy"),
    ],
    "rollouts": [
        ("{} responses a prompt are no better than 4", "8|16", "not above", "4", "greedy"),
    ],
    "norm": [
        ("the released mean does better than the formulas' sum (token)",
         "token, mean", "above", "token, sum", "greedy"),
        ("the released mean does better than the formulas' sum (sequence)",
         "sequence, mean", "above", "sequence, sum", "greedy"),
    ],
    "delta": [
        ("δ = 0.1 is better than 0.05", "0.1", "above", "0.05", "accuracy"),
        ("δ = 0.5 is as good as 0.1", "0.5", "not below", "0.1", "accuracy"),
        ("δ = 1.0 is worse than 0.3", "1.0", "below", "0.3", "accuracy"),
    ],
    "descent": [
        ("{} steps are enough (not below 15)", "5|10", "not below", "15", "accuracy"),
        ("fewer than 3 ({}) are not enough", "1", "below", "15", "accuracy"),
    ],
    "diversity": [
        ("{} lowers the calibration error",
         "EM-RL token|EM-RL sequence", "below", "base", "ECE"),
        ("{} costs diversity (pass@16 falls)",
         "EM-FT|EM-RL token|EM-RL sequence", "below", "base", "pass@16"),
    ],
}


def unit_of(metric):
    """Its unit: a key of UNITS."""
    for unit, (_, metrics) in UNITS.items():
        if metric in metrics.split("|"):
            return unit
    return "share"


def settings_of(found, experiment, metric):
    """An experiment's settings that have a metric."""
    return [setting for name, setting, other in found if (name, other) == (experiment, metric)]


# ------------------------------------------------------------- does it agree with the paper?


def compared(a, b):
    """How the mean of a lies to b's: "above", "below" or "level with". What counts is more
    than 2 sd of the difference, and than 2 points: 512 problems alone leave that much open."""
    variance = sum(np.var(values, ddof=1) for values in (a, b) if len(values) > 1)
    difference = np.mean(a) - np.mean(b)
    if abs(difference) <= max(0.02, 2 * np.sqrt(variance)):
        return "level with"
    return "above" if difference > 0 else "below"


def verdict(found, experiment):
    """A sentence: which claims hold here, and which don't?"""
    claims = []
    for claim, settings, relation, other, metric in CLAIMS.get(experiment, []):
        for setting in settings.split("|"):
            here = compared(found[experiment, setting, metric], found[experiment, other, metric])
            holds = here != relation[4:] if relation.startswith("not ") else here == relation
            claims.append((claim.format(setting), holds))
    if experiment in MORE_CLAIMS:
        claims += MORE_CLAIMS[experiment](found)
    parts = []
    for start, link, side in [
        ("agrees that ", ", and that ", True),
        ("does not agree that ", ", or that ", False),
    ]:
        some = [claim for claim, holds in claims if holds == side]
        if some:
            parts.append(start + link.join(some))
    return f"The miniature {'; it '.join(parts)}."


def rise_claims(found):
    falls = {}
    for run in settings_of(found, "rise", "peak greedy"):
        end, peak = found["rise", run, "greedy"], found["rise", run, "peak greedy"]
        falls[run] = compared(end, peak) == "below"
        yield f"accuracy falls after its peak ({run})", falls[run]
    for reward in REWARDS:
        surest = [found["rise", f"base, {reward}", f"surest of {k}"] for k in KS]
        foretold = compared(surest[-1], max(surest, key=np.mean)) == "below"
        yield (f"the base model's surest of k foretell {'a' if foretold else 'no'} fall "
               f"({reward}, fast)", foretold == falls[f"{reward}, fast"])


def fails_claims(found):
    gains, signs = {}, []  # gains by world
    for setting in settings_of(found, "fails", "forecast"):
        world = setting.split(",")[0]
        for key in "greedy", "T = 1":
            gains.setdefault(world, []).extend(found["fails", setting, f"gain {key}"])
            signs.extend(found["fails", setting, f"sign right ({key})"])
    right, there = np.nansum(signs), np.sum(~np.isnan(signs))
    yield ("EM helps where confident answers are right", compared(gains["100"], [0]) == "above")
    yield ("EM does not help where they are wrong", compared(gains["0"], [0]) != "above")
    yield (f"one can tell before training (the forecast has the sign of {right:.0f} of the "
           f"{there} gains that have one)", right == there)


MORE_CLAIMS = {"rise": rise_claims, "fails": fails_claims}

# --------------------------------------------------------------------------- findings.md


def cell(metric, values):
    """Values by seed as a table shows them: mean ± sd."""
    unit = unit_of(metric)
    if unit == "sign":
        return next(word for word in VERDICTS if VERDICTS[word] == values[0])
    if unit == "yes":
        return {1: "yes", 0: "no"}.get(values[0], "no sign")
    if unit == "step":
        return ", ".join("never" if np.isnan(value) else f"{value:.0f}" for value in values)
    values = [value for value in values if not np.isnan(value)]
    if not values:
        return ""
    form = UNITS[unit][0]
    text = f"{np.mean(values):{form}}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):{form.strip('+')}}"
    return text


def table(found, experiment, first, metrics):
    """Markdown, with a row for each setting that has the first of the metrics."""
    head, rows = [first], []
    if first == "method":
        head.append("labels")
    for metric in metrics:
        unit = unit_of(metric)
        head.append(f"{metric}, {unit}" if unit in ("nats/token", "tokens", "1e9") else metric)
    for setting in settings_of(found, experiment, metrics[0]):
        row = [setting]
        if first == "method":
            row.append(LABELS.get(setting, "no"))
        for metric in metrics:
            values = found.get((experiment, setting, metric))
            row.append(cell(metric, values) if values else "")
        rows.append(row)
    rows = [head, ["---"] * len(head)] + rows
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def git(*words):
    return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()


def report(found, minutes, seeds, command):
    """The text of findings.md."""
    commit = git("rev-parse", "--short", "HEAD")
    if git("status", "--porcelain", "--untracked-files=no"):
        commit += " + uncommitted changes"
    blocks = [
        "# Findings on the tiny model",
        f"Made by `{command}` at commit {commit}: mean ± sd of {seeds} seed{'s' * (seeds > 1)}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; {minutes:.0f} "
        f"minutes of work, each job on one of {os.cpu_count()} CPU cores. tiny/findings.csv has "
        "every seed's numbers.",
    ]
    for experiment in TABLES:
        if not any(key[0] == experiment for key in found):
            continue
        heading, first, metrics, paper, figure = TABLES[experiment]
        blocks.append(f"## {heading}")
        if figure:
            blocks.append(f"![{heading}](../assets/findings-{figure}.png)")
        blocks.append(table(found, experiment, first, metrics.split("|")))
        if experiment in SECOND_TABLES:
            heading, first, metrics = SECOND_TABLES[experiment][:3]
            blocks += [heading, table(found, experiment, first, metrics.split("|"))]
        blocks += [paper, verdict(found, experiment)]
    return "\n\n".join(blocks) + "\n"


# --------------------------------------------------------------------------- the figures

STYLES = [  # color, line, marker
    ("#12355b", "-", "o"),
    ("#d1495b", "--", "s"),
    ("#2e8b57", "-.", "^"),
    ("#7b5ea7", ":", "D"),
]
SIMPLE = {  # figure: its panels, (experiment, metrics)
    "training": [("training", "greedy|T = 1")],
    "ablations": [("kl", "greedy|T = 1"), ("rollouts", "greedy|T = 1"),
                  ("delta", "accuracy"), ("descent", "accuracy")],
    "diversity": [("diversity", "pass@1|pass@4|pass@16|ECE")],
}


def draw(axis, places, lines, joined=True, **labels):
    """Means over seeds, in percent, with bars of one sd. `places` stand below the axis, and
    `lines` are {name: for each place, the values by seed}."""
    for (name, values), (color, line, marker) in zip(lines.items(), STYLES):
        percent = 100 * np.array(values)  # (places, seeds)
        sd = percent.std(1, ddof=1) if percent.shape[1] > 1 else None
        axis.errorbar(places, percent.mean(1), sd, color=color, marker=marker, capsize=3,
                      linestyle=line if joined else "", label=name)
    axis.set(**labels)
    axis.legend(frameon=False, fontsize=9)
    if not joined:
        axis.tick_params("x", rotation=30)


def simple_figure(found, panels):
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 4), layout="constrained",
                                sharey=True, squeeze=False)
    for axis, (experiment, metrics) in zip(axes[0], panels):
        lines = {}
        for metric in metrics.split("|"):
            settings = settings_of(found, experiment, metric)
            lines[metric] = [found[experiment, setting, metric] for setting in settings]
        heading, first, *_ = TABLES[experiment]
        draw(axis, settings, lines, joined=len(panels) > 1, xlabel=first,
             title=heading.replace(", ", ",\n"))
    axes[0, 0].set(ylabel="%", ylim=(0, 105))
    return figure


def rise_figure(found, rises):
    """`rises`: {setting: the rows of metrics.csv, for each seed}."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
    titles = {
        "val_greedy": "share right, greedy",
        "val_sampled": "share right, T = 1",
        "entropy": "entropy of its own samples, nats per token",
    }
    for axis, (key, title) in zip(axes.flat, titles.items()):
        for (setting, runs), (color, line, _) in zip(rises.items(), STYLES):
            steps = [row["step"] for row in runs[0] if key in row]
            values = [[row[key] for row in rows if key in row] for rows in runs]
            mean, sd = np.mean(values, axis=0), np.std(values, axis=0, ddof=len(runs) > 1)
            axis.plot(steps, mean, color=color, linestyle=line, label=setting)
            axis.fill_between(steps, mean - sd, mean + sd, color=color, alpha=0.15)
        axis.set(title=title, xlabel="step", ylim=(0, None))
    axes[0, 0].legend(frameon=False, fontsize=9)
    lines = {}
    for reward in REWARDS:
        lines[reward] = [found["rise", f"base, {reward}", f"surest of {k}"] for k in KS]
    places = [str(k) for k in KS]
    draw(axes[1, 1], places, lines, title="before training: is the surest of k right, by reward?",
         xlabel="k", ylabel="%", ylim=(0, 105))
    return figure


def fails_figure(found):
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    names = {
        "gain greedy": "EM-RL's gain, greedy",
        "gain T = 1": "EM-RL's gain, T = 1",
        "forecast": "forecast for T = 1, first 0.1 nats",
    }
    shares = settings_of(found, "fails", "majority over greedy")[::-1]
    for axis, reward in zip(axes, REWARDS):
        lines = {}
        for metric, name in names.items():
            lines[name] = [found["fails", f"{share}, {reward}", metric] for share in shares]
        draw(axis, shares, lines, title=f"reward {reward}", ylabel="points",
             xlabel="confident answers that are right, %")
        axis.axhline(0, color="black", linewidth=1)
    return figure


def figures(found, rises, folder):
    """findings-*.png of the experiments that there are, and idea.png."""
    there = {key[0] for key in found}
    made = {"idea": idea()}
    for name, panels in SIMPLE.items():
        if there.issuperset(experiment for experiment, _ in panels):
            made[f"findings-{name}"] = simple_figure(found, panels)
    if "rise" in there:
        made["findings-rise"] = rise_figure(found, rises)
    if "fails" in there:
        made["findings-fails"] = fails_figure(found)
    for name, figure in made.items():
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(folder / f"{name}.png", dpi=130)
        plt.close(figure)


def idea():
    """Three answers of the base model to one problem, and the entropy of each token."""
    model, tokenizer = load_model(str(ROOT / "tiny/base"), "cpu")
    problem = load_problems(ROOT / "tiny/test.jsonl")[5]  # a long one
    ids = encode_prompt(tokenizer, problem["prompt"])
    torch.manual_seed(0)
    responses, entropy, _ = generate(model, [ids], stop_ids(model, tokenizer), 64, n=64)
    texts = [tokenizer.decode(response, skip_special_tokens=True) for response in responses]
    right = [is_correct(text, problem) for text in texts]
    kinds = [  # how such an answer begins, and is it right?
        ("works step by step", r"\d.\d=", True),
        ("blurts", r"\\boxed", False),
        ("rambles", r"\d, ", False),
    ]
    figure, axes = plt.subplots(3, 1, figsize=(10, 5.5), layout="constrained", sharey=True)
    for axis, (kind, start, good), (color, _, _) in zip(axes, kinds, STYLES):
        begins = [re.match(start, text) is not None for text in texts]
        i = list(zip(begins, right)).index((True, good))
        # a line break in place of the backslash: "boxed{" is too wide to stand among the others
        tokens = [tokenizer.decode([token]).replace("\\", "\n") for token in responses[i][:-1]]
        values = entropy[i, : len(tokens) + 1].numpy()
        axis.bar(range(len(values)), values, color=color)
        axis.set_xticks(range(len(values)), [*tokens, "end"], fontsize=8)
        axis.set(xlim=(-1, 56), ylabel="nats")
        mark = "right" if good else "wrong"
        axis.set_title(f"{kind}: {values.mean():.2f} nats per token, {mark}", loc="left")
    figure.suptitle(f"{problem['prompt']}     How unsure is the model of each token?")
    return figure
