"""
What em_ft.py and em_rl.py share word for word: the optimiser's step, and what a run leaves behind and how it is taken up again.

    runs/NAME/config.json      every setting
              metrics.csv      one row a step; row 0 is the base model
              samples.jsonl    responses, to read
              plot.png         entropy, accuracy and length against steps
              checkpoint/      the latest model, an ordinary Hugging Face folder, and what --resume needs besides: state.pt, and
                               with torchrun one such file of each process, to be read by any number of them
              best/            with --select val: the model with the best held-out greedy accuracy
              result.json      base, peak and final accuracy; its presence says that the run has ended

The columns of metrics.csv, empty where a step did not measure something:

    entropy            nats per token, mean over the step's response tokens, before the update
    loss               em_ft.py: nats per token, KL included
    reward, reward_std em_rl.py: mean over the responses; standard deviation within a prompt's N responses, mean over prompts
    length, truncated  response tokens, eos included; share of responses that reached --max-new-tokens without one
    kl                 nats per token, k3 estimate of KL(policy || initial model) on the step's responses
    gap                nats per token, mean |difference| between the log-probs that the sampler and the trainer give the sampled tokens
    grad_norm          before clipping
    changed            share of the (float32) weights that the step's last update changed, in a sample of at most 10,000 of each tensor
    tokens, flops      response tokens; FLOPs by the paper's count, parameters x tokens (the prompts' too) x 2 to sample, 6 to train, 2 for
                       the reference
    seconds, tokens_per_second      of the step without evaluation; response tokens over these seconds
    val_greedy, val_sampled         held-out accuracy, greedy and at T = 1 (row 0: the base model)
    val_entropy        nats per token of the held-out responses at T = 1
    val_length, val_truncated       of the greedy responses
"""
import csv
import functools
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from eval import RANK, WORLD, evaluate, gather, summary

COLUMNS = ("step entropy loss reward reward_std length truncated kl gap grad_norm changed tokens flops seconds tokens_per_second "
           "val_greedy val_sampled val_entropy val_length val_truncated").split()


