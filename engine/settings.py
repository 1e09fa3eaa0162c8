"""
The settings of a training run: the flags that every method has, and how a run that is resumed gets
its own back. em_rl.py and em_ft.py add those of their method.
"""
import argparse
import importlib.util
import os
import sys
from pathlib import Path

from engine.arguments import (
    Help,
    as_flags,
    growth,
    path_name,
    positive_int,
    template_settings,
    whole_number,
)
from engine.files import checkpoint_of, lock, read_config
from engine.inputs import absolute
from engine.load import add_device_arguments

ROOT = Path(__file__).resolve().parent.parent
NOT_SAVED = ("resume", "out")  # in config.json: they say where the run is


def add_arguments(parser):
    """The settings that every training run has."""
    add = parser.add_argument_group("model and data").add_argument
    add("--model", type=path_name, help="folder or Hub id; without it the tiny one, set as "
        "said below")
    add("--template", type=template_settings, metavar="KEY=VALUE", help="settings of the chat "
        "template, with commas: enable_thinking=false")
    add("--data", default="numina", help="training prompts: JSONL file or Hub name")
    add("--data-size", type=positive_int, default=35_000, help="prompts drawn from --data")
    add("--val", default="math500", help="held-out problems: JSONL file, Hub name, or none")
    add("--val-size", type=positive_int, default=512, help="use the first VAL_SIZE of them")
    add("--max-prompt-tokens", type=positive_int, default=1024, help="longer ones are left out")
    add = parser.add_argument_group("device and memory").add_argument
    add_device_arguments(add)
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
    add("--out", type=path_name, help="folder for the run; without it a new one in runs/")
    add("--resume", type=path_name, metavar="FOLDER", help="go on; the run's settings hold unless "
        "given again")
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
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.resume:
        if args.out:
            parser.error(f"--out {args.out}: --resume {args.resume} goes on in its own folder")
        read_config(args.resume, script)
        checkpoint_of(args.resume)
        lock(args.resume)
        before, args = saved_settings(args.resume, script, parser, argv, NOT_SAVED)
        if args.lora != before["lora"]:
            parser.error(f"--lora {args.lora}: {args.resume} has {before['lora']}, and keeps it")
    elif args.model is None:
        files = {name: str(ROOT / tiny[name]) for name in ("model", "data", "val")}
        args = parser.parse_args(argv, argparse.Namespace(**tiny | files))
    args.model = absolute(args.model, os.path.isdir)
    args.data, args.val = absolute(args.data), absolute(args.val)
    if args.updates > args.prompts:
        parser.error(f"--updates {args.updates}: at most one for each of --prompts {args.prompts}")
    for flag, package in ("wandb", "wandb"), ("lora", "peft"):
        if vars(args)[flag] and not importlib.util.find_spec(package):
            parser.error(f"--{flag} {vars(args)[flag]}: needs a package; pip install {package}")
    return args


def saved_settings(folder, script, parser, argv, not_saved):
    """The settings in the config.json of a folder that `script` must have written, and the same
    with those that `argv` gives anew. UserError, or argparse's own error, for a bad one."""
    path = Path(folder, "config.json")
    saved = read_config(folder, script)
    settings = {key: saved[key] for key in saved if key not in ("script", "inputs")}
    defaults = vars(parser.parse_args([]))
    defaults = {key: defaults[key] for key in defaults if key not in not_saved}
    flags = as_flags(settings, defaults | {"model": "needed"}, path)
    name, parser.prog = parser.prog, path  # argparse names it where a value is bad
    before = vars(parser.parse_args(flags))
    parser.prog = name
    return {key: before[key] for key in settings}, parser.parse_args(flags + argv)
