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

An answer is right if its last \\boxed{} holds the problem's, as judged by math-verify.
Programs are run with the problem's tests, if you allow it (tasks/sandbox.py).

The folder of an evaluation has config.json, samples.jsonl (every response and its grade),
results.json and reliability.png.
"""
import argparse
import inspect
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer

from entropy import batches, output_head, score_all, token_entropy
from tasks import answers, sandbox, scores
from tasks.answers import is_correct, votes  # noqa: F401, for other scripts
from tasks.arguments import (  # noqa: F401
    Help,
    comma_list,
    growth,
    nonnegative,
    number_or_exact,
    positive,
    positive_int,
    shard,
    two_or_more,
    whole_number,
)
from tasks.files import (
    append_jsonl,
    fresh_folder,
    lock,
    read_config,
    read_jsonl,
    read_samples,
    replace_file,
)
from tasks.problems import HUB, hub_says, load_gradable, load_problems, reach_hub  # noqa: F401
from tasks.prompts import encode_problem, encode_prompt, stop_ids

HERE = Path(__file__).parent
DECODERS = {0: "greedy", 1: "sample"}  # by temperature

# ------------------------------------------------------------------------ model and prompts


def set_up(device=None, dtype=None):
    """(device, dtype) to work with, chosen where they are not given.

    Weights are bfloat16 on a GPU that has it, else float32 (on a T4, say): float16 would
    need its losses scaled. Raises ValueError for a device that is not there.
    """
    if device is None:
        other = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else other
    try:
        if device.split(":")[0] not in ("cuda", "mps", "cpu"):
            raise RuntimeError("give cuda, mps or cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0][:160]
        raise ValueError(f"--device {device}: not usable here ({reason})") from None
    # cuDNN's attention makes a plan for every new shape, which takes longer than a token does
    torch.backends.cuda.enable_cudnn_sdp(False)
    native = device.startswith("cuda")
    native = native and torch.cuda.is_bf16_supported(including_emulation=False)
    return device, getattr(torch, dtype or ("bfloat16" if native else "float32"))


def load_model(name, device, dtype=torch.float32):
    """(model in eval mode, tokenizer) of a folder or a Hub id; OSError where there is none."""
    is_folder = Path(name).is_dir()
    reached = is_folder or reach_hub()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        settings = Path(name, "generation_config.json")  # if damaged, transformers ignores it
        if settings.exists():
            json.loads(settings.read_text())
        adapters = Path(name, "adapter_config.json")  # of --lora
        base = name
        if adapters.exists():
            base = json.loads(adapters.read_text())["base_model_name_or_path"]
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        if adapters.exists():
            import peft

            model = peft.PeftModel.from_pretrained(model, name).get_base_model()
    except Exception as error:  # whatever the loaders raise for a missing or a damaged file
        reason = " ".join(str(error).split())[:160]
        if is_folder:
            raise OSError(f"model {name}: the folder can't be loaded ({reason})") from error
        raise OSError(f"model {name}: no folder here, and {hub_says(reached)} model") from error
    if model.num_parameters() < 2**20 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # beside any other work several would wait for each other
    return model.to(device).eval(), tokenizer


# ------------------------------------------------------------------------------ the sampler


class GrowingLayer(DynamicLayer):
    """A layer's keys and values in a buffer with room to grow. transformers' own layer copies
    all of itself at every token: at 64 rows x 1,024 tokens that took 1.8 times as long."""

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.key_room, self.value_room = self.keys, self.values
        self.key_room, self.keys = append(self.key_room, self.keys, keys)
        self.value_room, self.values = append(self.value_room, self.values, values)
        return self.keys, self.values


def append(room, old, new):
    """Put `new` (B, heads, t, D) behind `old` in its buffer `room`: (room, a view of both)."""
    start = old.shape[-2] if old.numel() else 0
    end = start + new.shape[-2]
    if len(room) != len(new) or room.shape[-2] < end:  # full, or rows have come or gone
        room = new.new_empty(*new.shape[:2], end + 256, new.shape[-1])
        if start:
            room[:, :, :start] = old
    room[:, :, start:end] = new
    return room, room[:, :, :end]


def next_logits(model, cache, ids, attention_mask, position_ids):
    """Run the model on ids (B, t) behind what `cache` holds: logits of the next token (B, V)."""
    names = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in names else "past_key_values"  # renamed in transformers 5.24
    output = model(
        input_ids=ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=True,
        logits_to_keep=1,
        **{name: cache},
    )
    return output.logits[:, -1].float()


def prefill(model, prompts, n):
    """Run B prompts (token ids) through the model, once for all n responses to each.

    Gives the cache, and for its B x n rows the logits of the next token (B x n, V), the
    attention mask (B x n, longest prompt) and the last position (B x n, 1).
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)[:, None]
    ids = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(ids, batch_first=True, padding_side="left").to(model.device)
    place = torch.arange(ids.shape[1], device=model.device)
    mask = (place >= ids.shape[1] - lengths).long()  # from lengths: the padding may be eos
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:  # the layer of a sliding window does not grow
            cache.layers[i] = GrowingLayer()
    logits = next_logits(model, cache, ids, mask, positions)
    cache.batch_repeat_interleave(n)
    logits, mask = logits.repeat_interleave(n, dim=0), mask.repeat_interleave(n, dim=0)
    return cache, logits, mask, positions[:, -1:].repeat_interleave(n, dim=0)


