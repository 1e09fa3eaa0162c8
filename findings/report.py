"""
Tables and sentences of what findings.py has measured.

`found` is what findings.csv holds: {(experiment, setting, metric): values by seed}. A Markdown
file says in comments what belongs where, and `fill` puts it there:

    <!-- table: kl; β; greedy, T = 1 -->   an experiment's settings, below the heading β
    <!-- claims: kl -->                    a list: which claims of claims.csv hold here
    100.0 %<!--kl|0|greedy-->              a number, in as many decimals
"""
import csv
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import torch
import transformers
from measure import VERDICTS

DELTAS = {f"δ = {delta}": delta for delta in (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)}  # nats
LABELS = {"base": "", "SFT": "yes", "RLOO": "yes", "GRPO": "yes"}  # the others read none
UNITS = {  # unit: how a table shows it, and the metrics that have it; all others are shares
    "change of share": ("+.1%", "majority over greedy|forecast|from|to|gain greedy|gain T = 1"),
    "nats/token": (".3f", "entropy|worked right|worked wrong"),
    "nats": (".1f", "KL at peak|KL at end"),
    "tokens": (".1f", "length"),
    "1e9": (".2f", "FLOPs"),
    "factor": (".2f", "FLOPs (greedy = 1)"),
    "seconds": (".1f", "seconds"),
    "count": (".2f", "distinct answers|distinct right answers"),
    "": (".3f", "ECE|AUROC"),
    "squared": (".4g", "variance|squared mean"),
    "step": ("", "peak at step|guard stops at step|steps to 95 %"),
    "sign": ("", "diagnosis"),
    "yes": ("", "sign right (greedy)|sign right (T = 1)"),
    "share": (".1%", ""),
}


def unit_of(metric):
    """Its unit: a key of UNITS."""
    if metric.startswith("ECE "):  # of a decoder
        metric = "ECE"
    for unit, (_, metrics) in UNITS.items():
        if metric in metrics.split("|"):
            return unit
    return "share"


def settings_of(found, experiment, metric):
    """An experiment's settings that have a metric."""
    return [key[1] for key in found if (key[0], key[2]) == (experiment, metric)]


def rows_of(name, experiment):
    """The rows (dicts) of an experiment in claims.csv or experiments.csv, beside this file."""
    with Path(__file__).with_name(name).open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["experiment"] == experiment]


def write_csv(path, found):
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow("experiment setting metric unit values".split())
        for key, values in found.items():
            shown = " ".join(f"{value:.6g}" for value in values)
            out.writerow([*key, unit_of(key[2]), shown])


def read_csv(path):
    found = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = row["experiment"], row["setting"], row["metric"]
            found[key] = [float(value) for value in row["values"].split()]
    return found


# ------------------------------------------------------------- does it agree with the paper?


def compared(a, b):
    """How the mean of a lies to b's: "above", "below" or "level with". What counts is more
    than 2 sd of the difference, and than 2 points: 512 problems alone leave that much open."""
    variance = sum(np.var(values, ddof=1) for values in (a, b) if len(values) > 1)
    difference = np.mean(a) - np.mean(b)
    if abs(difference) <= max(0.02, 2 * np.sqrt(variance)):
        return "level with"
    return "above" if difference > 0 else "below"


def holds(a, relation, b):
    """Has a this relation to b? One of those of `compared`, or "not" and one of them."""
    here = compared(a, b)
    return here != relation[4:] if relation.startswith("not ") else here == relation


def list_of_claims(found, experiment):
    """Markdown: which claims hold here, and which don't?"""
    claims = claims_of(found, experiment)
    if experiment in ("fails", "capability"):
        claims += [claim_of_forecasts(found, experiment)]
    if experiment == "zoo":
        claims += zoo_claims(found)
    lines = []
    for claim, true in claims:
        lines.append(f"- {'holds here' if true else 'does not hold here'}: {claim}")
    return "\n".join(lines)


def claims_of(found, experiment):
    """Pairs of claim and bool, for the rows of claims.csv. A claim holds if in each of its settings
    the metric has that relation to the other setting or metric or, if neither is given, to 0."""
    claims = []
    for row in rows_of("claims.csv", experiment):
        metric, relation = row["metric"], row["relation"]
        other_setting, other_metric = row["other setting"], row["other metric"]
        true = []
        for setting in row["settings"].split("|"):
            a, b = found[experiment, setting, metric], [0]
            if other_setting or other_metric:
                b = found[experiment, other_setting or setting, other_metric or metric]
            true.append(holds(a, relation, b))
        claims.append((row["claim"], all(true)))
    return claims


def claim_of_forecasts(found, experiment):
    signs = []
    for (name, _, metric), values in found.items():
        if name == experiment and metric.startswith("sign right"):
            signs.extend(values)
    right, there = np.nansum(signs), np.sum(~np.isnan(signs))
    claim = f"the forecast has the sign of {right:.0f} of the {there} gains that have one"
    return f"one can tell before training ({claim})", right == there > 0


