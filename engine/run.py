"""
What a training run leaves behind, and how it is taken up again.

    runs/NAME/config.json      every setting, and what identifies the model and the problems: a run
                               goes on only with those that it began with
              metrics.csv      one row a step; row 0 is the base model
              samples.jsonl    responses, to read
              plot.png         entropy, accuracy and length against steps
              checkpoint/      the latest model, an ordinary Hugging Face folder, and state.pt,
                               what --resume needs besides
              best/            with --keep-best: the model of the best held-out greedy accuracy,
                               and its row of metrics.csv as row.json
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
import contextlib
import csv
import errno
import functools
import inspect
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError

from engine.check import check_model, sampler_gap
from engine.files import (
    append_jsonl,
    checkpoint_of,
    lock,
    make_folder,
    read_config,
    read_jsonl,
    release_locks,
    replace,
    replace_file,
)
from engine.inputs import digest_of, digest_of_model
from engine.load import load_model, switch_off_dropout
from engine.output import printing
from engine.report import SAMPLE
from engine.settings import NOT_SAVED
from tasks.errors import UserError
from tasks.problems import TRAINING, benchmark_of, load_gradable, load_problems
from tasks.prompts import encode_problem, stop_ids

COLUMNS = (
    "step entropy reward reward_std length truncated kl grad_norm tokens flops "
    "seconds val_greedy val_sampled val_entropy val_length val_truncated"
).split()
AT_EACH_STEP = "entropy length truncated grad_norm tokens flops seconds".split()
HELD_OUT = COLUMNS[-5:]  # all or none of them

# ------------------------------------------------------------------- starting and resuming


def load(args, device, dtype):
    """(model, tokenizer, adapters) to be trained, as --resume has left them.

    The adapters (LoRA, arXiv 2106.09685) are a PeftModel: the model, whose linear layers have
    got a product of two float32 matrices of rank --lora beside their frozen weights. The second
    one is zero at first. They are None without --lora. UserError where something can't be loaded.
    """
    folder = checkpoint_of(args.resume) if args.resume else None
    name = args.model if args.lora else folder or args.model
    model, tokenizer = load_model(name, device, dtype, args.template)
    args.dtype = str(model.dtype).removeprefix("torch.")  # of the run, also where it is resumed
    switch_off_dropout(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"--model {args.model}: adapters, which --lora trained, and which no run "
                        "starts from; give the model that they belong to")
    if args.recompute:
        recompute_activations(model)
    if not args.lora:
        print_memory(model, args)
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
    print_memory(model, args)
    return model.eval(), tokenizer, adapters


def print_memory(model, args):
    """What a run needs whatever its tokens are: the weights, and those of a reference; of what is
    trained a float32 gradient, Adam's two moments and, beside bfloat16 weights, a master."""
    need = sum(p.numel() * p.itemsize for p in model.parameters())
    if args.beta and not args.lora:
        need *= 2
    for p in model.parameters():
        if p.requires_grad:
            need += p.numel() * (12 if p.itemsize == 4 else 16)
    if need > 1e9:
        print(f"memory: {need / 1e9:.1f} GB for weights, reference, gradients, masters and Adam, "
              "and more for keys, values and activations")


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
        ids = encode_problem(tokenizer, problem)
        if len(ids) <= args.max_prompt_tokens:
            kept = {"prompt": problem["prompt"], "ids": ids}
            if label:
                kept[label] = problem[label]
            prepared.append(kept)
    if len(prepared) < args.prompts:
        raise UserError(f"--prompts {args.prompts}: {args.data} has only {len(prepared)} of at "
                         f"most {args.max_prompt_tokens} tokens")
    return prepared


def check_fit(model, tokenizer, train, val, args):
    """UserError where the model can't answer the prompts, those of training or those held out."""
    prompts = [problem["ids"] for problem in train]
    prompts += [encode_problem(tokenizer, problem) for problem in val]
    check_model(model, prompts, args.max_new_tokens, training=True)


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


def load_data(args):
    """(training problems, held-out problems), before a model is loaded and shows what is wrong."""
    train = load_problems(args.data)
    train = random.Random(args.seed).sample(train, min(args.data_size, len(train)))
    return train, load_held_out(args)


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


def check_inputs(args, train, val):
    """Identify the model and the problems, for config.json. UserError where a run that is
    resumed began with others, unless a flag asks for other problems."""
    asked = [{key: problem[key] for key in problem if key != "ids"} for problem in train]
    args.inputs = {
        "model": digest_of_model(args.model), "data": digest_of(asked), "val": digest_of(val)
    }
    if not args.resume:
        return
    saved = read_config(args.resume)
    before = inputs_of(saved, args.resume)
    for key, now in args.inputs.items():
        chosen_anew = any(vars(args).get(name) != saved.get(name) for name in CHOOSES[key])
        if now != before.get(key) and not chosen_anew:
            raise UserError(f"--{key} {vars(args)[key]}: it has changed since {args.resume} began "
                            f"({now}; then {before.get(key)}); put it back, or begin another run")


