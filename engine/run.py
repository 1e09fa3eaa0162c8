"""
What a training run leaves behind, and how it is taken up again.

    runs/NAME/config.json      every setting
              metrics.csv      one row a step; row 0 is the base model
              samples.jsonl    responses, to read
              plot.png         entropy, accuracy and length against steps
              checkpoint/      the latest model, an ordinary Hugging Face folder, and state.pt,
                               what --resume needs besides
              best/            with --keep-best: the model of the best held-out greedy accuracy
              result.json      base, peak and final accuracy; it says that the run has ended

The columns of metrics.csv, empty where a step did not measure something:

    entropy            nats a token, mean over the step's response tokens, before the update
    reward, reward_std em_rl.py: mean over responses; standard deviation within a prompt's N
                       responses, mean over prompts
    length, truncated  response tokens, eos included; share of responses that reached
                       --max-new-tokens without one
    kl                 nats a token, k3 estimate of KL(policy || initial model), with --beta
    grad_norm          of the step's last update, before clipping
    tokens, flops      response tokens; FLOPs by the paper's count: parameters x tokens (the
                       prompts' too) x 2 to sample, 6 to train (4 with --lora), 2 for the reference
    seconds            of the step without evaluation
    val_greedy, val_sampled        held-out accuracy, greedy and at T = 1
    val_entropy        nats a token of the held-out responses at T = 1
    val_length, val_truncated      of the greedy responses
"""
import argparse
import contextlib
import csv
import errno
import functools
import importlib.util
import inspect
import io
import json
import os
import pickle
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError

from engine.arguments import Help, growth, positive_int, whole_number
from engine.files import (
    append_jsonl,
    fresh_folder,
    lock,
    read_config,
    read_jsonl,
    replace,
    replace_file,
)
from engine.load import load_model
from engine.output import printing
from engine.sampler import generate
from entropy import score_all
from tasks.errors import UserError
from tasks.problems import load_gradable
from tasks.prompts import encode_prompt, stop_ids

COLUMNS = (
    "step entropy reward reward_std length truncated kl grad_norm tokens flops "
    "seconds val_greedy val_sampled val_entropy val_length val_truncated"
).split()

# ------------------------------------------------------------------- starting and resuming


def add_arguments(parser):
    """The settings that every training run has."""
    add = parser.add_argument_group("model and data").add_argument
    add("--model", help="folder or Hub id; without it the tiny model, set as said below")
    add("--data", default="numina", help="training prompts: JSONL file or Hub name")
    add("--data-size", type=positive_int, default=35_000, help="prompts drawn from --data")
    add("--val", default="math500", help="held-out problems: JSONL file, Hub name, or none")
    add("--val-size", type=positive_int, default=512, help="use the first VAL_SIZE of them")
    add("--max-prompt-tokens", type=positive_int, default=1024, help="longer ones are left out")
    add = parser.add_argument_group("device and memory").add_argument
    add("--device", help="cuda, mps or cpu; without it the first there is")
    add("--dtype", choices=["bfloat16", "float32"], help="of the weights; without it bfloat16 "
        "on a GPU that has it")
    add("--offload", action=argparse.BooleanOptionalAction, help="float32 masters and Adam in CPU "
        "memory; without this flag only where the GPU is too small")
    add("--recompute", action=argparse.BooleanOptionalAction, default=True,
        help="compute activations again in the backward: less memory, more time")
    add("--lora", type=positive_int, metavar="R", help="train adapters of rank R (peft) instead of "
        "the weights: far less memory, and about ten times the --lr")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-every", type=positive_int, default=10, help="steps between evaluations")
    add("--keep-best", action="store_true", help="keep the best held-out model, by labels")
    add("--guard", type=growth, default=4.0, metavar="X", help="stop when length or entropy has "
        "grown X-fold, or the run has collapsed otherwise; 0: never")
    add = parser.add_argument_group("run").add_argument
    add("--out", help="folder for the run; without it a new one in runs/")
    add("--resume", metavar="FOLDER", help="go on; the run's settings hold unless given again")
    add("--save-every", type=positive_int, default=10, help="steps between checkpoints")
    add("--seed", type=whole_number, default=1, help="random seed")
    add("--wandb", metavar="PROJECT", help="log to Weights & Biases too")


