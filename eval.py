"""
Evaluate a language model on problems with known answers: load, prompt, generate, grade, score.

    python eval.py                                             # the tiny base model on its 512 test problems
    python eval.py --model runs/NAME/checkpoint                # what a run has trained
    python eval.py --model Qwen/Qwen2.5-Math-7B --data math500 --max-new-tokens 3072
    python eval.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data gsm8k --limit 8 --n 2 --seeds 1      # small, on a CPU

Per seed, N responses per problem are sampled at T = 1 with nothing truncated; greedy decoding stands beside them, with the
same prompt and the same grader. pass@1 is the share of right responses, pass@N the share of problems with a right one. The
AUROC says how well a response's mean token entropy ranks the wrong responses above the right ones (0.5 is chance): what
entropy minimisation lives on.

A response is right if its last \\boxed{} holds the problem's answer, as judged by math-verify. No box, or a last box that never
closes, is no answer: an earlier box does not count.
"""
import argparse
import functools
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
from math_verify import parse, verify
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from entropy import entropy_and_logprob, token_entropy
from problems import HUB, hub_says, last_box, load_problems, reach_hub

HERE = Path(__file__).parent
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."  # the paper asks for this
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


def is_correct(response, problem):
    """Does the response's last box hold the problem's answer?"""
    box = last_box(response)
    return box is not None and same_answer(str(problem["answer"]), box)


# -------------------------------------------------------------------------------------------------------------- model


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


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt: the chat template with the paper's system prompt where the tokenizer has a template (in the user's
    turn where the template knows no system role), else the plain text and a line break."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt + "\n")["input_ids"]
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template itself raises, through jinja2: Gemma's has no system role
        if "system" not in str(error).lower():
            raise
        turns = [{"role": "user", "content": f"{SYSTEM}\n\n{prompt}"}]
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


@torch.no_grad()
def generate(model, prompts, stop, max_new_tokens, temperature=1.0, budget=2**18, desc=None):
    """Sample one response per prompt: lists of token ids -> list of lists of token ids.

    Temperature 0 is greedy. Nothing else shapes the distribution: no top-k, no top-p, no penalty, whatever the checkpoint's
    generation_config says. A response ends with the first of the `stop` ids, which belongs to it, or at max_new_tokens without
    one (truncated). Batches hold at most `budget` tokens, prompts and longest responses together.
    """
    sampling = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature > 0 else dict(do_sample=False)
    config = GenerationConfig(**sampling, max_new_tokens=max_new_tokens, eos_token_id=list(stop), pad_token_id=stop[0])
    responses = [None] * len(prompts)
    was_training, own_config = model.training, model.generation_config
    model.eval()
    model.generation_config = config  # generate() fills what we leave open from here, so nothing of the checkpoint's stays
    try:
        bar = tqdm(total=len(prompts), desc=desc, unit="response", leave=False, delay=5, disable=desc is None)
        for group in batches([len(p) + max_new_tokens for p in prompts], budget):
            inputs = pad_left([prompts[i] for i in group], model.device)
            output = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=config)
            for i, row in zip(group, output[:, inputs["input_ids"].shape[1] :].tolist()):
                end = next((t for t, token in enumerate(row) if token in stop), len(row) - 1)
                responses[i] = row[: end + 1]
            bar.update(len(group))
        bar.close()
    finally:
        model.generation_config = own_config
        model.train(was_training)
    return responses


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
    """`score` in micro-batches of at most `budget` tokens, without a graph. Rows in the order given."""
    T = max(map(len, responses))
    values = torch.zeros(3, len(responses), T, device=model.device)  # entropy, logprobs, mask
    for group in tqdm(batches([len(p) + len(r) for p, r in zip(prompts, responses)], budget), desc="score", leave=False, delay=5):
        part = score(model, head, [prompts[i] for i in group], [responses[i] for i in group], temperature)  # (b, t) each
        values[:, group, T - part[0].shape[1] :] = torch.stack([x.float() for x in part])  # rows end at the right
    return values[0], values[1], values[2].bool()


# ------------------------------------------------------------------------------------------------------------- scores