def inputs_of(saved, folder):
    """What identifies the inputs of a run in its config.json: {input: digest}."""
    if not isinstance(saved.get("inputs"), dict):
        raise UserError(f"{folder}/config.json: 'inputs' is missing or damaged, so nothing tells "
                        "whether the run would go on as it began; start again with another --out")
    return saved["inputs"]


CHOOSES = {  # the settings that choose an input: given anew, they may choose another one
    "model": [],
    "data": ["data", "data_size", "max_prompt_tokens", "template", "seed", "reward", "loss"],
    "val": ["val", "val_size"],
}


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
    print(f"model: {args.model}, {model.num_parameters() / 1e6:,.1f} M parameters in {args.dtype} "
          f"on {model.device}")
    if args.lora:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rest = model.num_parameters() - trained
        print(f"adapters: {trained:,} parameters are trained, {rest:,} are frozen; their gradients "
              f"and moments would take {12 * rest / 1e6:,.0f} MB")
    print(f"prompts: {len(train):,} of {args.data}, {template}")
    print(f"held out: {len(val)} problems of {args.val}")
    for note in notes_on_data(args, train, val):
        print(f"note: {note}")
    print(f"a step: {args.prompts} prompts x {args.rollouts} rollouts = {sequences} sequences of "
          f"at most {longest:,} tokens, at most {flops * sequences * longest:.2g} FLOPs; "
          f"{args.steps} steps")
    some = [problem["ids"] for problem in train[:8]]
    stop, tokens = stop_ids(model, tokenizer), min(args.max_new_tokens, 64)
    gap = sampler_gap(model, head, some, stop, tokens, args.temperature)
    print(f"sampler and trainer differ by {gap:.1g} nats a token")
    print(f"results: {folder}", flush=True)


def notes_on_data(args, train, val):
    """Why an accuracy may not be one on unseen problems: a list of lines."""
    notes = []
    benchmark = benchmark_of(args.data)
    if benchmark:
        instead = TRAINING.get(benchmark, "numina")
        notes.append(f"--data {args.data} has the test questions of {benchmark}. RENT and TTRL "
                     "train on such questions on purpose; after it, the accuracy on them is not "
                     f"one on unseen problems. Else give --data {instead}")
    asked = {" ".join(problem["prompt"].split()) for problem in train}
    shared = sum(" ".join(problem["prompt"].split()) in asked for problem in val)
    if shared:
        notes.append(f"{shared} of the {len(val)} held-out prompts are training prompts, too, so "
                     "the held-out accuracy is not one on unseen problems")
    return notes


def new_folder(args, script):
    """Make and lock the run's folder: --resume's, --out, or a new one in runs/.

    Writes config.json. Raises UserError rather than overwrite anything, and where another
    process is at work in the folder.
    """
    if args.resume:
        folder = Path(args.resume)
    else:
        if args.out:
            refuse_to_overwrite(Path(args.out), script)
        folder = make_folder(args.out, f"runs/{Path(script).stem}")
        lock(folder)
    settings = {"script": script}
    settings |= {key: value for key, value in vars(args).items() if key not in NOT_SAVED}
    (folder / "result.json").unlink(missing_ok=True)  # a finished run that is taken further
    replace_file(folder / "config.json", json.dumps(settings, indent=1) + "\n")
    return folder


def refuse_to_overwrite(folder, script):
    """UserError where the folder holds a run, with what can be done instead."""
    if not os.path.exists(folder / "config.json"):
        return
    lock(folder)  # no advice about a run that is still going on
    way_out = f"go on with it by --resume {folder}, or give another --out"
    if read_config(folder)["script"] != script:
        way_out = "another script's results are there; give another --out"
    elif not (folder / "checkpoint").exists() and not (folder / "checkpoint.old").exists():
        way_out = "it ended before its first checkpoint; remove it, or give another --out"
    raise UserError(f"{folder} is in use: {way_out}")


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
        step = int(state["step"])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: damaged ({reason}); start again with another --out") from None
    rows = rows_until(step, folder / "metrics.csv")
    if args.steps < step:
        raise UserError(f"--steps {args.steps}: the run is at step {step}; ask for more")
    samples = [s for s in read_jsonl(folder / "samples.jsonl", SAMPLE) if s["step"] <= step]
    lines = [json.dumps(sample) + "\n" for sample in samples]
    replace_file(folder / "samples.jsonl", "".join(lines))
    return step, rows


