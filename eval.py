"""
Evaluate a language model on problems with known answers: load, prompt, decode, grade, score.

    python eval.py                                                       # the tiny base model on its 512 test problems
    python eval.py --model runs/NAME/checkpoint                          # what a run has trained
    python eval.py --model Qwen/Qwen2.5-Math-7B --data math500,amc,aime --max-new-tokens 3072
    python eval.py --decode greedy,sample@0.1,em-inf,self-consistency    # decoders side by side
    python eval.py --n 4                                                 # four answers a problem and seed: pass@4
    python eval.py --model Qwen/Qwen2.5-Math-7B --data math500 --diagnose --max-new-tokens 3072      # will EM help this model?
    python eval.py --compare runs/A runs/B                               # is B better, and how sure is that?
    python eval.py --resume runs/NAME                                    # after Ctrl-C, or a kill
    python eval.py --regrade runs/NAME                                   # scores from the samples alone
    torchrun --nproc_per_node=8 eval.py --model Qwen/Qwen2.5-Math-7B --data math500 --max-new-tokens 3072
    python eval.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data gsm8k --limit 8 --seeds 1 --max-new-tokens 256     # small, on a CPU

Decoders: greedy; sample; self-consistency, the most common final answer of 4; refine, 3 times, with the earlier answer in the prompt;
em-inf and adaptive-temperature, which sharpen what is sampled, alone or before one of the others (em-inf+self-consistency). Behind "@"
stands a temperature. Nothing else shapes the distribution: no top-k, no top-p, whatever the checkpoint says.

An answer is right if its last \\boxed{} holds the problem's, as judged by math-verify. No box, or a last box that never closes, is no
answer: an earlier box does not count. Programs are run with the problem's tests (sandbox.py).

The folder of an evaluation: config.json, samples.jsonl (every response, with its grade), results.json and reliability.png. The prompt, the
grader and the numbers are the same for all decoders and models; seeds, intervals and costs stand beside them.
"""
import argparse
import atexit
import collections
import datetime
import functools
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from math_verify import parse, verify
from rapidfuzz.distance import Levenshtein
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList

import sandbox
from em_inf import AdaptiveTemperature, EMInf
from entropy import entropy_and_logprob, token_entropy
from problems import HUB, hub_says, last_box, load_problems, reach_hub
from scores import auroc, by_problem, compare, drift, reliability_plot, summary, surest_of_k, table

HERE = Path(__file__).parent
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's processes; without it one, number 0
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."  # the paper asks for this
CODE = "Please reason step by step, and put your final program into one ```python block."  # where there are tests
NOT_ALLOWED = "its answers are programs, and grading runs them: --allow-code-execution (see sandbox.py for what that means)"
REFINE = "Check this answer step by step, and give a corrected and complete one in the same form."
SHARPEN = {"em-inf": EMInf, "adaptive-temperature": AdaptiveTemperature}  # what may come before sampling
CONFIDENCE = {"token": ("entropy", -1), "sequence": ("logprob", 1)}  # em_rl.py's rewards, as means over tokens: a sample's key, and its sign
SCHEMES = {"greedy": 1, "sample": 1, "self-consistency": 4, "refine": 3}  # how an answer is made, and of how many responses
REPAIRS = [  # (pattern, replacement): what stands in answers, and what math-verify reads as the same
    (r"[\u2212\u2013]", "-"), ("°", r"^\\circ"), ("·", r"\\cdot "), ("²", "^2"), ("³", "^3"), (r"√(\d+)", r"\\sqrt{\1}"),
    ("[€£¥]", ""), (r"\\langle", "("), (r"\\rangle", ")"), (r"\\(?:text|math)bf\{([^{}]*)\}", r"\1"),
    (r"(?<=\d)[eE]([+-]?\d+)", r"\\times 10^{\1}"),  # 4.5e33, as Minerva's answers are written, would be 4.5 times Euler's e times 33
    (r"(?<=\d) ?[x×] ?(?=10\^)", r"\\times "),
    (r"^\s*(-?\d+) +(\d+)/(\d+)\s*$", r"\1\\frac{\2}{\3}"),  # 1 1/2
    (r"(?<=\d)(?:\\[,! ]|[ ~])+(?=\d{3}(?!\d))", ""),  # 10\,000
    (r"\.\s*$", ""),
    (r"^(?!\s*-?[\d.,]+ )(.*[\d}\s])([cdghlmost])\s*$", r"\1{\2}"),  # a last letter: a variable, 5t, and a unit in 5 m only
]
CHOICE = r"(?:\\text|\\mathrm)?[{(\s]*([A-J])[})\s]*(?:[).:}](?!.*\([A-J]\))(.*\S.*))?"  # B, (B), \text{(B)}; and more: B) 12, (B)\ 12
TINY = r"10\^\{?-(\d+)|(?<![\d.])0?\.(0+)"  # zeros after the point: 10^{-19} or 0.00016


