"""
Load a language model and its tokenizer: on which device, in which precision, from where.
"""
import itertools
import json
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.errors import UserError
from tasks.problems import hub_says, reach_hub


def set_up(device=None, dtype=None):
    """(device, dtype) to work with, chosen where they are not given.

    Weights are bfloat16 on a GPU that has it, else float32 (on a T4, say): float16 would
    need its losses scaled. Raises UserError for a device that is not there.
    """
    if device is None:
        other = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else other
    try:
        if device.split(":")[0] not in ("cuda", "mps", "cpu"):
            raise RuntimeError("give cuda, mps or cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0][:160]
        raise UserError(f"--device {device}: not usable here ({reason})") from None
    # cuDNN's attention makes a plan for every new shape, which takes longer than a token does
    torch.backends.cuda.enable_cudnn_sdp(False)
    native = device.startswith("cuda")
    native = native and torch.cuda.is_bf16_supported(including_emulation=False)
    return device, getattr(torch, dtype or ("bfloat16" if native else "float32"))


def load_model(name, device, dtype=torch.float32):
    """(model in eval mode, tokenizer) of a folder or a Hub id; UserError where there is none."""
    is_folder = Path(name).is_dir()
    reached = is_folder or reach_hub()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        settings = Path(name, "generation_config.json")  # if damaged, transformers ignores it
        if settings.exists():
            json.loads(settings.read_text(encoding="utf-8"))
        adapters = Path(name, "adapter_config.json")  # of --lora
        base = name
        if adapters.exists():
            base = json.loads(adapters.read_text(encoding="utf-8"))["base_model_name_or_path"]
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        if adapters.exists():
            import peft

            model = peft.PeftModel.from_pretrained(model, name).get_base_model()
    except Exception as error:  # whatever the loaders raise for a missing or a damaged file
        reason = " ".join(str(error).split())[:160]
        if is_folder:
            raise UserError(f"model {name}: the folder can't be loaded ({reason})") from error
        raise UserError(f"model {name}: no folder here, and {hub_says(reached)} model") from error
    if model.num_parameters() < 2**20 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # beside any other work several would wait for each other
    model.to(device).eval()
    if model.device.type == "cpu":
        # safetensors has mapped the file into memory: whoever writes to it changes the model,
        # and Windows lets nobody rename it
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            tensor.data = tensor.data.clone()
    return model, tokenizer
