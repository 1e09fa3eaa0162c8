"""
A model, its optimiser and its checkpoints, spread over processes: what em_rl_fsdp.py needs and
em_rl.py does not.

FSDP2 (torch's fully_shard) cuts every weight along its first dimension into one piece a
process, its shard. Gradients and Adam's moments are cut in the same way. A layer's weights are
put together, in the working precision, when the layer runs, and dropped behind it.

Rank 0 is the process that reads, writes and prints. Whatever all processes do together is
called a collective here: every process must call it, in the same order, or the run hangs.
"""
import contextlib
import datetime
import os
import shutil
import sys
import types

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import distribute_tensor
from transformers import AutoModelForCausalLM

from engine import cache, report, run
from engine.load import switch_off_dropout
from engine.optimizer import scale_down
from engine.sampler import generate
from entropy import score, score_all
from eval import evaluate
from tasks.errors import UserError

LONGEST_WAIT = datetime.timedelta(hours=2)  # of one process for another: loading, rollouts

# ------------------------------------------------------------------------------- processes


def join_processes():
    """(rank, number of processes) of a run by torchrun; plain python is one process."""
    if not dist.is_initialized():
        if "RANK" in os.environ:
            dist.init_process_group(timeout=LONGEST_WAIT)
        else:
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size()


def check(args, world):
    """Raise UserError for settings that do not fit `world` processes."""
    if args.lora:
        raise UserError(f"--lora {args.lora}: adapters need one GPU, and em_rl.py has them")
    if args.prompts % world:
        raise UserError(f"--prompts {args.prompts}: give a multiple of the {world} processes")
    if args.updates > args.prompts // world:
        raise UserError(f"--updates {args.updates}: at most one for each of the prompts of a "
                        f"process, {args.prompts // world}")
    if args.device and args.device not in ("cuda", "cpu"):
        raise UserError(f"--device {args.device}: several processes work on cuda or cpu")


def use_own_gpu():
    """Make a process work on the GPU of its number; UserError where there are too few."""
    place, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if place >= gpus:
        raise UserError(f"process {place} has no GPU: give --nproc_per_node {gpus} or fewer")
    torch.cuda.set_device(place)


def run_and_end(main):
    """Call a script's main, and end the process without Python's own tidying up.

    A thread of gloo's frees the tensors of the last collective some time after it, and needs
    Python for that. Where Python is being taken down at that moment, the thread aborts the
    process: in 4 of 16 runs of four small layers. destroy_process_group is no cure (5 of 16):
    it waits for the thread only where nothing else holds the group, as FSDP does. Nor is a
    barrier (1 of 16, and 1 of 13).
    """
    code = None
    try:
        main()
    except SystemExit as end:
        code = end.code
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    for stream in filter(None, (sys.stdout, sys.stderr)):  # one that was closed is None
        stream.flush()
    os._exit(code or 0)


def share(value):
    """Rank 0's value, on every process (a collective). None says that rank 0 has failed, and
    has told the user why: then the others end, quietly."""
    box = [value]
    dist.broadcast_object_list(box)
    if dist.get_rank() == 0:
        return value
    if box[0] is None:
        sys.exit()
    return box[0]


@contextlib.contextmanager
def rank_0_leads():
    """Where rank 0 fails in here, the others end too, instead of waiting for it."""
    try:
        yield
    except (Exception, SystemExit):
        share(None)
        raise
    share(True)


def on_rank_0(call, *args, **settings):
    """Call it on rank 0 alone, and go on together (a collective): what it gives there, or None."""
    with rank_0_leads():
        if dist.get_rank() == 0:
            return call(*args, **settings)


def total(values):
    """A dict of numbers -> their sums over all processes, as floats (a collective)."""
    sums = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist()))


def mean(pairs):
    """A dict of sums and the number of their terms -> means over all processes (a collective)."""
    sums = total({name: pairs[name][0] for name in pairs})
    counts = total({name: pairs[name][1] for name in pairs})
    return {name: sums[name] / counts[name] for name in pairs}


def agree(num_tokens, micro_batches):
    """(tokens of all processes, this one's micro-batches, as many as the others have).

    One collective. A process that has fewer than another splits those with the most rows, so
    a process must have as many rows as any other.
    """
    mine = torch.tensor([int(num_tokens), len(micro_batches)])
    everyone = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    tokens, counts = torch.stack(everyone).unbind(1)
    micro_batches = list(micro_batches)
    while len(micro_batches) < counts.max():
        rows = max(micro_batches, key=len)
        micro_batches.remove(rows)
        half = len(rows) // 2
        micro_batches += [rows[:half], rows[half:]]
    return tokens.sum().item(), micro_batches


# ---------------------------------------------------------------------------------- a model