def memory_of(device):
    """Bytes of memory that a device has."""
    return (torch.cuda.get_device_properties(device).total_memory if device.startswith("cuda") else
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def memory(model, device, reference, offload, checkpointing, tokens, cached):
    """Estimated peak of a step in bytes, by purpose: (on the model's device, in CPU memory besides).

    An update holds `tokens` tokens at once, the rollouts before it `cached`; the larger of the two counts. P parameters of b bytes take b P,
    as much again for a reference, 4 P for gradients (float32), and 12 P / processes for masters and Adam (8 P where weights are float32).
    A layer keeps some 12 widths of hidden state and 4 of the MLP per token for its backward; with checkpointing one layer does, and the
    others keep their input.
    """
    config, P, b = model.config.get_text_config(), sum(p.numel() for p in model.parameters()), model.dtype.itemsize
    D, L, V, heads = config.hidden_size, config.num_hidden_layers, config.vocab_size, config.num_attention_heads
    head_dim, kv_heads = getattr(config, "head_dim", None) or D // heads, getattr(config, "num_key_value_heads", None) or heads
    layer = tokens * b * (12 * D + 4 * (getattr(config, "intermediate_size", None) or 4 * D))
    output_head = (4 + b) * V * D + 12 * (2**26 if device.startswith("cuda") else 2**20)  # its gradient, and blocks of logits
    update = 4 * P + output_head + (layer + L * tokens * b * D if checkpointing else L * layer)
    rollouts = cached * b * L * 2 * kv_heads * head_dim
    optimizer = {"masters and Adam": (12 if offload or b < 4 else 8) * P // WORLD}
    here = {"weights": b * P, "reference": b * P if reference else 0}
    here |= {"gradients and activations": update} if update > rollouts else {"KV cache of the rollouts": rollouts}
    return (here, {key: WORLD * n for key, n in optimizer.items()}) if offload else (here | optimizer, {})


def fit(model, device, reference, offload, *sizes):
    """Does it fit? -> (offload, a line that says what takes what). `offload` None: only if it does not fit otherwise, and on a GPU.
    Raises ValueError, with the gigabytes, where nothing fits. `sizes` are the rest of what `memory` takes."""
    for offload in [False, device.startswith("cuda")] if offload is None else [offload]:
        parts = memory(model, device, reference, offload, *sizes)
        said = "; ".join(f"{sum(part.values()) / 1e9:.3g} of {memory_of(where) / 1e9:.3g} GB on {where}: "
                         + ", ".join(f"{key} {n / 1e9:.3g}" for key, n in part.items() if n)
                         for part, where in zip(parts, (device, "the CPU")) if part)
        if all(sum(part.values()) <= memory_of(where) for part, where in zip(parts, (device, "cpu"))):
            return offload, said
    raise ValueError(f"this needs {said}. Take a smaller model, fewer tokens at once (--budget, --max-new-tokens), or do without the "
                     "KL's reference (--beta 0)" + ("" if offload else ", or keep masters and Adam on the CPU (--offload)"))


class MasterAdamW:
    """AdamW on float32 master copies of a model's weights: bfloat16 weights do not move at a learning rate of 1e-6.

    Each of torchrun's processes keeps the masters and Adam's two moments of its share of the tensors, 12 bytes a parameter, on the weights'
    device or, with `offload`, in CPU memory, where torch's fused AdamW steps them (ZeRO stage 1). Gradients are summed in float32 over
    micro-batches and processes. Weights that are float32 where they are to be stepped are their own masters.
    """

    def __init__(self, model, lr, offload=False):
        self.params = list(model.parameters())
        by_size = sorted(range(len(self.params)), key=lambda i: self.params[i].numel())  # neighbours are of one size: shares come out even
        self.owner = {i: place % WORLD for place, i in enumerate(by_size)}
        self.sums = {}  # float32 gradients, by place, of weights that are not float32
        for i, p in enumerate(self.params):
            if p.dtype != torch.float32:
                p.register_post_accumulate_grad_hook(functools.partial(self.add, i))
        copy = lambda p: p.detach().to("cpu" if offload else p.device, torch.float32, copy=True)
        self.masters = {i: p if p.dtype == torch.float32 and not offload else copy(p)
                        for i, p in enumerate(self.params) if self.owner[i] == RANK}
        self.adam = torch.optim.AdamW(self.masters.values(), lr=lr, fused=True if offload else None)
        largest = max(p.numel() for p in self.params)  # through pinned memory a copy is several times as fast
        self.stage = torch.empty(largest, pin_memory=True) if offload and self.params[0].is_cuda else None

    def add(self, i, p):
        self.sums[i] = self.sums[i].add_(p.grad) if i in self.sums else p.grad.float()
        p.grad = None

    @torch.no_grad()
    def step(self, clip):
        """One update from the gradients so far, clipped to norm `clip` -> (their norm, share of the weights that changed, in a sample)."""
        grads = {}
        for i, p in enumerate(self.params):
            grad, p.grad = p.grad if p.dtype == torch.float32 else self.sums.pop(i, None), None
            if WORLD > 1:
                grad = torch.zeros_like(p, dtype=torch.float32) if grad is None else grad  # this process may have had no micro-batch
                torch.distributed.all_reduce(grad)
            if grad is not None:
                grads[i] = grad
        norm = torch.nn.utils.get_total_norm(grads.values())
        scale, changed, seen = (clip / (norm + 1e-6)).clamp(max=1.0), 0, 0
        for i, grad in grads.items():
            if i in self.masters:
                master, some = self.masters[i], slice(None, None, 1 + grad.numel() // 10_000)
                before = master.flatten()[some].clone()
                grad = grad.mul_(scale) if self.stage is None else self.stage[: grad.numel()].view_as(grad).copy_(grad.mul_(scale))
                master.grad = grad.to(master.device)
                self.adam.step()  # of this tensor alone: the others have no gradient, and none takes memory beside this one's
                master.grad = None
                changed, seen = changed + (master.flatten()[some] != before).sum().item(), seen + before.numel()
                if master is not self.params[i]:
                    self.params[i].copy_(master)
            if WORLD > 1:
                torch.distributed.broadcast(self.params[i].detach(), self.owner[i])
        shares = gather({RANK: (changed, seen)}).values()
        return norm.item(), sum(changed for changed, _ in shares) / sum(seen for _, seen in shares)

    def state(self):
        """{place of a tensor in the model: its moments, and its master where that is not the weight itself} of this process's share."""
        return {i: dict(self.adam.state[m], **({} if m is self.params[i] else {"master": m})) for i, m in self.masters.items()}

    def load(self, state):
        """Take up this process's share of a `state` of all tensors."""
        with torch.no_grad():
            for i, m in self.masters.items():
                moments = {key: x.clone() if key == "step" else x.to(m.device, copy=True) for key, x in state[i].items()}  # from a mapped file
                m.copy_(moments.pop("master", m))
                self.adam.state[m] = moments


def first_only(function):
    """A function that only the first of torchrun's processes runs: what writes or prints."""
    return function if RANK == 0 else lambda *args, **kwargs: None


def new_folder(out, script):
    """Make a run's folder. `out` None: runs/SCRIPT-TIME. Raises FileExistsError rather than overwrite a run."""
    if RANK:
        return gather({})[0]
    stem = Path("runs") / f"{Path(script).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, n = Path(out) if out else stem, 2
    while not out and folder.exists():
        folder, n = stem.with_name(f"{stem.name}-{n}"), n + 1
    if (folder / "result.json").exists():
        raise FileExistsError(f"{folder} holds a finished run: give another --out, or take it further with --resume {folder} --steps MORE")
    if (folder / "checkpoint").exists():
        raise FileExistsError(f"{folder} holds an unfinished run: continue it with --resume {folder}, or give another --out")
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} holds a run that ended before its first checkpoint: remove it, or give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    return gather({0: folder})[0]


@first_only
def begin(folder, settings):
    """Write config.json; result.json, which a finished run has that is now taken further, goes."""
    (folder / "result.json").unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")


def save_model(folder, model, tokenizer, state=None):
    """Write an ordinary Hugging Face folder, and each process's `state` beside it. A kill at any moment leaves the old one or the new."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    if RANK == 0:
        shutil.rmtree(new, ignore_errors=True)
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    gather({})  # wait for one another
    if state is not None:
        torch.save(state, new / f"state{RANK or ''}.pt")
    gather({})
    if RANK == 0:
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def checkpoint_of(folder):
    """The folder that --resume loads. Raises FileNotFoundError where a run has saved none."""
    for name in "checkpoint", "checkpoint.old":  # .old: killed between the two renames of save_model
        if (Path(folder) / name / "state.pt").exists():
            return Path(folder) / name
    raise FileNotFoundError(f"{folder}: no checkpoint/state.pt in it, so there is nothing to resume; start again with another --out")


def restore(folder, checkpoint, optimizer):
    """Put the optimiser back as it was after the checkpoint's step, and forget what was logged later: (step, rows)."""
    states = [torch.load(path, weights_only=True, mmap=True) for path in checkpoint.glob("state*.pt")]  # of as many processes as there were
    optimizer.load({i: moments for state in states for i, moments in state["optimizer"].items()})
    step, path = states[0]["step"], folder / "samples.jsonl"
    rows = [row for row in read_rows(folder / "metrics.csv") if row["step"] <= step]
    lines = path.read_text().splitlines() if path.exists() else []  # none without held-out problems and before the first sample
    gather({})  # all have read
    if RANK == 0:
        path.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= step))
    return step, rows


