"""
EM-RL and EM-FT on N GPUs: weights, gradients and Adam's state are spread over the processes.

    torchrun --nproc_per_node=8 scale/em_rl_fsdp.py --model Qwen/Qwen2.5-32B
    torchrun --nproc_per_node=8 scale/em_rl_fsdp.py --model Qwen/Qwen2.5-32B --method ft
    torchrun --nproc_per_node=2 scale/em_rl_fsdp.py      # the tiny model, on a laptop's CPU
    python scale/em_rl_fsdp.py --model Qwen/Qwen2.5-32B --plan 8   # what 8 GPUs would hold
    python scale/em_rl_fsdp.py --model Qwen/Qwen2.5-Math-7B --sampler vllm   # one GPU, with vLLM

em_rl.py explains the method; its rewards, advantage, objective and settings are imported. This
file has what N processes need, and shards.py what they do to a model. In a step each process

  - samples responses to its share of the prompts, with all weights in its memory;
  - does as many micro-batches as every other: a layer's weights are put together for its
    forward and its backward, from the float32 shards that the processes hold;
  - updates its shards of the weights, with its shards of the gradients and of Adam's moments.

The normaliser, the gradient's norm and the logged means are those of all processes together.
With --method ft the objective is EM-FT's, -H: the entropy has weight -1, and there is no reward.
A run is reproducible on the same number of processes, and draws other samples on another one;
--resume works on any number. Rank 0 reads, writes and prints. The run's folder also has
sharded-STEP/, to which every process writes: several machines need a file system in common.

torchrun passes Ctrl-C on, and kills after 30 seconds what has not ended. A step takes longer, so
give it time: `torchrun --shutdown-timeout 3600 ...`, or TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600 in the
environment. Where torchrun has neither, stop rank 0 by `kill -INT PID`; it prints its PID.
"""
import argparse
import functools
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import em_rl
from em_rl import READS_LABELS, REWARDS, TINY, advantage, policy_objective
from engine import report, run
from engine.arguments import positive_int
from engine.files import checkpoint_of
from engine.guard import collapsed
from engine.load import load_model, set_up, switch_off_dropout
from engine.settings import parse_args
from entropy import batches, k3, output_head
from scale import memory, shards, vllm_rollouts
from scale.shards import on_rank_0, total
from tasks.errors import UserError
from tasks.prompts import response_texts, stop_ids

NAME = Path(__file__).resolve().name
EM_FT = dict(rollouts=1, steps=40, beta=0.0, entropy_coef=-1.0)  # what --method ft sets

# -------------------------------------------------------------------------- rank 0's set-up


def add_arguments(parser, method):
    """em_rl.py's settings, with the defaults of EM-FT where asked, and those of N processes."""
    parser.conflict_handler = "resolve"  # --rollouts below replaces em_rl.py's
    em_rl.add_arguments(parser)
    add = parser.add_argument_group("several processes").add_argument
    add("--method", choices=["rl", "ft"], default="rl", help="EM-RL or EM-FT")
    add("--rollouts", type=positive_int, default=4, metavar="N", help="responses per prompt; "
        "EM-RL needs 2 or more")
    parser.set_defaults(**EM_FT if method == "ft" else {})
    add("--sync-each", action=argparse.BooleanOptionalAction, help="sum gradients over processes "
        "after every micro-batch, not after the last: slower, but whole float32 gradients never "
        "exist; without this flag only where the GPU is too small")
    add("--plan", type=positive_int, metavar="N", help="print what each of N GPUs of 80 GB would "
        "hold, from the model's config.json alone, and stop")
    vllm_rollouts.add_arguments(add)


