"""
Make everything in tiny/: the problems, the tokenizer, the corpus and the base model, from one seed.

    python tiny/prepare.py                               # the shipped base model
    python tiny/prepare.py --start tiny/base --misaligned --out tiny/misaligned      # the same, but its surest answers are wrong
    python tiny/prepare.py --start tiny/base --aligned 0.5 --out tiny/half           # ... wrong on half of the problems

The world. A problem is a chain of operations, done from left to right and modulo 10:

    Mod 10, left to right: 7+5*3-8

The corpus answers it in one of three styles, and all end in a box:

    worked    7+5=2, 2*3=6, 6-8=8, \\boxed{8}
    direct    \\boxed{8}
    rambling  4, 0, 9, 9, 1, 6, 2, 8, 3, 7, 5, 1, \\boxed{1}

Each worked step is easy; the whole at once is hard for a model this small. So a worked answer is mostly right and low in
entropy, a direct answer to a long chain is a guess and high in entropy, and the corpus' habits decide which of the two the model
usually gives: short chains are mostly worked, long ones mostly answered directly. A worked step of the corpus is wrong now and then
(noise), and its writer then goes on from the wrong digit. The model therefore *can* solve nearly every problem and usually does not:
what entropy minimisation claims to bring out. A rambling answer is longer than a worked one and nothing but random digits: long is
not the same as sure.

The base model learns by plain next-token prediction on a stream of such documents, made as it goes; no document uses a test
problem. It first learns the steps (SCHOOL: 8,000 optimiser steps with little noise), then the habits that it ships with (HABITS: 1,500).
A model that had only ever seen a noisy corpus (0.20, 8,000 steps) was no use: neither EM-RL nor RLOO with labels improved it in 40 steps.
The corpus is never stored: --sample N prints N documents and ends.

In a misaligned corpus of habits the worked answers forget the last operation. They are still the model's surest answers, and wrong.
--aligned X: only where the last operand is 2 + 8 X or more, so that confidence is right on a share X of the problems.
"""
import argparse
import base64
import json
import random
import tempfile
from pathlib import Path

import tiktoken
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

END = "<|endoftext|>"  # ends every document; also the padding, as in many a checkpoint
HERE = Path(__file__).parent
LENGTHS = (2, 3, 4, 5, 6)  # operations in a chain; all lengths are equally common
SCHOOL = dict(direct={2: 0.20, 3: 0.20, 4: 0.57, 5: 0.64, 6: 0.71}, rambling=0.0, noise=0.10)  # shares by length; of answers; of steps
HABITS = dict(direct={2: 0.20, 3: 0.20, 4: 0.30, 5: 0.62, 6: 0.66}, rambling=0.06, noise=0.15)
TRAIN, TEST = 4096, 512  # problems
PATTERN = r"\\boxed\{| ?[A-Za-z]+|, |[\s\S]"  # how a text is cut before its bytes are merged
WORDS = ("Mod", " left", " to", " right", "left", ", ", "\\boxed{")


def chain(rng):
    """One problem: a start digit and its operations, e.g. (7, [("+", 5), ("*", 3), ("-", 8)])."""
    return rng.randrange(10), [(rng.choice("+-*"), rng.randrange(2, 10)) for _ in range(rng.choice(LENGTHS))]


def step(digit, op, operand):
    return {"+": digit + operand, "-": digit - operand, "*": digit * operand}[op] % 10


def prompt_of(start, ops):
    return f"Mod 10, left to right: {start}" + "".join(f"{op}{operand}" for op, operand in ops)


def worked(start, ops, rng=None, noise=0.0):
    """The worked answer. With `noise`, each step is wrong with that probability and the rest goes on from the wrong digit."""
    lines, digit = [], start
    for op, operand in ops:
        result = step(digit, op, operand)
        if noise and rng.random() < noise:
            result = (result + rng.randrange(1, 10)) % 10
        lines.append(f"{digit}{op}{operand}={result}")
        digit = result
    return ", ".join(lines + [f"\\boxed{{{digit}}}"])


def answer_of(start, ops):
    for op, operand in ops:
        start = step(start, op, operand)
    return start


def document(rng, corpus, aligned, exclude):
    """(prompt, response) of one document of a corpus, SCHOOL or HABITS, about a problem that is not in `exclude`."""
    start, ops = chain(rng)
    while prompt_of(start, ops) in exclude:
        start, ops = chain(rng)
    style, direct, noise = rng.random(), corpus["direct"][len(ops)], corpus["noise"]
    if style < direct:
        response = f"\\boxed{{{answer_of(start, ops)}}}"
    elif style < direct + corpus["rambling"]:
        digits = [rng.randrange(10) for _ in range(4 * len(ops))]
        response = ", ".join(map(str, digits)) + f", \\boxed{{{digits[-1]}}}"
    else:
        rng.random()  # drawn and not used: without it the shipped model would have seen other documents
        response = worked(start, ops if ops[-1][1] < 2 + 8 * aligned else ops[:-1], rng, noise)
    return prompt_of(start, ops), response