def zoo_claims(found):
    """Which rewards fall after their peak, and does the guard or the base model tell of it?"""
    claims, falls, drops, stops = [], {}, [], []
    for run in settings_of(found, "zoo", "peak greedy"):
        end, peak = found["zoo", run, "greedy"], found["zoo", run, "peak greedy"]
        falls[run] = holds(end, "below", peak)
        drops.extend(np.subtract(peak, end))
        stops.extend(found["zoo", run, "guard stops at step"])
    for speed, fast in ("the default rate", False), ("ten times that rate", True):
        those = [falls[run] for run in falls if run.endswith("fast") == fast]
        claim = f"rewards fall after their peak at {speed} ({sum(those)} of {len(those)})"
        claims.append((claim, any(those)))
    seen = ~np.isnan(stops)[np.array(drops) >= 0.05]
    claim = f"the guard stops those that lose 5 points or more ({sum(seen)} of {len(seen)})"
    claims.append((claim, len(seen) > 0 and all(seen)))
    for reward in "token", "sequence":
        surest = [found["surest", reward, f"surest of {k}"] for k in (1, 2, 4, 8, 16)]
        foretold = holds(surest[-1], "below", max(surest, key=np.mean))
        claim = f"the base model's surest of k foretell {'a' if foretold else 'no'} fall"
        claims.append((f"{claim} ({reward}, fast)", foretold == falls[f"{reward}, fast"]))
    return claims


def sign_of_gains(found):
    """Has a forecast the sign of what was then gained? nan within 2 points, which 512 problems
    leave open."""
    signs = {}
    for (experiment, setting, metric), gains in found.items():
        kind, _, key = metric.partition(" ")
        if kind == "gain":
            product = np.mean(gains) * found[experiment, setting, "forecast"][0]
            unknown = abs(np.mean(gains)) <= 0.02 or np.isnan(product)
            sign = np.nan if unknown else float(product > 0)
            signs[experiment, setting, f"sign right ({key})"] = [sign]
    return signs


# --------------------------------------------------------------------------- Markdown


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


def table(found, experiment, heading, metrics):
    """Markdown, with a row for each setting that has the first of the metrics."""
    labels = heading == "method"
    head, rows = [heading] + ["labels"] * labels, []
    for metric in metrics:
        unit = unit_of(metric)
        shown = unit in ("nats/token", "nats", "tokens", "1e9")
        head.append(f"{metric}, {unit}" if shown else metric)
    for setting in settings_of(found, experiment, metrics[0]):
        row = [setting] + [LABELS.get(setting, "no")] * labels
        rows.append(row + [cell(metric, found[experiment, setting, metric]) for metric in metrics])
    return markdown(head, rows)


def markdown(head, rows):
    rows = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def fill(text, found, texts=None):
    """A Markdown text with the numbers of `found` in it, and `texts` {comment: paragraph} below
    their own comments. What is not in `found` stays as it is."""
    texts = texts or {}

    def block(match):
        mark, old, end = match.groups()
        kind, _, rest = mark.partition(": ")
        experiment, *columns = rest.split("; ")
        if mark in texts:
            old = texts[mark]
        elif kind == "table":
            old = table(found, experiment, columns[0], columns[1].split(", "))
        elif kind == "claims":
            old = list_of_claims(found, experiment)
        return f"<!-- {mark} -->\n\n{old}{end}"

    def number(match):
        old, unit, key = match.groups()
        values = found.get(tuple(key.split("|")))
        if values is None or np.isnan(values).any():
            return match[0]
        mean = np.mean(values) * (100 if unit else 1)
        sign = "+" if old[0] in "+-" and unit == " points" else ""
        decimals = len(old.partition(".")[2])
        return f"{mean:{sign}.{decimals}f}{unit or ''}<!--{key}-->"

    text = re.sub(r"<!-- ([^\n]*) -->\n\n(.*?)(\n\n|\n?\Z)", block, text, flags=re.DOTALL)
    return re.sub(r"([+-]?[\d.]+)( %| points)?<!--(\S.*?\S)-->", number, text)


def made_by(command, seeds, minutes):
    """A paragraph: what made these numbers?"""
    return (
        f"Made by `{command}` at commit {commit()}: mean ± sd of {seeds} seed{'s' * (seeds > 1)}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; {minutes:.0f} "
        f"minutes of work, each job on one of {os.cpu_count()} CPU cores."
    )


def commit():
    """Of this repository, with "-dirty" behind it if a file was changed since; "" without a
    repository."""
    describe = ["git", "describe", "--always", "--dirty"]
    here = Path(__file__).parent
    return subprocess.run(describe, capture_output=True, encoding="utf-8", cwd=here).stdout.strip()
