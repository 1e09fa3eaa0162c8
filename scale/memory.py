"""
What each of N processes holds in memory, by arithmetic, and what follows from it: are shards kept
in CPU memory, and when are gradients summed?
"""
import math
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from scale.shards import layers_of
from tasks.errors import UserError
from tasks.problems import hub_says, reach_hub


def memory_of(model, processes, width):
    """Bytes that the process with the largest shards holds, by what they are for.

    Only shapes are looked at, so a model on the meta device will do. A working number has
    `width` bytes: 2 for bfloat16, 4 for float32, where masters are their own working copy.
    """
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)]
    numbers = sum(p.numel() for p in model.parameters())
    shard = 0
    for p in model.parameters():
        shard += math.ceil(len(p) / processes) * (p.numel() // len(p))
    rest = numbers - sum(sizes)  # embeddings, head, last norm
    return {
        "masters": 4 * shard,
        "gradients": 4 * shard,
        "Adam": 8 * shard,
        "reference": width * shard,
        "layers": width * (2 * max(sizes) + rest),  # one at work, one on its way, and the rest
        "layer gradients": (width + 4) * max(*sizes, rest),  # before they are summed
        "whole": width * numbers,  # while sampling
        "whole gradients": 4 * numbers,  # without --sync-each
    }


def settle(args, model, processes, device, dtype):
    """Choose --offload and --sync-each where they are not given, and print what follows."""
    need, capacity = memory_of(model, processes, dtype.itemsize), math.inf
    if device == "cuda":
        capacity = torch.cuda.get_device_properties(device).total_memory
    print(describe(need, processes, capacity, args))
    args.offload, args.sync_each, *_ = plan(need, capacity, args)


def plan(need, capacity, args):
    """(offload, sync_each, bytes on the GPU while sampling, and while training).

    What args leaves open becomes true where a fifth of the GPU's `capacity` in bytes would
    not be left otherwise, for the cache of keys and values or for activations. vLLM takes its
    share of the GPU before the whole model is there to score, so the larger of the two counts.
    """
    sampler = need["whole"]
    if args.sampler == "vllm" and capacity < math.inf:
        sampler = max(sampler, args.vllm_memory * capacity)
    shards = need["masters"] + need["Adam"] + (need["reference"] if args.beta else 0)
    offload, sync_each = args.offload, args.sync_each
    if offload is None:
        offload = shards + sampler > 0.8 * capacity
    kept = 0 if offload else shards
    training = kept + need["layers"] + need["layer gradients"]
    if sync_each is None:
        sync_each = training + need["whole gradients"] > 0.8 * capacity
    training += 0 if offload else need["gradients"]
    training += 0 if sync_each else need["whole gradients"]
    return offload, sync_each, kept + sampler, training


def describe(need, processes, capacity, args):
    """Lines that say where a process's bytes are, as arithmetic."""
    offload, sync_each, sampling, training = plan(need, capacity, args)
    names = ["masters", "gradients", "Adam"] + (["reference"] if args.beta else [])
    held = ", ".join(f"{name} {size(need[name])}" for name in names)
    where = "CPU memory" if offload else "its device's memory"
    when = "after every micro-batch" if sync_each else "after the last micro-batch"
    whole = "" if sync_each else f" (until then {size(need['whole gradients'])} of them)"
    sampler = f"the whole model too, {size(need['whole'])}"
    if args.sampler == "vllm" and capacity < math.inf:
        sampler = f"vLLM's {size(args.vllm_memory * capacity)}, and then {sampler}"
    lines = [
        f"each of {processes} processes has in {where}: {held}",
        f"while sampling it has {sampler}: {size(sampling)} in all",
        f"while training, layers at work {size(need['layers'])} and their gradients "
        f"{size(need['layer gradients'])}: {size(training)} in all",
        f"gradients are summed over processes {when}{whole}",
    ]
    if capacity < math.inf:
        left = capacity - max(sampling, training)
        lines.append(f"of a GPU's {size(capacity)} there are {size(left)} left for the cache of "
                     "keys and values, and for activations; all this is arithmetic")
    return "\n".join(lines)


def print_plan(args):
    """What --plan asks for, from the model's config.json. Raises UserError without one."""
    reached = Path(args.model).is_dir() or reach_hub()
    try:
        config = AutoConfig.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        found = f"no folder with a config.json, and {hub_says(reached)} model"
        raise UserError(f"--plan {args.plan}: --model {args.model}: {found}") from error
    with torch.device("meta"):  # shapes without numbers
        model = AutoModelForCausalLM.from_config(config)
    need = memory_of(model, args.plan, 4 if args.dtype == "float32" else 2)
    print(f"{args.model}: {model.num_parameters() / 1e9:,.2f} billion parameters")
    print(describe(need, args.plan, 80e9, args))


def size(count):
    """Bytes for people: 1.5 GB, 27.0 MB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
