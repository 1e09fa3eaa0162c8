"""
EM-FT: fine-tuning that minimises the token entropy of the model's own samples. No labels.

    python em_ft.py                               # the tiny model, on a laptop's CPU
    python em_ft.py --beta 0.001 --rollouts 4     # the paper's ablation: KL, 4 responses
    python em_ft.py --loss sft                    # the supervised twin: labelled solutions
    python em_ft.py --model Qwen/Qwen2.5-Math-7B  # the paper's run, on one 80 GB GPU

Each step samples N responses to each of B prompts. It follows the gradient of their entropy,
through the probabilities and not through the sampling:

    objective = -H(pi(. | y_<t)) - beta KL(pi || initial model), over the batch's tokens

It does not see how a token changes the tokens behind it; em_rl.py does.

A response's tokens include the end-of-sequence token that it drew. One that never ends is cut
at --max-new-tokens and counts like any other. Labels are read for the report only (held-out
accuracy, every few steps), unless a flag asks for them. After Ctrl-C --resume runs/NAME goes
on as if nothing had happened, since each step has a seed of its own, and --steps 200 takes a
finished run further. engine/run.py lists a run's files; engine/optimizer.py says why the
weights are bfloat16 on a GPU and have float32 masters.

Departures from the paper (arXiv 2505.15134) and its released trainer:
  - The objective is divided by all tokens of the update: every token weighs the same.
"""
import argparse
import random
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from engine import report, run
from engine.arguments import Help, growth, nonnegative, positive, positive_int, whole_number
from engine.guard import collapsed
from engine.load import load_model, set_up
from engine.optimizer import MasterAdamW
from engine.sampler import generate
from entropy import batches, k3, output_head, score, score_all
from eval import evaluate_held_out
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
    add("--loss", choices=["entropy", "sft"], default="entropy", help="sft: of labelled solutions")
    add("--beta", type=nonnegative, default=0.0, help="weight of the KL; 0: no KL")
    add("--rollouts", type=positive_int, default=1, metavar="N", help="responses per prompt")
    add("--steps", type=positive_int, default=40, help="batches of responses")
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
    add("--wandb", metavar="PROJECT", help="log to Weights & Biases too")
    args = run.parse_args(parser, argv, TINY, NAME)
    if args.updates > args.prompts:
        parser.error(f"--updates {args.updates}: at most one for each of --prompts {args.prompts}")
    label = "solution" if args.loss == "sft" else None  # the only label that training sees

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
        optimizer = MasterAdamW(model, args.lr, args.offload)
        start, history = run.restore(args, optimizer)
        folder = run.new_folder(args, NAME)
    except (OSError, ValueError) as error:
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
        if args.loss == "sft":
            written = tokenizer([p["solution"] for p in problems], add_special_tokens=False)
            responses = [(x + stop[:1])[: args.max_new_tokens] for x in written["input_ids"]]
            entropy, old_logprobs, _ = score_all(model, head, prompts, responses, args.temperature)
        else:
            responses, entropy, old_logprobs = generate(
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
                objective = -new_entropy if args.loss == "entropy" else new_logprobs  # (b, t)
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