def read(argv, world):
    """Rank 0's part of the set-up: read all files, and open the folder of the run.

    Gives what all processes share, the whole model, and the initial one (None without a KL).
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", default="rl")
    method = first.parse_known_args(argv)[0].method
    add = functools.partial(add_arguments, method=method)
    args = parse_args(argv, __doc__, add, TINY, NAME)
    if args.method == "rl" and args.rollouts < 2:
        raise UserError(f"--rollouts {args.rollouts}: give 2 or more: a response needs a rival")
    shards.check(args, world)
    vllm_rollouts.check(args)
    if args.plan:
        memory.print_plan(args)
        sys.exit()
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device, dtype = set_up(args.device or default, args.dtype)
    train, val = run.load_data(args)
    weights = checkpoint_of(args.resume) if args.resume else args.model
    whole, tokenizer = load_model(weights, "cpu", dtype, args.template)
    dtype = whole.dtype
    args.dtype = str(dtype).removeprefix("torch.")  # of the run, also where it is resumed
    train = run.prepare(train, tokenizer, "answer" if args.reward in READS_LABELS else None, args)
    switch_off_dropout(whole)
    run.check_fit(whole, tokenizer, train, val, args)
    head = output_head(whole, train[0]["ids"]) | {"weight": None, "bias": None}
    initial = None
    if args.beta:  # the KL needs the initial model beside the one that changes
        initial = load_model(args.model, "cpu", dtype)[0] if args.resume else whole
    run.check_inputs(args, train, val)
    start, history = run.restore(args, torch.nn.Module())  # Adam's state is in sharded-STEP/
    folder = run.new_folder(args, NAME)
    memory.settle(args, whole, world, device, dtype)
    shared = args, device, dtype, train, val, tokenizer, head, start, history, folder
    return shared, whole, initial


# --------------------------------------------------------------------------------- all ranks


@run.command
def main(argv=None):
    rank, world = shards.join_processes()
    shared, whole, before = on_rank_0(read, argv, world) or (None, None, None)
    args, device, dtype, train, val, tokenizer, head, start, history, folder = shards.share(shared)
    if device == "cuda":
        shards.use_own_gpu()
    roll_out = shards.generate_gathered
    if args.sampler == "vllm":
        roll_out = vllm_rollouts.sampler(args, train, head, dtype)
    model = shards.spread(whole, device, torch.float32, args.offload, work=dtype)
    if args.beta:
        reference = shards.spread(before, device, dtype, args.offload)
        del before
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    if start:
        shards.restore(start, model, optimizer, folder)
    if args.recompute:
        run.recompute_activations(model)
    B, N = args.prompts // world, args.rollouts  # B of this process
    stop = stop_ids(model, tokenizer)
    with shards.gathered(model):
        if rank == 0:
            run.announce(args, model, tokenizer, shards.head_of(model, head), train, val, folder)
            print(f"rank 0 of {world} is process {os.getpid()}", flush=True)
    logger = run.start_logger(args, folder) if rank == 0 else None
    stopping, stopped = run.StopSignal(), False

    # -------------------------------------------------------------------------------- train
    if start == 0:
        row = shards.evaluate_held_out(0, model, tokenizer, val, args, folder)
        history.append({"step": 0} | row)
        on_rank_0(run.write_rows, folder / "metrics.csv", history)
    for step in range(start + 1, args.steps + 1):
        started = time.time()
        seed = args.seed + 1_000 * rank  # of this process; rank 0 draws what em_rl.py draws
        torch.manual_seed(1_000_000 * seed + step)  # a resumed step draws the same

        # roll out: N responses to each of B prompts, a prompt's N side by side
        problems = run.problems_of_step(step, train, args)  # of all processes
        problems = [p for i, p in enumerate(problems) if i // N % world == rank]
        prompts = [problem["ids"] for problem in problems]  # B*N lists of token ids
        rollout = roll_out(
            model, prompts[::N], stop, args.max_new_tokens, args.temperature, N=N,
            batch_size=args.rollout_batch, desc="rollouts" if rank == 0 else None,
        )
        rollout.texts = response_texts(tokenizer, rollout.responses)
        rollout.problems = problems
        lengths = rollout.mask.sum(1)  # (B*N,), tokens

        # reward, and advantage: against the prompt's other N - 1
        advantages = torch.zeros(B * N, 1, device=device)  # EM-FT's objective has none
        if args.method == "rl":
            rewards = REWARDS[args.reward](rollout).view(B, N)
            if args.reward_norm == "sum":
                rewards = rewards * lengths.view(B, N)
            advantages = advantage(args.advantage, rewards).view(B * N, 1)

        # reference: log-probs of the same tokens under the initial model
        if args.beta:
            initial = shards.score_gathered(
                reference, head, prompts, rollout.responses, args.temperature, args.budget
            )

        # update: split the prompts into K parts, and take a step on each (K = 1: on-policy)
        model.train()
        sizes = [len(p) + len(r) for p, r in zip(prompts, rollout.responses)]
        for chosen in torch.arange(B * N).view(B, N).tensor_split(args.updates):
            chosen = chosen.flatten().tolist()
            micro_batches = batches(sizes, args.budget, chosen)
            num_tokens, micro_batches = shards.agree(lengths[chosen].sum(), micro_batches)
            for micro in tqdm(micro_batches, "update", leave=False, delay=5, disable=rank > 0):
                model.set_requires_gradient_sync(args.sync_each or micro is micro_batches[-1])
                new = model.score(head, prompts, rollout.responses, args.temperature, micro)
                T = new.mask.shape[1]
                old = rollout.logprobs[micro, :T]
                ref = initial.logprobs[micro, :T] if args.beta else None
                objective = policy_objective(new, old, ref, advantages[micro], args)  # (b, T)
                objective = (objective * new.mask).sum() / num_tokens
                loss = -objective * world  # FSDP takes the processes' mean, where a sum is meant
                loss.backward()
            grad_norm = shards.clip(optimizer, args.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        model.eval()

        # log: of all processes, so that each of them has the same row
        counts = total({"tokens": lengths.sum(), "processed": sum(sizes)})
        row = {
            "step": step, "tokens": int(counts["tokens"]),
            "grad_norm": grad_norm, "seconds": time.time() - started,
            "flops": run.flops_per_token(model, args) * int(counts["processed"]),
        }
        means = {  # a sum, and the number of its terms
            "entropy": (rollout.entropy.sum(), lengths.sum()),
            "length": (lengths.sum(), B * N),
            "truncated": (sum(ids[-1] not in stop for ids in rollout.responses), B * N),
        }
        if args.method == "rl":
            means["reward"] = rewards.sum(), B * N
            means["reward_std"] = rewards.std(1).sum(), B
        if args.beta:
            kl = k3(rollout.logprobs, initial.logprobs)[rollout.mask]
            means["kl"] = kl.sum(), len(kl)
        row |= shards.mean(means)

        # evaluate, let the guard look, and save
        collapse = collapsed(history + [row], args.guard)
        last = step == args.steps or collapse is not None
        if last or step % args.eval_every == 0:
            on_rank_0(run.log_sample, step, problems[0]["prompt"], rollout.texts[0], folder)
            row |= shards.evaluate_held_out(step, model, tokenizer, val, args, folder)
        history.append(row)
        on_rank_0(run.log, row, logger)
        on_rank_0(run.write_rows, folder / "metrics.csv", history)
        if args.keep_best and run.is_best(history):
            shards.collect(model, whole)
            on_rank_0(run.save_model, folder / "best", whole, tokenizer, row=row)
        asked = total({"asked": stopping.asked})["asked"] > 0  # by Ctrl-C, of any process
        if last or asked or step % args.save_every == 0:
            shards.save(step, model, optimizer, whole, tokenizer, folder)
            on_rank_0(report.plot, history, folder)
        if collapse and rank == 0:
            print(f"step {step} | the guard stops the run: {collapse} (--guard 0 goes on)")
        stopped = asked and not last
        if collapse or stopped:
            break
    dist.barrier()  # no process ends while another still needs it
    if logger:
        logger.finish()
    if stopped and rank == 0:
        sys.exit(f"{NAME}: stopped after step {step}; to go on: --resume {folder}")
    if rank == 0:
        report.summarize(folder, history, len(val))


if __name__ == "__main__":
    shards.run_and_end(main)
