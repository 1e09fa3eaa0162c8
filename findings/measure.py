"""
Measurements of a model of the tiny world, for findings.py, which says what to measure in JSON.

    python findings/measure.py '{"model": "tiny/base", "seed": 1, "n": 8}' --out answers.json
    python findings/measure.py --out answers.json '{"model": "tiny/base", "seed": 1,
        "decoders": {"greedy": ["greedy", {}], "δ = 0.1": ["em-inf", {"delta": 0.1}]},
        "families": {"long": {"lengths": [6]}}}'

"n" asks for greedy answers and n at T = 1 to each of the first "problems" in "data". With
"decoders" each of them answers: {name: [decoder, settings of EM-INF]}. With "families", too, they
answer problems that are drawn for each family, {family: arguments of `tiny.prepare.chain`}, or
those of "data" if a family has no arguments. variance.py has the command for gradients. `of_run`
and `examples` look at training runs.
"""
import argparse
import json
import random
import sys
from operator import itemgetter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from variance import of_gradients

from em_inf import AdaptiveTemperature, EMInf, decode_and_grade
from engine.arguments import Help
from engine.files import replace_file
from engine.guard import collapsed
from engine.load import load_model
from engine.sampler import generate
from entropy import output_head
from eval import evaluate
from tasks.answers import is_correct, last_box
from tasks.problems import load_problems
from tasks.prompts import encode_prompt, stop_ids
from tasks.scores import CONFIDENCE, by_problem, diagnosis, summary
from tiny.prepare import chain, problem_of

VERDICTS = {"likely helps": 1, "too close to call": 0, "harms": -1}


def measure(spec):
    """{part: {metric: value}}. A part is a family of problems or else a decoder's name, one of
    `of_answers` or an estimator of a gradient."""
    problems = load_problems(spec.get("data", "tiny/test.jsonl"))[: spec.get("problems")]
    model, tokenizer = load_model(spec["model"], "cpu")
    model = model, tokenizer, output_head(model, encode_prompt(tokenizer, problems[0]["prompt"]))
    if "n" in spec:
        settings = dict(max_new_tokens=64, seed=spec["seed"], batch_size=512)
        greedy = evaluate(*model, problems, 0, **settings)
        sampled = evaluate(*model, problems, 1, n=spec["n"], **settings)
        return of_answers(greedy, sampled)
    if "norm" in spec:
        return of_gradients(*model, spec["norm"], spec["batches"])
    if not spec.get("families"):
        return of_decoders(decoded(model, problems, spec))
    parts = {}
    for family, limits in spec["families"].items():
        drawn = problems_of(limits, len(problems)) if limits else problems
        parts[family] = {}
        for name, numbers in decoded(model, drawn, spec).items():
            parts[family] |= {name: numbers["accuracy"], f"ECE {name}": numbers["ece"]}
    return parts


def decoded(model, problems, spec):
    """{name of a decoder: `summary` of its answers}; `model` with its tokenizer and head."""
    numbers = {}
    for name, (decoder, chosen) in spec["decoders"].items():
        sharpeners = {
            "em-inf": EMInf(**{"steps": 10} | chosen),
            "adaptive-temperature": AdaptiveTemperature(),
        }
        settings = dict(seed=spec["seed"], batch_size=512, sharpeners=sharpeners)
        numbers[name] = summary(decode_and_grade(*model, problems, decoder, 128, **settings))
    return numbers


def of_decoders(found):
    """What the summaries of decoders say."""
    parts = {}
    for name, numbers in found.items():
        parts[name] = {key: numbers[key] for key in ("accuracy", "entropy", "seconds")}
        parts[name]["FLOPs"] = numbers["flops"] / 1e9
        if "greedy" in found:
            parts[name]["FLOPs (greedy = 1)"] = numbers["flops"] / found["greedy"]["flops"]
    return parts


def problems_of(limits, count):
    """`count` different problems, of the lengths and signs in `limits`."""
    rng = random.Random(0)
    problems = {}
    while len(problems) < count:
        problem = problem_of([chain(rng, **limits)])
        problems[problem["prompt"]] = problem | {"id": problem["prompt"]}
    return list(problems.values())


