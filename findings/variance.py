"""
How noisy is the gradient of an EM-RL reward? The same 16 prompts are sampled many times.

    python findings/variance.py --norm sum --batches 2000

With --norm sum the sequence reward has the expected gradient of the token reward and the entropy's
own together ("token + exact", see `em_rl.entropy_weights`). The latter should vary less, since it
averages each token's log-prob over all tokens that might have been drawn. An estimate is the
gradient of a mean over 16 prompts of tiny/train.jsonl and 4 responses to each, for tiny/base.

The table has the squared norm of an estimator's mean, without what noise adds to it, and the
variance: the mean squared distance from the mean, all weights together. The last line says how far
those two means lie apart, relative to the first, and how far they would by chance if both
estimated the same, given that both see the same responses.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from em_rl import REWARDS, advantage, entropy_weight
from engine.arguments import Help, two_or_more, whole_number
from engine.files import replace_file
from engine.load import load_model
from engine.run import command
from engine.sampler import generate
from entropy import output_head, score
from tasks.problems import load_problems
from tasks.prompts import encode_problem, stop_ids

ROOT, N = Path(__file__).resolve().parent.parent, 4  # responses to each of 16 prompts


def estimates(model, head, prompts, stop, norm):
    """Sample the prompts (token ids) once: {estimator: gradient (P,), float64}, P parameters."""
    rollout = generate(model, prompts, stop, 64, n=N, rows=len(prompts) * N)
    prompts = [prompt for prompt in prompts for _ in range(N)]
    new = score(model, head, prompts, rollout.responses)  # (B*N, T)
    args = argparse.Namespace(entropy_coef="exact", reward_norm=norm)
    objectives = {"entropy's own": entropy_weight(new.mask, args) * new.entropy}
    for name in "token", "sequence":
        rewards = REWARDS[name](rollout)  # (B*N,)
        if norm == "sum":
            rewards = rewards * new.mask.sum(1)
        objectives[name] = advantage("rloo", rewards.view(-1, N)).view(-1, 1) * new.logprobs
    gradients = {}
    for name, objective in objectives.items():
        objective = (objective * new.mask).sum() / len(prompts)
        parts = torch.autograd.grad(objective, list(model.parameters()), retain_graph=True)
        gradients[name] = torch.cat([part.flatten() for part in parts]).double()
    gradients["token + exact"] = gradients["token"] + gradients["entropy's own"]
    gradients["difference"] = gradients["sequence"] - gradients["token + exact"]
    return gradients


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--norm", choices=["sum", "mean"], default="sum", help="of a reward, over tokens")
    add("--batches", type=two_or_more, default=2000, help="estimates of each estimator")
    add("--seed", type=whole_number, default=0, help="of the responses")
    add("--out", type=Path, metavar="FILE", help="write the table's numbers there, as JSON")
    args = parser.parse_args(argv)
    model, tokenizer = load_model(ROOT / "tiny/base", "cpu")
    problems = load_problems(ROOT / "tiny/train.jsonl")[:16]
    prompts = [encode_problem(tokenizer, problem) for problem in problems]
    head, stop = output_head(model, prompts[0]), stop_ids(model, tokenizer)
    torch.manual_seed(args.seed)
    sums, squares = {}, {}
    for _ in tqdm(range(args.batches), desc="batches", unit="batch"):
        for name, gradient in estimates(model, head, prompts, stop, args.norm).items():
            sums[name] = sums.get(name, 0) + gradient
            squares[name] = squares.get(name, 0) + gradient.square().sum().item()
    means = {name: total / args.batches for name, total in sums.items()}
    found = {}
    for name in means:
        squared = means[name].square().sum().item()
        variance = (squares[name] - args.batches * squared) / (args.batches - 1)
        found[name] = {"variance": variance, "squared mean": squared - variance / args.batches}
    print(f"| estimator ({args.norm}) | squared mean | variance |\n| --- | --- | --- |")
    by_chance = (found.pop("difference")["variance"] / args.batches) ** 0.5
    for name in "sequence", "token", "entropy's own", "token + exact":
        print(f"| {name} | {found[name]['squared mean']:.4g} | {found[name]['variance']:.4g} |")
    size, apart = means["sequence"].norm(), means["difference"].norm()
    cosine = torch.cosine_similarity(means["sequence"], means["token + exact"], dim=0)
    print(f"\nsequence, and token + exact: cosine {cosine:.6f} of their means, {apart / size:.4f} "
          f"apart, {by_chance / size:.4f} by chance")
    if args.out:
        replace_file(args.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