# ------------------------------------------------------------------------------------------------------------ grading


@functools.lru_cache(maxsize=100_000)
def parsed(answer):
    """What math-verify reads in an answer, [] where it reads nothing or would take more than 5 s. Half the time of a comparison."""
    return parse(f"\\boxed{{{answer}}}")


@functools.lru_cache(maxsize=100_000)
def same_answer(answer, other):
    """Do two answers (strings) mean the same? By math-verify: "0.5" and "1/2" do, numbers to 6 decimals, or to 4 digits where tiny.

    Some ms for two answers not seen before, at most 14 s (9^{9^{9^9}}: no), in the main thread only: math-verify's clock is a signal.
    """
    a, b = repair(answer), repair(other)
    if a == b or len(a + b) > 1000:  # so long: mostly a response gone astray, and never seen in a benchmark
        return a == b != ""
    choices = [re.fullmatch(CHOICE, x, re.DOTALL) for x in (a, b)]
    if all(choices) and (choices[0][1] != choices[1][1] or None in (choices[0][2], choices[1][2])):
        return choices[0][1] == choices[1][1]
    a, b = (choice[2] if choice and choice[2] else x for choice, x in zip(choices, (a, b)))  # (B) 12 is 12, too
    digits = min(300, 3 + max((int(power or len(zeros) + 1) for power, zeros in re.findall(TINY, f"{a} {b}")), default=0))
    compare = functools.partial(verify, float_rounding=max(6, digits), numeric_precision=max(15, digits), timeout_seconds=2)
    return compare(parsed(a), parsed(b)) or compare(parsed(b), parsed(a))  # its verdict on equations and inequalities depends on the order


def repair(answer):
    for pattern, replacement in REPAIRS:
        answer = re.sub(pattern, replacement, answer)
    return answer.strip()


def votes(texts):
    """For each of a prompt's N responses, how many of them give the same final answer: 0 for one that gives none."""
    boxes = [last_box(text) for text in texts]
    same = lambda a, b: a is not None and b is not None and same_answer(a, b)
    return [sum(same(a, b) for b in boxes) for a in boxes]


def is_correct(response, problem):
    """Does the response's last box hold the problem's answer?"""
    box = last_box(response)
    return box is not None and same_answer(str(problem["answer"]), box)


def grade(problems, responses, allow_code=False):
    """Is each response (text) right for its problem? Where a problem has tests, the response's program is run with them, after the problem's
    setup and the programs of the problems that it comes after, if any; only with allow_code, else ValueError."""
    code = [i for i, problem in enumerate(problems) if "tests" in problem]
    if code and not allow_code:
        raise ValueError(NOT_ALLOWED)
    right = [False if "tests" in problem else is_correct(response, problem) for response, problem in zip(responses, problems)]
    programs, jobs = {}, []
    for i in code:
        programs[problems[i]["id"]] = own = sandbox.extract_program(responses[i])
        pieces = [problems[i].get("setup", ""), *(programs.get(before) or "" for before in problems[i].get("after", ())), own]
        jobs.append((own and "\n".join(pieces), problems[i]["tests"]))
    for i, passed in zip(code, sandbox.grade(jobs, desc="grade") if code else []):
        right[i] = passed
    return right


# -------------------------------------------------------------------------------------------------------------- model


def set_up(device=None, dtype=None):
    """(device, dtype) to work with, chosen where not given, after joining torchrun's processes, if any; only the first one goes on printing.

    The dtype of the weights is bfloat16 on a GPU that has it, else float32 (on a T4, say): float16 would need its losses scaled.
    """
    cuda = f"cuda:{os.environ['LOCAL_RANK']}" if WORLD > 1 else "cuda"
    device = device or (cuda if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    native = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    if WORLD > 1 and not torch.distributed.is_initialized():
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=datetime.timedelta(hours=6))
        atexit.register(torch.distributed.destroy_process_group)
        if RANK:
            sys.stdout = open(os.devnull, "w")
    return device, getattr(torch, dtype or ("bfloat16" if native else "float32"))


def gather(mine):
    """A dict of each of torchrun's processes -> one dict with the entries of all of them, in every process."""
    if WORLD == 1:
        return mine
    parts = [None] * WORLD
    torch.distributed.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def load_model(name, device, dtype=torch.float32):
    """(model in eval mode, tokenizer) of a folder or a Hub id. Raises OSError, in one line, where there is none."""
    reached = Path(name).is_dir() or reach_hub()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            raise OSError(f"model {name}: the folder can't be loaded ({' '.join(str(error).split())[:160]})") from error
        raise OSError(f"model {name}: no folder here, and {hub_says(reached)} model") from error
    return model.to(device).eval(), tokenizer


