"""
Tables and sentences of what findings.py has measured.

`found` is what findings.csv holds: {(experiment, setting, metric): values by seed}. A Markdown
file says in comments what belongs where, and `fill` puts it there:

    <!-- table: kl; β; greedy, T = 1 -->   an experiment's settings, below the heading β
    <!-- claims: kl -->                    a paragraph: which claims hold here
    100.0 %<!--kl|0|greedy-->              a number, in as many decimals
"""
import csv
import os
import re
import subprocess

import numpy as np
import torch
import transformers
from measure import VERDICTS

DELTAS = {f"δ = {delta}": delta for delta in (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)}  # nats
LABELS = {"base": "", "SFT": "yes", "RLOO": "yes", "GRPO": "yes"}  # the others read none
KS = 1, 2, 4, 8, 16  # answers to a problem
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
# experiment; settings; relation; another setting; metric; claim. The claim holds for a setting if
# the metric has that relation to the other setting's; {} in it stands for the setting.
CLAIMS = """\
training; EM-RL token|EM-RL sequence; not below; RLOO; greedy; {} comes close to RLOO or beats it
training; EM-FT; above; base; greedy; EM-FT improves greedy decoding
training; EM-FT; above; base; T = 1; EM-FT improves sampling at T = 1
training; SFT; below; EM-FT; greedy; SFT gains less than EM-FT
training; SC-RL; below; EM-RL token; greedy; SC-RL stays under EM-RL token
training; control: random; not above; base; greedy; a random reward gains nothing
training; control: length; not above; base; greedy; a reward for length gains nothing
decoding; em-inf; above; sample; accuracy; EM-INF beats sampling at the same temperature
decoding; em-inf; above; greedy; accuracy; EM-INF beats greedy decoding
decoding; em-inf; above; adaptive-temperature; accuracy; EM-INF beats adaptive temperature
decoding; em-inf; not below; self-consistency; accuracy; EM-INF is not below self-consistency
decoding; refine; not above; greedy; accuracy; refinement does not beat greedy decoding
kl; 0.5|1.5; below; 0.001; greedy; β = {} costs much of the gain
kl; 0; level with; 0.001; greedy; no KL at all is as good as β = 0.001
rollouts; 8|16; not above; 4; greedy; {} responses a prompt are no better than 4
norm; token, mean; above; token, sum; greedy; the mean does better than the sum (token)
norm; sequence, mean; above; sequence, sum; greedy; the mean does better than the sum (sequence)
coef; 0.001; level with; 0; greedy; the released trainer's bonus changes little
coef; exact; above; 0; T = 1; the token reward's own gradient (exact) improves sampling at T = 1
descent; 5|10; not below; 15; accuracy; {} steps are enough (not below 15)
descent; 1; below; 15; accuracy; fewer than 3 ({}) are not enough
diversity; EM-RL token|EM-RL sequence; below; base; ECE; {} lowers the calibration error
diversity; EM-FT|EM-RL token|EM-RL sequence; below; base; pass@16; {} costs pass@16
labels; correct+token|correct+sequence; above; correct; greedy; {} ends above labels alone
labels; correct+token|correct+sequence; above; correct; T = 1; {} beats labels alone at T = 1
several; EM-FT|token|sequence; below; base; distinct right answers; {} finds fewer right answers
several; token, β = 0.5; above; token; distinct right answers; a KL keeps more of them (token)
several; EM-FT, β = 0.5; above; EM-FT; distinct right answers; a KL keeps more of them (EM-FT)
several; token, c = 0.01; above; token; distinct right answers; a bonus for entropy keeps more
"""
GAIN_CLAIMS = {  # experiment: {base model: (relation of the gain to 0, claim on each method)}
    "fails": {
        "100": ("above", "helps where confident answers are right"),
        "0": ("not above", "does not help where they are wrong"),
    },
    "capability": {
        "500": ("not above", "does not help the weakest"),
        "8000": ("above", "helps the strongest"),
    },
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
    """A list: which claims hold here, and which don't?"""
    lines = []
    for claim, true in claims_of(found, experiment):
        lines.append(f"- {'holds here' if true else 'does not hold here'}: {claim}")
    return "\n".join(lines)


def claims_of(found, experiment):
    """Pairs of claim and bool."""
    for line in CLAIMS.splitlines():
        name, settings, relation, other, metric, claim = line.split("; ")
        if name == experiment:
            b = found[experiment, other, metric]
            for setting in settings.split("|"):
                a = found[experiment, setting, metric]
                yield claim.format(setting), holds(a, relation, b)
    if experiment in GAIN_CLAIMS:
        yield from gain_claims(found, experiment)
    if experiment in MORE_CLAIMS:
        yield from MORE_CLAIMS[experiment](found)


def gain_claims(found, experiment):
    """What training gained from the base models in GAIN_CLAIMS, and whether all gains were
    forecast."""
    signs = []
    for setting in settings_of(found, experiment, "gain greedy"):
        base, method = setting.split(", ")
        relation, claim = GAIN_CLAIMS[experiment].get(base, (None, None))
        for key in "greedy", "T = 1":
            signs.extend(found[experiment, setting, f"sign right ({key})"])
            if claim:
                gain = found[experiment, setting, f"gain {key}"]
                yield f"{method} {claim} ({key})", holds(gain, relation, [0])
    right, there = np.nansum(signs), np.sum(~np.isnan(signs))
    yield (f"one can tell before training (the forecast has the sign of {right:.0f} of the "
           f"{there} gains that have one)", right == there > 0)


def zoo_claims(found):
    """Which rewards fall after their peak, and does the guard or the base model tell of it?"""
    falls, drops = {}, []
    for run in settings_of(found, "zoo", "peak greedy"):
        end, peak = found["zoo", run, "greedy"], found["zoo", run, "peak greedy"]
        falls[run] = holds(end, "below", peak)
        drops.extend(np.subtract(peak, end))
    for speed, fast in ("the default rate", False), ("ten times that rate", True):
        those = [falls[run] for run in falls if run.endswith("fast") == fast]
        count = f"({sum(those)} of {len(those)})"
        yield f"rewards fall after their peak at {speed} {count}", any(those)
    stops = [found["zoo", run, "guard stops at step"] for run in falls]
    seen = ~np.isnan(np.concatenate(stops))[np.array(drops) >= 0.05]
    yield (f"the guard stops those that lose 5 points or more ({sum(seen)} of {len(seen)})",
           len(seen) > 0 and all(seen))
    for reward in "token", "sequence":
        surest = [found["surest", reward, f"surest of {k}"] for k in KS]
        foretold = holds(surest[-1], "below", max(surest, key=np.mean))
        yield (f"the base model's surest of k foretell {'a' if foretold else 'no'} fall "
               f"({reward}, fast)", foretold == falls[f"{reward}, fast"])


def in_all(found, experiment, settings, a, relation, b):
    """Has metric a this relation to metric b in all of these settings of an experiment?"""
    for setting in settings:
        if not holds(found[experiment, setting, a], relation, found[experiment, setting, b]):
            return False
    return True


def shift_claims(found):
    for name in "em-inf", "adaptive-temperature":
        for which, lengths in ("trained on", "3 4 5 6"), ("never seen", "7 8 9 10"):
            where = found, "shift", lengths.split()
            better = in_all(*where, name, "above", "sample")
            yield f"{name} beats sampling at all lengths {which}", better
            calibrated = in_all(*where, f"ECE {name}", "below", "ECE sample")
            yield f"{name} lowers the calibration error at those {which}", calibrated


def threshold_claims(found):
    right = "short", "long", "sums", "products"
    for delta in DELTAS:
        helps = in_all(found, "threshold", right, delta, "above", "none")
        yield f"{delta} helps where confident answers are right", helps
        harmless = in_all(found, "threshold", ["misaligned"], delta, "not below", "none")
        yield f"{delta} does no harm where confident answers are wrong", harmless


MORE_CLAIMS = {"zoo": zoo_claims, "shift": shift_claims, "threshold": threshold_claims}


def sign_of_gains(found):
    """Has a forecast the sign of what was then gained? nan within 2 points, which 512 problems
    leave open."""
    signs = {}
    for (experiment, setting, metric), forecast in found.items():
        for key in "greedy", "T = 1":
            gains = found.get((experiment, setting, f"gain {key}"))
            if metric == "forecast" and gains:
                product = np.mean(gains) * forecast[0]
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
    head, rows = [heading], []
    if heading == "method":
        head.append("labels")
    for metric in metrics:
        unit = unit_of(metric)
        shown = unit in ("nats/token", "nats", "tokens", "1e9")
        head.append(f"{metric}, {unit}" if shown else metric)
    for setting in settings_of(found, experiment, metrics[0]):
        row = [setting]
        if heading == "method":
            row.append(LABELS.get(setting, "no"))
        for metric in metrics:
            values = found.get((experiment, setting, metric))
            row.append(cell(metric, values) if values else "")
        rows.append(row)
    rows = [head, ["---"] * len(head)] + rows
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
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, encoding="utf-8").stdout.strip()
    return (
        f"Made by `{command}` at commit {commit}: mean ± sd of {seeds} seed{'s' * (seeds > 1)}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; {minutes:.0f} "
        f"minutes of work, each job on one of {os.cpu_count()} CPU cores."
    )
