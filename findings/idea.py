"""
The README's picture: three answers of the base model to one problem, and the entropy of each
of their tokens.

    python findings/idea.py   # writes assets/idea.png
"""
import re
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from measure import answers_to

from tasks.problems import load_problems

ROOT = Path(__file__).resolve().parent.parent
KINDS = [  # of answers: how one begins, whether it is right, its colour
    ("worked steps", r"\d.\d=", True, "#12355b"),
    ("direct", r"\\boxed", False, "#d1495b"),
    ("rambling", r"\d, ", False, "#2e8b57"),
]


def main():
    problem = load_problems(ROOT / "tiny/test.jsonl")[5]  # a long one
    torch.manual_seed(0)
    answers = list(answers_to(problem, ROOT / "tiny/base", N=64))
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots(3, 1, sharey=True)
    for axis, (kind, start, good, color) in zip(axes, KINDS):
        judged = [answer for answer in answers if answer[2] == good]
        those = [answer for answer in judged if re.match(start, "".join(answer[0]))]
        tokens, values, _ = those[0]
        # a line break in place of the backslash: "boxed{" is too wide to stand among the others
        labels = [token.replace("\\", "\n") for token in tokens[:-1]]
        axis.bar(range(len(values)), values, color=color)
        axis.set_xticks(range(len(values)), [*labels, "end"], fontsize=8)
        axis.set(xlim=(-1, 56), ylabel="nats")
        mark = "right" if good else "wrong"
        axis.set_title(f"{kind}: {np.mean(values):.2f} nats per token, {mark}", loc="left")
    figure.suptitle(f"{problem['prompt']}     How unsure is the model of each token?")
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "assets/idea.png", dpi=130)


if __name__ == "__main__":
    main()