def encode_prompt(tokenizer, prompt, earlier=None, system=SYSTEM):
    """Token ids of a prompt: the chat template with the system prompt (the paper's) where the tokenizer has a template (in the user's
    turn where the template knows no system role), else the plain text and a line break. `earlier` is a response to be refined: its
    turn and a request follow, or in plain text the response and the prompt once more."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt + "\n" + (f"{earlier}\n\n{prompt}\n" if earlier is not None else ""))["input_ids"]
    turns = [{"role": "user", "content": prompt}]
    if earlier is not None:
        turns += [{"role": "assistant", "content": earlier}, {"role": "user", "content": REFINE}]
    try:
        text = tokenizer.apply_chat_template([{"role": "system", "content": system}] + turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template itself raises, through jinja2: Gemma's has no system role
        if "system" not in str(error).lower():
            raise
        turns[0]["content"] = f"{system}\n\n{prompt}"
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written the special tokens already


def stop_ids(model, tokenizer):
    """Ids of the tokens that end a response: the chat template's, the tokenizer's and the checkpoint's generation_config's, in that
    order, so that the first is what a written response should end with."""
    ids = model.generation_config.eos_token_id
    ids = [tokenizer.eos_token_id] + (ids if isinstance(ids, list) else [ids])
    if tokenizer.chat_template is not None:  # a base model's <|endoftext|> is not what ends a turn of its template
        turn = tokenizer.apply_chat_template([{"role": "user", "content": "?"}, {"role": "assistant", "content": "#!#"}], tokenize=False)
        after = tokenizer(turn.rpartition("#!#")[2], add_special_tokens=False)["input_ids"]
        ids = [i for i in after[:1] if i in tokenizer.all_special_ids] + ids
    return [i for i in dict.fromkeys(ids) if i is not None]


def output_head(model, prompt):
    """How this model turns hidden states into logits, as keyword arguments of `entropy_and_logprob`: weight, bias, scale, softcap.

    Checked once against the model's own logits on `prompt` (a list of token ids); raises ValueError where the two disagree.
    A logit scale hides under several names and is multiplied by some models and divided by in others, so it is measured.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output head, so no next-token distribution")
    named = [getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")]
    scales = [1.0] + [s for value in named if value for s in (float(value), 1 / float(value))]
    softcap = getattr(config, "final_logit_softcapping", None)
    ids = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].float()  # (T - 1, V)
        hidden = model.base_model(input_ids=ids).last_hidden_state[0, :-1]  # (T - 1, D)
        wanted = token_entropy(logits), logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]

        def gap(scale):  # nats
            got = entropy_and_logprob(hidden, head.weight, ids[0, 1:], head.bias, scale, softcap)
            return max((a - b).abs().max().item() for a, b in zip(got, wanted))

        scale = min(scales, key=gap)
    tolerance = 1e-3 if logits.dtype == hidden.dtype and not torch.is_autocast_enabled(model.device.type) else 0.2
    if not gap(scale) <= tolerance:
        raise ValueError(f"{type(model).__name__}: its output head is more than weight, bias, scale and soft cap: recomputed entropies or "
                         f"log-probs are off by {gap(scale):.3g} nats (at most {tolerance} allowed); see eval.output_head")
    return dict(weight=head.weight, bias=head.bias, scale=scale, softcap=softcap)


def batches(lengths, budget, indices=None):
    """Lists of indices (all, or those given), the longest sequences first, with count x longest <= budget tokens (a lone long one is
    let through)."""
    groups = []
    for i in sorted(range(len(lengths)) if indices is None else indices, key=lambda i: -lengths[i]):
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > budget:
            groups.append([])
        groups[-1].append(i)
    return groups


def pad_left(rows, device):
    """Lists of token ids -> input_ids, attention_mask, position_ids, each (B, T). The mask comes from the lengths: pad may be eos."""
    width = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(width) >= width - lengths[:, None]).long()  # (B, T)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])  # which id pads is all the same: it is never seen
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    return {name: x.to(device) for name, x in inputs.items()}


def sampling_config(stop, max_new_tokens, temperature, **more):
    """A GenerationConfig that says everything `generate` promises: no top-k, no top-p; temperature 0 is greedy."""
    sampling = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature > 0 else dict(do_sample=False)
    return GenerationConfig(**sampling, max_new_tokens=max_new_tokens, eos_token_id=list(stop), pad_token_id=stop[0], **more)