def make_problems(seed):
    """(train, test): lists of dicts, all prompts different, so that the two are disjoint."""
    rng, problems = random.Random(seed), {}
    while len(problems) < TRAIN + TEST:
        start, ops = chain(rng)
        problems[prompt_of(start, ops)] = {"answer": str(answer_of(start, ops)), "operations": len(ops), "solution": worked(start, ops)}
    rows = [{"prompt": prompt, **rest} for prompt, rest in problems.items()]
    rng.shuffle(rows)
    test, train = rows[:TEST], rows[TEST:]
    return [{"id": f"train/{i}", **r} for i, r in enumerate(train)], [{"id": f"test/{i}", **r} for i, r in enumerate(test)]


def make_tokenizer(folder):
    """A byte-level tiktoken Encoding, saved in `folder` as an ordinary tokenizer.json: 256 bytes, then the words, each
    reached by merging its prefixes one byte at a time."""
    ranks = {bytes([i]): i for i in range(256)}
    for word in WORDS:
        for end in range(2, len(word) + 1):
            ranks.setdefault(word[:end].encode(), len(ranks))
    encoding = tiktoken.Encoding("tiny", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)})
    with tempfile.NamedTemporaryFile("w", suffix=".tiktoken") as f:  # tiktoken's own file format: base64 bytes, rank
        f.writelines(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
        f.flush()
        fast = TikTokenConverter(f.name, pattern=PATTERN, extra_special_tokens=[END]).converted()
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=END, pad_token=END).save_pretrained(folder)
    return encoding, AutoTokenizer.from_pretrained(folder)


def new_model(tokenizer, args):
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(LlamaConfig(  # Llama: AutoTokenizer gives a Qwen2 model Qwen2's way of cutting text, whatever tokenizer.json says
        vocab_size=len(tokenizer), hidden_size=args.width, intermediate_size=2 * args.width, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id))


def pretrain(model, tokenizer, corpus, aligned, steps, rng, args, exclude):
    """Next-token prediction on every token of the stream of documents, prompt and end-of-text included."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.05)
    bar = tqdm(range(steps), desc="school" if corpus is SCHOOL else "habits", unit="step", smoothing=0.02)
    for i in bar:
        texts = ["{}\n{}".format(*document(rng, corpus, aligned, exclude)) + tokenizer.eos_token for _ in range(args.batch)]
        ids = tokenizer(texts)["input_ids"]
        width = max(map(len, ids))
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in ids])  # -100: no loss on padding
        loss = model(input_ids=labels.clamp(min=0), labels=labels).loss  # padding on the right needs no mask: attention is causal
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        if i % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f} nats/token")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "base", help="folder for the base model and its tokenizer")
    parser.add_argument("--aligned", type=float, default=1.0, help="share of the problems whose worked answers use every operation, in eighths")
    parser.add_argument("--misaligned", dest="aligned", action="store_const", const=0.0, help="the same as --aligned 0")
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="go on from this model, which has been to school, and only learn habits")
    parser.add_argument("--steps", type=int, default=8000, help="optimiser steps of school")
    parser.add_argument("--habit-steps", type=int, default=1500, help="optimiser steps of habits")
    parser.add_argument("--batch", type=int, default=128, help="documents per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--layers", type=int, default=2, help="transformer layers")
    parser.add_argument("--width", type=int, default=64, help="width of the hidden states")
    parser.add_argument("--heads", type=int, default=2, help="attention heads")
    parser.add_argument("--seed", type=int, default=1, help="seed of everything")
    parser.add_argument("--sample", type=int, metavar="N", help="print N documents of the corpus and end")
    args = parser.parse_args()

    train, test = make_problems(seed=0)
    exclude = {problem["prompt"] for problem in test}
    if args.sample:
        rng = random.Random(args.seed + 1)
        for _ in range(args.sample):
            print("{}\n{}\n".format(*document(rng, HABITS, args.aligned, exclude)))
        raise SystemExit
    for name, problems in ("train", train), ("test", test):
        (HERE / f"{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    encoding, tokenizer = make_tokenizer(args.out)
    model = LlamaForCausalLM.from_pretrained(args.start) if args.start else new_model(tokenizer, args)
    if not args.start:
        pretrain(model, tokenizer, SCHOOL, 1.0, args.steps, random.Random(args.seed + 1), args, exclude)
    pretrain(model, tokenizer, HABITS, args.aligned, args.habit_steps, random.Random(args.seed + 2), args, exclude)
    model.save_pretrained(args.out)
    print(f"{args.out}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary; "
          f"{len(train)} training and {len(test)} test problems in {HERE}")
