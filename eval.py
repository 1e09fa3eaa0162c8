"""
Evaluate a language model on problems with known answers: load, prompt, sample, grade, score.

    python eval.py                                        # the tiny model, 512 test problems
    python eval.py --model runs/NAME/checkpoint           # what a run has trained
    python eval.py --decode greedy,sample@0.1 --n 4       # four answers a problem: pass@4
    python eval.py --model Qwen/Qwen2.5-Math-7B --data math500,amc --max-new-tokens 3072
    python eval.py --model Qwen/Qwen2.5-Math-7B --data math500 --max-new-tokens 3072 --diagnose
    python eval.py --compare runs/A runs/B                # is B better, and how sure is that?
    python eval.py --resume runs/NAME                     # after Ctrl-C, or a kill
    python eval.py --regrade runs/NAME                    # scores from the samples alone
    python eval.py --out runs/NAME --shard 0/8            # several GPUs, a process on each

A decoder is "greedy", "sample" or "sample@T" with a temperature T. Nothing else shapes
the distribution: no top-k and no top-p, whatever the checkpoint says. em_inf.py has the
decoders that sharpen, vote or refine. `--diagnose` asks whether EM will help a model.

An answer is right if its last \\boxed{} holds the problem's (tasks/compare.py).
Programs are run with the problem's tests, if you allow it (tasks/sandbox.py).

The folder of an evaluation has config.json, samples.jsonl (every response and its grade),
results.json and reliability.png.
"""
import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from engine import report, run
from engine.arguments import (
    Help,
    comma_list,
    path_name,
    positive,
    positive_int,
    shard,
    template_settings,
)
from engine.check import check_model
from engine.files import append_jsonl, lock, read_samples, replace_file
from engine.inputs import absolute, refuse_changes
from engine.jobs import folder_in_use, jobs_left, jobs_of, open_folder
from engine.load import add_device_arguments, load_model, set_up
from engine.sampler import generate
from engine.settings import saved_settings
from entropy import output_head, score_all
from tasks import answers, scores
from tasks.errors import UserError
from tasks.problems import HUB, load_gradable, load_problems
from tasks.prompts import encode_problem, response_texts, stop_ids
from tasks.steps import as_asked, ask_in_rounds

HERE, NAME = Path(__file__).resolve().parent, Path(__file__).resolve().name
DECODERS = {0: "greedy", 1: "sample"}  # by temperature
NOT_SAVED = "resume regrade compare out device shard".split()

# --------------------------------------------------------------------------- the evaluation


def evaluate(
    model, tokenizer, head, problems, temperature, max_new_tokens, seed=1, n=1, batch_size=128,
    desc=None, allow_code=False,
):
    """Answer each problem n times, and grade: -> samples as `graded` describes them.

    A problem's n answers stand side by side. Temperature 0 is greedy. The caller's random
    state stays as it was, so that evaluating more often does not change a training run.
    """
    decoder = DECODERS.get(temperature, f"sample@{temperature}")
    stop = stop_ids(model, tokenizer)

    def ask(problems, n):
        started = time.time()
        prompts = [encode_problem(tokenizer, problem) for problem in problems]
        scores = rollout = generate(
            model, prompts, stop, max_new_tokens, temperature, N=n, batch_size=batch_size, desc=desc
        )
        problems = [problem for problem in problems for _ in range(n)]
        prompts = [prompt for prompt in prompts for _ in range(n)]
        seconds = (time.time() - started) / len(problems)
        if temperature not in (0, 1):  # a sample's entropy is the model's own, at T = 1
            scores = score_all(model, head, prompts, rollout.responses)
        spent = [len(p) + len(r) for p, r in zip(prompts, rollout.responses)]
        return graded(
            model, tokenizer, problems, rollout.responses, scores, spent=spent,
            decoder=decoder, seed=seed, seconds=seconds, allow_code=allow_code,
        )

    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return ask_in_rounds(problems, n, ask)


