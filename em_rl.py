"""
EM-RL: reinforcement learning with the model's own confidence as the only reward. No labels.

    python em_rl.py                               # the tiny model, on a laptop's CPU
    python em_rl.py --reward correct              # RLOO with labels; --advantage grpo: GRPO
    python em_rl.py --model Qwen/Qwen2.5-Math-7B  # the paper's model, on one 80 GB GPU

Each step samples N responses y_i to each of B prompts x. The reward of a response is the model's
confidence in it. A response whose reward is above the mean of its prompt's other N - 1 rewards
(RLOO) becomes more likely:

    r_i = mean_t -H(pi(. | x, y_<t))        (--reward token), or
    r_i = mean_t log pi(y_t | x, y_<t)      (--reward sequence)
    A_i = r_i - mean of the other N - 1 rewards
    objective = mean over the update's tokens of  A_i log pi(y_t | x, y_<t) - beta KL

KL is the k3 estimate of KL(pi || initial model); see entropy.k3. The reward is a constant: no
gradient flows through it. em_ft.py follows the gradient of the entropy itself, and a negative
--entropy-coef adds that gradient here.

The tokens of a response include the end-of-sequence token that it drew. A response that never
ends is cut at --max-new-tokens, and counts like any other. Labels only measure the held-out
accuracy, except for the rewards in READS_LABELS. Ctrl-C saves, and --resume runs/NAME goes on as
if nothing had happened: the checkpoint has weights, masters and moments, and a step's prompts and
random numbers follow from --seed and its number. --steps 200 extends a finished run.

Departures from the paper (arXiv 2505.15134) and its released trainer: the objective is divided by
the number of tokens of the update, so every token weighs the same, and

                       here             paper    released trainer
    a reward           mean of tokens   sum      mean                   --reward-norm
    updates a batch    1, on-policy     1        4, ratios clipped      --updates
    entropy bonus      0                0        0.001                  --entropy-coef
"""
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from engine import report, run
from engine.arguments import nonnegative, number_or_exact, positive, positive_int, two_or_more
from engine.guard import collapsed
from engine.load import load_model, set_up
from engine.optimizer import MasterAdamW
from engine.sampler import generate
from engine.settings import parse_args
from entropy import batches, k3, output_head, score, score_all
from eval import evaluate_held_out
from tasks.answers import is_correct, votes
from tasks.prompts import response_texts, stop_ids

NAME = Path(__file__).resolve().name
TINY = dict(  # without --model. The defaults in add_arguments are the paper's, but for the table
    model="tiny/base", data="tiny/train.jsonl", val="tiny/test.jsonl",
    lr=1e-4, prompts=64, steps=40, max_new_tokens=64, eval_every=5, save_every=5,
    budget=8192, rollout_batch=256, recompute=False,
)

# ------------------------------------------------------------------------------- the rewards
# A reward takes a rollout (engine/sampler.py) of B*N responses, a prompt's N side by side, with
# texts[i] and problems[i] of response i, and gives B*N numbers, as (B*N,) or (B, N). To add one,
# write a function and its line in REWARDS, and in READS_LABELS if it needs problems[i]["answer"].


def mean_over_tokens(values, mask):
    return (values * mask).sum(-1) / mask.sum(-1)  # (B*N, T) -> (B*N,)


def token(rollout):
    return mean_over_tokens(-rollout.entropy, rollout.mask)  # nats


def sequence(rollout):
    return mean_over_tokens(rollout.logprobs, rollout.mask)  # nats


def self_certainty(rollout):
    """KL(uniform || pi) = -log V - mean_v log pi(v), nats, with a vocabulary of V tokens."""
    return mean_over_tokens(-rollout.mean_logprobs - math.log(rollout.V), rollout.mask)


def agreement(rollout):
    """For each response, how many of its prompt's N have the same answer: (B, N). 0 for none."""
    groups = [rollout.texts[i : i + rollout.N] for i in range(0, len(rollout.texts), rollout.N)]
    return torch.tensor([votes(group) for group in groups], device=rollout.mask.device)


def majority(rollout):
    counts = agreement(rollout)
    return ((counts == counts.amax(1, keepdim=True)) & (counts > 0)).float()


def empo(rollout):
    counts = agreement(rollout)
    return counts * (counts.amax(1, keepdim=True) > 1) / rollout.N


def correct(rollout):
    right = [is_correct(text, problem) for text, problem in zip(rollout.texts, rollout.problems)]
    return torch.tensor(right, device=rollout.mask.device).float()


