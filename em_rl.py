"""
EM-RL: reinforcement learning with the model's own confidence as the only reward. No labels.

    python em_rl.py                               # the tiny model, on a laptop's CPU
    python em_rl.py --reward correct              # RLOO with labels; --advantage grpo: GRPO
    python em_rl.py --model Qwen/Qwen2.5-Math-7B  # the paper's run, on one 80 GB GPU

Each step samples N responses to each of B prompts. A response's reward is the model's confidence
in it, and those above the mean of their prompt's other N - 1 (RLOO) become more likely:

    r_i = mean_t log pi(y_t | x, y_<t)      (--reward sequence), or
    r_i = mean_t -H(pi(. | x, y_<t))        (--reward token)
    A_i = r_i - mean of the other N - 1 rewards
    objective = A_i log pi(y_i | x) - beta KL(pi || initial model), over the batch's tokens

A reward is a constant, without a gradient of its own: em_ft.py has the entropy's own gradient,
and --entropy-coef adds it here (see `entropy_weights`). `reward` has the other rewards.

A response's tokens include the end-of-sequence token that it drew. One that never ends is cut
at --max-new-tokens and counts like any other. Labels are read for the report only (held-out
accuracy, every few steps), unless a flag asks for them. After Ctrl-C --resume runs/NAME goes
on as if nothing had happened, since each step has a seed of its own, and --steps 200 takes a
finished run further. engine/run.py lists a run's files; engine/optimizer.py says why the
weights are bfloat16 on a GPU and have float32 masters.

Departures from the paper (arXiv 2505.15134) and its released trainer:
  - The objective is divided by all tokens of the update: every token weighs the same.
  - A reward is the mean over tokens, as released. The paper's formulas sum (--reward-norm sum).
  - One on-policy update per batch, as in the paper. The released trainer splits the batch into
    four, with the ratio clipped (--updates 4), and adds 0.001 x mean entropy to the objective
    (--entropy-coef 0.001), against its own reward.
"""
import argparse
import math
import random
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from engine import report, run
from engine.arguments import (
    Help,
    growth,
    nonnegative,
    number_or_exact,
    positive,
    positive_int,
    two_or_more,
    whole_number,
)
from engine.guard import collapsed
from engine.load import load_model, set_up
from engine.optimizer import MasterAdamW
from engine.sampler import generate
from entropy import batches, k3, output_head, score, score_all
from eval import evaluate_held_out
from scale import vllm_rollouts
from tasks.answers import is_correct, votes
from tasks.problems import load_problems
from tasks.prompts import stop_ids

HERE, NAME = Path(__file__).parent, Path(__file__).name
TINY = dict(
    model=str(HERE / "tiny/base"),
    data=str(HERE / "tiny/train.jsonl"),
    val=str(HERE / "tiny/test.jsonl"),
    lr=1e-4,
    prompts=64,
    steps=40,
    max_new_tokens=64,
    eval_every=5,
    save_every=5,
    budget=8192,
    rollout_batch=256,
    checkpointing=False,
)
REWARDS = (
    "token sequence self-certainty majority consistency empo format random length "
    "correct correct+token correct+sequence"
).split()


