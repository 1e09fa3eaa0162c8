"""
What a process holds when a model is spread over 1, 2 and 4 of them as scale/em_rl_fsdp.py does.

    python bench/fsdp_memory.py      # a random model of 50 M parameters, float32, gloo, Linux

Each row is the last of N processes, in MB above what it had before the model. `shards`:
masters, gradients and Adam's moments, 16 bytes a parameter over N, as computed. Then high-water
marks: of steps with two micro-batches, gradients summed after each (--sync-each) or after the
last, and of sampling, when every process has the whole model.
"""
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from entropy import output_head
from scale import memory, shards

CONFIG = AutoConfig.for_model(
    "llama", vocab_size=8_000, hidden_size=512, intermediate_size=1_792, num_hidden_layers=12,
    num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True,
)
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # give back what is freed


def megabytes(field):
    """VmRSS, what this process holds, or VmHWM, the most that it has held since `forget`."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6


def forget():
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def measure():
    rank, world = shards.join_processes()
    tokens = [[i] * 32 for i in range(4)]
    whole = AutoModelForCausalLM.from_config(CONFIG).eval() if rank == 0 else None
    head = rank == 0 and output_head(whole, tokens[0]) | {"weight": None, "bias": None}
    head = shards.share(head or None)
    before = megabytes("VmRSS")
    model = shards.spread(whole, "cpu", torch.float32)
    need = memory.memory_of(model, world, 4)
    held = need["masters"] + need["gradients"] + need["Adam"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    peaks = []
    for sync_each in (True, False):
        for _ in range(2):  # the second step has Adam's moments from the start
            forget()
            for last in (False, True):
                model.set_requires_gradient_sync(last or sync_each)
                entropy, _, _ = model.score(head, tokens, tokens)
                entropy.mean().backward()
            shards.clip(optimizer, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        peaks.append(megabytes("VmHWM") - before)
    forget()
    with torch.no_grad(), shards.gathered(model):
        model(input_ids=torch.tensor(tokens))
    peaks.append(megabytes("VmHWM") - before)
    if rank == world - 1:
        cells = [f"{value:,.0f}" for value in (held / 1e6, *peaks)]
        print(f"| {world} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__" and "RANK" in os.environ:
    shards.run_and_end(measure)
elif __name__ == "__main__" and not Path("/proc/self/clear_refs").exists():
    sys.exit("bench/fsdp_memory.py: it needs Linux, whose /proc tells what a process holds")
elif __name__ == "__main__":
    print("| processes | shards, computed | step, --sync-each | step | sampling |", flush=True)
    print("|---|---|---|---|---|", flush=True)
    for n in (1, 2, 4):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", __file__]
        subprocess.run(command, check=True, env=os.environ | MALLOC | {"OMP_NUM_THREADS": "1"})
