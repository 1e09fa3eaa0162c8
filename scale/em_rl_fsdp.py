"""
EM-RL on N GPUs: em_rl.py with the weights, gradients and Adam's state spread over processes.

    torchrun --nproc_per_node=8 scale/em_rl_fsdp.py --model Qwen/Qwen2.5-32B
    torchrun --nproc_per_node=2 scale/em_rl_fsdp.py      # the tiny model, on a laptop's CPU
    python scale/em_rl_fsdp.py --model Qwen/Qwen2.5-32B --plan 8   # what 8 GPUs would hold

To read it, `diff em_rl.py scale/em_rl_fsdp.py`; em_rl.py explains the method, and shards.py
what is done to a model. Every process runs this script. In a step it

  - rolls out its share of the prompts, with all weights in its memory, in bfloat16, at its own
    pace (a process that is done waits for the others);
  - does as many micro-batches as every other: a layer's weights are put together for its
    forward and its backward, from the float32 shards that the processes hold;
  - steps with its shards of the gradients and of Adam's moments.

The normaliser, the gradient's norm and the logged means are those of all processes together.
A run is reproducible on the same number of processes; on another one it draws other samples.
--prompts must be a multiple of the number of processes. With --sampler vllm every process has a
vLLM engine of its own, on its own GPU, which gets the weights put together one at a time.

Rank 0 reads, writes and prints. A run's folder is em_rl.py's, and sharded-STEP/ besides, which
each process writes for itself: several machines need a file system in common. --resume works on
any number of processes.

torchrun passes Ctrl-C and SIGTERM on, and kills 30 seconds later what has not ended. A step
and its checkpoint take longer, so say how long they may take: `torchrun --shutdown-timeout
3600 ...`, or TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600 in the environment. Where `torchrun --help`
has no such option, send the signal to rank 0 alone, past torchrun: `kill -INT PID`, with the
PID that is printed at the start.

There is no --method for EM-FT. It has another objective, no rewards, no advantages, no old
log-probs and by default no reference, so nearly every phase of a step would have a branch.
What N GPUs need is in shards.py, for em_ft.py as well.
"""
import argparse
import functools
import importlib.util
import math
import os
import random
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from em_rl import REWARDS, TINY, advantage, entropy_weights, reward
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
from entropy import batches, k3, output_head
from scale import vllm_rollouts
from scale.shards import (
    agree,
    collect,
    describe,
    evaluate_held_out,
    gathered,
    generate_gathered,
    head_of,
    join_processes,
    memory_of,
    plan,
    rank_0_leads,
    restore,
    run_and_end,
    save,
    score_gathered,
    share,
    spread,
    step_clipped,
    total,
    use_own_gpu,
    whole_weights,
)
from tasks.problems import hub_says, load_problems, reach_hub
from tasks.prompts import stop_ids

NAME = Path(__file__).name


def read(argv, world):
    """Rank 0's part of the set-up: all that is read from files, and the folder of the run.

    Gives a list for all processes to share, and one for rank 0 to keep: the whole model, the
    initial one (None without a KL) and the lock on the folder.
    """
    # ----------------------------------------------------------------------------- settings
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=Help, usage=f"torchrun [...] {NAME} [options]",
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
    add("--device", choices=["cuda", "cpu"], help="without it cuda where there is a GPU")
    add("--dtype", choices=["bfloat16", "float32"], help="to work in, from float32 masters; "
        "without it bfloat16 on a GPU that has it")
    add("--offload", action=argparse.BooleanOptionalAction, help="all shards in CPU memory; "
        "without this flag only where the GPU is too small")
    add("--sync-each", action=argparse.BooleanOptionalAction, help="sum gradients over processes "
        "after every micro-batch, not after the last: slower, but whole float32 gradients never "
        "exist; without this flag only where the GPU is too small")
    add("--plan", type=positive_int, metavar="N", help="print what each of N GPUs of 80 GB would "
        "hold, from the model's config.json alone, and stop")
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
    parser.set_defaults(lora=None, merge=False)  # adapters need one GPU: em_rl.py has them
    args = run.parse_args(parser, argv, TINY, NAME)
    if args.prompts % world:
        parser.error(f"--prompts {args.prompts}: give a multiple of the {world} processes")
    if args.updates > args.prompts // world:
        parser.error(f"--updates {args.updates}: at most one for each of the prompts of a "
                     f"process, {args.prompts // world}")
    label = "answer" if "correct" in args.reward else None  # the only label that training sees

    # ------------------------------------------------------------------------------- set-up
    try:
        if args.plan:
            print_plan(args)
            sys.exit()
        if args.sampler == "vllm" and not importlib.util.find_spec("vllm"):
            parser.error("--sampler vllm: needs a package; pip install vllm")
        default = "cuda" if torch.cuda.is_available() else "cpu"
        device, dtype = set_up(args.device or default, args.dtype)
        train = load_problems(args.data)
        train = random.Random(args.seed).sample(train, min(args.data_size, len(train)))
        val = run.load_held_out(args)
        weights = run.checkpoint_of(args.resume) if args.resume else args.model
        whole, tokenizer = load_model(weights, "cpu", dtype)
        train = run.prepare(train, tokenizer, label, args)
        head = output_head(whole, train[0]["ids"]) | {"weight": None, "bias": None}
        need = memory_of(whole, world, dtype.itemsize)
        initial = None
        if args.beta:  # the KL needs the initial model beside the one that changes
            initial = load_model(args.model, "cpu", dtype)[0] if args.resume else whole
        nothing = torch.nn.Module()  # for the optimizer, whose state is in sharded-STEP/
        start, history = run.restore(args, nothing)
        folder = run.new_folder(args, NAME)
    except (OSError, ValueError) as error:
        sys.exit(f"{NAME}: {error}")
    capacity = math.inf
    if device == "cuda":
        capacity = torch.cuda.get_device_properties(device).total_memory
    print(describe(need, world, capacity, args))
    args.offload, args.sync_each, *_ = plan(need, capacity, args)
    lock, args.lock = args.lock, None  # it stays with this process
    shared = [
        args, device, dtype, train, val, tokenizer, head, start, history, folder, whole.config,
        whole.generation_config,
    ]
    return shared, [whole, initial, lock]


