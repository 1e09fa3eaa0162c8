"""
The paper's questions, asked of a real model: a forecast, decoding, training.

    python findings/real.py forecast   # greedy and 4 answers at T = 1: will EM help?
    python findings/real.py decoding   # EM-INF beside its rivals
    python findings/real.py training   # EM-FT, EM-RL and their controls, and a test of each
    python findings/real.py overlap    # is a test prompt in a training set?
    python findings/real.py report     # tables and figure anew, from the CSV alone
    python findings/real.py examples   # answers before and after training, as Markdown

The model is --model, a folder or an id of the Hub. Problems come from the Hub too, unless
--data svamp=FILE,gsm8k=FILE names files.

real.csv has a row for each (model, run, set, method, seed). What it has is not measured again,
so that the same command goes on after Ctrl-C, and on another machine. The samples of a row lie
in runs/real/, where a job that was cut short goes on too. They are graded when the row is made.
The tables of real.md, between its comments, are filled from the CSV.

Methods are decoders of em_inf.py. The column "right" says how many of the n
answers to each problem are right, so that two rows can be compared problem by problem.
"""
import argparse
import functools
import itertools
import json
import os
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from figures import draw_training
from jobs import Job, execute
from real_tables import (
    COLUMNS,
    CURVES,
    DECODERS,
    KEY,
    PLAIN,
    RUNS,
    SETS,
    TESTS,
    TRAIN,
    curves_of,
    filled,
    read_table,
    runs_of,
    write_table,
)
from report import commit

from em_inf import SCHEMES, AdaptiveTemperature, EMInf, decode_and_grade, parse_decoder
from engine.arguments import Help, comma_list, positive_int
from engine.files import lock, read_jsonl, replace_file
from engine.load import add_device_arguments, load_model, set_up
from engine.run import command, read_rows
from entropy import output_head
from eval import evaluate
from tasks.answers import grade, last_box
from tasks.compare import same_answer
from tasks.problems import load_problems
from tasks.prompts import encode_prompt
from tasks.scores import CONFIDENCE, by_problem, diagnosis, drift, summary

ROOT = Path(__file__).resolve().parent.parent
FULL = dict(problems=100, n=4, tokens=512, seeds=2, prompts=8, steps=20)
GPU = FULL | dict(seeds=3, prompts=64, steps=40)  # 64 x 4 responses take seconds there
QUICK = dict(problems=2, n=2, tokens=16, seeds=1, prompts=2, steps=1)
COMMON = "--lr 5e-6 --max-new-tokens 256 --budget 4096 --rollout-batch 64 --val none"

# ------------------------------------------------------------------------------- the rows


def row_of(samples, problems, allow_code):
    """Graded anew: the columns that follow from samples, n of each problem side by side."""
    known = {problem["id"]: problem for problem in problems}
    texts = [sample["response"] for sample in samples]
    asked = [known[sample["id"]] for sample in samples]
    for sample, right in zip(samples, grade(asked, texts, allow_code)):
        sample["correct"] = right
        if sample["answer"]:  # not a program
            sample["answered"] = last_box(sample["response"]) is not None
    numbers = summary(samples)
    row = {name: numbers[name] for name in "accuracy low high truncated entropy length".split()}
    row |= dict(boxed=numbers["answered"], commit=samples[0]["commit"])
    if samples[0]["answer"]:
        pairs = zip(samples, asked)
        row["added"] = np.mean([wrong_by_adding(one, task["prompt"]) for one, task in pairs])
        row["formulas"] = np.mean([text.count("\\[") for text in texts])  # on lines of their own
        row["last_number"] = np.mean([right_by_last_number(sample) for sample in samples])
    row["flops"] = numbers["flops"] / len(samples)  # of an answer
    drawn = [sample for sample in samples if sample.get("sharpened") is not None]
    if drawn:
        row["sharpened"] = np.mean([sample["sharpened"] for sample in drawn])
    if numbers["n"] > 1:
        found = diagnosis(samples, samples)  # its column of greedy answers is not used
        row |= {"majority": found["majority"], "passed": found["passed"]}
        for reward in CONFIDENCE:
            told = found["rewards"][reward]
            row |= {f"{reward}_{end}": told[end] for end in ("low", "high", "auroc")}
            row[reward] = told["drift"]
        shortness = [-np.array(group) for group in by_problem(samples, "length").values()]
        ends = drift(shortness, by_problem(samples).values())
        row |= dict(zip(("shorter", "shorter_low", "shorter_high"), ends))
    row = {name: f"{value:.4g}" if name != "commit" else value for name, value in row.items()}
    row["right"] = " ".join(str(sum(group)) for group in by_problem(samples).values())
    return row


