"""
EM-INF: sharper decoding without training. Before each token is drawn, its logits take a few steps
of gradient descent on their own entropy.

    python em_inf.py                                          # the tiny model: a table
    python em_inf.py --prompt "Mod 10, left to right: 8-7*6"  # one answer, streamed
    python em_inf.py --model Qwen/Qwen2.5-7B-Instruct --data math500 --decode greedy,em-inf

In your own code, with any causal model, batch and other processors of transformers:

    from em_inf import EMInf
    model.generate(**inputs, do_sample=True, temperature=0.1, logits_processor=[EMInf()])

It works on the logits as the model gives them, before the sampling temperature. The most likely
token stays the most likely (nearly always: see `minimize_entropy`). So greedy decoding does not
change, and EM-INF matters only where tokens are sampled.

Decoders: greedy; sample; self-consistency, which takes the most common of 4 answers; refine,
which answers 3 times, with the last answer in the prompt; em-inf and adaptive-temperature, alone
or together with one of these (em-inf+refine). "@0.7" at the end sets the sampling temperature.

Departures from the paper (arXiv 2505.15134) and its released code:
  - It works on a batch, and every row stops by itself. The released code sums the entropy over
    the batch, so it is right for a single row only.
  - A masked token (logit -inf) stays masked. In the released code it makes the row nan.
  - The entropy is exact: no epsilon is added to a probability.
"""
import argparse
import functools
import itertools
import math
import os
import sys
import time
from bisect import bisect
from pathlib import Path

import torch
from transformers import LogitsProcessor, TextStreamer

from engine import run
from engine.arguments import (
    Help,
    comma_list,
    fraction,
    nonnegative,
    path_name,
    plain_text,
    positive,
    positive_int,
    template_settings,
    whole_number,
)
from engine.check import check_model
from engine.load import add_device_arguments, load_model, set_up
from engine.sampler import generate
from entropy import at_least_float32, can_compile, compiled, output_head, score_all, token_entropy
from eval import graded
from tasks.answers import after_thoughts, most_agreed
from tasks.errors import UserError
from tasks.problems import load_gradable
from tasks.prompts import encode_problem, response_texts, stop_ids
from tasks.scores import table
from tasks.steps import ask_in_rounds

HERE, NAME = Path(__file__).resolve().parent, Path(__file__).resolve().name
TINY = dict(
    model=str(HERE / "tiny/base"),
    data=str(HERE / "tiny/test.jsonl"),
    steps=10,
    temperature=1.0,
    max_new_tokens=64,
    rollout_batch=512,
)

# ------------------------------------------------------------------------------- the method


