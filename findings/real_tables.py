"""
What real.py measures, and the tables of real.md, filled from the rows of real.csv.

`rows` is all that the CSV has, {key: row}. What one method did on one set is `measured`: a list
with a row for each seed. A run is called "METHOD, TRAINING SET" here, and has ", SEED" behind it
in the CSV. The base model's is "".
"""
import csv
import io
import itertools
import re

import numpy as np
from report import fill, markdown

from engine.files import replace_file
from tasks.scores import CONFIDENCE, accuracy_interval, paired_interval

SETS = "svamp", "gsm8k", "asdiv", "humaneval"  # forecast and decoded with the base model
TESTS = "svamp", "gsm8k", "humaneval"  # what the trained models are tested on
TRAIN = "asdiv", "gsm8k-train"  # prompts to train on
PLAIN = "greedy", "sample@1"  # measured of every model, trained or not
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
    "problems n tokens accuracy low high last_number added boxed truncated formulas entropy "
    "length flops sharpened majority passed token token_low token_high token_auroc sequence "
    "sequence_low sequence_high sequence_auroc shorter shorter_low shorter_high steps kl minutes "
    "entropy_by_step length_by_step truncated_by_step commit right"
).split()
CURVES = {  # of the responses that were trained on
    "entropy": "entropy, nats/token",
    "length": "length, tokens",
    "truncated": "share that is cut",
}
FORMS = dict(entropy=".3f", length=".0f", formulas=".1f", flops=".2f", kl=".1f", minutes=".0f",
             steps=".0f", token_auroc=".2f", sequence_auroc=".2f")  # all others are shares

# -------------------------------------------------------------------------------- the CSV


def key_of(row):
    return tuple(str(row[name]) for name in KEY)


def read_table(path):
    """{key: row}; a row is a dict of strings. A column that an older table lacks is empty."""
    if not path.exists():
        return {}
    empty = dict.fromkeys(COLUMNS, "")
    with path.open(newline="", encoding="utf-8") as file:
        return {key_of(row): empty | row for row in csv.DictReader(file)}


def write_table(path, rows):
    text = io.StringIO()
    out = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    out.writeheader()
    out.writerows(rows.values())
    replace_file(path, text.getvalue())


# --------------------------------------------------------------------- numbers of a method


def find(rows, model, run, dataset, method):
    """The rows of all seeds."""
    measured = []
    for key, row in rows.items():
        if (key[0], key[1].rpartition(", ")[0], key[2], key[3]) == (model, run, dataset, method):
            measured.append(row)
    return measured


def tested(rows, model, dataset, run=""):
    """What a run did on a set: [greedy, at T = 1]."""
    return [find(rows, model, run, dataset, method) for method in PLAIN]


def runs_of(rows, model):
    """The runs that are planned, and behind them those that had more flags."""
    planned = [f"{method}, {train}" for train, method in itertools.product(TRAIN, RUNS)]
    others = [key[1].rpartition(", ")[0] for key in rows if key[0] == model and key[1]]
    return list(dict.fromkeys(planned + others))


def mean(measured, column):
    values = [float(row[column]) for row in measured if row[column]]
    return np.mean(values) if values else np.nan


def foretold(measured, reward):
    """(change, low, high) of accuracy at T = 1 in the first 0.1 nats of KL: shares."""
    return [mean(measured, f"{reward}{end}") for end in ("", "_low", "_high")]


def shown(measured, column):
    value = mean(measured, column)
    return "" if np.isnan(value) else f"{value:{FORMS.get(column, '.1%')}}"


def shares(measured):
    """Of each problem, the share of its answers in all seeds that are right."""
    by_seed = []
    for row in measured:
        by_seed.append([int(count) / int(row["n"]) for count in row["right"].split()])
    return np.mean(by_seed, axis=0)


def gain(a, b):
    """(b's accuracy - a's, low, high): paired, of the problems that both were asked."""
    a, b = shares(a), shares(b)
    n = min(len(a), len(b))  # every row has the first problems of its set
    return paired_interval(a[:n], b[:n])


