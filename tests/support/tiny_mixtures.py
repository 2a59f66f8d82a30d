"""Tiny seeded mixtures of experts of every family that the engine is tested on, as transformers saves them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from support.tiny_architectures import VOCABULARY
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

__all__ = ["MIXTURES", "load_mixture", "tiny_mixture"]

_BASE: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_DEEPSEEK: Mapping[str, Any] = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_shared_experts": 1,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
_GROUPED_ROUTING: Mapping[str, Any] = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}

#: Model type → what its config has beside the sizes that all share.
MIXTURES: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": _GROUPED_ROUTING,
    "dots1": _GROUPED_ROUTING,
    "minimax": {"num_local_experts": 4, "num_experts_per_tok": 2},
    # These two keep their routers in float32.
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_layer_start_index": 1,
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "qwen3_next": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
    },
}


def tiny_mixture(directory: Path, kind: str, **config: Any) -> Path:
    """Save a mixture in bfloat16; ``config`` overrides its settings."""
    torch.manual_seed(0)
    settings = AutoConfig.for_model(kind, **{**_BASE, **MIXTURES[kind], **config})
    AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


def load_mixture(directory: Path, **options: Any) -> PreTrainedModel:
    """The resident model with transformers' eager experts, which the engine has to equal."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, experts_implementation="eager", attn_implementation="sdpa", **options
    ).eval()
