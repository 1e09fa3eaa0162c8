"""
EM-FT: fine-tuning that minimises the token entropy of the model's own samples. No labels.

    python em_ft.py                               # the tiny model, on a laptop's CPU
    python em_ft.py --beta 0.001 --rollouts 4     # the paper's ablation: KL, 4 responses
    python em_ft.py --loss sft                    # the supervised twin: labelled solutions
    python em_ft.py --model Qwen/Qwen2.5-Math-7B  # the paper's model, on one 80 GB GPU

Each step samples N responses to each of B prompts x, and takes a gradient step that raises

    objective = mean over the update's tokens of  -H(pi(. | x, y_<t)) - beta KL

The gradient flows through the probabilities, and not through the sampling: it does not see how a
token changes the entropy of the tokens behind it, while that of em_rl.py does. KL is the k3
estimate of KL(pi || initial model); see entropy.k3.

The tokens of a response include the end-of-sequence token that it drew. A response that never
ends is cut at --max-new-tokens, and counts like any other. Labels only measure the held-out
accuracy, except for --loss sft. Ctrl-C saves, and --resume runs/NAME goes on as if nothing had
happened: the checkpoint has weights, masters and moments, and a step's prompts and random numbers
follow from --seed and its number. --steps 200 extends a finished run.
engine/run.py lists the files of a run.

Departures from the paper (arXiv 2505.15134) and its released trainer:
  - The objective is divided by the number of tokens of the update: every token weighs the same.
"""
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from engine import report, run
from engine.arguments import nonnegative, positive, positive_int
from engine.guard import collapsed
from engine.load import load_model, set_up
from engine.optimizer import MasterAdamW
from engine.sampler import generate
from engine.settings import parse_args
from entropy import batches, k3, output_head, score, score_all
from eval import evaluate_held_out
from tasks.prompts import response_texts, stop_ids

NAME = Path(__file__).resolve().name
TINY = dict(  # without --model. The defaults in add_arguments are the paper's
    model="tiny/base", data="tiny/train.jsonl", val="tiny/test.jsonl",
    lr=1e-4, prompts=64, steps=40, max_new_tokens=64, eval_every=5, save_every=5,
    budget=8192, rollout_batch=256, recompute=False,
)

# ------------------------------------------------------------------------------- the settings


def add_arguments(parser):
    """The settings of the method. engine/settings.py has those of any training run."""
    add = parser.add_argument_group("sampling").add_argument
    add("--prompts", type=positive_int, default=512, metavar="B", help="prompts per step")
    add("--rollouts", type=positive_int, default=1, metavar="N", help="responses per prompt")
    add("--temperature", type=positive, default=1.0, help="of sampling and of scoring")
    add("--max-new-tokens", type=positive_int, default=3072, help="longest response, tokens")
    add("--rollout-batch", type=positive_int, default=128, help="responses sampled at once; "
        "another number draws other samples, and the same greedy ones")
    add = parser.add_argument_group("objective").add_argument
    add("--loss", choices=["entropy", "sft"], default="entropy", help="sft: of labelled solutions")
    add("--beta", type=nonnegative, default=0.0, help="weight of the KL; 0: no second model")
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=positive_int, default=40, help="batches of responses")
    add("--updates", type=positive_int, default=1, metavar="K", help="split a batch into K updates")
    add("--lr", type=positive, default=1e-6, help="learning rate, constant")
    add("--grad-clip", type=positive, default=1.0, help="largest gradient norm")
    add("--budget", type=positive_int, default=16_384, help="tokens per micro-batch")


@run.command
def main(argv=None):
    args = parse_args(argv, __doc__, add_arguments, TINY, NAME)
    label = "solution" if args.loss == "sft" else None  # the only label that training sees

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
        if args.loss == "sft":
            written = tokenizer([p["solution"] for p in problems], add_special_tokens=False)
            responses = [(ids + stop[:1])[: args.max_new_tokens] for ids in written["input_ids"]]
            old = score_all(model, head, prompts, responses, args.temperature, args.budget)
        else:
            old = generate(
                model, prompts[::N], stop, args.max_new_tokens, args.temperature, N=N,
                batch_size=args.rollout_batch, desc="rollouts",
            )
            responses = old.responses
        lengths = old.mask.sum(1)  # (B*N,), tokens

        # reference: log-probs of the same tokens under the initial model
        if args.beta:
            with adapters.disable_adapter() if adapters else nullcontext():  # of --lora
                initial = score_all(
                    reference, ref_head, prompts, responses, args.temperature, args.budget
                )

        # update: split the prompts into K parts, and take a step on each (K = 1: on-policy)
        model.train()  # for --recompute; dropout is off
        sizes = [len(p) + len(r) for p, r in zip(prompts, responses)]
        for chosen in torch.arange(B * N).view(B, N).tensor_split(args.updates):
            chosen = chosen.flatten().tolist()
            num_tokens = lengths[chosen].sum()  # of the whole update
            micro_batches = batches(sizes, args.budget, chosen)
            for micro in tqdm(micro_batches, desc="update", leave=False, delay=5):
                new = score(model, head, prompts, responses, args.temperature, micro)
                objective = -new.entropy if args.loss == "entropy" else new.logprobs  # (b, T)
                if args.beta:
                    ref = initial.logprobs[micro, : new.mask.shape[1]]
                    objective = objective - args.beta * k3(new.logprobs, ref)
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
            "entropy": old.entropy.sum().item() / tokens,
            "length": tokens / (B * N),
            "truncated": sum(ids[-1] not in stop for ids in responses) / (B * N),
            "grad_norm": grad_norm, "tokens": tokens, "seconds": time.time() - started,
            "flops": run.flops_per_token(model, args) * sum(sizes),
        }
        if args.beta:
            row["kl"] = k3(old.logprobs, initial.logprobs)[old.mask].mean().item()

        # evaluate, let the guard look, and save
        collapse = collapsed(history + [row], args.guard)
        last = step == args.steps or collapse is not None
        if last or step % args.eval_every == 0:
            (text,) = response_texts(tokenizer, responses[:1])
            run.log_sample(step, problems[0]["prompt"], text, folder)
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
