"""Tiny seeded mixtures of experts of every family that the engine is tested on, as transformers saves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support.tiny_architectures import VOCABULARY
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

__all__ = ["MIXTURES", "WHOLE", "fuse_experts", "load_mixture", "tiny_mixture", "visits"]

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

_SIGMOID: Mapping[str, Any] = {**_GROUPED_ROUTING, "num_experts": 6}

#: Model type → what its config has beside the sizes that all share.
MIXTURES: dict[str, Mapping[str, Any]] = {
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
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
    "glm4_moe_lite": {**_DEEPSEEK, "head_dim": 16},
    "exaone_moe": {**_SIGMOID, "layer_types": ["full_attention"] * 2},
    "afmoe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_dense_layers": 1},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "solar_open": _SIGMOID,
    "jamba": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "expert_layer_offset": 0,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "mamba_d_state": 16,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    # No gate, and sums of what experts give in float32.
    "nemotron_h": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 64,
        "n_group": 1,
        "topk_group": 1,
        "layers_block_type": ["attention", "moe"],
        "num_hidden_layers": None,
    },
    # Experts in one tensor.
    "qwen3_5_moe_text": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    "granitemoehybrid": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "shared_intermediate_size": 64,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "granitemoeshared": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "shared_intermediate_size": 64,
    },
    "gemma4_text": {
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "global_head_dim": 16,
        "num_kv_shared_layers": 0,
    },
    # Transposed; gpt-oss with biases, and with gate and up in turns.
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
# Classes that say nothing of how they hold experts. Llama 4's get an input per expert and token; LongCat has experts
# that give tokens back as they are; DBRX has matrices one below the other.
MIXTURES["llama4_text"] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 32,
    "intermediate_size_mlp": 96,
    "moe_layers": [0, 1],
}
MIXTURES["longcat_flash"] = {
    **_DEEPSEEK,
    "n_routed_experts": 4,
    "moe_topk": 2,
    "zero_expert_num": 2,
    "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 96,
    "num_layers": 2,
    "num_hidden_layers": None,
}
MIXTURES["dbrx"] = {
    **dict.fromkeys(("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings")),
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 128,
    "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
}
#: Those whose checkpoints hold a layer's experts in one tensor, and that transformers knows no other way to read.
WHOLE = ("granitemoe", "granitemoehybrid", "granitemoeshared", "gemma4_text", "aria_text", "gpt_oss", "dbrx")


def tiny_mixture(directory: Path, kind: str, **config: Any) -> Path:
    """Save a mixture in bfloat16; ``config`` overrides its settings."""
    torch.manual_seed(0)
    given = {**_BASE, **MIXTURES[kind], **config}
    settings = AutoConfig.for_model(kind, **{name: value for name, value in given.items() if value is not None})
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if len(parameter.unique()) == 1:  # norms and biases, by which nothing could be told apart
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return directory


def fuse_experts(source: Path, directory: Path) -> Path:
    """Save a mixture as its class holds it: a layer's experts in one tensor for each of their parameters."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    states = model.state_dict()
    stored = {name: states[name].contiguous() for name in states if name not in model.all_tied_weights_keys}
    directory.mkdir()
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(stored, directory / "model.safetensors")
    return directory


def load_mixture(directory: Path, **options: Any) -> PreTrainedModel:
    """The resident model with transformers' eager experts, which the engine has to equal."""
    if AutoConfig.from_pretrained(directory).model_type == "gpt_oss":  # whose attention has no other implementation
        options = {"attn_implementation": "eager", **options}
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, experts_implementation="eager", **{"attn_implementation": "sdpa", **options}
    ).eval()


def visits(
    model: PreTrainedModel, layer: int, windows: Sequence[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What reaches the experts of a layer in the resident model: hidden states, and where they go."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    experts = model.model.layers[layer].mlp.experts
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append((args[0].float(), args[1])))
    with torch.no_grad():
        for window in windows:
            model(window)
    handle.remove()
    return seen