@torch.no_grad()
def generate(
    model, prompts, stop, max_new_tokens, temperature=1.0, n=1, rows=128, sharpen=None,
    desc=None, streamer=None,
):
    """Sample n responses to each prompt: -> (responses, entropy, logprobs).

    Prompts and responses are lists of token ids; a prompt's n responses stand side by side.
    entropy and logprobs (len(responses), T) are those of the drawn tokens, in nats, under
    softmax(logits / temperature): each row has its own values first and zeros behind.

    A response ends with the first of the stop ids, which belongs to it, or without one at
    max_new_tokens (it is truncated). Temperature 0 is greedy, and scored at 1. `sharpen`
    changes the logits (b, V) that are drawn from, before the temperature, and not what is
    scored. At most `rows` responses, or n, are sampled at once. A streamer of transformers
    gets the tokens of a single response as they come.
    """
    was_training = model.training
    model.eval()
    responses = [[] for _ in range(len(prompts) * n)]
    entropy = [[] for _ in responses]
    logprobs = [[] for _ in responses]
    bar = tqdm(total=len(responses), desc=desc, unit="response", leave=False, delay=5,
               disable=desc is None)
    for group in batches([len(p) for p in prompts], math.inf, count=max(1, rows // n)):
        cache, logits, mask, positions = prefill(model, [prompts[i] for i in group], n)
        alive = [i * n + k for i in group for k in range(n)]  # the response of each row
        for t in range(1, max_new_tokens + 1):
            scores = (logits / (temperature or 1.0)).log_softmax(-1)  # (b, V)
            values = token_entropy(scores).tolist()
            if not all(map(math.isfinite, values)):
                raise FloatingPointError(f"the logits are not finite at token {t}")
            ids = draw(logits if sharpen is None else sharpen(logits), temperature)  # (b, 1)
            tokens = ids[:, 0].tolist()
            drawn = scores.gather(-1, ids)[:, 0].tolist()
            for i, token, h, logprob in zip(alive, tokens, values, drawn):
                responses[i].append(token)
                entropy[i].append(h)
                logprobs[i].append(logprob)
            if streamer is not None:
                streamer.put(ids[:, 0].cpu())
            # the rows that have ended leave, and the others go on with their part of the cache
            on = [row for row, token in enumerate(tokens) if token not in stop]
            bar.set_postfix_str(f"token {t}", refresh=False)
            bar.update(len(alive) - len(on))
            if not on or t == max_new_tokens:
                break
            if len(on) < len(alive):
                alive = [alive[row] for row in on]
                on = torch.tensor(on, device=model.device)
                cache.batch_select_indices(on)
                ids, mask, positions = ids[on], mask[on], positions[on]
            mask, positions = F.pad(mask, (0, 1), value=1), positions + 1
            logits = next_logits(model, cache, ids, mask, positions)
    bar.close()
    if streamer is not None:
        streamer.end()
    model.train(was_training)
    return responses, as_rows(entropy, model.device), as_rows(logprobs, model.device)


def draw(logits, temperature):
    """(b, V) -> (b, 1): the likeliest token at temperature 0, else a drawn one."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(-1), 1)


def as_rows(lists, device):
    """Lists of floats -> (rows, T) float32, zeros behind each row's own."""
    return pad_sequence([torch.tensor(row) for row in lists], batch_first=True).to(device)


# --------------------------------------------------------------------------- the evaluation


def evaluate(
    model, tokenizer, head, problems, temperature, max_new_tokens, seed=1, n=1, rows=128,
    desc=None, allow_code=False,
):
    """Answer each problem n times, and grade: -> samples as `graded` describes them.

    A problem's n answers stand side by side. Temperature 0 is greedy. The caller's random
    state stays as it was, so that evaluating more often does not change a training run.
    """
    started = time.time()
    stop = stop_ids(model, tokenizer)
    prompts = [encode_problem(tokenizer, problem) for problem in problems]
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        responses, entropy, logprobs = generate(
            model, prompts, stop, max_new_tokens, temperature, n=n, rows=rows, desc=desc
        )
    problems = [problem for problem in problems for _ in range(n)]
    prompts = [prompt for prompt in prompts for _ in range(n)]
    seconds = (time.time() - started) / len(problems)
    if temperature not in (0, 1):  # a sample's entropy is the model's own, at T = 1
        entropy, logprobs, _ = score_all(model, head, prompts, responses)
    spent = [len(p) + len(r) for p, r in zip(prompts, responses)]
    return graded(
        model, tokenizer, problems, responses, entropy=entropy, logprobs=logprobs,
        spent=spent, decoder=DECODERS.get(temperature, f"sample@{temperature}"), seed=seed,
        seconds=seconds, allow_code=allow_code,
    )


def graded(
    model, tokenizer, problems, responses, entropy, logprobs, spent, decoder, seed, seconds,
    allow_code=False,
):
    """Grade a response (token ids) to each problem: -> samples, a list of dicts with

        id, answer          the problem's
        decoder, seed       as given, and so are seconds
        response            text
        correct, answered   is it right, and has it a box, or a program, at all?
        truncated, length   did it end without a stop token; tokens, the stop token included
        entropy, logprob    means over its tokens, nats, from (B, T) of each
        flops               2 P n, with n the tokens that went through the model for it
    """
    stop = stop_ids(model, tokenizer)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    right = answers.grade(problems, texts, allow_code)
    entropy = entropy.cpu().double().sum(-1).tolist()
    logprobs = logprobs.cpu().double().sum(-1).tolist()
    samples = []
    for i, problem in enumerate(problems):
        length = len(responses[i])
        extract = sandbox.extract_program if "tests" in problem else answers.last_box
        samples.append({
            "id": problem["id"],
            "decoder": decoder,
            "seed": seed,
            "response": texts[i],
            "correct": right[i],
            "answered": extract(texts[i]) is not None,
            "truncated": responses[i][-1] not in stop,
            "length": length,
            "entropy": entropy[i] / length,
            "logprob": logprobs[i] / length,
            "flops": 2 * model.num_parameters() * spent[i],
            "seconds": seconds,
            "answer": problem.get("answer"),
        })
    return samples


def temperature_of(decoder):
    """The temperature of a decoder: 0 for greedy, 1 for sample, T for sample@T."""
    scheme, at, number = decoder.partition("@")
    try:
        temperature = positive(number) if at else float(scheme == "sample")
    except (ValueError, argparse.ArgumentTypeError):
        temperature = 0.0
    if decoder != "greedy" and (scheme != "sample" or temperature == 0):
        raise ValueError(f"--decode {decoder}: give greedy, sample or sample@T with a T above 0; "
                         "em_inf.py has other decoders")
    return temperature


def main(argv=None):
    # ----------------------------------------------------------------------------- settings
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=Help, usage="python eval.py [options]"
    )
    add = parser.add_argument
    add("--model", default=str(HERE / "tiny/base"), help="folder or Hub id")
    add("--data", type=comma_list, default=str(HERE / "tiny/test.jsonl"),
        help=f"JSONL files or names, with commas: {', '.join(HUB)}")
    add("--limit", type=positive_int, help="only the first LIMIT problems of each")
    add("--decode", type=comma_list, default="greedy,sample", help="decoders, with commas")
    add("--n", type=positive_int, default=1, help="answers a problem and seed, for pass@n")
    add("--seeds", type=positive_int, default=3, help="seeds 1 to SEEDS; one for greedy")
    add("--max-new-tokens", type=positive_int, default=64,
        help="longest response, tokens; a real model needs some 3072")
    add("--rollout-batch", type=positive_int, default=512, help="responses sampled at once")
    add("--allow-code-execution", action="store_true",
        help="run the programs that answer code problems, in a sandbox")
    add("--device", help="cuda, mps or cpu; without it the first there is")
    add("--out", help="folder for the results; without it a new one in runs/")
    add("--resume", metavar="FOLDER", help="go on with an interrupted evaluation")
    add("--shard", type=shard, metavar="I/N", help="do the I-th of N parts (from 0), in the --out "
        "that the other parts have too; the last one to end prints the table")
    add("--regrade", metavar="FOLDER", help="grade samples again and print the table")
    add("--compare", nargs=2, metavar="FOLDER", help="paired difference of two evaluations")
    add("--diagnose", action="store_true", help="will EM help this model? Takes 8 answers to "
        "each of 512 problems, unless --n and --limit say otherwise")
    args = parser.parse_args(argv)
    try:
        if args.compare:
            first, second = args.compare
            return print(scores.compare(read_samples(first), read_samples(second)))
        if args.regrade:
            regraded = scores.regrade(args.regrade, args.allow_code_execution)
            return print(scores.table(regraded))
        if args.diagnose:
            args.decode, args.seeds = ["greedy", "sample"], 1
            args.limit = args.limit or 512
            args.n = args.n if args.n > 1 else 8
        if args.resume and args.out:
            raise ValueError(f"--out {args.out}: --resume goes on in its own folder")
        if args.shard and not (args.out or args.resume):
            raise ValueError("--shard: all parts need the same --out")
        begun = args.resume
        if args.shard and args.out and Path(args.out, "config.json").exists():
            begun = args.out  # by another part
        if begun:
            saved = read_config(begun, "eval.py")
            args = parser.parse_args(argv, argparse.Namespace(**saved))
            for key in saved:
                if vars(args)[key] != saved[key]:
                    raise ValueError(f"{begun} began with {key} {saved[key]}, so "
                                     f"{vars(args)[key]} needs a new folder")

        # --------------------------------------------------------------------------- set-up
        device, dtype = set_up(args.device)
        temperatures = {decoder: temperature_of(decoder) for decoder in args.decode}
        if len(set(temperatures.values())) < len(temperatures):
            raise ValueError(f"--decode {','.join(args.decode)}: two of them are the same")
        problems = {}
        for data in args.data:
            problems[data] = load_gradable(data, args.limit, args.allow_code_execution)
        model, tokenizer = load_model(args.model, device, dtype)
        head = output_head(model, encode_prompt(tokenizer, "Which prime is even?"))
        folder = begun or args.out
        folder = Path(folder) if folder else fresh_folder("runs/eval")
        if not begun and (folder / "config.json").exists():
            raise FileExistsError(f"{folder} is in use: --resume {folder}, or another --out")
        folder.mkdir(parents=True, exist_ok=True)
        first, parts = args.shard or (0, 1)
        suffix = f"-{first}" if args.shard else ""
        held = lock(folder, f"lock{suffix}")  # noqa: F841, until the process ends
        if not begun:
            settings = {"script": "eval.py"} | vars(args)
            for key in ("resume", "regrade", "compare", "out", "device", "shard"):
                del settings[key]
            replace_file(folder / "config.json", json.dumps(settings, indent=1) + "\n")
    except (OSError, ValueError) as error:
        sys.exit(f"eval.py: {error}")
    sizes = ", ".join(f"{len(some)} problems of {data}" for data, some in problems.items())
    template = "in the chat template" if tokenizer.chat_template else "plain: no chat template"
    print(f"{args.model} on {sizes}; {device}; prompts {template}")
    print(f"results: {folder}", flush=True)

    # --------------------------------------------------------------------------- evaluation
    # A job is some of the problems, with one decoder and one seed: it is written at once.
    done = set()
    for path in folder.glob("samples*.jsonl"):  # one of each part
        for sample in read_jsonl(path):
            done.add((sample.get("job"), sample.get("place")))
    jobs, job, total = [], 0, 0
    for data, decoder, seed in itertools.product(problems, args.decode, range(1, args.seeds + 1)):
        n = args.n if temperatures[decoder] else 1
        if seed > 1 and not temperatures[decoder]:
            continue  # there is no chance in greedy decoding
        size = max(1, args.rollout_batch // n)
        for start in range(0, len(problems[data]), size):
            some = problems[data][start : start + size]
            places = range(start * n, (start + len(some)) * n)
            finished = all((job, place) in done for place in places)
            if job % parts == first and not finished:
                jobs.append((job, data, decoder, seed, some, places, n))
            job, total = job + 1, total + len(places)
    bar = tqdm(jobs, unit="job", leave=False, delay=5)
    try:
        for job, data, decoder, seed, some, places, n in bar:
            bar.set_description(f"{Path(data).stem} {decoder}, seed {seed}")
            samples = evaluate(
                model, tokenizer, head, some, temperatures[decoder], args.max_new_tokens,
                seed=seed + 1000 * places[0], n=n, rows=args.rollout_batch, desc="responses",
                allow_code=args.allow_code_execution,
            )
            for place, sample in zip(places, samples):
                sample.update(data=data, decoder=decoder, seed=seed, job=job, place=place)
            append_jsonl(folder / f"samples{suffix}.jsonl", samples)
        results = read_samples(folder)
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
        scores.reliability_plot(results, folder / "reliability.png")
        print(f"\nsamples, results.json and reliability.png: {folder}")
    except (KeyboardInterrupt, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        reason = str(error) or "stopped"
        sys.exit(f"eval.py: {reason}; go on with: python eval.py --resume {folder}")


if __name__ == "__main__":
    main()