REWARDS = {
    "token": token,  # EM-RL; RENT
    "sequence": sequence,  # EM-RL
    "self-certainty": self_certainty,  # Intuitor
    "majority": majority,  # TTRL, SRT: no other answer of the N is more common
    "consistency": lambda rollout: agreement(rollout) / rollout.N,  # SC-RL, the paper's baseline
    "empo": empo,  # EMPO: consistency, but 0 where all N answers differ
    "format": lambda rollout: (agreement(rollout) > 0).float(),  # a control: is there an answer?
    "random": lambda rollout: torch.rand(len(rollout.texts), device=rollout.mask.device),
    "length": lambda rollout: rollout.mask.sum(-1).float(),  # a control, as random is
    "correct": correct,  # RLOO, GRPO
    "correct+token": lambda rollout: correct(rollout) + token(rollout),
    "correct+sequence": lambda rollout: correct(rollout) + sequence(rollout),
}

READS_LABELS = "correct", "correct+token", "correct+sequence"

# -------------------------------------------------------------- the advantage, the objective


def advantage(kind, rewards):
    """(B, N) -> (B, N): each reward against those of the same prompt's other responses."""
    rewards = rewards - rewards[:, :1]  # equal rewards give advantage 0 without rounding error
    if kind == "grpo":  # against the mean of all N, and divided by their standard deviation
        return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def policy_objective(new, old, ref, advantages, args):
    """What each token adds to the objective, which is maximised: -> (b, T).

        min(ratio A, clip(ratio) A) + c H - beta KL,    ratio = pi(y_t) / pi_old(y_t)

    `new` are the Scores of b responses; old and ref (b, T) are log-probs of the same tokens, of
    the policy that sampled them and of the initial model; advantages are (b, 1). In the first
    update on a batch the ratio is 1, and its gradient is that of log pi(y_t). It is 1 up to
    rounding: in bfloat16 a few hundredths are usual, and a token beyond 1 +- clip may be left out.
    """
    ratio = (new.logprobs - old).exp()
    clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
    objective = torch.min(ratio * advantages, clipped * advantages)
    objective = objective + entropy_weight(new.mask, args) * new.entropy
    if args.beta:
        objective = objective - args.beta * k3(new.logprobs, ref)
    return objective


def entropy_weight(mask, args):
    """c of `policy_objective`. The expected reward has two gradients: A grad log pi, and grad r,
    since r = mean_t -H depends on the weights. `exact` adds the second one, for --reward token
    with rloo. In expectation the two are the gradient of --reward sequence, where rewards are sums
    or all lengths are equal.
    """
    if args.entropy_coef != "exact":
        return args.entropy_coef
    return -1.0 if args.reward_norm == "sum" else -1.0 / mask.sum(1, keepdim=True)


# ------------------------------------------------------------------------------- the settings


def add_arguments(parser):
    """The settings of the method. engine/settings.py has those of any training run."""
    add = parser.add_argument_group("sampling").add_argument
    add("--prompts", type=positive_int, default=512, metavar="B", help="prompts per step")
    add("--rollouts", type=two_or_more, default=4, metavar="N", help="responses per prompt")
    add("--temperature", type=positive, default=1.0, help="of sampling and of scoring")
    add("--max-new-tokens", type=positive_int, default=3072, help="longest response, tokens")
    add("--rollout-batch", type=positive_int, default=128, help="responses sampled at once; "
        "another number draws other samples, and the same greedy ones")
    add = parser.add_argument_group("reward and objective").add_argument
    add("--reward", choices=REWARDS, default="token", help="what makes a response more likely")
    add("--reward-norm", choices=["mean", "sum"], default="mean", help="sum: any reward x length")
    add("--advantage", choices=["rloo", "grpo"], default="rloo", help="baseline of a reward")
    add("--beta", type=nonnegative, default=0.001, help="weight of the KL; 0: no second model")
    add("--entropy-coef", type=number_or_exact, default=0.0, metavar="C", help="adds C x entropy: "
        "0.001 as released, below 0 EM-FT's gradient, or exact: the token reward's own gradient")
    add("--clip", type=positive, default=0.2, help="of the ratio; matters for --updates 2 and more")
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=positive_int, default=100, help="batches of responses")
    add("--updates", type=positive_int, default=1, metavar="K", help="split a batch into K updates")
    add("--lr", type=positive, default=1e-6, help="learning rate, constant")
    add("--grad-clip", type=positive, default=1.0, help="largest gradient norm")
    add("--budget", type=positive_int, default=16_384, help="tokens per micro-batch")


