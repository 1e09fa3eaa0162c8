"""
What real.py measures, and the tables of real.md, filled from the rows of real.csv.
"""
import csv
import io
import itertools
import re

import numpy as np
from report import fill, markdown

from engine.files import replace_file
from tasks.scores import CONFIDENCE, accuracy_interval, paired_interval

SETS = "svamp", "gsm8k", "asdiv", "humaneval"  # what is forecast
TESTS = "svamp", "gsm8k", "humaneval"  # what is decoded, and what the trained models are tested on
TRAIN = "asdiv", "gsm8k-train"  # prompts to train on
BASE = "greedy", "sample@1"
DECODERS = (
    "sample@0.1 adaptive-temperature@1 adaptive-temperature@0.1 em-inf@1 em-inf@0.1 "
    "self-consistency@1 em-inf+self-consistency@1"
).split()
RUNS = {  # method: script and flags
    "EM-FT": "em_ft.py",
    "EM-RL token": "em_rl.py --reward token",
    "EM-RL sequence": "em_rl.py --reward sequence",
    "EM-RL token exact": "em_rl.py --reward token --entropy-coef exact",
    "majority": "em_rl.py --reward majority",
    "RLOO with labels": "em_rl.py --reward correct",
    "control: random": "em_rl.py --reward random",
    "control: format": "em_rl.py --reward format",
}
CLAIMS = [  # (a, b, the claim that a is right more often than b)
    ("em-inf@1", "sample@1", "EM-INF beats sampling at the same temperature, 1"),
    ("em-inf@0.1", "sample@0.1", "EM-INF beats sampling at the same temperature, 0.1"),
    ("em-inf@1", "greedy", "EM-INF at T = 1 beats greedy decoding"),
    ("em-inf@0.1", "greedy", "EM-INF at T = 0.1 beats greedy decoding"),
    ("em-inf@1", "adaptive-temperature@1", "EM-INF beats adaptive temperature, both at T = 1"),
    ("em-inf@1", "self-consistency@1", "EM-INF beats self-consistency of 4"),
    ("em-inf+self-consistency@1", "self-consistency@1", "EM-INF improves self-consistency"),
]
KEY = "model run set method seed".split()
COLUMNS = KEY + (
    "problems n tokens accuracy low high last_number boxed truncated entropy length flops "
    "sharpened majority passed token token_low token_high token_auroc sequence sequence_low "
    "sequence_high sequence_auroc steps kl minutes commit right"
).split()
FORMS = dict(entropy=".3f", length=".0f", flops=".2f", kl=".2f", minutes=".0f", steps=".0f",
             token_auroc=".2f", sequence_auroc=".2f")  # all others are shares
UNKNOWN = "not measured"

# -------------------------------------------------------------------------------- the CSV


def key_of(row):
    return tuple(str(row[name]) for name in KEY)


def read_table(path):
    """{key: row}; a row is a dict of strings."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {key_of(row): row for row in csv.DictReader(file)}


def write_table(path, rows):
    text = io.StringIO()
    out = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    out.writeheader()
    out.writerows(rows.values())
    replace_file(path, text.getvalue())


# --------------------------------------------------------------------- numbers of some rows


def find(rows, model, run, name, method):
    """The rows of all seeds."""
    return [row for key, row in rows.items() if key[:4] == (model, run, name, method)]


def of_base(rows, model, name):
    """The base model's rows of a set: (greedy, at T = 1)."""
    return [find(rows, model, "", name, method) for method in BASE]


def mean(rows, column):
    values = [float(row[column]) for row in rows if row[column]]
    return np.mean(values) if values else np.nan


def foretold(rows, reward):
    """(change, low, high) of accuracy at T = 1 in the first 0.1 nats of KL: shares."""
    return [mean(rows, f"{reward}{end}") for end in ("", "_low", "_high")]


def shown(rows, column):
    value = mean(rows, column)
    return "" if np.isnan(value) else f"{value:{FORMS.get(column, '.1%')}}"


def shares(rows):
    """Of each problem, the share of its answers in all seeds that are right."""
    by_seed = []
    for row in rows:
        by_seed.append([int(count) / int(row["n"]) for count in row["right"].split()])
    return np.mean(by_seed, axis=0)


def gain(a, b):
    """(b's accuracy - a's, low, high): paired, of the problems that both sets of rows have."""
    a, b = shares(a), shares(b)
    both = min(len(a), len(b))  # the first of a set, always
    return paired_interval(a[:both], b[:both])


def accuracy(rows):
    """Accuracy and its 95 % interval over problems, in two cells."""
    low, high = accuracy_interval(mean(rows, "accuracy"), int(rows[0]["problems"]))
    return [shown(rows, "accuracy"), f"{low:.1%} to {high:.1%}"]


def points(difference):
    middle, low, high = [100 * value for value in difference]
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"


def verdict(low, high):
    return "likely helps" if low > 0 else "harms" if high < 0 else "too close to call"


def table(head, lines):
    """Markdown. The headings are one string; a line with one cell has not been measured."""
    head = head.split("; ")
    for line in lines:
        if len(line) == 1:
            line += [UNKNOWN] + [""] * (len(head) - 2)
    return markdown(head, lines)


# ------------------------------------------------------------------------------- the tables