def in_cache(function):
    """On a CPU, call a function of (B, V) logits for about 2^18 logits at a time, which stay in
    the processor's cache."""

    @functools.wraps(function)
    def wrapper(logits, *args, **settings):
        rows = max(1, 2**18 // logits.shape[-1])
        if logits.device.type != "cpu" or len(logits) <= rows:
            return function(logits, *args, **settings)
        return torch.cat([function(some, *args, **settings) for some in logits.split(rows)])

    return wrapper


entropy_of_rows = in_cache(compiled(token_entropy))  # (B, V) -> (B,)


def softmax_and_entropy(z):
    """Finite logits (B, V), none far above 0 -> softmax (B, V), its entropy in nats (B, 1) and
    the log of its normaliser (B, 1)."""
    p = z.exp()
    total = p.sum(-1, keepdim=True)
    p.div_(total)
    norm = total.log()
    return p, norm - torch.linalg.vecdot(p, z)[:, None], norm


def downhill(z, p, start, shift, kl_weight):
    """-dloss/dz = p (log p + H) - kl_weight (p - start), with shift = log p + H - z: (B, 1)."""
    return (z + (shift - kl_weight)).mul_(p).add_(start, alpha=kl_weight)


def take_step(z, m, v, down, rate, t, optimizer):
    """The t-th step, in place. Of each row (B, 1), `rate` is lr, or 0 where it has stopped."""
    if optimizer == "sgd":
        z.addcmul_(down, rate)
    else:
        m.lerp_(down, 0.1)
        v.mul_(0.999).addcmul_(down, down, value=0.001)
        bias = math.sqrt(1 - 0.999**t)
        step = m / v.sqrt().add_(1e-8 * bias)
        z.addcmul_(step, rate, value=bias / (1 - 0.9**t))


@in_cache
@torch.no_grad()
def minimize_entropy(logits, delta=0.3, lr=0.1, steps=3, kl_weight=0.05, optimizer="adam"):
    """EM-INF: take each row's logits downhill in their own entropy: (B, V) -> (B, V).

        loss = H(softmax(z)) + kl_weight KL(softmax(logits) || softmax(z)),  first z = logits

    (paper, section 4). A row stops as soon as its entropy is under `delta` nats, and one that
    starts under it comes back as it was. `optimizer` is "adam", as in the released code (betas
    0.9 and 0.999, eps 1e-8), or "sgd", plain gradient descent, as in Proposition 1.

    Under sgd the most likely token keeps its place, and tokens less likely than e^-(H + 1)
    can change theirs. Adam divides each gradient by its own size: a token more likely than
    e^-H rises by about lr a step, and others fall by as much, but for those of a probability
    under 1e-9 or so. At lr 1 these steps are so large that tokens of nearly equal logits change
    places, even the first two. At the released settings none did in 20,000 random rows.

    A logit of -inf stays so, and a row with nan becomes nan. The result is float32 (float64
    for float64). Raises ValueError for settings out of range.
    """
    if min(delta, lr, steps, kl_weight) < 0 or optimizer not in ("adam", "sgd"):
        raise ValueError(
            f"minimize_entropy: delta {delta}, lr {lr}, steps {steps}, kl_weight {kl_weight}: none "
            f"may be negative; and optimizer {optimizer!r} must be adam or sgd"
        )
    if len(logits) and 0 < steps <= 4 and can_compile(logits.device, logits.shape[-1]):
        return minimize_in_few_passes(logits, delta, lr, steps, kl_weight, optimizer)
    logits = at_least_float32(logits)
    if steps == 0:
        return logits.clone()
    top = logits.amax(-1, keepdim=True)
    z = (logits - top).clamp_(min=-1e4)  # finite, so that a masked token's p log p is 0
    start, entropy, norm = softmax_and_entropy(z)
    rate = lr * (entropy >= delta).to(z.dtype)  # (B, 1): 0 once the row has stopped
    untouched = (entropy < delta) | (logits == -torch.inf)
    p, m, v = start, torch.zeros_like(z), torch.zeros_like(z)
    for t in range(1, steps + 1):
        down = downhill(z, p, start, entropy - norm, kl_weight)
        take_step(z, m, v, down, rate, t, optimizer)
        if t < steps:
            p, entropy, norm = softmax_and_entropy(z)
            rate.masked_fill_(entropy < delta, 0.0)
    return torch.where(untouched, logits, z.add_(top))


def replay(first, sums, delta, lr, kl_weight, optimizer):
    """z after as many steps as there are `sums`, of exp(z) and of exp(z) z before each step."""
    z, m, v = first.clone(), torch.zeros_like(first), torch.zeros_like(first)
    rate, start = lr, None
    for t, (total, weighted) in enumerate(sums, 1):
        norm = total.log()
        entropy = norm - weighted / total
        p = (z - norm).exp()
        start = p if start is None else start
        down = downhill(z, p, start, entropy - norm, kl_weight)
        rate = rate * (entropy >= delta).to(z.dtype)
        take_step(z, m, v, down, rate, t, optimizer)
    return z


@compiled
def minimize_in_few_passes(logits, delta, lr, steps, kl_weight, optimizer):
    """`minimize_entropy` for torch.compile: steps + 2 reads of the logits and one write.

    z after some steps follows from the first logits and, for each step, two sums of each row. So
    every pass takes all steps anew, and no z, m or v is stored. The work grows with the square
    of the steps, and so does the time to compile it.
    """
    # Rows in equal parts, (B, parts, size), are summed part by part: where the compiler cuts a
    # row into parts that are not equal, it stores z.
    size = math.gcd(logits.shape[-1], 1024)
    logits = at_least_float32(logits)
    top = logits.amax(-1)[:, None, None]
    logits = logits.unflatten(-1, (-1, size))
    first = (logits - top).clamp(min=-1e4)
    sums = first.new_zeros(0, 2, len(first), 1, 1)
    for _ in range(steps):
        z = replay(first, sums, delta, lr, kl_weight, optimizer)
        e = z.exp()
        of_rows = torch.stack([e.sum(-1), (e * z).sum(-1)]).sum(-1)  # (2, B)
        # A new tensor in each pass: if the sums stood in a list, the compiler would see that two
        # passes have steps in common, and store z, m and v for the second.
        sums = torch.cat([sums, of_rows[None, :, :, None, None]])
    total, weighted = sums[0]  # (B, 1, 1)
    untouched = (total.log() - weighted / total < delta) | (logits == -torch.inf)
    z = replay(first, sums, delta, lr, kl_weight, optimizer)
    return torch.where(untouched, logits, z + top).flatten(1)


@in_cache
@torch.no_grad()
def adaptive_temperature(logits, alpha=0.5, delta=0.3, tau_min=0.01, tau_max=1.0, iterations=20):
    """The paper's baseline (Algorithm 1): divide each row by a temperature: (B, V) -> (B, V).

    It is the largest tau in [tau_min, tau_max] at which the row's entropy is at most
    max(alpha H, delta) nats, with H its entropy before. If no tau reaches that, it is tau_min.
    A row with H <= delta comes back as it was. Entropy rises with tau, so each of the `iterations`
    halves the interval, and 20 of them find tau within 1e-6. Precision, -inf and errors as in
    `minimize_entropy`.
    """
    if not (0 < alpha < 1 and delta >= 0 and 0 < tau_min < tau_max and iterations >= 0):
        raise ValueError(
            f"adaptive_temperature: alpha {alpha} must be inside (0, 1), delta {delta} and "
            f"iterations {iterations} not negative, and 0 < tau_min {tau_min} < tau_max {tau_max}"
        )
    logits = at_least_float32(logits)
    z = (logits - logits.amax(-1, keepdim=True)).clamp_(min=-1e4)
    _, entropy, _ = softmax_and_entropy(z)  # (B, 1)
    target = (alpha * entropy).clamp(min=delta)
    low = torch.full_like(entropy, tau_min)
    high = torch.full_like(entropy, tau_max)
    for _ in range(iterations):
        middle = (low + high) / 2
        _, cooled, _ = softmax_and_entropy(z / middle)
        low = torch.where(cooled <= target, middle, low)
        high = torch.where(cooled <= target, high, middle)
    return torch.where(entropy <= delta, logits, logits / low)


class Sharpen(LogitsProcessor):
    """Sharpens the rows of logits whose entropy is at least `delta` nats: (B, V) -> (B, V).

    transformers' `generate` calls it with the ids so far, which it does not need; our own takes
    its method `sharpen`. It counts the rows and the changed rows, and sums their entropy before
    and after (nats). On a GPU it also counts rows that have ended and are still in the batch.
    Raises ValueError for settings out of range, and UserError for nan.
    """

    def __init__(self, function, delta, **settings):
        # one call for nothing, so that bad settings fail here and not at the first token
        function(torch.zeros(1, 1), delta=delta, **settings)
        self.function = functools.partial(function, delta=delta, **settings)
        self.delta = delta
        self.rows = self.changed = 0
        self.before = self.after = 0.0

    def __call__(self, input_ids, scores):
        return self.sharpen(scores)

    def sharpen(self, logits):
        logits = at_least_float32(logits)
        entropy = entropy_of_rows(logits)  # (B,)
        unsure = (entropy >= self.delta).nonzero()[:, 0]
        sharper = self.function(logits[unsure])
        entropy_after = entropy.index_copy(0, unsure, entropy_of_rows(sharper))
        before, after = torch.stack([entropy, entropy_after]).sum(-1).tolist()
        if math.isnan(after):
            row = entropy_after.isnan().nonzero()[0].item()
            raise UserError(
                f"{type(self).__name__}: nan in row {row}: the model overflows, or lr is too large"
            )
        self.rows += len(logits)
        self.changed += len(unsure)
        self.before += before
        self.after += after
        return logits.index_copy(0, unsure, sharper)

    def report(self):
        """Print what it has done so far."""
        if n := self.rows:
            print(
                f"\n{type(self).__name__}: entropy {self.before / n:.3f} -> {self.after / n:.3f} "
                f"nats over {n:,} tokens; {self.changed / n:.1%} of them sharpened"
            )


class EMInf(Sharpen):
    """EM-INF as a LogitsProcessor, with `minimize_entropy`'s settings and released defaults."""

    def __init__(self, delta=0.3, lr=0.1, steps=3, kl_weight=0.05, optimizer="adam"):
        super().__init__(
            minimize_entropy, delta, lr=lr, steps=steps, kl_weight=kl_weight, optimizer=optimizer
        )


class AdaptiveTemperature(Sharpen):
    """The baseline as a LogitsProcessor, with `adaptive_temperature`'s settings."""

    def __init__(self, alpha=0.5, delta=0.3, tau_min=0.01, tau_max=1.0):
        super().__init__(
            adaptive_temperature, delta, alpha=alpha, tau_min=tau_min, tau_max=tau_max
        )


# ------------------------------------------------------------------------------- its rivals

SCHEMES = {  # responses to a prompt at once, and rounds, each with the answer before in the prompt
    "greedy": (1, 1),
    "sample": (1, 1),
    "self-consistency": (4, 1),
    "refine": (1, 3),
}
SHARPENERS = "em-inf", "adaptive-temperature"
DECODERS = (
    "greedy,sample,sample@0.1,adaptive-temperature,em-inf,self-consistency,refine,"
    "em-inf+self-consistency"
)


def parse_decoder(name, temperature=1.0):
    """ "[SHARPENER+]SCHEME[@T]" -> (sharpener or None, scheme, temperature).

    A sharpener alone samples, and greedy has temperature 0. UserError for any other name.
    """
    spec, at, number = name.partition("@")
    sharpener, _, scheme = spec.rpartition("+")
    if scheme in SHARPENERS and not sharpener:
        sharpener, scheme = scheme, "sample"
    try:
        if at:
            temperature = positive(number)
        known = scheme in SCHEMES and sharpener in ("", *SHARPENERS)
    except (ValueError, argparse.ArgumentTypeError):
        known = False
    if not known or (at and scheme == "greedy"):
        raise UserError(
            f"--decode {name}: give one of {', '.join(SCHEMES)}, {' or '.join(SHARPENERS)} before "
            "it or alone, and perhaps a temperature above 0, as in em-inf+refine@0.7"
        )
    return sharpener or None, scheme, 0.0 if scheme == "greedy" else temperature


def decode_and_grade(
    model, tokenizer, head, problems, decoder, max_new_tokens, seed=1, batch_size=128, desc=None,
    temperature=1.0, sharpeners=None, allow_code=False,
):
    """Answer each problem with a decoder, and grade: -> samples as `eval.graded` gives them.

    `sharpeners` are {"em-inf": EMInf(...), "adaptive-temperature": AdaptiveTemperature(...)}.
    Entropy and log-prob of a sample are the model's own at T = 1, and flops are those of all
    tokens that the decoder spent. The caller's random state stays as it was, but for mps.
    """
    name, scheme, temperature = parse_decoder(decoder, temperature)
    sharpeners = sharpeners or {"em-inf": EMInf(), "adaptive-temperature": AdaptiveTemperature()}
    sharpen = sharpeners[name].sharpen if name else None
    n, rounds = SCHEMES[scheme]
    stop = stop_ids(model, tokenizer)

    def ask(problems, _):  # for one answer to each
        started = time.time()
        earlier = [None] * len(problems)  # text of the answer before
        spent = [0] * len(problems)  # tokens
        for _ in range(rounds):
            pairs = zip(problems, earlier)
            prompts = [encode_problem(tokenizer, problem, text) for problem, text in pairs]
            drafts = generate(
                model, prompts, stop, max_new_tokens, temperature, N=n, batch_size=batch_size,
                sharpen=sharpen, desc=desc,
            ).responses
            responses = []
            for i, prompt in enumerate(prompts):
                group = drafts[i * n : i * n + n]
                texts = response_texts(tokenizer, group)
                best = most_agreed(texts) if n > 1 else 0
                responses.append(group[best])
                earlier[i] = after_thoughts(texts[best]) or None  # cut in a thought: ask again
                spent[i] += n * len(prompt) + sum(len(ids) for ids in group)
        seconds = (time.time() - started) / len(problems)
        scores = score_all(model, head, prompts, responses)
        return graded(
            model, tokenizer, problems, responses, scores, spent=spent, decoder=decoder,
            seed=seed, seconds=seconds, allow_code=allow_code,
        )

    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return ask_in_rounds(problems, 1, ask)


@run.command
def main(argv=None):
    # ----------------------------------------------------------------------------- settings
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=Help, usage=f"python {NAME} [options]",
        epilog="Without --model: " + ", ".join(f"{key} {TINY[key]}" for key in TINY),
    )
    add = parser.add_argument
    add("--model", type=path_name, help="folder or Hub id; without it the tiny model, set as said "
        "below")
    add("--template", type=template_settings, metavar="KEY=VALUE", help="settings of the chat "
        "template, with commas: enable_thinking=false")
    add("--prompt", type=plain_text, help="answer this, streamed, and end")
    add("--data", default="math500", help="problems: JSONL file or Hub name")
    add("--limit", type=positive_int, help="only the first LIMIT problems")
    add("--show", type=whole_number, default=3, help="problems to print side by side")
    add("--decode", type=comma_list, default=DECODERS, help="decoders, with commas")
    add("--temperature", type=positive, default=0.1, help="of sampling, after EM-INF")
    add("--delta", type=nonnegative, default=0.3, help="nats; a row stops under it")
    add("--lr", type=nonnegative, default=0.1, help="of the descent on the logits")
    add("--steps", type=whole_number, default=3, help="of the descent")
    add("--kl-weight", type=nonnegative, default=0.05, help="of KL(before || after)")
    add("--optimizer", choices=["adam", "sgd"], default="adam", help="of the descent")
    add("--alpha", type=fraction, default=0.5, help="entropy that adaptive temperature keeps")
    add("--seeds", type=positive_int, default=3, help="seeds 1 to SEEDS; one for greedy")
    add("--max-new-tokens", type=positive_int, default=3072, help="longest response, tokens")
    add("--rollout-batch", type=positive_int, default=128, help="responses sampled at once")
    add("--allow-code-execution", action="store_true",
        help="run the programs that answer code problems, in a sandbox")
    add_device_arguments(add)
    args = parser.parse_args(argv)
    if args.model is None:  # the tiny model's settings replace defaults, and flags win
        args = parser.parse_args(argv, argparse.Namespace(**TINY))

    # ------------------------------------------------------------------------------- set-up
    device, dtype = set_up(args.device, args.dtype, args.graph)
    em_inf = EMInf(args.delta, args.lr, args.steps, args.kl_weight, args.optimizer)
    adaptive = AdaptiveTemperature(args.alpha, args.delta)
    for name in args.decode:
        parse_decoder(name, args.temperature)
    problems = [{"prompt": args.prompt}]
    if not args.prompt:
        problems = load_gradable(args.data, args.limit, args.allow_code_execution)
    model, tokenizer = load_model(args.model, device, dtype, args.template)
    prompts = [encode_problem(tokenizer, problem) for problem in problems]
    if args.prompt:
        check_model(model, prompts, args.max_new_tokens)
        return answer_one(args, model, tokenizer, prompts[0], em_inf)
    if "refine" in [parse_decoder(name)[1] for name in args.decode]:
        earlier = [0] * args.max_new_tokens  # room for the answer before
        prompts += [encode_problem(tokenizer, problem, "") + earlier for problem in problems]
    check_model(model, prompts, args.max_new_tokens)
    head = output_head(model, prompts[0])
    print(f"{args.model} on {len(problems)} problems of {args.data}, {device}", flush=True)

    # --------------------------------------------------------------------------- the table
    started = time.time()
    results = {}
    try:
        for name, seed in itertools.product(args.decode, range(1, args.seeds + 1)):
            if seed > 1 and parse_decoder(name)[1] == "greedy":
                continue  # greedy decoding does not depend on the seed
            samples = decode_and_grade(
                model, tokenizer, head, problems, name, args.max_new_tokens, seed=seed,
                batch_size=args.rollout_batch, desc=f"{name}, {seed}", temperature=args.temperature,
                sharpeners={"em-inf": em_inf, "adaptive-temperature": adaptive},
                allow_code=args.allow_code_execution,
            )
            results.setdefault(name, []).extend(samples)
    except KeyboardInterrupt:
        print(f"\n{NAME}: stopped; this is what was done by then", file=sys.stderr)
    for i, problem in enumerate(problems[: args.show]):
        print(f"\n{problem['prompt']}")
        for name, samples in results.items():
            verdict = "right" if samples[i]["correct"] else "wrong"
            print(f"  {name:23} {verdict}  {samples[i]['response']}")
    if results:
        print("\n" + table(results))
    em_inf.report()
    print(f"{time.time() - started:.0f} s")


