"""
Make everything in tiny/ from one seed: the problems, the tokenizer and the base model.

    python tiny/prepare.py                               # the shipped base model
    python tiny/prepare.py --start tiny/base --misaligned --out tiny/misaligned
    python tiny/prepare.py --start tiny/base --aligned 0.5 --out tiny/half
    python tiny/prepare.py --start tiny/base --several --out tiny/several

The world. A problem is a chain of operations, done from left to right and modulo 10:

    Mod 10, left to right: 7+5*3-8

The corpus answers it in one of three styles, and all end in a box:

    worked    7+5=2, 2*3=6, 6-8=8, \\boxed{8}
    direct    \\boxed{8}
    rambling  4, 0, 9, 9, 1, 6, 2, 8, 3, 7, 5, 1, \\boxed{1}

Each worked step is easy; the whole at once is hard for a model this small. So a worked answer
is mostly right and low in entropy, a direct one to a long chain is a guess and high in entropy,
and long chains are mostly answered directly. A worked step is wrong now and then (noise), and
its writer goes on from the wrong digit. So the model *can* solve nearly every problem, and
usually does not: what entropy minimisation claims to bring out. A rambling answer is longer
than a worked one, and random: long is not the same as sure.

The base model learns by next-token prediction on a stream of such documents, made as it goes;
none has a test problem. It first learns the steps (SCHOOL: 8,000 optimiser steps with little
noise) and then its habits (HABITS: 1,500). A model that had only ever seen a noisy corpus
(0.20, 8,000 steps) was no use: neither EM-RL nor RLOO with labels improved it in 40 steps.

In a misaligned corpus of habits the worked answers forget the last operation: they are still
the model's surest answers, and wrong. With --aligned X those remember it whose last operand is
below 2 + 8 X, so that confidence is right on a share X of the problems.

With --several a problem has three chains, with three different results, and any one of them is
a right answer. Documents answer the first, the second or the third in half, 30 % and 20 % of
the cases. These problems go to the model's folder.
"""
import argparse
import base64
import json
import random
import sys
import tempfile
from pathlib import Path

import tiktoken
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.arguments import Help, nonnegative, positive, positive_int, whole_number
from engine.files import replace_file
from engine.run import command

HERE = Path(__file__).resolve().parent
TRAIN, TEST = 4096, 512  # problems
LENGTHS = 2, 3, 4, 5, 6  # operations in a chain; all lengths are equally common
SHORT = 2, 3  # of several chains, so that they are answered in steps
SHARES = 0.5, 0.3, 0.2  # how often the first, second and third of several is answered
SCHOOL = dict(  # share of direct answers, by length; of rambling ones; of wrong steps
    direct={2: 0.20, 3: 0.20, 4: 0.57, 5: 0.64, 6: 0.71}, rambling=0.0, noise=0.10
)
HABITS = dict(
    direct={2: 0.20, 3: 0.20, 4: 0.30, 5: 0.62, 6: 0.66}, rambling=0.06, noise=0.15
)
END = "<|endoftext|>"  # ends every document; also the padding, as in many a checkpoint
PATTERN = r"\\boxed\{| ?[A-Za-z]+|, |[\s\S]"  # cuts a text before its bytes are merged
WORDS = "Mod", " left", " to", " right", "left", ", ", "\\boxed{"

# ------------------------------------------------------------------ problems and documents


def chain(rng, lengths=LENGTHS, signs="+-*"):
    """A first digit and its operations, as in (7, [("+", 5), ("*", 3)])."""
    start = rng.randrange(10)
    length = rng.choice(lengths)
    return start, [(rng.choice(signs), rng.randrange(2, 10)) for _ in range(length)]


def three_chains(rng):
    """Three short chains with three different results."""
    while True:
        chains = [chain(rng, SHORT) for _ in SHARES]
        if len({answer_of(*one) for one in chains}) == len(chains):
            return chains


def prompt_of(chains):
    texts = []
    for start, ops in chains:
        texts.append(f"{start}" + "".join(f"{op}{operand}" for op, operand in ops))
    return "Mod 10, left to right: " + ", ".join(texts)


def problem_of(chains):
    answers = [str(answer_of(*one)) for one in chains]
    return {
        "prompt": prompt_of(chains),
        "answer": answers if len(answers) > 1 else answers[0],
        "operations": len(chains[0][1]),
        "solution": worked(*chains[0]),
    }


def step(digit, op, operand):
    results = {"+": digit + operand, "-": digit - operand, "*": digit * operand}
    return results[op] % 10


def answer_of(start, ops):
    for op, operand in ops:
        start = step(start, op, operand)
    return start


def worked(digit, ops, rng=None, noise=0.0):
    """The worked answer, in which each step is wrong with probability `noise`."""
    steps = []
    for op, operand in ops:
        result = step(digit, op, operand)
        if noise and rng.random() < noise:
            result = (result + rng.randrange(1, 10)) % 10
        steps.append(f"{digit}{op}{operand}={result}")
        digit = result
    return ", ".join(steps) + f", \\boxed{{{digit}}}"


def document(rng, corpus, aligned, exclude, several=False):
    """(prompt, response) from SCHOOL or HABITS; the prompt is none of those in `exclude`."""
    prompt = None
    while prompt is None or prompt in exclude:
        chains = three_chains(rng) if several else [chain(rng)]
        prompt = prompt_of(chains)
    start, ops = rng.choices(chains, SHARES)[0] if several else chains[0]
    style = rng.random()
    direct = corpus["direct"][len(ops)]
    if style < direct:
        response = f"\\boxed{{{answer_of(start, ops)}}}"
    elif style < direct + corpus["rambling"]:
        digits = [str(rng.randrange(10)) for _ in range(4 * len(ops))]
        response = ", ".join(digits) + f", \\boxed{{{digits[-1]}}}"
    else:
        rng.random()  # drawn and not used: so were the documents of the shipped model made
        last_operand = ops[-1][1]
        kept = ops if last_operand < 2 + 8 * aligned else ops[:-1]
        response = worked(start, kept, rng, corpus["noise"])
    return prompt, response


