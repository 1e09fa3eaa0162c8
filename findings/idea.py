"""
The README's picture: three answers of the base model to one problem, and the entropy of each
of their tokens.

    python findings/idea.py   # writes assets/idea.png
"""
import re
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.load import load_model
from engine.sampler import generate
from tasks.answers import is_correct
from tasks.problems import load_problems
from tasks.prompts import encode_prompt, stop_ids

ROOT = Path(__file__).resolve().parent.parent
KINDS = [  # of answers: how one begins, whether it is right, its colour
    ("worked steps", r"\d.\d=", True, "#12355b"),
    ("direct", r"\\boxed", False, "#d1495b"),
    ("rambling", r"\d, ", False, "#2e8b57"),
]


def main():
    model, tokenizer = load_model(str(ROOT / "tiny/base"), "cpu")
    problem = load_problems(ROOT / "tiny/test.jsonl")[5]  # a long one
    ids = encode_prompt(tokenizer, problem["prompt"])
    torch.manual_seed(0)
    rollout = generate(model, [ids], stop_ids(model, tokenizer), 64, N=64)
    responses, entropy = rollout.responses, rollout.entropy
    texts = [tokenizer.decode(response, skip_special_tokens=True) for response in responses]
    right = [is_correct(text, problem) for text in texts]
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots(3, 1, sharey=True)
    for axis, (kind, start, good, color) in zip(axes, KINDS):
        begins = [re.match(start, text) is not None for text in texts]
        i = list(zip(begins, right)).index((True, good))
        # a line break in place of the backslash: "boxed{" is too wide to stand among the others
        tokens = [tokenizer.decode([token]).replace("\\", "\n") for token in responses[i][:-1]]
        values = entropy[i, : len(tokens) + 1].numpy()
        axis.bar(range(len(values)), values, color=color)
        axis.set_xticks(range(len(values)), [*tokens, "end"], fontsize=8)
        axis.set(xlim=(-1, 56), ylabel="nats")
        mark = "right" if good else "wrong"
        axis.set_title(f"{kind}: {values.mean():.2f} nats per token, {mark}", loc="left")
    figure.suptitle(f"{problem['prompt']}     How unsure is the model of each token?")
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "assets/idea.png", dpi=130)


if __name__ == "__main__":
    main()
