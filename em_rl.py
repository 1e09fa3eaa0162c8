"""
EM-RL: reinforcement learning with the model's own confidence as the only reward. No labels.

    python em_rl.py                                 # the tiny model, on a laptop's CPU
    python em_rl.py --reward sequence --seed 2
    python em_rl.py --reward correct                # RLOO with labels; --advantage grpo: GRPO; --reward consistency: SC-RL
    python em_rl.py --model Qwen/Qwen2.5-Math-7B      # the paper's run, on one 80 GB GPU
    torchrun --nproc_per_node=8 em_rl.py --model Qwen/Qwen2.5-Math-7B                  # several GPUs share each step's batches
    python em_rl.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data gsm8k --val none --prompts 4 --steps 2 --max-new-tokens 64    # on a CPU

After Ctrl-C, --resume runs/NAME goes on, and with --steps 200 it takes a finished run further. What the run's folder holds, and what the
columns of metrics.csv mean, stands in run.py. Labels are read for the report only (held-out accuracy, every few steps), unless a flag asks
for them. Weights are bfloat16 on a GPU that has it, always with float32 masters; with them in CPU memory a 7B model fits (run.MasterAdamW).

Each step: sample N responses to each of B prompts, reward each for how sure the model was of it, compare the reward with those of the
other N - 1 (RLOO), and raise the probability of the responses that the model was surer of:

    r_i = mean_t log pi(y_t | y_<t)     (--reward sequence)    or    r_i = -mean_t H(pi(. | y_<t))     (--reward token)
    A_i = r_i - mean of the other N - 1 rewards
    objective = A_i log pi(y_i) - beta KL(pi || initial model), over the batch's tokens

A reward is a constant. So the token reward steers to where the model is sure, and makes it no surer there: that is em_ft.py's part. In
expectation, and with sums for means, the sequence reward's gradient is the token reward's plus EM-FT's. Entropy does not see which token
was drawn, so to the token reward a slip is free, and it may steer too far: see the rise and fall in tiny/findings.md.

Departures from the paper (arXiv 2505.15134) and its released trainer:
  - The objective is divided by the tokens of the whole batch, so that every token weighs the same.
  - A reward is the mean over a response's tokens, as in the released code; the paper's formulas sum (--reward-norm sum). A sum
    pays for being short, and on the tiny world it gains next to nothing (tiny/findings.md).
  - One on-policy update per batch of responses, as in the paper's text. The released trainer's four, clipped at 0.2: --updates 4.
  - Rewards come from the same numbers as the gradient, not from a sampler's, so the policy is scored once more: 2 P n FLOPs.
"""
import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

import run
from entropy import k3
from eval import RANK, WORLD, batches, encode_prompt, gather, load_model, load_problems, output_head, score, set_up, stop_ids
from eval import is_correct, score_all, votes
from rollouts import choose, roll_out, sampler_gap

HERE, NAME = Path(__file__).parent, Path(__file__).name
TINY = dict(model=str(HERE / "tiny/base"), data=str(HERE / "tiny/train.jsonl"), val=str(HERE / "tiny/test.jsonl"),
            lr=1e-4, prompts=64, steps=40, max_new_tokens=64, eval_every=5, save_every=5, budget=8192, checkpointing=False)
REWARDS = "token", "sequence", "correct", "consistency", "random", "length"

# ------------------------------------------------------------------------------------------------------------------ the method


def reward(kind, entropy, logprobs, mask, norm="mean", texts=None, answers=None, weight=1.0):
    """Rewards by name: (B, N, T) each, B x N texts, B answers -> (B, N). "a+b" is a + weight * b."""
    if "+" in kind:
        first, second = (reward(k, entropy, logprobs, mask, norm, texts, answers) for k in kind.split("+"))
        return first + weight * second
    if kind == "correct":  # the only one that reads labels
        return entropy.new_tensor([[is_correct(text, {"answer": answer}) for text in group] for group, answer in zip(texts, answers)])
    if kind == "consistency":  # share of the prompt's N responses that give the same answer; 0 without one (SC-RL)
        return entropy.new_tensor([votes(group) for group in texts]) / mask.shape[1]
    if kind == "random":  # a control, as is the next
        return torch.rand(mask.shape[:-1], device=mask.device)
    if kind == "length":
        return mask.sum(-1).float()
    per_token = {"token": -entropy, "sequence": logprobs}[kind]  # (B, N, T), nats: how sure the policy was (paper, section 3.2)
    total = (per_token * mask).sum(-1)
    return total / mask.sum(-1) if norm == "mean" else total


def advantage(kind, rewards):
    """(B, N) -> (B, N), against the prompt's others: less the mean of the other N - 1, or for "grpo" of all N, and standardised."""
    N = rewards.shape[1]
    if kind == "grpo":
        return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (N - 1)