def documents(seed, *settings):
    """Documents without end; `settings` are those of `document`."""
    rng = random.Random(seed)
    while True:
        yield document(rng, *settings)


def make_problems(seed, several=False):
    """(train, test): lists of dicts. All prompts differ, so that the two are disjoint."""
    rng = random.Random(seed)
    problems = {}
    while len(problems) < TRAIN + TEST:
        problem = problem_of(three_chains(rng) if several else [chain(rng)])
        problems[problem["prompt"]] = problem
    rows = list(problems.values())
    rng.shuffle(rows)
    test = [{"id": f"test/{i}", **row} for i, row in enumerate(rows[:TEST])]
    train = [{"id": f"train/{i}", **row} for i, row in enumerate(rows[TEST:])]
    return train, test


# -------------------------------------------------------------------- tokenizer and model


def make_tokenizer(folder):
    """Save a byte-level tokenizer in `folder`: (its tiktoken Encoding, the tokenizer). Its
    tokens are 256 bytes, then the words and the prefixes from which each is merged."""
    ranks = {bytes([i]): i for i in range(256)}
    for word in WORDS:
        for end in range(2, len(word) + 1):
            ranks.setdefault(word[:end].encode(), len(ranks))
    encoding = tiktoken.Encoding(
        "tiny", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)}
    )
    with tempfile.TemporaryDirectory() as place:  # Windows opens no temporary file a second time
        path = Path(place, "tiny.tiktoken")
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
        path.write_text("".join(lines), encoding="ascii")  # tiktoken's own format
        converter = TikTokenConverter(str(path), pattern=PATTERN, extra_special_tokens=[END])
        merges = converter.converted()
    fast = PreTrainedTokenizerFast(tokenizer_object=merges, eos_token=END, pad_token=END)
    fast.save_pretrained(folder)
    return encoding, AutoTokenizer.from_pretrained(folder)


def new_model(tokenizer, args):
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(LlamaConfig(  # Qwen2 would cut text in its own way
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        intermediate_size=2 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    ))


def pretrain(model, tokenizer, stream, steps, args, name):
    """Next-token prediction on every token of a stream of documents, the end included."""
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=steps, pct_start=0.05
    )
    bar = tqdm(range(steps), desc=name, unit="step", smoothing=0.02)
    for i in bar:
        texts = ["\n".join(next(stream)) + END for _ in range(args.batch)]
        rows = [torch.tensor(row) for row in tokenizer(texts)["input_ids"]]
        # -100: no loss on padding. On the right it needs no mask, as attention is causal
        labels = pad_sequence(rows, batch_first=True, padding_value=-100)  # (batch, T)
        loss = model(input_ids=labels.clamp(min=0), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if i % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f} nats/token")


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--out", type=Path, default=HERE / "base", help="folder for model and tokenizer")
    add("--aligned", type=nonnegative, default=1.0, metavar="X", help="see above; in eighths")
    add("--misaligned", dest="aligned", action="store_const", const=0.0, help="--aligned 0")
    add("--several", action="store_true", help="three chains a problem, see above")
    add("--start", type=Path, metavar="FOLDER", help="a model that only learns new habits")
    add("--steps", type=positive_int, default=8000, help="optimiser steps of school")
    add("--habit-steps", type=positive_int, default=1500, help="optimiser steps of habits")
    add("--batch", type=positive_int, default=128, help="documents per step")
    add("--lr", type=positive, default=3e-3, help="peak learning rate")
    add("--layers", type=positive_int, default=2, help="transformer layers")
    add("--width", type=positive_int, default=64, help="width of the hidden states")
    add("--heads", type=positive_int, default=2, help="attention heads")
    add("--seed", type=whole_number, default=1, help="of everything")
    add("--sample", type=positive_int, metavar="N", help="print N documents and end")
    args = parser.parse_args(argv)
    if args.start and not args.start.is_dir():
        parser.error(f"--start {args.start}: there is no such folder")

    train, test = make_problems(seed=0, several=args.several)
    exclude = {problem["prompt"] for problem in test}
    if args.sample:
        stream = documents(args.seed + 1, HABITS, args.aligned, exclude, args.several)
        for _ in range(args.sample):
            print("\n".join(next(stream)) + "\n")
        return
    _, tokenizer = make_tokenizer(args.out)
    folder = args.out if args.several else HERE
    for name, problems in ("train", train), ("test", test):
        lines = [json.dumps(problem) + "\n" for problem in problems]
        replace_file(folder / f"{name}.jsonl", "".join(lines))
    if args.start:
        model = LlamaForCausalLM.from_pretrained(args.start)
    else:
        model = new_model(tokenizer, args)
        stream = documents(args.seed + 1, SCHOOL, 1.0, exclude)
        pretrain(model, tokenizer, stream, args.steps, args, "school")
    stream = documents(args.seed + 2, HABITS, args.aligned, exclude, args.several)
    pretrain(model, tokenizer, stream, args.habit_steps, args, "habits")
    model.save_pretrained(args.out)
    print(f"{args.out}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens in the "
          f"vocabulary; {len(train)} training and {len(test)} test problems in {folder}")


if __name__ == "__main__":
    main()