def forecast_table(rows, model):
    head = "set; problems; greedy; T = 1; majority of 4; pass@4; entropy, nats; AUROC; "
    head += "EM-RL token: the first 0.1 nats, points; EM-RL sequence: the first 0.1 nats, points"
    lines = []
    for name in SETS:
        greedy, sampled = of_base(rows, model, name)
        if not greedy or not sampled:
            lines.append([name])
            continue
        line = [name, sampled[0]["problems"], shown(greedy, "accuracy")]
        for column in "accuracy majority passed entropy token_auroc".split():
            line.append(shown(sampled, column))
        for reward in CONFIDENCE:
            ends = foretold(sampled, reward)
            line.append(f"{points(ends)}: {verdict(*ends[1:])}")
        lines.append(line)
    return table(head, lines)


def decoding_table(rows, model, name):
    head = "method; seeds x answers; accuracy; 95 %; against T = 1, points; by the last number; "
    head += "in a box; cut; entropy, nats; tokens; FLOPs, greedy = 1; tokens sharpened"
    greedy, sampled = of_base(rows, model, name)
    lines = []
    for method in [*BASE, *DECODERS]:
        some = find(rows, model, "", name, method)
        if not some:
            lines.append([method])
            continue
        line = [method, f"{len(some)} x {some[0]['n']}", *accuracy(some)]
        line.append(points(gain(sampled, some)) if sampled and method != "sample@1" else "")
        for column in "last_number boxed truncated entropy length".split():
            line.append(shown(some, column))
        line.append(f"{mean(some, 'flops') / mean(greedy, 'flops'):.2f}" if greedy else "")
        lines.append([*line, shown(some, "sharpened")])
    return table(head, lines)


def list_of_claims(rows, model, name):
    lines = []
    for a, b, claim in CLAIMS:
        first, second = [find(rows, model, "", name, method) for method in (a, b)]
        if not first or not second:
            lines.append(f"- {UNKNOWN}: {claim}")
            continue
        difference = gain(second, first)
        word = {"likely helps": "holds here", "harms": "does not hold here"}
        word = word.get(verdict(*difference[1:]), "open")
        lines.append(f"- {word}: {claim}, by {points(difference)} points")
    return "\n".join(lines)


def training_table(rows, model, name):
    head = "run; trained on; seeds; greedy; 95 %; T = 1; 95 %; pass@4; entropy, nats; tokens; cut; "
    head += "in a box; greedy by the last number; KL, nats a response; steps; minutes"
    lines = []
    for train, method in [("", "base"), *itertools.product(TRAIN, RUNS)]:
        runs = {key[1] for key in rows if key[1].startswith(f"{method}, {train}, ")}
        greedy, sampled = [], []
        for run in sorted(runs) if train else [""]:
            greedy += find(rows, model, run, name, "greedy")
            sampled += find(rows, model, run, name, "sample@1")
        if not greedy or not sampled:
            lines.append([f"{method}, {train}" if train else method])
            continue
        line = [method, train, str(len(greedy)), *accuracy(greedy), *accuracy(sampled)]
        for column in "passed entropy length truncated boxed".split():
            line.append(shown(sampled, column))
        line.append(shown(greedy, "last_number"))
        lines.append(line + [shown(sampled, column) for column in ("kl", "steps", "minutes")])
    return table(head, lines)


def outcome_table(rows, model):
    """Each forecast beside what was then measured, both in points against T = 1."""
    lines = []
    for name in SETS:
        greedy, sampled = of_base(rows, model, name)
        pairs = {
            "em-inf@1": greedy and mean(greedy, "accuracy"),
            "self-consistency@1": sampled and mean(sampled, "majority"),
        }
        for method, expected in pairs.items():
            some = find(rows, model, "", name, method)
            if not some or not sampled or not greedy:
                lines.append([f"{method}, {name}"])
                continue
            forecast = 100 * (expected - mean(sampled, "accuracy"))
            lines.append([f"{method}, {name}", f"{forecast:+.1f}", points(gain(sampled, some))])
    for key in rows:
        if key[0] == model and key[1] and key[3] == "sample@1":
            _, base = of_base(rows, model, key[2])
            reward = "sequence" if "sequence" in key[1] else "token"
            forecast, found = foretold(base, reward), gain(base, [rows[key]])
            lines.append([f"{key[1]}: {key[2]}", points(forecast), points(found)])
    return table("method and set; forecast, points; outcome, points", lines)


TABLES = {
    "forecast": forecast_table,
    "decoding": decoding_table,
    "claims": list_of_claims,
    "training": training_table,
    "outcome": outcome_table,
}


def filled(text, rows):
    """Markdown with its tables made anew: "<!-- decoding: MODEL; SET -->" stands above one, and
    "43.0 %<!--MODEL|RUN|SET|METHOD|COLUMN-->" is a number in the prose."""
    found, texts = {}, {}
    for key, row in rows.items():
        for column, value in row.items():
            if column not in KEY and re.fullmatch(r"-?[\d.]+(e[-+]\d+)?", value):
                found.setdefault((*key[:4], column), []).append(float(value))
    for mark in re.findall(r"<!-- (\w+: [^\n]*) -->", text):
        kind, _, which = mark.partition(": ")
        texts[mark] = TABLES[kind](rows, *which.split("; "))
    return fill(text, found, texts)