def rows_until(step, path):
    """The rows of metrics.csv up to that of a checkpoint. UserError where one has gaps."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    if [row["step"] for row in rows] != list(range(step + 1)):
        raise UserError(f"{path}: rows are missing before step {step}, the checkpoint's; it was "
                        "damaged, so start again with another --out")
    for row in rows:
        needed = AT_EACH_STEP if row["step"] > 0 else []
        if any(key in row for key in HELD_OUT):
            needed = needed + HELD_OUT
        for key in needed:
            if key not in row:
                raise UserError(f"{path}, line {row['step'] + 2}: no {key} in it; it was damaged, "
                                "so start again with another --out")
    return rows


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
    try:
        header, *lines, end = path.read_text(encoding="utf-8").split("\n")
        if header.split(",") != COLUMNS or end:
            raise ValueError("its first line is not the one that is written, or its last is cut")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged, not a run's metrics ({error})") from None
    rows = []
    for number, line in enumerate(lines, 2):
        row = {}
        try:
            for key, cell in zip(COLUMNS, line.split(","), strict=True):
                if cell:
                    row[key] = int(cell) if cell.isdigit() else float(cell)
            row["step"]  # KeyError where there is none
        except (ValueError, KeyError) as error:
            raise UserError(f"{path}, line {number}: damaged, not a row of a run's metrics "
                            f"({type(error).__name__}: {error})") from None
        rows.append(row)
    return rows


def save_model(folder, model, tokenizer, state=None, row=None):
    """Write an ordinary Hugging Face folder, and perhaps state.pt and row.json in it.

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
        if row is not None:
            replace_file(new / "row.json", json.dumps(row) + "\n")
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
    """Print what one watches of a step, on a line; send all of it to Weights & Biases if asked."""
    cells = [text.format(row[key]) for key, text in LINE.items() if key in row]
    print(" | ".join(cells), flush=True)
    if logger:
        logger.log(row, step=row["step"])


LINE = {
    "step": "step {}",
    "entropy": "entropy {:.3g} nats",
    "reward": "reward {:.3g}",
    "length": "length {:.1f} tokens",
    "truncated": "truncated {:.0%}",
    "kl": "kl {:.2g} nats",
    "grad_norm": "grad_norm {:.2g}",
    "seconds": "{:.1f} s",
}


def log_sample(step, prompt, response, folder):
    """Print a sampled response, and add it to samples.jsonl."""
    print(f"step {step} | a prompt, and a sampled response:")
    for text in (prompt, response):
        print(textwrap.indent(text, "    "), flush=True)
    sample = {"step": step, "set": "rollout", "prompt": prompt, "response": response}
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
        sys.stdout.on_loss = self.ask  # see engine/output.py

    def handle(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.ask(signal.Signals(number).name)

    def ask(self, reason):
        self.asked = True
        message = f"\n{reason}: this step is finished and saved first; once more stops at once\n"
        with contextlib.suppress(OSError):  # nobody reads that either
            os.write(2, message.encode())  # print may be in the middle of another line


# of a name or a folder that the system does not take; EINVAL is how Windows says it of a "?"
REFUSED = "EACCES EPERM EROFS ENAMETOOLONG ENOTDIR EISDIR ELOOP EINVAL".split()


def command(main):
    """A decorator for a script's main. A UserError, a full disk, a name or folder that the system
    refuses, too little memory and Ctrl-C end it with one line; every other exception keeps its
    traceback. Afterwards its locks are released, and signals are handled as they were before."""

    @functools.wraps(main)
    def wrapper(argv=None):
        name = Path(inspect.getfile(main)).name
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with printing(name):
                main(argv)
        except UserError as error:
            sys.exit(f"{name}: {error}".replace("\n", "\\n"))  # of a value; this is one line
        except (torch.OutOfMemoryError, MemoryError) as error:
            reason = str(error).split("\n")[0]
            sys.exit(f"{name}: out of memory: {reason} Less is needed with a smaller --budget, "
                     "--rollout-batch or --max-new-tokens, with --offload, or with --beta 0")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                sys.exit(f"{name}: {error}; make room, and go on with --resume FOLDER")
            if error.filename is None or errno.errorcode.get(error.errno) not in REFUSED:
                raise
            sys.exit(f"{name}: {error.filename}: {error.strerror}; give another file or folder")
        except KeyboardInterrupt:
            sys.exit(f"{name}: stopped at once; the last checkpoint, if any, is as it was")
        finally:
            release_locks()
            for number, handler in before.items():
                signal.signal(number, handler)

    return wrapper