def accuracy(measured):
    """Accuracy and its 95 % interval over problems, in two cells."""
    low, high = accuracy_interval(mean(measured, "accuracy"), int(measured[0]["problems"]))
    return [shown(measured, "accuracy"), f"{low:.1%} to {high:.1%}"]


def points(difference):
    middle, low, high = [100 * value for value in difference]
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"


def verdict(low, high, better, worse, unclear):
    return better if low > 0 else worse if high < 0 else unclear


def table(head, lines):
    """Markdown. The headings are one string."""
    return markdown(head.split("; "), lines) if lines else "Not measured yet."


# ------------------------------------------------------------------------------- the tables


def forecast_table(rows, model):
    head = "set; problems; greedy; T = 1; majority of 4; pass@4; entropy, nats; AUROC; "
    head += "EM-RL token: the first 0.1 nats, points; EM-RL sequence: as before; "
    head += "a reward for short answers: as before"
    lines = []
    for dataset in SETS:
        greedy, sampled = tested(rows, model, dataset)
        if not greedy or not sampled:
            continue
        line = [dataset, sampled[0]["problems"], shown(greedy, "accuracy")]
        for column in "accuracy majority passed entropy token_auroc".split():
            line.append(shown(sampled, column))
        for reward in (*CONFIDENCE, "shorter"):
            ends = foretold(sampled, reward)
            words = "likely helps", "harms", "too close to call"
            line.append(f"{points(ends)}: {verdict(*ends[1:], *words)}")
        lines.append(line)
    return table(head, lines)


def decoding_table(rows, model, dataset):
    head = "method; seeds x answers; accuracy; 95 %; against T = 1, points; by the last number; "
    head += "in a box; cut; entropy, nats; tokens; FLOPs, greedy = 1; tokens sharpened"
    greedy, sampled = tested(rows, model, dataset)
    lines = []
    for method in [*PLAIN, *DECODERS]:
        measured = find(rows, model, "", dataset, method)
        if not measured:
            continue
        line = [method, f"{len(measured)} x {measured[0]['n']}", *accuracy(measured)]
        line.append(points(gain(sampled, measured)) if sampled and method != "sample@1" else "")
        for column in "last_number boxed truncated entropy length".split():
            line.append(shown(measured, column))
        line.append(f"{mean(measured, 'flops') / mean(greedy, 'flops'):.2f}" if greedy else "")
        lines.append([*line, shown(measured, "sharpened")])
    return table(head, lines)


def list_of_claims(rows, model, dataset):
    lines = []
    for a, b, claim in CLAIMS:
        first, second = [find(rows, model, "", dataset, method) for method in (a, b)]
        if not first or not second:
            lines.append(f"- not measured: {claim}")
            continue
        difference = gain(second, first)
        word = verdict(*difference[1:], "holds here", "does not hold here", "open")
        lines.append(f"- {word}: {claim}. Difference: {points(difference)} points")
    return "\n".join(lines)


def tests_of(rows, model, dataset):
    """{run: [greedy, at T = 1]} of the base model and of each run that was tested on a set."""
    tests = {}
    for run in ["", *runs_of(rows, model)]:
        both = tested(rows, model, dataset, run)
        if all(both):
            tests[run] = both
    return tests if "" in tests else {}  # a gain needs the base model


def training_table(rows, model, dataset):
    head = "run; trained on; seeds; greedy; gain, points; T = 1; gain, points; pass@4; "
    head += "entropy, nats; KL, nats a response; steps; minutes"
    base = tested(rows, model, dataset)
    lines = []
    for run, both in tests_of(rows, model, dataset).items():
        method, _, train = run.partition(", ")
        line = [method or "base", train, str(len(both[0]))]
        for before, after in zip(base, both):
            line += [shown(after, "accuracy"), points(gain(before, after)) if run else ""]
        columns = "passed entropy kl steps minutes"
        lines.append(line + [shown(both[1], column) for column in columns.split()])
    return table(head, lines)