class SampledLogprobs(LogitsProcessor):
    """Records the log-prob of each sampled token, as the last of the processors: changes nothing. Which token was sampled shows in the next
    call's ids, so one step's logits, (B, V), are kept, where transformers' own output_logits would keep a whole response's."""

    def __init__(self, temperature):
        self.temperature, self.logits, self.picked = temperature or 1.0, None, []

    def __call__(self, input_ids, scores):
        self.pick(input_ids)
        self.logits = scores
        return scores

    def pick(self, input_ids):
        if self.logits is not None:
            logits = self.logits.float() / self.temperature
            self.picked.append(logits.gather(-1, input_ids[:, -1:])[:, 0] - logits.logsumexp(-1))  # (B,)

    def take(self, output):
        """The batch's log-probs, lists of T floats, given `model.generate`'s output (B, prompt + T); ready for the next batch."""
        self.pick(output)
        rows = torch.stack(self.picked, -1).tolist()
        self.logits, self.picked = None, []
        return rows


@torch.no_grad()
def generate(model, prompts, stop, max_new_tokens, temperature=1.0, budget=2**18, desc=None, processors=(), streamer=None, logprobs=None):
    """Sample one response per prompt: lists of token ids -> list of lists of token ids.

    Temperature 0 is greedy. Nothing else shapes the distribution: no top-k, no top-p, no penalty, whatever the checkpoint's
    generation_config says. A response ends with the first of the `stop` ids, which belongs to it, or at max_new_tokens without
    one (truncated). Batches hold at most `budget` tokens, prompts and longest responses together; whenever a quarter of a batch's rows has
    ended, they leave it and the others go on with their part of the KV cache. `processors`, LogitsProcessors of
    transformers, come before the temperature; a `streamer` of transformers gets the tokens of a single prompt as they come. A list given
    as `logprobs` gets the log-probs (nats) with which each response's tokens were sampled, as lists of floats.

    torchrun's processes share the batches and all get all responses. Each batch has a seed of its own, drawn from the global random
    state, so that it gives the same responses whoever runs it.
    """
    record, stops = [] if logprobs is None else [SampledLogprobs(temperature)], torch.tensor(stop, device=model.device)
    some_ended = lambda ids, scores, **_: (torch.isin(ids[:, -1], stops).float().mean() >= 0.25).expand(len(ids))  # ended rows are fed stop[0]
    groups = batches([len(p) + max_new_tokens for p in prompts], budget)
    responses, sampled = collections.defaultdict(list), collections.defaultdict(list)
    seeds = torch.randint(2**62, (len(groups),)).tolist()
    was_training, own_config = model.training, model.generation_config
    model.eval()
    model.generation_config = sampling_config(stop, max_new_tokens, temperature)  # generate() fills what we leave open from here
    try:
        with (torch.random.fork_rng([model.device] if model.device.type == "cuda" else []),
              tqdm(total=len(prompts), desc=desc, unit="response", leave=False, delay=5, disable=desc is None or RANK > 0) as bar):
            for group, seed in list(zip(groups, seeds))[RANK::WORLD]:
                torch.manual_seed(seed)
                ids, attention, _ = pad_left([prompts[i] for i in group], model.device).values()
                cache, left = None, max_new_tokens
                while group:  # a round ends when enough rows have
                    config = sampling_config(stop, left, temperature, return_dict_in_generate=True)
                    output = model.generate(
                        input_ids=ids, attention_mask=attention, past_key_values=cache, generation_config=config, streamer=streamer,
                        logits_processor=LogitsProcessorList([*processors, *record]), stopping_criteria=[some_ended])
                    rows = output.sequences[:, ids.shape[1] :].tolist()
                    lengths = [next((n for n, token in enumerate(row, 1) if token in stop), len(row)) for row in rows]
                    for i, row, n in zip(group, rows, lengths):
                        responses[i] += row[:n]
                    for i, row, n in zip(group, record[0].take(output.sequences) if record else (), lengths):
                        sampled[i] += row[:n]
                    for processor in processors:
                        if getattr(processor, "seen", None):
                            processor.keep(lengths)
                    left -= len(rows[0])
                    on = [place for place, i in enumerate(group) if left and responses[i][-1] not in stop]
                    bar.update(WORLD * (len(group) - len(on)))
                    group, cache, ids = [group[place] for place in on], output.past_key_values, output.sequences[on]
                    attention = torch.nn.functional.pad(attention[on], (0, len(rows[0])), value=1)
                    cache.reorder_cache(torch.tensor(on, dtype=torch.long, device=model.device))
    finally:
        model.generation_config = own_config
        model.train(was_training)
    responses = gather(responses)
    if logprobs is not None:
        sampled = gather(sampled)
        logprobs[:] = [sampled[i] for i in range(len(prompts))]
    return [responses[i] for i in range(len(prompts))]