def print_plan(args):
    """What --plan asks for, from the model's config.json. Raises OSError where there is none."""
    reached = Path(args.model).is_dir() or reach_hub()
    try:
        config = AutoConfig.from_pretrained(args.model)
    except Exception as error:  # whatever the loader raises for a missing or a damaged file
        found = f"no folder with a config.json, and {hub_says(reached)} model"
        raise OSError(f"--plan {args.plan}: --model {args.model}: {found}") from error
    with torch.device("meta"):  # shapes without numbers
        model = AutoModelForCausalLM.from_config(config)
    need = memory_of(model, args.plan, 4 if args.dtype == "float32" else 2)
    print(f"{args.model}: {model.num_parameters() / 1e9:,.2f} billion parameters")
    print(describe(need, args.plan, 80e9, args))


@run.command
def main(argv=None):
    rank, world = join_processes()
    shared, kept = None, [None, None, None]
    with rank_0_leads():
        if rank == 0:
            shared, kept = read(argv, world)
    (
        args, device, dtype, train, val, tokenizer, head, start, history, folder, config,
        generation_config,
    ) = share(shared)
    whole, initial, lock = kept  # on rank 0, else None
    try:
        if device == "cuda":
            use_own_gpu()
        roll_out = generate_gathered
        if args.sampler == "vllm":
            longest = max(len(problem["ids"]) for problem in train) + args.max_new_tokens
            # vLLM takes the group of all processes for its world, in which each is a group by
            # itself; without the launcher's name all engines would be on the first GPU
            launcher = "external_launcher" if "RANK" in os.environ else None
            engine = vllm_rollouts.start(
                args.model, dtype, longest, share=args.vllm_memory, rows=args.rollout_batch,
                distributed_executor_backend=launcher,
            )
            roll_out = vllm_rollouts.sampler(
                engine, head, 2 * args.budget, score=score_gathered, total=total,
                weights=functools.partial(whole_weights, dtype=dtype),
            )
    except (ValueError, ImportError) as error:
        sys.exit(f"{NAME}: {error}")
    mesh = init_device_mesh(device, (world,))
    policy = MixedPrecisionPolicy(dtype, torch.float32)  # work in dtype, sum in float32
    model = spread(whole, config, mesh, torch.float32, args.offload, policy)
    model.generation_config = generation_config
    if args.beta:
        reference = spread(initial, config, mesh, dtype, args.offload)
        del initial, kept
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    if start:
        restore(start, model, optimizer, folder)
    if args.checkpointing:
        run.checkpoint_activations(model)
    B, N, P = args.prompts // world, args.rollouts, model.num_parameters()  # B of this process
    stop = stop_ids(model, tokenizer)
    flops = P * (2 + 6 + (2 if args.beta else 0))  # a token: sample, train, reference
    with gathered(model):
        if rank == 0:
            run.announce(args, model, tokenizer, head_of(model, head), train, val, flops, folder)
            print(f"rank 0 of {world} is process {os.getpid()}", flush=True)
    logger = run.start_logger(args, folder) if rank == 0 else None
    stopping, stopped = run.StopSignal(), False

    # -------------------------------------------------------------------------------- train
    if start == 0:
        row = evaluate_held_out(0, model, tokenizer, val, args, folder)
        history.append({"step": 0} | row)
        with rank_0_leads():
            if rank == 0:
                run.write_rows(folder / "metrics.csv", history)
    for step in range(start + 1, args.steps + 1):
        started = time.time()
        seed = args.seed + 1_000 * rank  # of this process; rank 0 draws what em_rl.py draws
        torch.manual_seed(1_000_000 * seed + step)  # a resumed step draws the same

        # roll out: N responses to each of B prompts, a prompt's responses side by side
        problems = run.next_problems(train, step, args)  # of all processes
        problems = [p for i, p in enumerate(problems) if i // N % world == rank]
        prompts = [problem["ids"] for problem in problems]  # B*N lists of token ids
        responses, entropy, old_logprobs = roll_out(
            model, prompts[::N], stop, args.max_new_tokens, args.temperature, n=N,
            rows=args.rollout_batch, desc="rollouts" if rank == 0 else None,
        )
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
        lengths = torch.tensor([len(response) for response in responses], device=device)
        mask = torch.arange(lengths.max(), device=device) < lengths[:, None]  # (B*N, T)

        # score: the policy's numbers came with its samples; what does the reference say?
        ref_logprobs = old_logprobs  # (B*N, T), nats; without a KL its weight is 0
        if args.beta:
            _, ref_logprobs, _ = score_gathered(
                reference, head, prompts, responses, args.temperature, 2 * args.budget
            )

        # reward: how sure the policy was; advantage: against the prompt's other N - 1
        confidence = {"token": -entropy, "sequence": old_logprobs}  # (B*N, T), nats
        if args.reward == "self-certainty":  # KL(uniform || pi), of another pass
            _, mean_logprobs, _ = score_gathered(
                model, head, prompts, responses, args.temperature, 2 * args.budget, mean=True
            )
            vocabulary = len(model.get_output_embeddings().weight)
            confidence["self-certainty"] = -mean_logprobs - math.log(vocabulary)
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
            num_tokens, micro_batches = agree(num_tokens, micro_batches)
            bar = tqdm(micro_batches, desc="update", leave=False, delay=5, disable=rank > 0)
            for micro in bar:
                is_last = micro is micro_batches[-1]
                model.set_requires_gradient_sync(is_last or args.sync_each)
                new_entropy, new_logprobs, in_response = model.score(
                    head, [prompts[i] for i in micro], [responses[i] for i in micro],
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
                loss = -objective * world  # FSDP takes the processes' mean, where a sum is meant
                loss.backward()
            grad_norm, changed = step_clipped(optimizer, args.grad_clip)
        model.eval()

        # log: sums over all processes, so that each of them has the same row
        sums = total({
            "entropy": entropy.sum(),
            "reward": rewards.sum(),
            "reward_std": rewards.std(1).sum(),
            "kl": k3(old_logprobs, ref_logprobs)[mask].sum(),
            "truncated": sum(ids[-1] not in stop for ids in responses),
            "tokens": lengths.sum(),
            "processed": sum(sizes),
        })
        seconds, tokens = time.time() - started, int(sums["tokens"])
        row = dict(step=step, grad_norm=grad_norm, changed=changed, tokens=tokens, seconds=seconds)
        row["entropy"] = sums["entropy"] / tokens
        row["reward"] = sums["reward"] / (world * B * N)
        row["reward_std"] = sums["reward_std"] / (world * B)
        row["kl"] = sums["kl"] / tokens
        row["length"] = tokens / (world * B * N)
        row["truncated"] = sums["truncated"] / (world * B * N)
        row["flops"] = flops * int(sums["processed"])

        # evaluate, and let the guard look
        collapse = collapsed(history + [row], args.guard)
        last = step == args.steps or collapse is not None
        if last or step % args.eval_every == 0:
            with rank_0_leads():
                if rank == 0:
                    run.log_sample(step, problems[0]["prompt"], texts[0], folder)
            row.update(evaluate_held_out(step, model, tokenizer, val, args, folder))
        history.append(row)
        with rank_0_leads():
            if rank == 0:
                run.log(row, logger)
                run.write_rows(folder / "metrics.csv", history)

        # save
        if args.keep_best and run.is_best(history):
            collect(model, whole)
            with rank_0_leads():
                if rank == 0:
                    run.save_model(folder / "best", whole, tokenizer)
        asked = total({"asked": stopping.asked})["asked"] > 0  # by Ctrl-C, of any process
        if last or asked or step % args.save_every == 0:
            save(step, model, optimizer, whole, tokenizer, folder)
            if rank == 0:
                report.plot(history, folder)
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
        report.summarize(folder, history, args.keep_best)


if __name__ == "__main__":
    run_and_end(main)