def answers_table(rows, model, dataset):
    head = "run; trained on; greedy, by the last number; T = 1, by the last number; "
    head += "wrong by adding; in a box; cut; tokens; formulas"
    lines = []
    for run, (greedy, sampled) in tests_of(rows, model, dataset).items():
        method, _, train = run.partition(", ")
        line = [method or "base", train, shown(greedy, "last_number")]
        columns = "last_number added boxed truncated length formulas"
        lines.append(line + [shown(sampled, column) for column in columns.split()])
    return table(head, lines)


def controls_table(rows, model, dataset):
    """Each run against each control that saw the same prompts: gains, paired."""
    head = "run; control; trained on; greedy, points; T = 1, points"
    tests = tests_of(rows, model, dataset)
    controls = [run for run in tests if run.startswith("control: ")]
    lines = []
    for run, control in itertools.product(tests, controls):
        method, _, train = run.partition(", ")
        if run not in controls and control.endswith(f", {train}"):
            gains = [points(gain(its, ours)) for its, ours in zip(tests[control], tests[run])]
            lines.append([method, control.partition(", ")[0], train, *gains])
    return table(head, lines)


def outcome_table(rows, model):
    """Each forecast beside what was then measured, both in points against T = 1. EM-RL's are of
    rewards that are means over tokens, without the gradient of the entropy itself."""
    lines = []
    for dataset in SETS:
        greedy, sampled = tested(rows, model, dataset)
        if not greedy or not sampled:
            continue
        for method, expected in [
            ("em-inf@1", mean(greedy, "accuracy")),
            ("self-consistency@1", mean(sampled, "majority")),
        ]:
            measured = find(rows, model, "", dataset, method)
            if measured:
                forecast = f"{100 * (expected - mean(sampled, 'accuracy')):+.1f}"
                outcome = points(gain(sampled, measured))
                lines.append([f"{method}, {dataset}", forecast, outcome, ""])
        for run in runs_of(rows, model):
            measured = find(rows, model, run, dataset, "sample@1")
            if measured and run.startswith("EM-RL") and not re.search("exact|--reward-norm", run):
                forecast = points(foretold(sampled, "sequence" if "sequence" in run else "token"))
                outcome = points(gain(sampled, measured))
                lines.append([f"{run}: {dataset}", forecast, outcome, shown(measured, "kl")])
    head = "method and set; forecast, points; outcome, points; KL, nats a response"
    return table(head, lines)


def list_of_missing(rows, model):
    """What has not been measured, of each set."""
    lines = []
    for dataset in SETS:
        absent = [m for m in (*PLAIN, *DECODERS) if not find(rows, model, "", dataset, m)]
        for run in runs_of(rows, model) if dataset in TESTS else []:
            if not all(tested(rows, model, dataset, run)):
                absent.append(run)
        lines.append(f"- {dataset}: {'; '.join(absent) or 'nothing'}")
    return "\n".join(lines)


def curves_of(rows, model):
    """{run: {curve: its value at each step}} of the trained models, of each run its first seed. A
    run that another one continues is left out."""
    first = {}
    for key, row in rows.items():
        if key[0] == model and row["entropy_by_step"]:
            first.setdefault(key[1].rpartition(", ")[0], row)
    curves = {}
    for run, row in first.items():
        begins = f"{row['entropy_by_step']} "
        if not any(other["entropy_by_step"].startswith(begins) for other in first.values()):
            by_step = {name: row[f"{name}_by_step"].split() for name in CURVES}
            curves[run] = {name: np.array(values, float) for name, values in by_step.items()}
    return curves


TABLES = {
    "forecast": forecast_table,
    "decoding": decoding_table,
    "claims": list_of_claims,
    "training": training_table,
    "answers": answers_table,
    "controls": controls_table,
    "outcome": outcome_table,
    "missing": list_of_missing,
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
