"""
What a training run leaves behind, and how it is taken up again: the parts that em_ft.py and em_rl.py share word for word.

    runs/NAME/config.json      every setting
              metrics.csv      one row a step; row 0 is the base model
              samples.jsonl    responses, to read
              plot.png         entropy, accuracy and length against steps
              checkpoint/      the latest model, an ordinary Hugging Face folder, and state.pt, what --resume needs besides
              best/            with --select val: the model with the best held-out greedy accuracy
              result.json      base, peak and final accuracy; its presence says that the run has ended

The columns of metrics.csv, empty where a step did not measure something:

    entropy            nats per token, mean over the step's response tokens, before the update
    loss               em_ft.py: nats per token, KL included
    reward, reward_std em_rl.py: mean over the responses; standard deviation within a prompt's N responses, mean over prompts
    length, truncated  response tokens, eos included; share of responses that reached --max-new-tokens without one
    kl                 nats per token, k3 estimate of KL(policy || initial model) on the step's responses
    grad_norm          before clipping
    changed            share of the weights that the step changed, in a sample of at most 10,000 of each tensor
    tokens, flops      response tokens; FLOPs by the paper's count, parameters x tokens (the prompts' too) x 2 to sample, 6 to train, 2 for
                       the reference
    seconds, tokens_per_second      of the step without evaluation; response tokens over these seconds
    val_greedy, val_sampled         held-out accuracy, greedy and at T = 1 (row 0: the base model)
    val_entropy        nats per token of the held-out responses at T = 1
    val_length, val_truncated       of the greedy responses
"""
import csv
import json
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from eval import evaluate, summary

COLUMNS = ("step entropy loss reward reward_std length truncated kl grad_norm changed tokens flops seconds tokens_per_second "
           "val_greedy val_sampled val_entropy val_length val_truncated").split()


def new_folder(out, script):
    """Make a run's folder. `out` None: runs/SCRIPT-TIME. Raises FileExistsError rather than overwrite a run."""
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
    return folder


def save_model(folder, model, tokenizer, state=None):
    """Write an ordinary Hugging Face folder, and `state` as state.pt beside it. A kill at any moment leaves the old one or the new."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    if state is not None:
        torch.save(state, new / "state.pt")
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


def random_state():
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore(folder, checkpoint, optimizer):
    """Put optimiser and random state back as they were after the checkpoint's step, and forget what was logged later: (step, rows)."""
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"]["cpu"])
    if state["random"]["cuda"]:
        torch.cuda.set_rng_state_all(state["random"]["cuda"])
    path = folder / "samples.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []  # none without held-out problems and before the first sample
    path.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= state["step"]))
    return state["step"], [row for row in read_rows(folder / "metrics.csv") if row["step"] <= state["step"]]


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


def held_out(step, folder, model, tokenizer, head, problems, max_new_tokens, seed, budget):
    """Greedy and T = 1 accuracy on the held-out problems, printed and returned as the val_ columns ({} without problems). The first
    twelve greedy responses go to samples.jsonl."""
    if not problems:
        return {}
    samples = [evaluate(model, tokenizer, head, problems, decoder, max_new_tokens, seed, budget, "held out") for decoder in ("greedy", "sample")]
    greedy, sampled = map(summary, samples)
    with (folder / "samples.jsonl").open("a") as f:
        for problem, s in list(zip(problems, samples[0]))[:12]:
            sample = {"step": step, "set": "held out", "prompt": problem["prompt"], "response": s["response"], "correct": s["correct"]}
            f.write(json.dumps(sample) + "\n")
    print(f"step {step} | held-out greedy {greedy['accuracy']:.1%} [{greedy['low']:.1%}, {greedy['high']:.1%}] | "
          f"T = 1 {sampled['accuracy']:.1%}", flush=True)
    return {"val_greedy": greedy["accuracy"], "val_sampled": sampled["accuracy"], "val_entropy": sampled["entropy"],
            "val_length": greedy["length"], "val_truncated": greedy["truncated"]}


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