def parse_args(argv, description, add_method, tiny, script):
    """The settings of a run: flags first, then those of the run that is resumed or, without
    --model, those of `tiny`, then the defaults. `add_method` adds the method's own flags."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=Help, usage=f"python {script} [options]",
        epilog="Without --model: " + ", ".join(f"{key} {tiny[key]}" for key in tiny),
    )
    add_method(parser)
    add_arguments(parser)
    args = parser.parse_args(argv)
    saved = {}
    if args.resume:
        if args.out:
            parser.error(f"--out {args.out}: --resume {args.resume} goes on in its own folder")
        try:
            saved = read_config(args.resume, script)
            checkpoint_of(args.resume)
            saved["lock"] = lock(args.resume)  # held as long as the settings are
        except UserError as error:
            parser.error(f"--resume {error}")
    elif args.model is None:
        saved = tiny
    args = parser.parse_args(argv, argparse.Namespace(**saved))
    if args.resume and args.lora != saved.get("lora"):
        parser.error(f"--lora {args.lora}: {args.resume} has {saved.get('lora')}, and keeps it")
    if args.updates > args.prompts:
        parser.error(f"--updates {args.updates}: at most one for each of --prompts {args.prompts}")
    for flag, package in ("wandb", "wandb"), ("lora", "peft"):
        if vars(args)[flag] and not importlib.util.find_spec(package):
            parser.error(f"--{flag} {vars(args)[flag]}: needs a package; pip install {package}")
    return args


def load(args, device, dtype):
    """(model, tokenizer, adapters) to be trained, as --resume has left them.

    The adapters (LoRA, arXiv 2106.09685) are a PeftModel: the model, whose linear layers have
    got a product of two float32 matrices of rank --lora beside their frozen weights. The second
    one is zero at first. They are None without --lora. UserError where something can't be loaded.
    """
    folder = checkpoint_of(args.resume) if args.resume else None
    model, tokenizer = load_model(args.model if args.lora else folder or args.model, device, dtype)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"--model {args.model}: adapters, which --lora trained, and which no run "
                        "starts from; give the model that they belong to")
    if args.recompute:
        recompute_activations(model)
    if not args.lora:
        return model, tokenizer, None
    import peft

    torch.manual_seed(args.seed)
    if folder:
        try:
            adapters = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"{folder}: the adapters can't be loaded ({reason})") from error
    else:
        settings = dict(r=args.lora, lora_alpha=2 * args.lora, target_modules="all-linear")
        adapters = peft.get_peft_model(model, peft.LoraConfig(**settings))
    return model.eval(), tokenizer, adapters


def recompute_activations(model):
    """Keep only a layer's input for the backward, which computes the rest again."""
    name = "activation_checkpointing_enable"  # what late transformers 5 calls it
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()


def prepare(problems, tokenizer, label, args):
    """The training prompts: dicts of "prompt", its "ids", and `label` if there is one to be
    learned from. Raises UserError where labels are missing, or too few prompts are short
    enough for a step."""
    prepared = []
    for problem in problems:
        if label and label not in problem:
            raise UserError(f"--data {args.data}: {problem['id']} has no {label!r} to learn from")
        if problem.get("after"):
            raise UserError(f"--data {args.data}: {problem['id']} comes after other problems, and "
                            "its prompt needs their programs; take such steps out")
        ids = encode_prompt(tokenizer, problem["prompt"])
        if len(ids) <= args.max_prompt_tokens:
            kept = {"prompt": problem["prompt"], "ids": ids}
            if label:
                kept[label] = problem[label]
            prepared.append(kept)
    if len(prepared) < args.prompts:
        raise UserError(f"--prompts {args.prompts}: {args.data} has only {len(prepared)} of at "
                         f"most {args.max_prompt_tokens} tokens")
    return prepared


def problems_of_step(step, train, args):
    """The step's problems, each --rollouts times, side by side. The steps go through all of them
    again and again, each time in another order."""
    problems = []
    for place in range((step - 1) * args.prompts, step * args.prompts):
        epoch, i = divmod(place, len(train))
        if not problems or i == 0:
            order = np.random.default_rng((args.seed, epoch)).permutation(len(train))
        problems += [train[order[i]]] * args.rollouts
    return problems


def load_held_out(args):
    """The held-out problems: [] for --val none, and where the default can't be had."""
    if args.val == "none":
        return []
    try:
        return load_gradable(args.val, args.val_size, allow_code=False, flag="--val")
    except UserError as error:  # no network, and the default can't be had
        if args.val != "math500":
            raise
        print(f"no held-out set: {error}")
        return []