def reward(name, N, confidence, mask, texts, problems, norm="mean"):
    """One number for each of B*N responses, a prompt's N side by side: -> (B, N).

    confidence    by reward, nats of each token (B*N, T); its mean or sum is the reward
    mask          (B*N, T), which of them belong to the response
    texts         the responses, and problems those of each of them
    """
    if name in confidence:  # token, sequence, self-certainty
        total = (confidence[name] * mask).sum(-1)
        return (total / mask.sum(-1) if norm == "mean" else total).view(-1, N)
    if name == "correct":  # the only one that reads labels
        right = [is_correct(text, problem) for text, problem in zip(texts, problems)]
        return torch.tensor(right, device=mask.device).float().view(-1, N)
    if name == "random":  # a control, as is the next
        return torch.rand(len(texts) // N, N, device=mask.device)
    if name == "length":
        return mask.sum(-1).float().view(-1, N)
    # the others ask how many of the prompt's N responses have a response's answer (0: no answer)
    counts = [votes(texts[i : i + N]) for i in range(0, len(texts), N)]
    counts = torch.tensor(counts, device=mask.device)  # (B, N)
    most = counts.amax(1, keepdim=True)
    if name == "format":  # does it have an answer at all?
        return (counts > 0).float()
    if name == "majority":  # TTRL, SRT: no other answer is more common
        return ((counts == most) & (counts > 0)).float()
    if name == "empo":  # EMPO: as consistency, but nothing where all answers differ
        counts = counts * (most > 1)
    return counts / N  # consistency, the paper's SC-RL


def advantage(kind, rewards):
    """(B, N) -> (B, N): each reward against the others to the same prompt."""
    rewards = rewards - rewards[:, :1]  # so that equal rewards leave exactly nothing
    if kind == "grpo":  # less the mean of all N, and standardised
        return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def entropy_weights(coef, lengths, norm):
    """The weight of a token's entropy in the objective: (B*N,) lengths -> (B*N, 1).

    `exact` gives it the weight that it has in the token reward, -1 or, in the mean, -1 / length.
    Then the objective has the reward's whole gradient, which is in expectation that of the
    sequence reward, with each token's log-prob averaged over all tokens that might have been
    drawn (Rao-Blackwell). This is exact for sums, and for means where all lengths are equal.
    """
    weights = torch.ones_like(lengths[:, None], dtype=torch.float32)
    if coef != "exact":
        return coef * weights
    return -weights / lengths[:, None] if norm == "mean" else -weights


@run.command
def main(argv=None):
    # ----------------------------------------------------------------------------- settings
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=Help, usage=f"python {NAME} [options]",
        epilog="Without --model: " + ", ".join(f"{key} {TINY[key]}" for key in TINY),
    )
    add = parser.add_argument
    add("--model", help="folder or Hub id; without it the tiny model, set as said below")
    add("--data", default="numina", help="training prompts: JSONL file or Hub name")
    add("--data-size", type=positive_int, default=35_000, help="prompts drawn from --data")
    add("--val", default="math500", help="held-out problems: JSONL file, Hub name, or none")
    add("--val-size", type=positive_int, default=512, help="use the first VAL_SIZE of them")
    add("--out", help="folder for the run; without it a new one in runs/")
    add("--resume", metavar="FOLDER", help="go on; the run's settings hold unless given again")
    add("--seed", type=whole_number, default=1, help="random seed")
    add("--device", help="cuda, mps or cpu; without it the first there is")
    add("--dtype", choices=["bfloat16", "float32"], help="of the weights; without it bfloat16 "
        "on a GPU that has it")
    add("--offload", action=argparse.BooleanOptionalAction, help="float32 masters and Adam in CPU "
        "memory; without this flag only where the GPU is too small")
    add("--lora", type=positive_int, metavar="R", help="train adapters of rank R (peft) instead of "
        "the weights: far less memory, and some ten times the --lr")
    add("--merge", action="store_true", help="with --lora, write merged/ too, a plain model")
    add("--reward", choices=REWARDS, default="token", help="what a response is paid for")
    add("--reward-norm", choices=["mean", "sum"], default="mean", help="over tokens")
    add("--advantage", choices=["rloo", "grpo"], default="rloo", help="baseline of a reward")
    add("--entropy-coef", type=number_or_exact, default=0.0, metavar="C",
        help="adds C x entropy to the objective: 0.001 as released, below 0 EM-FT's gradient, or "
        "exact: the token reward's own gradient")
    add("--clip", type=positive, default=0.2, help="of the ratio, for --updates 2 and more")
    add("--beta", type=nonnegative, default=0.001, help="weight of the KL; 0: no KL")
    add("--rollouts", type=two_or_more, default=4, metavar="N", help="responses per prompt")
    add("--steps", type=positive_int, default=100, help="batches of responses")
    add("--rollout-batch", type=positive_int, default=128, help="responses sampled at once")
    add("--updates", type=positive_int, default=1, metavar="K", help="split a batch into K steps")
    add("--temperature", type=positive, default=1.0, help="of sampling and of scoring")
    add("--prompts", type=positive_int, default=512, metavar="B", help="prompts per step")
    add("--lr", type=positive, default=1e-6, help="learning rate, constant")
    add("--grad-clip", type=positive, default=1.0, help="largest gradient norm")
    add("--max-prompt-tokens", type=positive_int, default=1024, help="longer ones are left out")
    add("--max-new-tokens", type=positive_int, default=3072, help="longest response, tokens")
    add("--budget", type=positive_int, default=16_384, help="tokens per micro-batch")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=True,
        help="recompute activations in the backward: less memory")
    add("--eval-every", type=positive_int, default=10, help="steps between evaluations")
    add("--save-every", type=positive_int, default=10, help="steps between checkpoints")
    add("--keep-best", action="store_true", help="keep the best held-out model, by labels")
    add("--guard", type=growth, default=4.0, metavar="X", help="stop when length or entropy has "
        "grown X-fold, or the run has collapsed otherwise; 0: never")
    add("--sampler", choices=["own", "vllm"], default="own", help="what draws the responses; vllm: "
        "see scale/vllm_rollouts.py")
    add("--vllm-memory", type=positive, default=0.4, metavar="X", help="vLLM's share of the GPU's "
        "memory while it samples")
    add("--wandb", metavar="PROJECT", help="log to Weights & Biases too")
    args = run.parse_args(parser, argv, TINY, NAME)
    if args.updates > args.prompts:
        parser.error(f"--updates {args.updates}: at most one for each of --prompts {args.prompts}")
    if args.sampler == "vllm" and args.lora:
        parser.error("--sampler vllm: it would sample without the adapters of --lora")
    label = "answer" if "correct" in args.reward else None  # the only label that training sees

    # ------------------------------------------------------------------------------- set-up
    try:
        device, dtype = set_up(args.device, args.dtype)
        train = load_problems(args.data)
        train = random.Random(args.seed).sample(train, min(args.data_size, len(train)))
        val = run.load_held_out(args)
        model, tokenizer, adapters = run.load(args, device, dtype)
        train = run.prepare(train, tokenizer, label, args)
        head = output_head(model, train[0]["ids"])
        if args.beta:  # the KL needs the initial model beside the one that changes
            reference = model if args.lora else load_model(args.model, device, dtype)[0]
            ref_head = output_head(reference, train[0]["ids"])
        roll_out = generate
        if args.sampler == "vllm":
            longest = max(len(problem["ids"]) for problem in train) + args.max_new_tokens
            engine = vllm_rollouts.start(
                args.model, dtype, longest, share=args.vllm_memory, rows=args.rollout_batch
            )
            roll_out = vllm_rollouts.sampler(engine, head, 2 * args.budget)
        optimizer = MasterAdamW(model, args.lr, args.offload)
        start, history = run.restore(args, optimizer)
        folder = run.new_folder(args, NAME)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"{NAME}: {error}")
    if args.checkpointing:
        run.checkpoint_activations(model)
    B, N, P = args.prompts, args.rollouts, model.num_parameters()
    stop = stop_ids(model, tokenizer)
    # with --lora the model is its own reference, when its adapters are off
    without_adapters = adapters.disable_adapter if adapters else nullcontext
    # FLOPs of a token: to sample, to train, and of the reference; frozen weights need no gradient
    flops = P * (2 + (4 if args.lora else 6) + (2 if args.beta else 0))
    run.announce(args, model, tokenizer, head, train, val, flops, folder)
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

        # roll out: N responses to each of B prompts, a prompt's responses side by side
        problems = run.next_problems(train, step, args)
        prompts = [problem["ids"] for problem in problems]  # B*N lists of token ids
        responses, entropy, old_logprobs = roll_out(
            model, prompts[::N], stop, args.max_new_tokens, args.temperature, n=N,
            rows=args.rollout_batch, desc="rollouts",
        )
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
        lengths = torch.tensor([len(response) for response in responses], device=device)
        mask = torch.arange(lengths.max(), device=device) < lengths[:, None]  # (B*N, T)

        # score: the policy's numbers came with its samples; what does the reference say?
        ref_logprobs = old_logprobs  # (B*N, T), nats; without a KL its weight is 0
        if args.beta:
            with without_adapters():
                _, ref_logprobs, _ = score_all(
                    reference, ref_head, prompts, responses, args.temperature, 2 * args.budget
                )

        # reward: how sure the policy was; advantage: against the prompt's other N - 1
        confidence = {"token": -entropy, "sequence": old_logprobs}  # (B*N, T), nats
        if args.reward == "self-certainty":  # KL(uniform || pi), of another pass
            _, mean_logprobs, _ = score_all(
                model, head, prompts, responses, args.temperature, 2 * args.budget, mean=True
            )
            confidence["self-certainty"] = -mean_logprobs - math.log(len(head["weight"]))
        rewards = torch.zeros(B, N, device=device)
        for name in args.reward.split("+"):
            rewards += reward(
                name, N, confidence, mask, texts=texts, problems=problems, norm=args.reward_norm
            )
        advantages = advantage(args.advantage, rewards).view(B * N, 1)
        weights = entropy_weights(args.entropy_coef, lengths, args.reward_norm)

        # update: a step on each K-th of the prompts (K = 1: on-policy), in micro-batches
        model.train()
        sizes = [len(p) + len(r) for p, r in zip(prompts, responses)]
        for chosen in torch.arange(B * N).view(B, N).tensor_split(args.updates):
            chosen = chosen.flatten().tolist()
            num_tokens = lengths[chosen].sum()
            micro_batches = batches(sizes, args.budget, chosen)
            for micro in tqdm(micro_batches, desc="update", leave=False, delay=5):
                new_entropy, new_logprobs, in_response = score(
                    model, head, [prompts[i] for i in micro], [responses[i] for i in micro],
                    args.temperature,
                )
                t = in_response.shape[1]
                ratio = (new_logprobs - old_logprobs[micro, :t]).exp()  # (b, t); on-policy it
                # is 1, and the gradient of ratio x advantage is advantage x that of log pi
                bounded = ratio.clamp(1 - args.clip, 1 + args.clip)
                objective = torch.min(ratio * advantages[micro], bounded * advantages[micro])
                objective = objective + weights[micro] * new_entropy  # 0, unless asked for
                if args.beta:
                    kl = k3(new_logprobs, ref_logprobs[micro, :t])
                    objective = objective - args.beta * kl
                objective = (objective * in_response).sum()
                objective = objective / num_tokens  # of the whole update, not of this micro-batch
                loss = -objective
                loss.backward()
            grad_norm, changed = optimizer.step(args.grad_clip)
        model.eval()

        # log
        seconds, tokens = time.time() - started, lengths.sum().item()
        row = dict(step=step, grad_norm=grad_norm, changed=changed, tokens=tokens, seconds=seconds)
        row["entropy"] = entropy.sum().item() / tokens
        row["reward"] = rewards.mean().item()
        row["reward_std"] = rewards.std(1).mean().item()
        row["kl"] = k3(old_logprobs, ref_logprobs)[mask].mean().item()
        row["length"] = tokens / (B * N)
        row["truncated"] = sum(ids[-1] not in stop for ids in responses) / (B * N)
        row["flops"] = flops * sum(sizes)

        # evaluate, and let the guard look
        collapse = collapsed(history + [row], args.guard)
        last = step == args.steps or collapse is not None
        if last or step % args.eval_every == 0:
            run.log_sample(step, problems[0]["prompt"], texts[0], folder)
            row.update(evaluate_held_out(step, model, tokenizer, head, val, args, folder))
        history.append(row)
        run.log(row, logger)

        # save
        run.write_rows(folder / "metrics.csv", history)
        if args.keep_best and run.is_best(history):
            run.save_model(folder / "best", adapters or model, tokenizer)
        asked = stopping.asked  # by Ctrl-C
        if last or asked or step % args.save_every == 0:
            state = {"step": step, "optimizer": optimizer.state_dict()}
            run.save_model(folder / "checkpoint", adapters or model, tokenizer, state)
            report.plot(history, folder)
        if collapse:
            print(f"step {step} | the guard stops the run: {collapse} (--guard 0 goes on)")
            break
        if asked and not last:
            sys.exit(f"{NAME}: stopped after step {step}; to go on: --resume {folder}")
    if args.merge:
        run.save_model(folder / "merged", run.merge(adapters), tokenizer)
    report.summarize(folder, history, args.keep_best)


if __name__ == "__main__":
    main()