@run.command
def main(argv=None):
    args = parse_args(argv, __doc__, add_arguments, TINY, NAME)
    label = "answer" if args.reward in READS_LABELS else None  # the only label that training sees

    # ------------------------------------------------------------------------------- set-up
    device, dtype = set_up(args.device, args.dtype, args.graph)
    train, val = run.load_data(args)
    model, tokenizer, adapters = run.load(args, device, dtype)
    train = run.prepare(train, tokenizer, label, args)
    run.check_inputs(args, train, val)
    run.check_fit(model, tokenizer, train, val, args)
    head = output_head(model, train[0]["ids"])
    if args.beta:  # the KL needs the initial model beside the one that changes
        reference = model if args.lora else load_model(args.model, device, model.dtype)[0]
        ref_head = output_head(reference, train[0]["ids"])
    optimizer = MasterAdamW(model, args.lr, args.offload)
    start, history = run.restore(args, optimizer)
    folder = run.new_folder(args, NAME)
    B, N, stop = args.prompts, args.rollouts, stop_ids(model, tokenizer)
    run.announce(args, model, tokenizer, head, train, val, folder)
    logger = run.start_logger(args, folder)
    stopping = run.StopSignal()

    # -------------------------------------------------------------------------------- train
    if start == 0:
        row = evaluate_held_out(0, model, tokenizer, head, val, args, folder)
        history.append({"step": 0} | row)
        run.write_rows(folder / "metrics.csv", history)
    for step in range(start + 1, args.steps + 1):
        started = time.time()
        torch.manual_seed(1_000_000 * args.seed + step)  # a resumed step draws the same

        # roll out: N responses to each of B prompts, a prompt's N side by side
        problems = run.problems_of_step(step, train, args)  # B*N, each of B problems N times
        prompts = [problem["ids"] for problem in problems]  # lists of token ids
        rollout = generate(
            model, prompts[::N], stop, args.max_new_tokens, args.temperature, N=N,
            batch_size=args.rollout_batch, desc="rollouts",
        )
        rollout.texts = response_texts(tokenizer, rollout.responses)
        rollout.problems = problems
        lengths = rollout.mask.sum(1)  # (B*N,), tokens

        # reward, and advantage: against the prompt's other responses
        rewards = REWARDS[args.reward](rollout).view(B, N)
        if args.reward_norm == "sum":
            rewards = rewards * lengths.view(B, N)
        advantages = advantage(args.advantage, rewards).view(B * N, 1)

        # reference: log-probs of the same tokens under the initial model
        if args.beta:
            with adapters.disable_adapter() if adapters else nullcontext():  # --lora
                initial = score_all(
                    reference, ref_head, prompts, rollout.responses, args.temperature, args.budget
                )

        # update: split the prompts into K parts, and take a step on each (K = 1: on-policy)
        model.train()  # for --recompute; dropout is off
        sizes = [len(p) + len(r) for p, r in zip(prompts, rollout.responses)]
        for chosen in torch.arange(B * N).view(B, N).tensor_split(args.updates):
            chosen = chosen.flatten().tolist()
            num_tokens = lengths[chosen].sum()  # of the whole update
            micro_batches = batches(sizes, args.budget, chosen)
            for micro in tqdm(micro_batches, desc="update", leave=False, delay=5):
                new = score(model, head, prompts, rollout.responses, args.temperature, micro)
                T = new.mask.shape[1]
                old = rollout.logprobs[micro, :T]
                ref = initial.logprobs[micro, :T] if args.beta else None
                objective = policy_objective(new, old, ref, advantages[micro], args)  # (b, T)
                loss = -(objective * new.mask).sum() / num_tokens
                loss.backward()
            grad_norm = optimizer.clip(args.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        model.eval()

        # log
        tokens = lengths.sum().item()
        row = {
            "step": step,
            "entropy": rollout.entropy.sum().item() / tokens,
            "reward": rewards.mean().item(), "reward_std": rewards.std(1).mean().item(),
            "length": tokens / (B * N),
            "truncated": sum(ids[-1] not in stop for ids in rollout.responses) / (B * N),
            "grad_norm": grad_norm, "tokens": tokens, "seconds": time.time() - started,
            "flops": run.flops_per_token(model, args) * sum(sizes),
        }
        if args.beta:
            row["kl"] = k3(rollout.logprobs, initial.logprobs)[rollout.mask].mean().item()

        # evaluate, let the guard look, and save
        collapse = collapsed(history + [row], args.guard)
        last = step == args.steps or collapse is not None
        if last or step % args.eval_every == 0:
            run.log_sample(step, problems[0]["prompt"], rollout.texts[0], folder)
            row |= evaluate_held_out(step, model, tokenizer, head, val, args, folder)
        history.append(row)
        run.log(row, logger)
        run.write_rows(folder / "metrics.csv", history)
        if args.keep_best and run.is_best(history):
            run.save_model(folder / "best", adapters or model, tokenizer, row=row)
        asked = stopping.asked  # by Ctrl-C
        if last or asked or step % args.save_every == 0:
            state = {"step": step, "optimizer": optimizer.state_dict()}
            run.save_model(folder / "checkpoint", adapters or model, tokenizer, state)
            report.plot(history, folder)
        if asked and not last:
            sys.exit(f"{NAME}: stopped after step {step}; to go on: --resume {folder}")
        if collapse is not None:
            print(f"step {step} | the guard stops the run: {collapse} (--guard 0 goes on)")
            break
    report.summarize(folder, history, len(val))


if __name__ == "__main__":
    main()
