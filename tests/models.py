"""Small models for the tests. Importing this first keeps every test off the network."""
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the Hub's libraries are imported

from pathlib import Path

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
TINY_BASE = str(ROOT / "tiny/base")
FEW = ROOT / "tiny/test.jsonl"  # to be trained on: tiny/train.jsonl takes longer to read
NEEDS_POSIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs Linux or macOS")
torch.set_num_threads(1)  # with small models several threads wait for each other

SMALL = dict(
    vocab_size=280, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
    bos_token_id=None, eos_token_id=279, pad_token_id=279,
)
SOFTCAP = dict(query_pre_attn_scalar=8, final_logit_softcapping=1.5)
SLIDING = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])
EXPERTS = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
)
LATENT = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    num_key_value_heads=4, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1,
)
DELTA = dict(
    layer_types=["linear_attention", "full_attention"], linear_conv_kernel_dim=4,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8,
)
MAMBA = dict(
    mamba_n_heads=8, mamba_d_head=8, mamba_d_ssm=64, mamba_d_state=8, mamba_n_groups=1,
    mamba_chunk_size=8,
)
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
    "olmo3": SLIDING,
    "smollm3": dict(no_rope_layers=[1, 0]),
    "phi3": {},
    "glm4": {},
    "gpt_oss": EXPERTS | SLIDING | dict(num_local_experts=4),
    "qwen3_moe": EXPERTS,
    "deepseek_v3": EXPERTS | LATENT,
    "longcat_flash": LATENT | dict(
        num_layers=2, ffn_hidden_size=64, expert_ffn_hidden_size=16, moe_topk=2, zero_expert_num=1
    ),
    # hybrids: layers of linear attention or convolution, whose cache has no length
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "qwen3_next": EXPERTS | DELTA,
    "qwen3_5_text": DELTA,
    "granitemoehybrid": EXPERTS | MAMBA | dict(layer_types=["mamba", "attention"]),
    "falcon_h1": MAMBA,  # both in each layer
}


def random_model(kind, seed=0, **settings):
    """A small model with random weights, so large that its distributions are not flat."""
    torch.manual_seed(seed)
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    config = AutoConfig.for_model(kind, **{**SMALL, **ARCHITECTURES.get(kind, {}), **settings})
    model = AutoModelForCausalLM.from_config(config)
    for name, p in model.named_parameters():
        if p.dim() > 1 or name.endswith("lm_head.bias"):
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def rows_of(*lengths, seed=0):
    """Lists of random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