def score(model, head, prompts, responses, temperature=1.0):
    """Entropy and log-prob of every response token: B prompts and responses (token ids) -> entropy, logprobs, mask, each (B, T).

    T is the longest response; rows end at the right, as in generation, and the mask tells a response's own tokens from what
    stands left of them (where all three are 0). Nats, float32, differentiable. `head` comes from `output_head`.
    """
    inputs = pad_left([p + r for p, r in zip(prompts, responses)], model.device)
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state  # (B, prompt + T, D)
    lengths = torch.tensor([len(r) for r in responses], device=model.device)
    T = max(map(len, responses))
    mask = torch.arange(T, device=model.device) >= T - lengths[:, None]  # (B, T)
    states = hidden[:, -T - 1 : -1][mask]  # (tokens, D): the state that predicts each response token
    values = entropy_and_logprob(states, targets=inputs["input_ids"][:, -T:][mask], temperature=temperature, **head)
    entropy, logprobs = (torch.zeros(mask.shape, device=model.device).masked_scatter(mask, v.float()) for v in values)
    return entropy, logprobs, mask


@torch.no_grad()
def score_all(model, head, prompts, responses, temperature=1.0, budget=2**16):
    """`score` in micro-batches of at most `budget` tokens, without a graph; torchrun's processes share them. Rows in the order given."""
    T = max(map(len, responses))
    values = torch.zeros(3, len(responses), T, device=model.device)  # entropy, logprobs, mask
    groups = batches([len(p) + len(r) for p, r in zip(prompts, responses)], budget)[RANK::WORLD]
    for group in tqdm(groups, desc="score", leave=False, delay=5, disable=RANK > 0):
        part = score(model, head, [prompts[i] for i in group], [responses[i] for i in group], temperature)  # (b, t) each
        values[:, group, T - part[0].shape[1] :] = torch.stack([x.float() for x in part])  # rows end at the right
    if WORLD > 1:
        torch.distributed.all_reduce(values)
    return values[0], values[1], values[2].bool()


# ----------------------------------------------------------------------------------------------------------- decoders


def parse_decoder(name, temperature=1.0):
    """"[em-inf+ or adaptive-temperature+]SCHEME[@T]" -> (name in SHARPEN or None, name in SCHEMES, T). A sharpener alone samples; greedy is
    T = 0, and without "@T" the others have the `temperature` given. Raises ValueError for anything else."""
    if not temperature > 0:
        raise ValueError(f"--temperature {temperature}: samples need one above 0; --decode greedy takes the most likely token")
    spec, _, at = name.partition("@")
    sharpen, _, scheme = spec.rpartition("+")
    if scheme in SHARPEN and not sharpen:
        sharpen, scheme = scheme, "sample"
    try:
        temperature = 0.0 if scheme == "greedy" else float(at or temperature)
        known = scheme in SCHEMES and sharpen in ("", *SHARPEN) and (temperature > 0 or scheme == "greedy")
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"--decode {name}: give {', '.join(SCHEMES)} or {', '.join(SHARPEN)}, with @T for a temperature above 0, or one of "
                         "the latter before one of the former, as in em-inf+self-consistency@0.7")
    return sharpen or None, scheme, temperature


def most_agreed(texts):
    """Index of the response that self-consistency keeps: the first with the most common final answer or, where none has one (code, say),
    the one with the lowest mean Levenshtein distance to the others (characters)."""
    counts = votes(texts)
    if max(counts) == 0:
        counts = [-sum(Levenshtein.distance(a, b) for b in texts) for a in texts]
    return counts.index(max(counts))


def decode(model, tokenizer, problems, decoder, max_new_tokens, budget=2**18, desc=None, temperature=1.0, sharpen=SHARPEN):
    """Answer each problem: -> prompts, responses (token ids; a prompt holds the earlier answer, where there is one) and spent, the tokens
    that went through the model for each problem, prompts too. `sharpen` makes the LogitsProcessors by name."""
    name, scheme, temperature = parse_decoder(decoder, temperature)
    stop, N = stop_ids(model, tokenizer), SCHEMES[scheme]
    respond = lambda prompts: generate(model, prompts, stop, max_new_tokens, temperature, budget, desc, [sharpen[name]()] if name else [])
    read = lambda response: tokenizer.decode(response, skip_special_tokens=True)
    encode = lambda problem, earlier=None: encode_prompt(tokenizer, problem["prompt"], earlier, CODE if "tests" in problem else SYSTEM)
    prompts = [encode(problem) for problem in problems]
    if scheme == "self-consistency":
        drafts = respond([prompt for prompt in prompts for _ in range(N)])
        groups = [drafts[i : i + N] for i in range(0, len(drafts), N)]
        responses = [group[most_agreed([read(response) for response in group])] for group in groups]
        spent = [N * len(prompt) + sum(map(len, group)) for prompt, group in zip(prompts, groups)]
    else:
        responses = respond(prompts)
        spent = [len(prompt) + len(response) for prompt, response in zip(prompts, responses)]
        for _ in range(N - 1):  # refine
            prompts = [encode(problem, read(response)) for problem, response in zip(problems, responses)]
            responses = respond(prompts)
            spent = [n + len(prompt) + len(response) for n, prompt, response in zip(spent, prompts, responses)]
    return prompts, responses, spent