def layers_of(model):
    """The model's list of layers; UserError where there is none to be found."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"{type(model).__name__}: no list of its {count} layers, which are sharded")


def spread(whole, device, dtype, offload=False, work=None):
    """Rank 0's model `whole` as a sharded one on "cuda" or "cpu" of all processes (a collective).

    Each process keeps its shards in `dtype`, with `offload` in CPU memory. Layers work in the
    dtype `work`, or as they are kept, and gradients are summed in float32. The model is in eval
    mode, and has `score(head, prompts, responses, temperature)`, entropy.py's, as a further
    forward.
    """
    config, generation_config = share(whole and (whole.config, whole.generation_config))
    with torch.device("meta"):  # shapes without numbers: no process but rank 0 has them all
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config = generation_config
    switch_off_dropout(model, quiet=True)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    settings = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(work, torch.float32))
    if offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=device == "cuda")
    for layer in layers_of(model):
        fully_shard(layer, **settings)
    fully_shard(model, **settings)  # the rest; there tied embeddings stay one weight
    model.to_empty(device="cpu" if offload else device)
    weights = {} if whole is None else dict(whole.named_parameters())
    for name, p in model.named_parameters():
        full = torch.empty(p.shape, dtype=dtype, device=device)
        if whole is not None:
            full.copy_(weights[name].detach())
        shard = distribute_tensor(full, mesh, p.placements)
        p.detach().to_local().copy_(shard.to_local())
    buffers = {} if whole is None else dict(whole.named_buffers())
    for name, buffer in model.named_buffers():
        buffer.data = buffer.to(device)  # they are never sharded, nor offloaded
        if whole is not None:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, 0)
    model.score = types.MethodType(score_sharded, model)
    register_fsdp_forward_method(model, "score")
    with torch.no_grad():  # a first forward in common, by which FSDP finds out what the root is
        model.eval()(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
    model.reshard()  # the root alone stays together behind a forward
    cache.use_graphs = False  # FSDP's hooks work on the host
    return model


def score_sharded(model, head, *batch):
    """entropy.score inside a forward of FSDP's, where the weights are together."""
    return score(model, head_of(model, head), *batch)


def head_of(model, head):
    """entropy.output_head's dict with the weights that the model has at the moment."""
    layer = model.get_output_embeddings()
    return head | {"weight": layer.weight, "bias": layer.bias}


@contextlib.contextmanager
def gathered(model):
    """In here every process has all weights, in the working precision, and runs the model as
    often as it likes, without the others. To enter is a collective, to leave is not."""
    root, *layers = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
    for module in (root, *layers):
        module.unshard()
    yield
    for module in (root, *layers):
        module.reshard()
    for layer in layers:
        layer.set_reshard_after_forward(True, recurse=False)


def generate_gathered(model, *args, **settings):
    """engine.sampler.generate with all weights in each process's memory (a collective)."""
    with gathered(model):
        return generate(model, *args, **settings)


def score_gathered(model, head, *batch, **settings):
    """entropy.score_all with all weights in each process's memory (to call it is a collective)."""
    with gathered(model):
        return score_all(model, head_of(model, head), *batch, **settings)


def whole_weights(model, dtype):
    """Pairs of name and whole weight in `dtype`, one at a time: a collective each, so every
    process must take them all."""
    for name, p in model.named_parameters():
        yield name, p.detach().to(dtype).full_tensor()


@torch.no_grad()
def collect(model, whole):
    """Copy the shards of all processes into rank 0's model `whole` (a collective)."""
    weights = {} if whole is None else dict(whole.named_parameters())
    for name, p in model.named_parameters():
        full = p.full_tensor()
        if whole is not None:
            weights[name].copy_(full)


def evaluate_held_out(step, model, tokenizer, problems, args, folder):
    """eval.evaluate_held_out, each process with a share of the problems (a collective)."""
    if not problems:
        return {}
    rank, world = dist.get_rank(), dist.get_world_size()
    merged = []
    with gathered(model):
        for temperature in (0, 1):
            samples = evaluate(
                model, tokenizer, None, problems[rank::world] or problems[:1], temperature,
                args.max_new_tokens, seed=args.seed, batch_size=args.rollout_batch,
                desc="held out" if rank == 0 else None,
            )
            everyone = [None] * world
            dist.all_gather_object(everyone, samples)
            merged.append([everyone[i % world][i // world] for i in range(len(problems))])
    row = None
    with rank_0_leads():
        if rank == 0:
            row = report.held_out(step, problems, *merged, folder)
    return share(row)


# ----------------------------------------------------------------------------- the optimiser


def clip(optimizer, max_norm):
    """MasterAdamW.clip for shards: scale the gradients to a total norm of at most `max_norm` over
    all processes (a collective), and give the norm before. Raises UserError, on every process,
    where it is not finite."""
    params = optimizer.param_groups[0]["params"]
    grads = [p.grad for p in params if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads).full_tensor().item()
    return scale_down(grads, norm, max_norm)


# ------------------------------------------------------------------------------- checkpoints


def save(step, model, optimizer, whole, tokenizer, folder):
    """Write checkpoint/, an ordinary Hugging Face folder with a state.pt in it, and
    sharded-STEP/: float32 masters and Adam's moments, which each process writes for itself.

    A collective. state.pt names the step, so a kill at any moment leaves a checkpoint whose
    shards are whole. Any number of processes can read them.
    """
    shards = folder / f"sharded-{step}"
    weights, adam = get_state_dict(model, optimizer)
    try:
        dcp.save({"model": weights, "optimizer": adam}, checkpoint_id=shards)
    except dcp.CheckpointException as error:
        raise UserError(f"{shards} could not be written ({first_reason(error)})") from None
    collect(model, whole)
    with rank_0_leads():
        if dist.get_rank() == 0:
            state = {"step": step, "optimizer": {}}
            run.save_model(folder / "checkpoint", whole, tokenizer, state)
            for old in folder.glob("sharded-*"):
                if old != shards:
                    shutil.rmtree(old)


def restore(step, model, optimizer, folder):
    """Read what `save` has written (a collective). Raises UserError where that fails."""
    shards = folder / f"sharded-{step}"
    lr = optimizer.param_groups[0]["lr"]  # this run's
    weights, adam = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": adam}
    try:
        dcp.load(state, checkpoint_id=shards)
    except dcp.CheckpointException as error:
        raise UserError(f"{shards} could not be read ({first_reason(error)})") from None
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    for group in optimizer.param_groups:
        group["lr"] = lr


def first_reason(error):
    """One line of what went wrong on the first process where something did."""
    reason = next(iter(error.failures.values()))[0]
    return " ".join(str(reason).split())[:160]