def graded(
    model, tokenizer, problems, responses, scores, spent, decoder, seed, seconds,
    allow_code=False,
):
    """Grade a response (token ids) to each problem: -> samples, a list of dicts with

        id, answer          the problem's
        decoder, seed       as given, and so are seconds
        response            text
        correct, answered   is it right, and has it a box, or a program, at all?
        truncated, length   did it end without a stop token; tokens, the stop token included
        entropy, logprob    means over its tokens, nats, from `scores` (entropy.Scores)
        flops               2 P n, with n the tokens that went through the model for it
        main                only of a step: the problem that it is a step of
    """
    stop = stop_ids(model, tokenizer)
    texts = response_texts(tokenizer, responses)
    right = answers.grade(problems, texts, allow_code)
    entropy = scores.entropy.cpu().double().sum(-1).tolist()
    logprobs = scores.logprobs.cpu().double().sum(-1).tolist()
    samples = []
    for i, problem in enumerate(problems):
        length = len(responses[i])
        samples.append({
            "id": problem["id"],
            "decoder": decoder,
            "seed": seed,
            "response": texts[i],
            "correct": right[i],
            "answered": answers.find_answer(texts[i], problem) is not None,
            "truncated": responses[i][-1] not in stop,
            "length": length,
            "entropy": entropy[i] / length,
            "logprob": logprobs[i] / length,
            "flops": 2 * model.num_parameters() * spent[i],
            "seconds": seconds,
            "answer": problem.get("answer"),
        })
        if "main" in problem:
            samples[-1]["main"] = problem["main"]
    return samples


def evaluate_held_out(step, model, tokenizer, head, problems, args, folder):
    """Greedy and T = 1 accuracy on the held-out problems: the val_ columns ({} without any).

    They are printed, and the first twelve greedy responses go to samples.jsonl.
    """
    if not problems:
        return {}
    greedy, sampled = (
        evaluate(
            model, tokenizer, head, problems, temperature, args.max_new_tokens,
            seed=args.seed, batch_size=args.rollout_batch, desc="held out",
        )
        for temperature in (0, 1)
    )
    return report.held_out(step, problems, greedy, sampled, folder)


def regrade(folder, allow_code):
    """Grade the samples of a folder again: {"DATA DECODER": samples}. Needs no model."""
    results = read_samples(folder)
    for samples in results.values():
        problems = samples  # they hold the answers; tests can be large, and stay in the data
        if samples[0].get("answer") is None:
            data = samples[0]["data"]
            known = {problem["id"]: problem for problem in load_problems(data)}
            if missing := [sample["id"] for sample in samples if sample["id"] not in known]:
                raise UserError(f"--regrade {folder}: {data} has no problem {missing[0]} any more")
            problems = as_asked([known[sample["id"]] for sample in samples], samples)
        texts = [sample["response"] for sample in samples]
        for sample, right in zip(samples, answers.grade(problems, texts, allow_code)):
            sample["correct"] = right
    return results


def temperature_of(decoder):
    """The temperature of a decoder: 0 for greedy, 1 for sample, T for sample@T."""
    scheme, at, number = decoder.partition("@")
    try:
        temperature = positive(number) if at else float(scheme == "sample")
    except (ValueError, argparse.ArgumentTypeError):
        temperature = 0.0
    if decoder != "greedy" and (scheme != "sample" or temperature == 0):
        raise UserError(f"--decode {decoder}: give greedy, sample or sample@T with a T above 0; "
                         "em_inf.py has other decoders")
    return temperature