def evaluate(model, tokenizer, head, problems, decoder, max_new_tokens, seed=0, budget=2**18, desc=None, temperature=1.0, sharpen=SHARPEN,
             allow_code=False):
    """One graded answer per problem: a list of dicts with id, decoder, seed, response (text), correct, answered (it has a box, or a
    program), truncated, length (tokens), entropy and logprob (means over the response's tokens, nats, of the model's own distribution at
    T = 1), flops (2 P n, with n all tokens that the decoder spent), seconds (an equal share) and the problem's answer. `head` comes from
    `output_head`; decoder, temperature and sharpen go to `decode`, allow_code to `grade`.

    The caller's random state is left as it was, so that evaluating more often does not change a training run.
    """
    started, stop, P = time.time(), stop_ids(model, tokenizer), sum(p.numel() for p in model.parameters())
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        prompts, responses, spent = decode(model, tokenizer, problems, decoder, max_new_tokens, budget, desc, temperature, sharpen)
    seconds = (time.time() - started) / len(problems)
    entropy, logprobs, _ = (x.double().sum(-1).tolist() for x in score_all(model, head, prompts, responses, budget=budget // 4))
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    right = gather({0: grade(problems, texts, allow_code)} if RANK == 0 else {})[0]  # by one process, so that all agree
    rows = zip(problems, responses, texts, right, spent, entropy, logprobs)
    return [{"id": problem["id"], "decoder": decoder, "seed": seed, "response": text, "correct": correct,
             "answered": (sandbox.extract_program if "tests" in problem else last_box)(text) is not None, "truncated": ids[-1] not in stop, "length": len(ids),
             "entropy": H / len(ids), "logprob": l / len(ids), "flops": 2 * P * n, "seconds": seconds, "answer": problem.get("answer")}
            for problem, ids, text, correct, n, H, l in rows]


# ---------------------------------------------------------------------------------------------------------- evaluation


def diagnosis(greedy, sampled):
    """Will entropy minimisation help this model on these problems? Samples of greedy decoding, and N a problem at T = 1 -> a dict.

    EM-RL moves towards the surer of a problem's responses, so what decides is whether they are right. For each reward, token and sequence:
    `drift`, what accuracy at T = 1 gains as the first 0.1 nats of KL a response are spent on it, with `low` and `high`, its 95 %
    interval over problems (scores.drift); `verdict`: EM "likely helps" where the interval lies above 0, "harms" where it lies below, else it is
    "too close to call"; `surest`, how often the surest of k responses is right: the k-th is what a longer way leads to, and where it falls
    with k, accuracy is to rise and then fall; and `auroc`, of the reward, right against wrong, over all responses. Besides, accuracy
    `greedy`, `sampled` and of the `majority` of N, `passed` (pass@N), `distinct` answers of N, `ece`, and the number of `problems`.
    """
    right, texts = (by_problem(sampled, key) for key in ("correct", "response"))
    s, rewards = summary(sampled), {}
    for name, (key, sign) in CONFIDENCE.items():
        sure = {i: sign * np.array(values) for i, values in by_problem(sampled, key).items()}
        change, low, high = drift(list(sure.values()), list(right.values()))
        rewards[name] = {"drift": change, "low": low, "high": high, "auroc": auroc(np.concatenate(list(sure.values())), sum(right.values(), [])),
                         "verdict": "likely helps" if low > 0 else "harms" if high < 0 else "too close to call",
                         "surest": {k: float(np.mean([surest_of_k(sure[i], right[i], k) for i in right])) for k in (1, *s["pass"])}}
    return {"rewards": rewards, "problems": len(right), "n": s["n"], "greedy": summary(greedy)["accuracy"], "sampled": s["accuracy"],
            "passed": s["pass"][s["n"]], "majority": float(np.mean([right[i][most_agreed(texts[i])] for i in texts])),
            "distinct": float(np.mean([len({last_box(text) for text in group}) for group in texts.values()])), "ece": s["ece"]}


def diagnose(greedy, sampled):
    """`diagnosis` as text."""
    d = diagnosis(greedy, sampled)
    lines = [f"greedy {d['greedy']:.1%}, T = 1 {d['sampled']:.1%}, majority of {d['n']} {d['majority']:.1%}, pass@{d['n']} {d['passed']:.1%}; "
             f"{d['distinct']:.1f} distinct answers of {d['n']}; ECE {d['ece']:.3f}",
             f"\n| reward | the first 0.1 nats at T = 1, points | 95 % | right is the surest of {', '.join(map(str, d['rewards']['token']['surest']))} "
             "| AUROC |\n|---|---|---|---|---|"]
    for name, r in d["rewards"].items():
        lines.append(f"| {name} | {100 * r['drift']:+.1f} | {100 * r['low']:+.1f} to {100 * r['high']:+.1f} | "
                     f"{', '.join(f'{x:.1%}' for x in r['surest'].values())} | {r['auroc']:.3f} |")
    for name, r in d["rewards"].items():
        lines.append(f"\nEM-RL with reward {name} " + {"likely helps": "likely helps: surer answers are better ones.",
                     "harms": "harms: surer answers are worse ones.",
                     "too close to call": f"is too close to call with {d['problems']} problems."}[r["verdict"]])
        k, most = max(r["surest"].items(), key=lambda item: item[1])
        if r["verdict"] == "likely helps" and r["surest"][d["n"]] < most - 0.02:
            lines[-1] += f" Not for long: the surest of {d['n']} is right less often than that of {k}. Stop early, or hold it with --beta."
    return "\n".join(lines)


def run_decoders(model, tokenizer, head, problems, decoders, seeds, max_new_tokens, budget, temperature, sharpen=SHARPEN):
    """{decoder: samples} over seeds 1 to `seeds`; one for greedy, which has no chance in it. Ctrl-C ends it with what there is by then."""
    results = {name: [] for name in decoders}
    jobs = [(name, seed) for name in decoders for seed in range(1, seeds + 1) if seed == 1 or parse_decoder(name, temperature)[2]]
    try:
        for name, seed in (bar := tqdm(jobs, unit="run", leave=False, delay=5)):
            bar.set_description(f"{name}, seed {seed}")
            results[name] += evaluate(model, tokenizer, head, problems, name, max_new_tokens, seed, budget, "responses", temperature, sharpen)
    except KeyboardInterrupt:
        print("\nstopped; this is what was done by then", file=sys.stderr)
    return {name: samples for name, samples in results.items() if samples}


def read_samples(folder):
    """{"DATA DECODER": samples} of an evaluation's folder, in the order of its jobs."""
    samples, results = {}, {}
    path = Path(folder) / "samples.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            sample = json.loads(line)
        except json.JSONDecodeError:  # blank, or cut short by a kill; its part is done again, and comes later
            continue
        samples[sample["job"], sample["part"], sample["place"]] = sample
    for _, sample in sorted(samples.items()):
        results.setdefault(f"{Path(sample['data']).stem} {sample['decoder']}", []).append(sample)
    return results


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "tiny/base"), help="folder or Hub id (default: the tiny base model)")
    parser.add_argument("--data", default=str(HERE / "tiny/test.jsonl"),
                        help=f"JSONL files or names, with commas: {', '.join(HUB)} (default: the tiny world's)")
    parser.add_argument("--limit", type=int, help="only the first LIMIT problems of each")
    parser.add_argument("--decode", default="greedy,sample", help="decoders, with commas, see above (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling, where a decoder names none (default: %(default)s)")
    parser.add_argument("--n", type=int, default=1, help="answers per problem and seed, for pass@n (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to SEEDS; greedy decoding needs one (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest response; 3072 for real models (default: %(default)s)")
    parser.add_argument("--budget", type=int, default=2**16, help="tokens per generation batch (default: %(default)s)")
    parser.add_argument("--part", type=int, default=512, help="answers between two writes to the folder (default: %(default)s)")
    parser.add_argument("--allow-code-execution", action="store_true", help="run the programs that answer code problems, in a sandbox")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    parser.add_argument("--out", help="folder for the results (default: a new one in runs/)")
    parser.add_argument("--resume", metavar="FOLDER", help="go on with an interrupted evaluation")
    parser.add_argument("--regrade", metavar="FOLDER", help="grade an evaluation's samples again and print its table; needs no model")
    parser.add_argument("--compare", nargs=2, metavar="FOLDER", help="paired difference between two evaluations on the same problems")
    parser.add_argument("--diagnose", action="store_true", help="will EM help this model on these problems? "
                        "512 of them, 8 answers each, where --limit and --n say nothing else")
    args = parser.parse_args(argv)
    try:
        for folder in args.compare or [args.regrade] * bool(args.regrade):
            if not read_samples(folder):
                raise FileNotFoundError(f"{folder}: no samples.jsonl with samples in it; give the folder of an evaluation")
        if args.compare:
            return print(compare(*map(read_samples, args.compare)))
        if args.regrade:
            results = read_samples(args.regrade)
            for samples in results.values():  # they hold the answers; tests can be large, and stay where they are
                known = {p["id"]: p for p in load_problems(samples[0]["data"])} if samples[0]["answer"] is None else {}
                graded = grade([known.get(s["id"], s) for s in samples], [s["response"] for s in samples], args.allow_code_execution)
                for sample, right in zip(samples, graded):
                    sample["correct"] = right
            return print(table(results))
        if args.resume:
            settings = json.loads((Path(args.resume) / "config.json").read_text())
            parser.set_defaults(**settings)
            args = parser.parse_args(argv)
        if args.diagnose:
            args.limit, args.decode, args.n, args.seeds = args.limit or 512, "greedy,sample@1", args.n if args.n > 1 else 8, 1
        if min(args.n, args.seeds, args.part, args.max_new_tokens) < 1:
            raise ValueError(f"--n {args.n}, --seeds {args.seeds}, --part {args.part} and --max-new-tokens {args.max_new_tokens}: 1 or more")
        names = [(data, decoder) for data in args.data.split(",") for decoder in args.decode.split(",")]
        schemes = {decoder: parse_decoder(decoder, args.temperature) for _, decoder in names}
        problems = {data: load_problems(data)[: args.limit] for data, _ in names}
        for data in problems:
            if missing := sum("answer" not in p and "tests" not in p for p in problems[data]):
                raise ValueError(f"--data {data}: {missing} of its problems have no answer and no tests to grade against")
            if any("tests" in p for p in problems[data]) and not args.allow_code_execution:
                raise ValueError(f"--data {data}: {NOT_ALLOWED}")
        device, dtype = set_up(args.device)
        model, tokenizer = load_model(args.model, device, dtype)
        head = output_head(model, encode_prompt(tokenizer, next(iter(problems.values()))[0]["prompt"]))
        folder = Path(args.resume or args.out or f"runs/eval-{time.strftime('%Y%m%d-%H%M%S')}")
        if not args.resume and RANK == 0:
            if (folder / "config.json").exists():
                raise FileExistsError(f"{folder} holds an evaluation: go on with it by --resume {folder}, or give another --out")
            folder.mkdir(parents=True, exist_ok=True)
            keep = {k: v for k, v in vars(args).items() if k not in ("resume", "regrade", "compare", "out", "device")}
            (folder / "config.json").write_text(json.dumps(keep, indent=1) + "\n")
    except (OSError, ValueError) as error:
        sys.exit(f"eval.py: {error}")
    # a job is one seed of one decoder on one data set; a part of it is written at once, with randomness of its own
    times = lambda decoder: args.n if schemes[decoder][2] else 1  # greedy decoding has no chance in it
    jobs = [(data, decoder, seed) for data, decoder in names for seed in range(1, args.seeds + 1) if seed == 1 or schemes[decoder][2]]
    parts = [(job, part) for job, (data, decoder, _) in enumerate(jobs) for part in range(0, len(problems[data]) * times(decoder), args.part)]
    size = lambda job, part: min(args.part, len(problems[jobs[job][0]]) * times(jobs[job][1]) - part)
    counts = collections.Counter((s["job"], s["part"]) for samples in read_samples(folder).values() for s in samples) if args.resume else {}
    done = {part for part in parts if counts.get(part) == size(*part)}  # one that a kill has cut short is done again
    done = gather({RANK: done})[0]  # what the first process saw, before it writes more
    print(f"{args.model} on {', '.join(f'{len(p)} problems of {data}' for data, p in problems.items())}; {WORLD} x {device}; prompt: "
          + ("chat template" if tokenizer.chat_template else "plain, since there is no chat template"))
    print(f"results: {folder}" + (f", which holds {len(done)} of {len(parts)} parts" if done else ""), flush=True)
    try:
        for job, part in (bar := tqdm([part for part in parts if part not in done], unit="part", leave=False, delay=5, disable=RANK > 0)):
            data, decoder, seed = jobs[job]
            bar.set_description(f"{Path(data).stem} {decoder}, seed {seed}")
            some = [problem for problem in problems[data] for _ in range(times(decoder))][part : part + args.part]
            samples = evaluate(model, tokenizer, head, some, decoder, args.max_new_tokens, seed + 1000 * part, args.budget, "answers",
                               args.temperature, allow_code=args.allow_code_execution)
            lines = [json.dumps({"job": job, "part": part, "place": place, "data": data} | sample | {"seed": seed}) + "\n"
                     for place, sample in enumerate(samples)]
            if RANK == 0:
                with (folder / "samples.jsonl").open("a") as f:
                    f.write("\n" * (f.tell() > 0) + "".join(lines))  # a blank line, in case a kill has left half a one
        if RANK == 0:
            results = read_samples(folder)
            if args.diagnose:
                for data in problems:
                    print(f"\n{data}:\n" + diagnose(*(results[f"{Path(data).stem} {decoder}"] for decoder in args.decode.split(","))))
            else:
                print("\n" + table(results))
            (folder / "results.json").write_text(json.dumps({name: summary(samples) for name, samples in results.items()}, indent=1) + "\n")
            reliability_plot(results, folder / "reliability.png")
            print(f"\nsamples, results.json and reliability.png: {folder}")
    except KeyboardInterrupt:
        sys.exit(f"eval.py: stopped; go on with: python eval.py --resume {folder}")


if __name__ == "__main__":
    main()
