"""Small models for the tests. Importing this first keeps every test off the network."""
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the Hub's libraries are imported

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "tiny/base")
torch.set_num_threads(1)  # with small models several threads wait for each other

SMALL = dict(
    vocab_size=280, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
    bos_token_id=None, eos_token_id=279, pad_token_id=279,
)
SOFTCAP = dict(query_pre_attn_scalar=8, final_logit_softcapping=1.5)
SLIDING = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])
ARCHITECTURES = {  # every kind of output head: tied or not, soft cap, a scale either way
    "qwen2": {},
    "qwen3": {},
    "llama": dict(tie_word_embeddings=False),
    "gemma2": SOFTCAP,
    "gemma3_text": SOFTCAP | SLIDING,
    "cohere": dict(logit_scale=0.3),
    "granite": dict(logits_scaling=4.0),
    "phi": {},
    "gpt2": {},
}


def random_model(kind, seed=0, **settings):
    """A small model with random weights, so large that its distributions are not flat."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**SMALL, **ARCHITECTURES[kind], **settings})
    model = AutoModelForCausalLM.from_config(config)
    for name, p in model.named_parameters():
        if p.dim() > 1 or name.endswith("lm_head.bias"):
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def rows_of(*lengths, seed=0):
    """Lists of random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