@run.command
def main(argv=None):
    # ----------------------------------------------------------------------------- settings
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=Help, usage="python eval.py [options]"
    )
    add = parser.add_argument
    add("--model", type=path_name, default=str(HERE / "tiny/base"), help="folder or Hub id")
    add("--template", type=template_settings, metavar="KEY=VALUE", help="settings of the chat "
        "template, with commas: enable_thinking=false")
    add("--data", type=comma_list, default=str(HERE / "tiny/test.jsonl"),
        help=f"JSONL files or names, with commas: {', '.join(HUB)}")
    add("--limit", type=positive_int, help="only the first LIMIT problems of each")
    add("--decode", type=comma_list, default="greedy,sample", help="decoders, with commas")
    add("--n", type=positive_int, default=1, help="answers a problem and seed, for pass@n")
    add("--seeds", type=positive_int, default=3, help="seeds 1 to SEEDS; one for greedy")
    add("--max-new-tokens", type=positive_int, default=64,
        help="longest response, tokens; a real model needs about 3072")
    add("--rollout-batch", type=positive_int, default=512, help="responses sampled at once; "
        "another number draws other samples, and the same greedy ones")
    add("--allow-code-execution", action="store_true",
        help="run the programs that answer code problems, in a sandbox")
    add_device_arguments(add)
    add("--out", type=path_name, help="folder for the results; without it a new one in runs/")
    add("--resume", type=path_name, metavar="FOLDER", help="go on with an interrupted evaluation")
    add("--shard", type=shard, metavar="I/N", help="do the I-th of N parts (from 0), in the --out "
        "that the other parts have too; the last one to end prints the table")
    add("--regrade", type=path_name, metavar="FOLDER", help="grade samples again and print the "
        "table")
    add("--compare", type=path_name, nargs=2, metavar="FOLDER", help="paired difference of two "
        "evaluations")
    add("--diagnose", action="store_true", help="will EM help this model? Takes 8 answers to "
        "each of 512 problems, unless --n and --limit say otherwise")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.compare:
        first, second = args.compare
        return print(scores.compare(read_samples(first), read_samples(second)))
    if args.regrade:
        regraded = regrade(args.regrade, args.allow_code_execution)
        return print(scores.table(regraded))
    if args.resume and args.out:
        raise UserError(f"--out {args.out}: --resume goes on in its own folder")
    if args.shard and not (args.out or args.resume):
        raise UserError("--shard: all parts need the same --out")
    begun, before = folder_in_use(args), {}
    if begun:
        before, args = saved_settings(begun, NAME, parser, argv, NOT_SAVED)
    if args.diagnose:
        if args.decode != parser.get_default("decode").split(","):
            raise UserError(f"--decode {','.join(args.decode)}: --diagnose compares greedy and "
                            "sample; leave one of the two flags out")
        args.decode, args.seeds = ["greedy", "sample"], 1
        args.limit = args.limit or 512
        args.n = args.n if args.n > 1 else 8
    args.model = absolute(args.model, os.path.isdir)
    args.data = [absolute(data) for data in args.data]
    refuse_changes(begun, before, {key: vars(args)[key] for key in before})

    # ------------------------------------------------------------------------------- set-up
    device, dtype = set_up(args.device, args.dtype, args.graph)
    temperatures = [temperature_of(decoder) for decoder in args.decode]
    if len(set(temperatures)) < len(temperatures):
        raise UserError(f"--decode {','.join(args.decode)}: two of them are the same")
    problems = {}
    for data in args.data:
        problems[data] = load_gradable(data, args.limit, args.allow_code_execution)
    model, tokenizer = load_model(args.model, device, dtype, args.template)
    args.dtype = str(model.dtype).removeprefix("torch.")  # also where this is resumed
    asked = itertools.chain(*problems.values())
    prompts = [encode_problem(tokenizer, problem) for problem in asked]
    check_model(model, prompts, args.max_new_tokens)
    head = output_head(model, prompts[0])
    folder = open_folder(args, problems, NAME, NOT_SAVED)
    first, parts = args.shard or (0, 1)
    suffix = f"-{first}" if args.shard else ""
    lock(folder, f"lock{suffix}")
    sizes = ", ".join(f"{len(some)} problems of {data}" for data, some in problems.items())
    template = "in the chat template" if tokenizer.chat_template else "plain: no chat template"
    print(f"{args.model} on {sizes}; {device}; prompts {template}")
    print(f"results: {folder}", flush=True)

    # --------------------------------------------------------------------------- evaluation
    jobs = jobs_of(problems, args)
    left = jobs_left(jobs, folder, first, parts)
    try:
        for number in tqdm(left, unit="job", leave=False, delay=5):
            job = jobs[number]
            samples = evaluate(
                model, tokenizer, head, job["problems"], temperature_of(job["decoder"]),
                args.max_new_tokens, seed=job["seed"] + 1000 * job["places"][0], n=job["n"],
                batch_size=args.rollout_batch, allow_code=args.allow_code_execution,
                desc=f"{Path(job['data']).stem} {job['decoder']}, seed {job['seed']}",
            )
            for place, sample in zip(job["places"], samples):
                sample |= {name: job[name] for name in ("data", "decoder", "seed")}
                sample |= {"job": number, "place": place}
            append_jsonl(folder / f"samples{suffix}.jsonl", samples)
    except KeyboardInterrupt:
        raise UserError(f"stopped; go on with: python eval.py --resume {folder}") from None
    results = read_samples(folder)
    total = sum(len(job["places"]) for job in jobs)
    missing = total - sum(map(len, results.values()))
    if missing:
        return print(f"\nthis part is done; {missing:,} of {total:,} samples are to come")
    if args.diagnose:
        pairs = list(results.items())
        for (_, greedy), (name, sampled) in zip(pairs[::2], pairs[1::2]):
            print(f"\n{name}:\n{scores.diagnose(greedy, sampled)}")
    else:
        print("\n" + scores.table(results))
    summaries = {name: scores.summary(samples) for name, samples in results.items()}
    replace_file(folder / "results.json", json.dumps(summaries, indent=1) + "\n")
    report.reliability_plot(results, folder)
    print(f"\nsamples, results.json and reliability.png: {folder}")


if __name__ == "__main__":
    main()