def flops_per_token(model, args):
    """To sample a token and to train on it, with the reference: 2 a parameter for a forward, 4
    for a backward, and 2 for that of --lora, since frozen weights need no gradient."""
    return model.num_parameters() * (2 + (4 if args.lora else 6) + (2 if args.beta else 0))


def announce(args, model, tokenizer, head, train, val, folder):
    """Print what follows from the settings, before work starts."""
    flops = flops_per_token(model, args)
    sequences = args.prompts * args.rollouts
    longest = max(len(problem["ids"]) for problem in train) + args.max_new_tokens
    template = "in the chat template" if tokenizer.chat_template else "plain: no chat template"
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"model: {args.model}, {model.num_parameters() / 1e6:,.1f} M parameters in {dtype} "
          f"on {model.device}")
    if args.lora:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rest = model.num_parameters() - trained
        print(f"adapters: {trained:,} parameters are trained, {rest:,} are frozen; their gradients "
              f"and moments would take {12 * rest / 1e6:,.0f} MB")
    print(f"prompts: {len(train):,} of {args.data}, {template}")
    print(f"held out: {len(val)} problems of {args.val}")
    print(f"a step: {args.prompts} prompts x {args.rollouts} rollouts = {sequences} sequences of "
          f"at most {longest:,} tokens, at most {flops * sequences * longest:.2g} FLOPs; "
          f"{args.steps} steps")
    some = [problem["ids"] for problem in train[:8]]
    gap = sampler_gap(model, head, some, stop_ids(model, tokenizer), args)
    print(f"sampler and trainer differ by {gap:.1g} nats a token")
    print(f"results: {folder}", flush=True)


def sampler_gap(model, head, prompts, stop, args):
    """Mean |difference| in nats between the log-probs that the sampler and the trainer give to
    drawn tokens: rounding in float32, some hundredths in bfloat16, a bug where it is more."""
    tokens = min(args.max_new_tokens, 64)
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        rollout = generate(model, prompts, stop, tokens, args.temperature)
    scored = score_all(model, head, prompts, rollout.responses, args.temperature)
    return (rollout.logprobs - scored.logprobs)[scored.mask].abs().mean().item()


def new_folder(args, script):
    """Make and lock the run's folder: --resume's, --out, or a new one in runs/.

    Writes config.json. Raises UserError rather than overwrite a run, and where another process
    is at work in the folder.
    """
    if args.resume:
        folder = Path(args.resume)
    else:
        folder = Path(args.out) if args.out else fresh_folder(f"runs/{Path(script).stem}")
        refuse_to_overwrite(folder, script)
        folder.mkdir(parents=True, exist_ok=True)
        args.lock = lock(folder)
    settings = {"script": script}
    settings |= {key: value for key, value in vars(args).items() if key not in NOT_SAVED}
    (folder / "result.json").unlink(missing_ok=True)  # a finished run that is taken further
    replace_file(folder / "config.json", json.dumps(settings, indent=1) + "\n")
    return folder


NOT_SAVED = ("resume", "out", "lock", "script")


def refuse_to_overwrite(folder, script):
    """UserError where the folder holds a run, with what can be done instead."""
    if not (folder / "config.json").exists():
        return
    lock(folder)  # no advice about a run that is still going on
    way_out = f"go on with it by --resume {folder}, or give another --out"
    if read_config(folder)["script"] != script:
        way_out = "another script's results are there; give another --out"
    elif not (folder / "checkpoint").exists() and not (folder / "checkpoint.old").exists():
        way_out = "it ended before its first checkpoint; remove it, or give another --out"
    raise UserError(f"{folder} is in use: {way_out}")


def checkpoint_of(folder):
    """The folder that --resume loads. UserError where a run has saved none."""
    for name in ("checkpoint", "checkpoint.old"):  # .old: killed between two renames
        if (Path(folder) / name / "state.pt").exists():
            return Path(folder) / name
    raise UserError(
        f"{folder}: no checkpoint/state.pt in it, so there is nothing to resume; start again "
        "with another --out"
    )


def restore(args, optimizer):
    """Put the optimiser back as it was after the checkpoint's step, and forget what was logged
    later: (step, rows). Raises UserError for a damaged file."""
    if not args.resume:
        return 0, []
    folder = Path(args.resume)
    path = checkpoint_of(folder) / "state.pt"
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: damaged ({reason}); start again with another --out") from None
    rows = [row for row in read_rows(folder / "metrics.csv") if row["step"] <= step]
    if [row["step"] for row in rows] != list(range(step + 1)):
        raise UserError(f"{folder}/metrics.csv: rows are missing before step {step}, the "
                         "checkpoint's; it was damaged, so start again with another --out")
    if args.steps < step:
        raise UserError(f"--steps {args.steps}: the run is at step {step}; ask for more")
    samples = [s for s in read_jsonl(folder / "samples.jsonl") if s["step"] <= step]
    lines = [json.dumps(sample) + "\n" for sample in samples]
    replace_file(folder / "samples.jsonl", "".join(lines))
    return step, rows