@first_only
def append(path, rows):
    """Add rows (dicts) to a JSONL file."""
    with path.open("a") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


@first_only
def write_rows(path, rows):
    """Rows (dicts with equal keys) as a CSV file, replaced in one go."""
    new = path.with_name(path.name + ".new")
    with new.open("w", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    new.replace(path)


def read_rows(path):
    """The rows of such a CSV file: numbers, and "" where a step did not measure something."""
    with path.open(newline="") as f:
        return [{k: v if v == "" else int(v) if v.isdigit() else float(v) for k, v in row.items()} for row in csv.DictReader(f)]


def stop_at_next_step():
    """From here on Ctrl-C and SIGTERM only set "by" in the dict that is returned, for the loop to look at. A second one stops at once."""
    asked = {}

    def handler(number, frame):
        if asked:
            sys.exit("stopped at once; the last checkpoint is as it was")
        asked["by"] = signal.Signals(number).name
        print(f"\n{asked['by']}: this step is finished and saved first; once more stops at once, without saving", flush=True)

    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, handler)
    return asked


def collapsed(rows, factor, window=3):
    """Why a run has collapsed, judged without labels from its metrics rows, or None.

    Means over the last `window` steps against the first `window`: length grown or shrunk `factor`-fold, entropy grown
    `factor`-fold, 30 points more responses truncated, or entropy under 1e-4 nats (nothing is sampled any more). 0 turns it off.
    """
    rows = [row for row in rows if row["step"] > 0]
    if not factor or len(rows) < 2 * window:
        return None
    mean = lambda part, key: sum(row[key] for row in part) / window
    (length, entropy, truncated), (length0, entropy0, truncated0) = (
        [mean(part, key) for key in ("length", "entropy", "truncated")] for part in (rows[-window:], rows[:window]))
    if not length0 / factor <= length <= length0 * factor:
        return f"responses went from {length0:.1f} to {length:.1f} tokens"
    if not entropy <= entropy0 * factor:
        return f"entropy rose from {entropy0:.3g} to {entropy:.3g} nats/token"
    if not truncated <= truncated0 + 0.3:
        return f"truncated responses rose from {truncated0:.0%} to {truncated:.0%}"
    if entropy < 1e-4:
        return f"entropy is {entropy:.1g} nats/token: every response is the same"
    return None