def of_answers(greedy, sampled):
    """What graded answers say: greedy ones, and n to each problem at T = 1."""
    found = diagnosis(greedy, sampled)
    right = by_problem([sample for sample in sampled if sample["correct"]], "response")
    different = [len({last_box(text) for text in texts}) for texts in right.values()]
    answers = {
        "greedy": found["greedy"],
        "T = 1": found["sampled"],
        "entropy": found["entropy"],
        "majority over greedy": found["majority"] - found["greedy"],
        "distinct answers": found["distinct"],
        "distinct right answers": sum(different) / len(greedy),
        "ECE": found["ece"],
        "AUROC": found["rewards"]["token"]["auroc"],
        "pass@1": found["sampled"],
    }
    answers |= {f"pass@{k}": share for k, share in found["pass"].items()}
    parts = {"answers": answers, "pass@4": {"pass@4": answers["pass@4"]}}
    worked = [sample for sample in sampled if "=" in sample["response"]]  # they show their steps
    for reward, (key, sign) in CONFIDENCE.items():
        forecast = found["rewards"][reward]
        parts[reward] = {
            "forecast": forecast["drift"],
            "from": forecast["low"],
            "to": forecast["high"],
            "diagnosis": VERDICTS[forecast["verdict"]],
            "AUROC": forecast["auroc"],
        }
        parts[reward] |= {f"surest of {k}": share for k, share in forecast["surest"].items()}
        for name, right in ("worked right", True), ("worked wrong", False):
            rewards = [sign * sample[key] for sample in worked if sample["correct"] == right]
            parts[reward][name] = np.mean(rewards) if rewards else np.nan
    return parts


def of_run(rows):
    """What the rows of a run's metrics.csv say."""
    measured = [row for row in rows if "val_greedy" in row]
    last = measured[-1]
    peak = max(measured, key=itemgetter("val_greedy"))  # the first of the best
    high = [row["step"] for row in measured if row["val_greedy"] >= 0.95]
    stop = guard_stop(rows)
    until = [row["val_greedy"] for row in measured if row["step"] <= stop]
    return {
        "greedy": last["val_greedy"],
        "T = 1": last["val_sampled"],
        "entropy": last["val_entropy"],
        "length": last["val_length"],
        "FLOPs": sum(row["flops"] for row in rows[1:]) / 1e9,
        "steps to 95 %": high[0] if high else np.nan,
        "peak at step": peak["step"],
        "peak greedy": peak["val_greedy"],
        "KL at peak": kl_of_response(peak),
        "KL at end": kl_of_response(last),
        "guard stops at step": stop,
        "greedy there": until[-1] if until else np.nan,
    }


def kl_of_response(row):
    """Nats, of the policy before that step to the initial model; nan where it was not measured."""
    return row.get("kl", np.nan) * row["length"] if row["step"] else 0.0


def guard_stop(rows):
    """The step after which the guard, as it is by default, would have ended a run; or nan."""
    for i, row in enumerate(rows):
        if collapsed(rows[: i + 1], 4.0):
            return row["step"]
    return np.nan


def answers_to(problem, folder, **sampling):
    """The model of a folder answers: for each answer its tokens (texts), the entropy of each in
    nats, and whether the answer is right."""
    model, tokenizer = load_model(str(folder), "cpu")
    ids, stop = encode_prompt(tokenizer, problem["prompt"]), stop_ids(model, tokenizer)
    rollout = generate(model, [ids], stop, max_new_tokens=64, **sampling)
    for response, entropy in zip(rollout.responses, rollout.entropy.tolist()):
        tokens = [tokenizer.decode(token) for token in response]
        if response[-1] in stop:
            tokens[-1] = " end"
        yield tokens, entropy[: len(tokens)], is_correct("".join(tokens), problem)


def examples(models):
    """The same three problems, answered greedily by each of {name: folder}: Markdown, with
    each token's entropy below it, in tenths of a nat."""
    lines = []
    for problem in load_problems("tiny/test.jsonl")[5:8]:
        lines.append(f"{problem['prompt']}    answer: {problem['answer']}")
        for name, folder in models.items():
            ((tokens, entropy, right),) = answers_to(problem, folder, temperature=0.0)
            below = ""
            for token, nats in zip(tokens, entropy):
                below += f"{min(9, round(10 * nats))}".ljust(len(token))
            mark = "right" if right else "wrong"
            lines += [f"  {name:12} {mark}  " + "".join(tokens), " " * 22 + below.rstrip()]
    return "```\n" + "\n".join(lines) + "\n```"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("spec", type=json.loads, help="what to measure, in JSON")
    parser.add_argument("--out", type=Path, required=True, help="file for the numbers, JSON")
    args = parser.parse_args()
    replace_file(args.out, json.dumps(measure(args.spec), indent=1))


if __name__ == "__main__":
    main()