def numbers_in(text):
    return [number.replace(",", "") for number in re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)]


def right_by_last_number(sample):
    """Is the last number of a response the answer, whether it stands in a box or not?"""
    numbers = numbers_in(sample["response"])
    return bool(numbers) and same_answer(sample["answer"], numbers[-1])


def wrong_by_adding(sample, prompt):
    """Is the last number of a response wrong, and a sum of two or of all numbers of the prompt?"""
    numbers = [float(number) for number in numbers_in(prompt)]
    sums = [a + b for a, b in itertools.combinations(numbers, 2)] + [sum(numbers)]
    last = numbers_in(sample["response"])[-1:]
    if not last or right_by_last_number(sample):
        return False
    return bool(np.isclose(sums, float(last[0])).any())  # decimals do not add up exactly


# ------------------------------------------------------------------------------- measuring


def problems_of(name, args):
    return load_problems(args.data.get(name, name))


@functools.cache
def loaded(name, device, dtype):
    device, dtype = set_up(device, dtype)
    model, tokenizer = load_model(name, device, dtype)
    return model, tokenizer, output_head(model, encode_prompt(tokenizer, "Which prime is even?"))


def samples_of(key, folder, problems, n, args):
    """The samples of a row: those of its file, and behind them the rest, a batch at a time."""
    _, run, name, method, seed = key
    sharpener, scheme, temperature = parse_decoder(method)
    stem = f"{name} {method} {n} x {args.tokens}, {seed}"
    path = folder / f"{run} {stem}.jsonl".strip()
    samples = read_jsonl(path)
    size = max(1, args.rollout_batch // (n * SCHEMES[scheme][0]))
    for start in tqdm(range(len(samples) // n, len(problems), size), desc=path.stem, delay=5):
        model = loaded(str(folder / run / "checkpoint") if run else args.model, args.device,
                       args.dtype)
        some = problems[start : start + size]
        # methods draw apart: self-consistency must not vote over the row it is compared with
        drawn = zlib.crc32(f"{name} {method} {seed} {start}".encode())
        settings = dict(
            seed=drawn, batch_size=args.rollout_batch, allow_code=args.allow_code_execution
        )
        if sharpener is None and scheme in ("greedy", "sample"):
            new = evaluate(*model, some, temperature, args.tokens, n=n, **settings)
            share = None
        else:
            used = {"em-inf": EMInf(), "adaptive-temperature": AdaptiveTemperature()}
            new = decode_and_grade(*model, some, method, args.tokens, sharpeners=used, **settings)
            share = used[sharpener].changed / used[sharpener].rows if sharpener else None
        # batches drew with other seeds, but are samples of one row: scores.py goes by "seed"
        samples += [sample | dict(seed=1, sharpened=share, commit=commit()) for sample in new]
        replace_file(path, "".join(json.dumps(sample) + "\n" for sample in samples))
    return samples


def measure(rows, key, problems, n, folder, args, more=()):
    """Put the row of a key into `rows` and the CSV, unless it is there with these settings."""
    wanted = dict(problems=f"{len(problems)}", n=f"{n}", tokens=f"{args.tokens}")
    if not args.regrade and wanted.items() <= rows.get(key, {}).items():
        return
    samples = samples_of(key, folder, problems, n, args)
    row = dict(zip(KEY, key)) | wanted | row_of(samples, problems, args.allow_code_execution)
    row |= dict(more)
    rows[key] = {name: f"{row.get(name, '')}" for name in COLUMNS}
    write_table(args.csv, rows)


def train(run, method, name, seed, folder, args):
    """Train a model on the prompts of a set, without those that a test has, unless that is done.
    Returns what its metrics say: columns of real.csv."""
    file = folder / f"{name}.jsonl"
    problems = apart(problems_of(name, args), [problems_of(test, args) for test in TESTS])
    replace_file(file, "".join(json.dumps(problem) + "\n" for problem in problems))
    flags = f"{RUNS[method]} {COMMON} --prompts {args.prompts} --steps {args.steps} --seed {seed}"
    script, *flags = f"{flags} {args.flags}".split()  # of a flag given twice, the last counts
    words = [str(ROOT / script), *flags, "--model", args.model, "--data", str(file)]
    if args.dtype:
        words += ["--dtype", args.dtype]
    execute([Job(folder / run, words, after=(), threads=os.cpu_count())], 1, folder)
    metrics = read_rows(folder / run / "metrics.csv")[1:]  # step 0 has none
    minutes = sum(row["seconds"] for row in metrics) / 60
    more = dict(steps=metrics[-1]["step"], minutes=f"{minutes:.1f}")
    if "kl" in metrics[-1]:
        more["kl"] = f"{metrics[-1]['kl'] * metrics[-1]['length']:.3g}"  # nats a response
    for column in CURVES:
        more[f"{column}_by_step"] = " ".join(f"{row[column]:.3g}" for row in metrics)
    return more


def normal(prompt):
    return " ".join(re.findall(r"\w+", prompt.casefold()))


def apart(training, tests):
    """The problems of a training set whose prompts, but for case and punctuation, no test has."""
    asked = {normal(problem["prompt"]) for problems in tests for problem in problems}
    return [problem for problem in training if normal(problem["prompt"]) not in asked]


def print_examples(rows, run, name, folder, args):
    """Greedy answers before and after a run, as Markdown: the first that it mended, the first that
    it broke and the first other one that is right both times."""
    answers = []
    for who in "", run:
        right = rows[args.name, who, name, "greedy", "1"]["right"].split()
        samples = read_jsonl(folder / f"{who} {name} greedy 1 x {args.tokens}, 1.jsonl".strip())
        answers.append(list(zip(samples, right)))
    print(f"### {run}\n")
    shown = {("0", "0")}  # wrong both times: not shown
    for (before, was), (after, is_now) in zip(*answers):
        if (was, is_now) in shown or before["response"] == after["response"]:
            continue
        shown.add((was, is_now))
        print(f"{before['id']}; the answer is {before['answer']}.\n")
        for when, sample, right in ("Before", before, was), ("After", after, is_now):
            word = "right" if right == "1" else "wrong"
            print(f"{when}: {word}, {sample['length']} tokens, {sample['entropy']:.3f} nats "
                  f"a token.\n\n```text\n{sample['response'].strip()}\n```\n")


# ------------------------------------------------------------------------------ the command


def some_of(known):
    """A type for argparse: names that are in `known`, with commas between them."""
    def names(text):
        unknown = [name for name in comma_list(text) if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(known)}")
        return comma_list(text)
    return names


def named_files(text):
    """"svamp=FILE,gsm8k=FILE" -> {"svamp": FILE, "gsm8k": FILE}"""
    return dict(pair.split("=", 1) for pair in text.split(","))


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    tables = "forecast decoding training overlap report examples"
    add("table", choices=tables.split())
    add("--model", default="Qwen/Qwen2.5-Coder-0.5B-Instruct", help="folder or Hub id")
    add("--name", help="what the tables call it; without it the last part of --model")
    add("--data", type=named_files, default={}, metavar="SET=FILE,...", help="files of problems")
    add("--runs", type=some_of(RUNS), default=list(RUNS), help="methods of training, with commas")
    add("--train", type=some_of(TRAIN), default=list(TRAIN), help="sets to train on, with commas")
    add("--tests", type=some_of(TESTS), default=list(TESTS), help="sets to test on, with commas")
    add("--flags", default="", help="more flags for the training scripts, such as '--lr 1e-5': "
        "they stand behind the method's name in the tables")
    add("--regrade", action="store_true", help="grade the samples of a table's rows again")
    add("--quick", action="store_true", help="the settings under QUICK: less of everything")
    for name in FULL:
        add(f"--{name}", type=positive_int, help=f"without it {FULL[name]}, on a GPU {GPU[name]}")
    add("--rollout-batch", type=positive_int, default=208, help="responses sampled at once")
    add_device_arguments(add)
    add("--allow-code-execution", action="store_true", help="ask HumanEval too, and run the "
        "programs that answer, in a sandbox")
    add("--csv", type=Path, help="without it findings/real.csv, with --quick one in runs/")
    args = parser.parse_args(argv)
    settings = QUICK if args.quick else GPU if torch.cuda.is_available() else FULL
    for name in settings:
        setattr(args, name, getattr(args, name) or settings[name])
    folder = ROOT / ("runs/real-quick" if args.quick else "runs/real")
    args.csv = args.csv or (folder if args.quick else ROOT / "findings") / "real.csv"
    args.name = args.name or Path(args.model).name
    folder = folder / args.name
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder, "lock of real.py")  # noqa: F841, until the process ends
    rows = read_table(args.csv)
    if not args.allow_code_execution:
        args.tests = [name for name in args.tests if name != "humaneval"]
    args.sets = [name for name in SETS if name in ("asdiv", *args.tests)]

    def measure_all(name, run="", methods=PLAIN, seeds=(1,), more=()):
        problems = problems_of(name, args)[: args.problems]
        for method, seed in itertools.product(methods, seeds):
            n = args.n if method == "sample@1" else 1
            key = args.name, run, name, method, f"{seed}"
            measure(rows, key, problems, n, folder, args, more)

    seeds = range(1, args.seeds + 1)
    if args.table == "forecast":
        for name in args.sets:
            measure_all(name)
    if args.table == "decoding":
        for name in args.sets:
            measure_all(name)
            measure_all(name, methods=DECODERS, seeds=seeds)
    if args.table == "training":
        for seed, name, method in itertools.product(seeds, args.train, args.runs):
            run = f"{method} {args.flags}".strip() + f", {name}, {seed}"
            wanted = itertools.product([args.name], [run], args.tests, PLAIN, ["1"])
            if args.regrade or not rows.keys() >= set(wanted):
                more = train(run, method, name, seed, folder, args)
                for test in args.tests:
                    measure_all(test, run, more=more)
    if args.table == "overlap":
        for name, test in itertools.product(args.train, args.tests):
            training = problems_of(name, args)
            shared = len(training) - len(apart(training, [problems_of(test, args)]))
            print(f"{name}: {shared} of {len(training)} prompts are in {test}; not trained on")
    if args.table == "examples":
        for run in runs_of(rows, args.name):
            if (args.name, f"{run}, 1", "svamp", "greedy", "1") in rows:
                print_examples(rows, f"{run}, 1", "svamp", folder, args)
    if args.csv.resolve() == ROOT / "findings/real.csv":
        page = ROOT / "findings/real.md"
        replace_file(page, filled(page.read_text(encoding="utf-8"), rows))
        curves = curves_of(rows, args.name)
        if curves:
            draw_training(curves, CURVES, ROOT / "assets/real-training.png")


if __name__ == "__main__":
    main()