def drifted(rows):
    """A warning where the sampler's log-probs are farther from the trainer's than in the first steps, else None: then what is scored is no
    longer what was sampled."""
    gaps = [row["gap"] for row in rows if row["step"] > 0]
    usual = sorted(gaps[:3])[len(gaps[:3]) // 2]
    if gaps[-1] > 3 * usual + 0.01:
        return f"the sampler's log-probs are {gaps[-1]:.3g} nats off the trainer's, {usual:.3g} at first; try --rollouts-with generate"
    return None


def held_out(step, folder, model, tokenizer, head, problems, max_new_tokens, seed, budget):
    """Greedy and T = 1 accuracy on the held-out problems, printed and returned as the val_ columns ({} without problems). The first
    twelve greedy responses go to samples.jsonl."""
    if not problems:
        return {}
    samples = [evaluate(model, tokenizer, head, problems, decoder, max_new_tokens, seed, budget, "held out") for decoder in ("greedy", "sample")]
    greedy, sampled = map(summary, samples)
    append(folder / "samples.jsonl", [
        {"step": step, "set": "held out", "prompt": problem["prompt"], "response": s["response"], "correct": s["correct"]}
        for problem, s in list(zip(problems, samples[0]))[:12]])
    print(f"step {step} | held-out greedy {greedy['accuracy']:.1%} [{greedy['low']:.1%}, {greedy['high']:.1%}] | "
          f"T = 1 {sampled['accuracy']:.1%}", flush=True)
    return {"val_greedy": greedy["accuracy"], "val_sampled": sampled["accuracy"], "val_entropy": sampled["entropy"],
            "val_length": greedy["length"], "val_truncated": greedy["truncated"]}


@first_only
def report(folder, rows, select):
    """Print base, peak and final held-out accuracy, who picked the final model, and three problems before and after; write result.json."""
    measured = [row for row in rows if row["val_greedy"] != ""]
    result = {"selected by": "labels" if select == "val" else "nothing, it is the last"}
    if measured:
        peak = max(measured, key=lambda row: (row["val_greedy"], row["step"]))
        which = {"base": measured[0], "peak": peak, "final": peak if select == "val" else measured[-1]}
        print("\n| held out | step | greedy | T = 1 |\n|---|---|---|---|")
        for name, row in which.items():
            result[name] = {key: row[key] for key in ("step", "val_greedy", "val_sampled")}
            print(f"| {name} | {row['step']} | {row['val_greedy']:.1%} | {row['val_sampled']:.1%} |")
        print("\nThe final model was picked by the labels of the held-out set (--select val)." if select == "val" else
              "\nNo label picked the final model: it is the last one. The peak is known only through labels.")
        samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        at = lambda step: [sample for sample in samples if sample["set"] == "held out" and sample["step"] == step]
        pairs = zip(at(which["base"]["step"]), at(which["final"]["step"]))
        for before, after in sorted(pairs, key=lambda pair: pair[0]["correct"] == pair[1]["correct"])[:3]:  # those that changed come first
            print(f"\n{before['prompt']}\n  base     {'right' if before['correct'] else 'wrong'}  {before['response']}"
                  f"\n  trained  {'right' if after['correct'] else 'wrong'}  {after['response']}")
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nmodel: {folder / ('best' if select == 'val' else 'checkpoint')}, figure: {folder / 'plot.png'}")


@first_only
def plot(rows, path, title):
    """Entropy, held-out accuracy and length against steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    line = lambda axis, key, **style: axis.plot(*zip(*[(row["step"], row[key]) for row in rows if row[key] != ""] or [((), ())]), **style)
    line(left, "entropy", color="C0")
    left.set(title="Entropy of its own samples", xlabel="step", ylabel="nats per token", ylim=(0, None))
    line(middle, "val_greedy", color="C2", marker="o", label="greedy")
    line(middle, "val_sampled", color="C1", marker="s", linestyle="--", label="T = 1")
    middle.set(title="Held-out accuracy", xlabel="step", ylabel="share right", ylim=(0, 1.02))
    if any(row["val_greedy"] != "" for row in rows):
        middle.legend(frameon=False, loc="lower right")
    line(right, "length", color="C4")
    right.set(title="Response length", xlabel="step", ylabel="tokens", ylim=(0, None))
    for axis in left, middle, right:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
