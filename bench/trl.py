"""
One EM-RL step, ours and TRL's: seconds, peak memory, and what came out, side by side.

    pip install trl && python bench/trl.py                      # 3 pairs of 12 steps of 64 prompts x 4 rollouts
    python bench/trl.py --pairs 7 --steps 22 --prompts 16

Both train tiny/base on tiny/train.jsonl on the CPU in float32, each in processes of its own that take turns (ours, TRL, ours, ...) and
have the same number of threads. Ours is em_rl.py by its command line; a step's seconds are those of its metrics.csv. TRL's is
RLOOTrainer, with EM's token reward as a reward function: one forward of the policy over prompts and responses, since TRL hands no
entropies to rewards; seconds from the end of one step to the end of the next, so generation and data are in them. Equal: the prompts of
each step and their token ids, N, temperature 1, no top-k or top-p, --max-new-tokens, KL to a reference model of its own at beta 0.001,
AdamW at 1e-4, gradient norm at most 1, clip 0.2, one optimiser step per batch of responses, nothing evaluated, saved or tracked.

Not equal, and not compared: the objective. TRL subtracts the KL from the reward, clips the ratio of whole responses, and divides by
responses, where ours divides by tokens. The first step comes from the same model on both sides, so its reward and entropy differ by the
sampling only (standard deviation over 10 samplings of one step's 256 responses: reward 0.012, entropy 0.021); later ones drift apart.

TRL's settings are the fastest of those tried: CPU seconds per step with one thread and growth of memory, a run of 5 steps each on a
busy machine, so that 0.2 s may be chance. --accumulate 4 is TRL at its smallest.

    key-value cache                     dynamic, TRL's default              static
    micro-batches (--accumulate)        1          2          4             1 (here)    4
    CPU seconds per step                2.5        2.3        2.3           1.9         2.2
    growth, MB                          376        271        200           380         183

Seconds: median over the steps after --warmup, the ratio from the medians of each pair. CPU seconds are those of all threads together:
other jobs on the machine disturb them least, above all with OMP_NUM_THREADS=1 (threads that wait for each other spin). Peak memory is
the process's high-water mark with all that it has imported; growth is that above its resident memory right before the first step.
"""
import argparse
import csv
import importlib.metadata
import importlib.util
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
MODEL, DATA = str(HERE / "tiny/base"), str(HERE / "tiny/train.jsonl")
sys.path[0] = str(HERE)  # instead of bench/, where trl.py, entropy.py and em_inf.py are other things than what is imported below
# torch is imported by the children only: a child's high-water mark starts at its parent's size


class Watch:
    """To be marked right before the first step and after each one."""

    def __init__(self):
        self.marks = []

    def mark(self):
        import psutil  # accelerate, which TRL needs, needs it
        high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.marks.append((time.time(), time.process_time(), high, psutil.Process().memory_info().rss))

    def result(self):
        clock, cpu, high, now = zip(*self.marks)
        steps = lambda x: [b - a for a, b in zip(x, x[1:])]
        return {"seconds": steps(clock), "cpu": steps(cpu), "peak": high, "before": now[0]}  # bytes


def ours(args, seed):
    import em_rl
    watch, write_rows = Watch(), em_rl.run.write_rows
    em_rl.run.write_rows = lambda *given: (watch.mark(), write_rows(*given))  # before the first step and after each one, before it is saved
    with tempfile.TemporaryDirectory() as folder:
        size = f"--prompts {args.prompts} --rollouts {args.rollouts} --steps {args.steps} --max-new-tokens {args.max_new_tokens}"
        rest = f"--lr 1e-4 --beta 0.001 --budget 8192 --no-checkpointing --guard 0 --eval-every {10**6} --save-every {10**6} --seed {seed}"
        files = ["--model", MODEL, "--data", DATA, "--val", "none", "--out", f"{folder}/run"]
        em_rl.main(files + f"{size} {rest} --device cpu".split())
        rows = list(csv.DictReader(open(f"{folder}/run/metrics.csv")))[1:]
    return watch.result() | {key: [float(row[key]) for row in rows] for key in ("seconds", "tokens", "reward", "entropy")}