def accuracy_interval(correct, z=1.96):
    """(share, low, high): the share of True and its 95 % Wilson interval over problems."""
    n, share = len(correct), sum(correct) / len(correct)
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return share, (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def auroc(scores, labels):
    """Probability that a positive scores above a negative, ties counting half; nan without both kinds."""
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    positive, negative = scores[labels], np.sort(scores[~labels])
    if not len(positive) or not len(negative):
        return math.nan
    below = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
    return float(below.mean() / 2 / len(negative))


def evaluate(model, tokenizer, head, problems, temperature, max_new_tokens, seed=0, budget=2**18, desc=None):
    """One response per problem, graded: a dict of accuracy, low, high (its 95 % interval over problems), length (mean, tokens),
    truncated (share), entropy (mean over all response tokens, nats), and per problem: correct, responses (texts), entropies (mean
    over the response's tokens, nats). `head` comes from `output_head`. At temperature 0 entropies are still those at T = 1.

    The caller's random state is left as it was, so that evaluating more often does not change a training run.
    """
    stop, prompts = stop_ids(model, tokenizer), [encode_prompt(tokenizer, problem["prompt"]) for problem in problems]
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        ids = generate(model, prompts, stop, max_new_tokens, temperature, budget, desc)
    lengths, sums = np.array([len(r) for r in ids]), score_all(model, head, prompts, ids, budget=budget // 4)[0].double().sum(-1).cpu().numpy()
    responses = [tokenizer.decode(r, skip_special_tokens=True) for r in ids]
    correct = [is_correct(response, problem) for response, problem in zip(responses, problems)]
    share, low, high = accuracy_interval(correct)
    return {"accuracy": share, "low": low, "high": high, "length": float(lengths.mean()),
            "truncated": float(np.mean([r[-1] not in stop for r in ids])), "entropy": float(sums.sum() / lengths.sum()),
            "correct": correct, "responses": responses, "entropies": sums / lengths}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "tiny/base"), help="folder or Hub id (default: the tiny base model)")
    parser.add_argument("--data", default=str(HERE / "tiny/test.jsonl"), 
                        help=f"JSONL file, one of {', '.join(HUB)}, or a Hub id (default: the tiny world's)")
    parser.add_argument("--limit", type=int, help="only the first LIMIT problems")
    parser.add_argument("--n", type=int, default=4, help="responses per problem and seed at T = 1 (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to SEEDS (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest response; 3072 for real models (default: %(default)s)")
    parser.add_argument("--budget", type=int, default=2**16, help="tokens per generation batch (default: %(default)s)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        problems = load_problems(args.data)[: args.limit]
        if any("answer" not in p for p in problems):
            raise ValueError(f"{args.data}: {sum('answer' not in p for p in problems)} problems have no answer to grade against")
        model, tokenizer = load_model(args.model, device)
        head = output_head(model, encode_prompt(tokenizer, problems[0]["prompt"]))
    except (OSError, ValueError) as error:
        sys.exit(f"eval.py: {error}")
    print(f"{args.model} on {len(problems)} problems of {args.data}, {device}; prompt: "
          + ("chat template" if tokenizer.chat_template else "plain, since the tokenizer has no chat template"))

    run = lambda *which: evaluate(model, tokenizer, head, *which[:2], args.max_new_tokens, which[2], args.budget, which[3])
    greedy, rows = run(problems, 0.0, 0, "greedy"), []
    for seed in range(1, args.seeds + 1):
        sampled = run(problems * args.n, 1.0, seed, f"T = 1, seed {seed}")
        correct = np.array(sampled["correct"]).reshape(args.n, len(problems))
        wrong_above_right = auroc(sampled["entropies"], ~correct.ravel())
        rows.append((correct.mean(), correct.any(0).mean(), wrong_above_right, sampled["entropy"], sampled["length"], sampled["truncated"]))
    mean, sd = np.mean(rows, 0), np.std(rows, 0, ddof=1 if args.seeds > 1 else 0)
    print(f"\n| decoding | pass@1 | pass@{args.n} | AUROC of entropy | entropy, nats/token | length, tokens | truncated |")
    print("|---|---|---|---|---|---|---|")
    ranked = auroc(greedy["entropies"], ~np.array(greedy["correct"]))
    print(f"| greedy | {greedy['accuracy']:.1%} [{greedy['low']:.1%}, {greedy['high']:.1%}] | | {ranked:.3f} | "
          f"{greedy['entropy']:.3f} | {greedy['length']:.1f} | {greedy['truncated']:.1%} |")
    print(f"| T = 1 | {mean[0]:.1%} ± {sd[0]:.1%} | {mean[1]:.1%} ± {sd[1]:.1%} | {mean[2]:.3f} ± {sd[2]:.3f} | {mean[3]:.3f} ± {sd[3]:.3f} | "
          f"{mean[4]:.1f} | {mean[5]:.1%} |")
    print(f"\nGreedy: 95 % interval over problems. T = 1: mean ± sd over {args.seeds} seeds.")