# -------------------------------------------------------------------------------- writing


def write_rows(path, rows):
    """Rows (dicts of COLUMNS) as a CSV file, replaced in one go."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, text.getvalue())


def read_rows(path):
    """The rows of such a file, as dicts of numbers without what a step did not measure."""
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            raise ValueError("its last line is cut off")
        for line in csv.DictReader(io.StringIO(text)):
            row = {}
            for key, value in line.items():
                if value:
                    row[key] = int(value) if value.isdigit() else float(value)
            row["step"]  # KeyError where there is none
            rows.append(row)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged, not a run's metrics ({type(error).__name__})") from None
    return rows


def save_model(folder, model, tokenizer, state=None):
    """Write an ordinary Hugging Face folder, and perhaps state.pt in it.

    A kill at any moment leaves the old folder or the new one. Raises UserError where the disk
    is full, or another program has the old one open; it is whole then.
    """
    new = folder.with_name(folder.name + ".new")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    transformers.logging.disable_progress_bar()  # saving takes no time worth a bar
    try:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        if state is not None:
            torch.save(state, new / "state.pt")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            replace(folder, old)
        replace(new, folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # as torch and safetensors say it
        shutil.rmtree(new, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free / 1e6
        raise UserError(f"{folder} could not be written ({error}); {free:,.0f} MB are free there, "
                      "and the version before, if any, is whole") from error
    shutil.rmtree(old, ignore_errors=True)


def start_logger(args, folder):
    """A run of Weights & Biases for --wandb, else None."""
    if not args.wandb:
        return None
    import wandb

    return wandb.init(project=args.wandb, name=folder.name)


def log(row, logger=None):
    """Print a step's row on one greppable line, and send it to Weights & Biases if asked."""
    cells = [f"{key} {row[key]:.4g}" for key in COLUMNS if key in row]
    print(" | ".join(cells), flush=True)
    if logger:
        logger.log(row, step=row["step"])


def log_sample(step, prompt, response, folder):
    """Print a sampled response, and add it to samples.jsonl."""
    sample = {"step": step, "set": "rollout", "prompt": prompt, "response": response}
    print(f"  {sample}", flush=True)
    append_jsonl(folder / "samples.jsonl", [sample])


def is_best(rows):
    """Has the last row the best held-out greedy accuracy of all?"""
    best = max((row.get("val_greedy", -1.0) for row in rows), default=None)
    return rows[-1].get("val_greedy") == best


# -------------------------------------------------------------------------------- stopping


class StopSignal:
    """From its making on, Ctrl-C, SIGTERM and a pipe whose reader has gone (`| head -1`) only
    set `asked`, for the loop to look at. A second signal stops at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)
        for stream in (sys.stdout, sys.stderr):
            stream.on_loss = self.ask  # see engine/output.py

    def handle(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.ask(signal.Signals(number).name)

    def ask(self, reason):
        self.asked = True
        message = f"\n{reason}: this step is finished and saved first; once more stops at once\n"
        with contextlib.suppress(OSError):  # nobody reads that either
            os.write(2, message.encode())  # print may be in the middle of another line


def command(main):
    """A decorator for a script's main. A UserError, a full disk, too little memory and Ctrl-C end
    it with one line; every other exception keeps its traceback. Afterwards signals are handled
    as they were before."""

    @functools.wraps(main)
    def wrapper(argv=None):
        name = Path(inspect.getfile(main)).name
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with printing(name):
                main(argv)
        except UserError as error:
            sys.exit(f"{name}: {error}")
        except (torch.OutOfMemoryError, MemoryError) as error:
            reason = str(error).split("\n")[0]
            sys.exit(f"{name}: out of memory: {reason} Less is needed with a smaller --budget, "
                     "--rollout-batch or --max-new-tokens, with --offload, or with --beta 0")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            sys.exit(f"{name}: {error}; make room, and go on with --resume FOLDER")
        except KeyboardInterrupt:
            sys.exit(f"{name}: stopped at once; the last checkpoint, if any, is as it was")
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    return wrapper