def trl(args, seed):
    import numpy as np
    import torch
    import transformers
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    from eval import encode_prompt, load_model, load_problems, stop_ids
    model, tokenizer = load_model(MODEL, "cpu")
    train = random.Random(seed).sample(problems := load_problems(DATA), len(problems))  # em_rl.py's order
    order = np.random.default_rng((seed, 0)).permutation(len(train))[: args.steps * args.prompts]
    texts = [train[i]["prompt"] + "\n" for i in order]  # no chat template
    assert tokenizer(text=texts)["input_ids"] == [encode_prompt(tokenizer, train[i]["prompt"]) for i in order]
    watch, log = Watch(), {"tokens": [], "reward": [], "entropy": []}

    @torch.no_grad()
    def reward(prompts, completion_ids, **_):
        rows = [p + c for p, c in zip(tokenizer(text=prompts)["input_ids"], completion_ids)]
        inputs = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        T, lengths = max(map(len, completion_ids)), torch.tensor([len(c) for c in completion_ids])
        model.eval()
        logits = model(**inputs, logits_to_keep=T + 1, use_cache=False).logits[:, :-1]  # (B x N, T, V)
        model.train()
        entropy = logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)
        total = (entropy * (torch.arange(T) >= T - lengths[:, None])).sum(-1)
        log["tokens"].append(lengths.sum().item())
        log["reward"].append(-(total / lengths).mean().item())
        log["entropy"].append(total.sum().item() / log["tokens"][-1])
        return (-total / lengths).tolist()

    callback = transformers.TrainerCallback()
    callback.on_train_begin = callback.on_step_end = lambda *_, **__: watch.mark()
    with tempfile.TemporaryDirectory() as folder:
        micro = args.prompts * args.rollouts // args.accumulate
        config = RLOOConfig(
            folder, per_device_train_batch_size=micro, gradient_accumulation_steps=args.accumulate,
            num_generations=args.rollouts, num_iterations=1, max_completion_length=args.max_new_tokens, max_steps=args.steps, seed=seed,
            temperature=1.0, top_k=0, top_p=1.0, beta=0.001, epsilon=0.2, max_grad_norm=1.0, learning_rate=1e-4, weight_decay=0.01,
            lr_scheduler_type="constant", shuffle_dataset=False, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
            **{"cache_implementation": "static"} | json.loads(args.trl))
        trainer = RLOOTrainer(model, reward, config, Dataset.from_dict({"prompt": texts}), processing_class=tokenizer, callbacks=[callback])
        assert trainer.eos_token_ids == stop_ids(model, tokenizer) and not model.is_gradient_checkpointing
        trainer.train()
    return watch.result() | log


def child(name, args, seed):
    """Run one side in a process of its own: what it measured, and the threads and versions it ran with."""
    command = [sys.executable, __file__, "--only", name, "--seed", str(seed)] + sys.argv[1:]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bench/trl.py: {name} failed\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="a run (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="first steps of a run that don't count (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=64, metavar="B", help="prompts per step (default: %(default)s)")
    parser.add_argument("--rollouts", type=int, default=4, metavar="N", help="responses per prompt (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest response, tokens (default: %(default)s)")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of TRL's update (default: %(default)s)")
    parser.add_argument("--trl", default="{}", metavar="JSON", help="more of RLOOConfig (default: %(default)s)")
    parser.add_argument("--only", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        sys.exit("bench/trl.py: TRL is not installed: pip install trl")
    if args.only:
        result = {"ours": ours, "trl": trl}[args.only](args, args.seed)
        import torch
        import transformers
        version = f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {importlib.metadata.version('trl')}"
        print("\n" + json.dumps(result | {"threads": torch.get_num_threads(), "version": version}))
        sys.exit()

    runs = {"ours": [], "trl": []}
    for seed in range(1, args.pairs + 1):
        for name in runs:
            runs[name].append(child(name, args, seed))
            run = runs[name][-1]
            print(f"pair {seed} | {name:4} | seconds per step {statistics.median(run['seconds'][args.warmup :]):.3f} | "
                  f"reward of step 1 {run['reward'][0]:.4f} | seconds {' '.join(f'{s:.2f}' for s in run['seconds'])}", flush=True)
    first = runs["ours"][0]
    assert len({run["threads"] for name in runs for run in runs[name]}) == 1, "not the same number of threads"
    print(f"\n{args.prompts} prompts x {args.rollouts} rollouts of at most {args.max_new_tokens} tokens; {args.pairs} pairs of "
          f"{args.steps} steps, {args.warmup} of them warm-up; {first['threads']} threads; {first['version']}\n")
    late, median, mean = slice(args.warmup, None), statistics.median, statistics.fmean
    every = lambda name, key, part: [x for run in runs[name] for x in run[key][part]]
    print("| | seconds per step | CPU seconds | tokens per step | step 1: reward | entropy, nats/token | last step: reward | "
          "peak memory, MB | growth, MB |\n|---|---|---|---|---|---|---|---|---|")
    for name in runs:
        high = max(run["peak"][-1] for run in runs[name]) / 1e6
        growth = max(run["peak"][-1] - run["before"] for run in runs[name]) / 1e6
        print(f"| {name} | {median(every(name, 'seconds', late)):.3f} | {median(every(name, 'cpu', late)):.3f} | "
              f"{mean(every(name, 'tokens', late)):,.0f} | {mean(every(name, 'reward', slice(1))):.3f} | "
              f"{mean(every(name, 'entropy', slice(1))):.3f} | {mean(every(name, 'reward', slice(-1, None))):.3f} | "
              f"{high:,.0f} | {growth:,.0f} |")
    print()
    for key, label in ("seconds", "seconds per step"), ("cpu", "CPU seconds per step"):
        ratios = [median(a[key][late]) / median(b[key][late]) for a, b in zip(runs["ours"], runs["trl"])]
        print(f"ours / TRL, {label}: {median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f} over the pairs")
