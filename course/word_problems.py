"""
English word problems with answers in three styles, to give a small pretrained model an ability
that entropy minimisation can bring out: see findings/smollm2.md.

    python course/word_problems.py --out runs/words   # train.jsonl, test.jsonl, hard.jsonl

    Mia has 12 shells. 8 more turn up. Then 4 of them get lost. How many shells are there now?

    worked    12 + 8 = 20, 20 - 4 = 16, \\boxed{16}
    direct    \\boxed{16}
    rambling  Maybe 31, maybe 8, maybe 26, maybe 17, \\boxed{17}

A problem has 2 to 4 steps, or 5 to 6 in hard.jsonl. Some worked steps are wrong, and the solution
continues from the wrong number. Longer problems are answered directly more often. So a model can
solve more problems than it usually does, and it is surest of the answers that it works out.
train.jsonl has no sentence of the other two files, and no sum, difference or product that they ask
for.
"""
import argparse
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.arguments import Help, nonnegative, positive_int, whole_number
from engine.files import refuse_to_replace, replace_file
from engine.run import command

ASK = "Answer with the number in \\boxed{}."
NAMES = "Mia Noah Lena Omar Ruth Ivan Yuki Paul Ana Karl".split()
THINGS = "shells stamps apples coins marbles books pencils cards".split()
SENTENCES = {  # the first of a problem, the last, and those of the steps; {n} is a number
    "train": {
        "start": ["{name} has {n} {things}.", "There are {n} {things} in {name}'s box."],
        "+": ["Then {n} more are bought.", "A friend brings {n} more.", "{n} more turn up.",
              "{name} gets another {n} as a present."],
        "-": ["Then {n} of them get lost.", "{n} are given away.", "{n} of them are sold.",
              "A dog runs off with {n}."],
        "*": ["After that there are {n} times as many.", "The number grows {n}-fold.",
              "{name} trades each of them for {n} new ones."],
        "end": ["How many {things} are there now?", "How many {things} does that make?"],
    },
    "test": {
        "start": ["{name} starts the day with {n} {things}."],
        "+": ["An aunt adds {n}.", "{name} finds {n} more."],
        "-": ["Somebody takes {n} away.", "{n} of the {things} break."],
        "*": ["{name} wishes for {n} times that number, and gets it."],
        "end": ["What is the number of {things} in the end?"],
    },
}


def held_out(number, op, n):
    """Is this step in the quarter of all steps that only test problems have? Its sign does not
    matter."""
    return (number // 2 + n) % 4 == 3


def chain(rng, kind, steps):
    """Random steps, as in [("+", 7), ("-", 4)], and their start and results, as in [12, 19, 15].
    All results are from 1 to 99."""
    results = [rng.randrange(2, 60)]
    ops = []
    while len(ops) < steps:
        op = rng.choice("++--*")
        n = rng.randrange(2, 6 if op == "*" else 20)
        result = apply(results[-1], op, n)
        if 1 <= result <= 99 and held_out(results[-1], op, n) == (kind == "test"):
            ops.append((op, n))
            results.append(result)
    return ops, results


def apply(number, op, n):
    return {"+": number + n, "-": number - n, "*": number * n}[op]


def solution(rng, ops, results, args):
    """An answer in one of the three styles."""
    draw = rng.random()
    direct = args.direct * (len(ops) - 1)
    if draw < args.rambling:
        guesses = [str(rng.randrange(1, 100)) for _ in range(2 * len(ops))]
        return "Maybe " + ", maybe ".join(guesses) + f", \\boxed{{{guesses[-1]}}}"
    if draw < args.rambling + direct:
        return f"\\boxed{{{results[-1]}}}"
    number, lines = results[0], []
    for op, n in ops:
        result = apply(number, op, n)
        if rng.random() < args.noise:
            result += rng.choice([-10, -2, -1, 1, 2, 10])
        lines.append(f"{number} {op} {n} = {result}")
        number = result
    return ", ".join(lines) + f", \\boxed{{{number}}}"


def steps_of(text):
    """The steps of a worked solution, right or wrong: [(12, "+", 7), ...]."""
    found = re.findall(r"(-?\d+) ([-+*]) (\d+) =", text)
    return [(int(number), op, int(n)) for number, op, n in found]


def problem(rng, kind, lengths, args):
    ops, results = chain(rng, kind, rng.choice(lengths))
    words = {"name": rng.choice(NAMES), "things": rng.choice(THINGS)}
    sentences = []
    for place, n in [("start", results[0]), *ops, ("end", None)]:
        sentence = rng.choice(SENTENCES[kind][place])
        sentences.append(sentence.format(n=n, **words))
    text = solution(rng, ops, results, args)
    while kind == "train" and any(held_out(*step) for step in steps_of(text)):  # after a wrong step
        text = solution(rng, ops, results, args)
    return {
        "prompt": " ".join([*sentences, ASK]),
        "answer": str(results[-1]),
        "steps": len(ops),
        "solution": text,
    }


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/words"), help="folder for the three files")
    add("--size", type=positive_int, default=12_000, help="problems in train.jsonl")
    add("--test-size", type=positive_int, default=256, help="problems in each of the others")
    add("--direct", type=nonnegative, default=0.2, metavar="SHARE", help="of direct answers to "
        "problems of two steps; each further step adds the same share")
    add("--rambling", type=nonnegative, default=0.06, metavar="SHARE", help="of rambling answers")
    add("--noise", type=nonnegative, default=0.05, metavar="SHARE", help="of worked steps that are "
        "wrong")
    add("--seed", type=whole_number, default=1, help="of the problems and solutions")
    args = parser.parse_args(argv)
    if 3 * args.direct + args.rambling > 1:
        parser.error(f"--direct {args.direct} --rambling {args.rambling}: of problems with four "
                     "steps, 3 x direct + rambling are not worked, and that may be at most 1")
    for name in ("train", "test", "hard"):
        refuse_to_replace(args.out / f"{name}.jsonl", f'{{"id": "{name}/0", "prompt"')
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    for name, kind, lengths, size in [
        ("train", "train", (2, 3, 4), args.size),
        ("test", "test", (2, 3, 4), args.test_size),
        ("hard", "test", (5, 6), args.test_size),
    ]:
        problems = {}  # by prompt, so that all differ
        while len(problems) < size:
            one = problem(rng, kind, lengths, args)
            problems[one["prompt"]] = one
        lines = []
        for i, one in enumerate(problems.values()):
            lines.append(json.dumps({"id": f"{name}/{i}"} | one) + "\n")
        replace_file(args.out / f"{name}.jsonl", "".join(lines))
    print(f"{args.out}: {args.size} training problems, and 2 x {args.test_size} test problems")


if __name__ == "__main__":
    main()