def policy_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, tokens, beta, clip):
    """Minus the clipped objective with the KL penalty: (B, T) x 3, (B,), (B, T), the tokens of the whole update -> scalar, per token."""
    ratio = (logprobs - old_logprobs).exp()  # (B, T): 1 on-policy, where this is REINFORCE
    advantages = advantages[:, None]  # (B, 1): one for all tokens of a response
    objective = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    if beta:
        objective = objective - beta * k3(logprobs, ref_logprobs)
    objective = (objective * mask).sum()
    objective = objective / tokens
    return -objective


def main(argv=None):
    # -------------------------------------------------------------------------------------------------------------- settings
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id (default: the tiny model, with the settings under TINY)")
    parser.add_argument("--data", default="numina", help="training prompts: JSONL file or Hub name (default: %(default)s)")
    parser.add_argument("--data-size", type=int, default=35_000, help="prompts drawn from --data with the seed (default: %(default)s)")
    parser.add_argument("--val", default="math500", help="held-out problems: JSONL file, Hub name, or none (default: %(default)s)")
    parser.add_argument("--val-size", type=int, default=512, help="the first so many held-out problems (default: %(default)s)")
    parser.add_argument("--out", help="folder for the run (default: a new one in runs/)")
    parser.add_argument("--resume", metavar="FOLDER", help="go on with the run in FOLDER; its settings hold unless given again")
    parser.add_argument("--seed", type=int, default=1, help="of everything (default: %(default)s)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="of the weights (default: bfloat16 on a GPU that has it)")
    parser.add_argument("--offload", action=argparse.BooleanOptionalAction, help="float32 masters and Adam in CPU memory (default: if needed)")
    parser.add_argument("--reward", default="token", help=f"{', '.join(REWARDS)}, or a sum like correct+token (default: %(default)s)")
    parser.add_argument("--reward-weight", type=float, default=1.0, help="of the second reward in a sum (default: %(default)s)")
    parser.add_argument("--reward-norm", choices=["mean", "sum"], default="mean", help="over a response's tokens (default: %(default)s)")
    parser.add_argument("--advantage", choices=["rloo", "grpo"], default="rloo", help="against the prompt's others (default: %(default)s)")
    parser.add_argument("--clip", type=float, default=0.2, help="ratio clip, matters from 2 updates on (default: %(default)s)")
    parser.add_argument("--beta", type=float, default=0.001, help="weight of the KL to the initial model; 0: no KL (default: %(default)s)")
    parser.add_argument("--rollouts", type=int, default=4, metavar="N", help="responses per prompt (default: %(default)s)")
    parser.add_argument("--rollouts-with", choices=["generate", "paged"], help="model.generate, or a paged KV cache (default: see rollouts.py)")
    parser.add_argument("--steps", type=int, default=100, help="batches of responses (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=1, metavar="K", help="optimiser steps per batch of responses (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling and of what is scored (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=512, metavar="B", help="prompts per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-6, help="learning rate, constant (default: %(default)s)")
    parser.add_argument("--grad-clip", type=float, default=1.0, help="largest gradient norm (default: %(default)s)")
    parser.add_argument("--max-prompt-tokens", type=int, default=1024, help="longer prompts are left out (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=3072, help="longest response, tokens (default: %(default)s)")
    parser.add_argument("--budget", type=int, default=16_384, help="tokens per micro-batch; x 8 in rollouts (default: %(default)s)")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="recompute activations: less memory")
    parser.add_argument("--eval-every", type=int, default=10, help="steps between held-out evaluations (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=10, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--guard", type=float, default=4.0, metavar="X", help="stop when length or entropy has grown X-fold, or the run "
                        "has collapsed otherwise (see run.collapsed); 0: never (default: %(default)s)")
    parser.add_argument("--select", choices=["last", "val"], default="last", help="the result; val: labels choose (default: %(default)s)")
    parser.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases too")
    given = parser.parse_args(argv)
    try:
        if given.resume:
            checkpoint = run.checkpoint_of(given.resume)
            parser.set_defaults(**json.loads((Path(given.resume) / "config.json").read_text()))
        elif given.model is None:
            parser.set_defaults(**TINY)
        args = parser.parse_args(argv)
        if args.rollouts < 2:
            raise ValueError(f"--rollouts {args.rollouts}: a response is compared with others to the same prompt, so at least 2 are needed")
        if not set(args.reward.split("+")) <= set(REWARDS) or args.reward.count("+") > 1:
            raise ValueError(f"--reward {args.reward}: give one of {', '.join(REWARDS)}, or a sum of two like correct+token")
        if args.temperature <= 0:
            raise ValueError(f"--temperature {args.temperature}: samples need a temperature above 0")
        if not 1 <= args.updates <= args.prompts:
            raise ValueError(f"--updates {args.updates}: between 1 and the step's {args.prompts} prompts")

        # ------------------------------------------------------------------------------------------------------------ set-up
        device, dtype = set_up(args.device, args.dtype)
        if args.wandb:
            import wandb
        train = load_problems(args.data)
        train = random.Random(args.seed).sample(train, min(args.data_size, len(train)))
        try:
            val = [] if args.val == "none" else load_problems(args.val)[: args.val_size]
        except FileNotFoundError as error:
            if args.val != "math500":  # the default is used where it can be had
                raise
            print(f"no held-out set: {error}")
            val = []
        if any("answer" not in problem for problem in val):
            raise ValueError(f"--val {args.val}: some of its problems have no answer to grade against; --val none goes without")
        model, tokenizer = load_model(checkpoint if args.resume else args.model, "cpu", dtype)
        label = "answer" if "correct" in args.reward else None  # the only label that training can see, and only if asked to
        if label and any(label not in problem for problem in train):
            raise ValueError(f"--data {args.data}: some of its problems have no \"{label}\", and this run learns from it")
        train = [(problem["prompt"], encode_prompt(tokenizer, problem["prompt"]), problem.get(label)) for problem in train]
        train = [row for row in train if len(row[1]) <= args.max_prompt_tokens]
        if len(train) < args.prompts:
            raise ValueError(f"--prompts {args.prompts}: {args.data} has only {len(train)} of at most {args.max_prompt_tokens} tokens")
        stop = stop_ids(model, tokenizer)
        P = sum(p.numel() for p in model.parameters())
        most = max(len(prompt) for _, prompt, _ in train) + args.max_new_tokens  # tokens of the longest sequence there can be
        how, whole = choose(args.rollouts_with, device, dtype), args.prompts * args.rollouts * most  # tokens of a step, at most
        update, rollout = (min(max(n * args.budget, most), whole) for n in (1, 8))  # tokens at once
        offload, memory = run.fit(model, device, args.beta, args.offload, args.checkpointing, update, rollout if how == "generate" else 0)
        model.to(device)
        reference = load_model(args.model, device, dtype)[0] if args.beta else None
        head = output_head(model, train[0][1])
        ref_head = output_head(reference, train[0][1]) if args.beta else None
        folder = Path(args.resume) if args.resume else run.new_folder(args.out, NAME)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"{NAME}: {error}")
    transformers.logging.disable_progress_bar()  # loading a large model shows one; saving a small one need not
    if args.checkpointing:
        name = "activation_checkpointing_enable"  # what late transformers 5 calls it
        getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
    optimizer = run.MasterAdamW(model, args.lr, offload)
    B, N, start, rows = args.prompts, args.rollouts, 0, []
    title = f"EM-RL with reward {args.reward}: {args.model}".replace(str(HERE) + "/", "")
    per_token = 2 + 6 + (2 if args.beta else 0)  # FLOPs a parameter and token: sample, train, reference
    if args.resume:
        start, rows = run.restore(folder, checkpoint, optimizer)
    print(f"model: {args.model}, {P / 1e6:,.1f} M parameters in {model.dtype}".replace("torch.", "") + f" on {WORLD} x {device}")
    print(f"memory: {memory}; rollouts with {how}")
    print(f"prompts: {len(train):,} of {args.data}, {'in the' if tokenizer.chat_template else 'plain, since there is no'} chat template")
    print(f"held out: {len(val)} problems of {args.val}")
    print(f"a step: {B} prompts x {N} rollouts = {B * N} sequences of at most {most:,} tokens, "
          f"at most {P * B * N * most * per_token:.2g} FLOPs; {args.steps} steps")
    print(f"results: {folder}", flush=True)
    run.begin(folder, {k: v for k, v in vars(args).items() if k != "resume"})
    if args.wandb and RANK == 0:
        wandb.init(project=args.wandb, name=folder.name, config=vars(args))
    asked = run.stop_at_next_step()

    held_out = lambda step: run.held_out(step, folder, model, tokenizer, head, val, args.max_new_tokens, args.seed, 8 * args.budget)

    # ------------------------------------------------------------------------------------------------------------------ train
    if not rows:
        rows = [dict.fromkeys(run.COLUMNS, "") | {"step": 0} | held_out(0)]
        run.write_rows(folder / "metrics.csv", rows)
        if args.select == "val":
            run.save_model(folder / "best", model, tokenizer)
    for step in range(start + 1, args.steps + 1):
        started = time.time()
        torch.manual_seed(1_000_000 * args.seed + step)  # so a resumed step draws what it would have drawn

        # roll out: N responses to each of B prompts, with no top-k or top-p. An epoch is a permutation of the prompts
        position = np.arange((step - 1) * B, step * B)
        epochs = {e: np.random.default_rng((args.seed, e)).permutation(len(train)) for e in set(position // len(train))}
        picks = [epochs[p // len(train)][p % len(train)] for p in position]
        problems, prompts, labels = zip(*[train[i] for i in picks for _ in range(N)])  # B x N, a prompt's rollouts side by side
        responses, sampled = roll_out(how, model, prompts, stop, args.max_new_tokens, args.temperature, 8 * args.budget, "rollouts")
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses)]
        texts = [tokenizer.decode(response, skip_special_tokens=True) for response in responses]

        # score: entropy and log-probs under the policy that sampled, log-probs under the initial model
        scored = prompts, responses, args.temperature, 2 * args.budget
        entropy, old_logprobs, mask = score_all(model, head, *scored)  # (B x N, T)
        ref_logprobs = score_all(reference, ref_head, *scored)[1] if args.beta else old_logprobs

        # reward and advantage: how sure the model was of a response, against its other responses to the same prompt
        rewards = reward(args.reward, *(x.view(B, N, -1) for x in (entropy, old_logprobs, mask)), args.reward_norm,
                         [texts[i : i + N] for i in range(0, B * N, N)], labels[::N], args.reward_weight)  # (B, N)
        advantages = advantage(args.advantage, rewards).view(B * N)

        # update: K minibatches of prompts (K = 1: the whole batch, on-policy), each in micro-batches of similar length
        model.train()
        for minibatch in torch.arange(B * N).view(B, N).chunk(args.updates):
            minibatch = minibatch.flatten().tolist()
            tokens = sum(len(responses[i]) for i in minibatch)
            for group in tqdm(batches(lengths, args.budget, minibatch)[RANK::WORLD], desc="update", leave=False, delay=5, disable=RANK > 0):
                part = [prompts[i] for i in group], [responses[i] for i in group], args.temperature
                _, logprobs, here = score(model, head, *part)  # (b, t): rows end at the right
                old, ref = (x[group, -here.shape[1] :] for x in (old_logprobs, ref_logprobs))
                loss = policy_loss(logprobs, old, ref, advantages[group], here, tokens, args.beta, args.clip)
                loss.backward()
            grad_norm, changed = optimizer.step(args.grad_clip)
        model.eval()

        # log
        tokens, seconds = sum(map(len, responses)), time.time() - started
        row = {"step": step, "entropy": entropy.sum().item() / tokens, "reward": rewards.mean().item(),
               "reward_std": rewards.std(1).mean().item(), "kl": k3(old_logprobs, ref_logprobs)[mask].mean().item(),
               "gap": sampler_gap(sampled, old_logprobs, mask),
               "length": tokens / (B * N), "truncated": sum(r[-1] not in stop for r in responses) / (B * N), "grad_norm": grad_norm, "changed": changed,
               "tokens": tokens, "flops": P * sum(lengths) * per_token, "seconds": seconds, "tokens_per_second": tokens / seconds}
        print(f"step {step} | " + " | ".join(f"{key} {row[key]:.4g}" for key in run.COLUMNS[1:] if key in row), flush=True)
        for key in row:
            assert np.isfinite(row[key]), f"step {step}: {key} is {row[key]}; {folder}/checkpoint is from before; a lower --lr may help"

        # evaluate, and let the guard look
        why = run.collapsed(rows + [row], args.guard)
        last = step == args.steps or why is not None
        rows.append(dict.fromkeys(run.COLUMNS, "") | row | (held_out(step) if last or step % args.eval_every == 0 else {}))
        row = rows[-1]
        if step % args.eval_every == 0:
            sample = {"step": step, "set": "rollout", "prompt": problems[0], "response": texts[0], "reward": rewards[0, 0].item()}
            print(f"  {sample}", flush=True)
            run.append(folder / "samples.jsonl", [sample])
        if warning := run.drifted(rows):
            print(f"step {step} | warning: {warning}")
        if args.wandb and RANK == 0:
            wandb.log({k: v for k, v in row.items() if v != ""}, step=step)

        # save
        stop_now = any(gather({RANK: bool(asked)}).values())
        run.write_rows(folder / "metrics.csv", rows)
        measured = [row for row in rows if row["val_greedy"] != ""]
        if args.select == "val" and row in measured and row["val_greedy"] == max(r["val_greedy"] for r in measured):
            run.save_model(folder / "best", model, tokenizer)
        if last or stop_now or step % args.save_every == 0:
            run.save_model(folder / "checkpoint", model, tokenizer, {"step": step, "optimizer": optimizer.state()})
            run.plot(rows, folder / "plot.png", title)
        if why:
            print(f"step {step} | the guard stops the run: {why} (no label was read; --guard 0 goes on)")
        if stop_now and not last:
            sys.exit(f"{NAME}: stopped after step {step}; go on with: python {NAME} --resume {folder}")
        if last:
            break

    run.report(folder, rows, args.select)


if __name__ == "__main__":
    main()