LEVELS = 0.1, 0.3, 0.7, 1.2, 2.0  # nats, at which a token's background changes
BACKGROUNDS = "0 48;5;195;30 48;5;153;30 48;5;111;30 48;5;69;30 48;5;27;97".split()


def answer_one(args, model, tokenizer, prompt, em_inf):
    """Print one answer as it comes, until Ctrl-C: in a terminal that has colours, each token on a
    background that shows its entropy."""
    streamer, ids, entropy = TextStreamer(tokenizer, skip_special_tokens=True), [], []

    def sharpen(logits):
        entropy.append(token_entropy(logits).item())
        return em_inf.sharpen(logits)

    def put(drawn):  # (1,)
        before = tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")
        ids.extend(drawn.tolist())
        text = tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")  # whole characters
        colour = f"\x1b[{BACKGROUNDS[bisect(LEVELS, entropy[-1])]}m"
        added = text[len(before) :].replace("\n", f"\x1b[0m\n{colour}")
        print(f"{colour}{added}\x1b[0m", end="", flush=True)

    if sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        streamer.put, streamer.end = put, print
        backgrounds = zip(BACKGROUNDS, ("under 0.1", *LEVELS))
        print("nats:", *(f"\x1b[{code}m {least} \x1b[0m" for code, least in backgrounds))
    torch.manual_seed(1)
    try:
        generate(
            model, [prompt], stop_ids(model, tokenizer), args.max_new_tokens, args.temperature,
            sharpen=sharpen, streamer=streamer,
        )
    except KeyboardInterrupt:
        print()
    em_inf.report()


if __name__ == "__main__":
    main()
