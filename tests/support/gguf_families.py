"""Tiny models of every architecture that a GGUF file can have, whose structure shows in what they compute."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from support.tiny_models import VOCABULARY, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

__all__ = ["GGUF_FAMILIES", "REFUSED_FAMILIES", "save_family"]

_WINDOW = 16
_TOKENS: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_BASE: Mapping[str, Any] = {
    **_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_ALONE: Mapping[str, Any] = {key: value for key, value in _BASE.items() if key != "num_key_value_heads"}
_HEADS: Mapping[str, Any] = {**_BASE, "head_dim": 16}
_GPT2: Mapping[str, Any] = {**_TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
_EXPERTS: Mapping[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL: Mapping[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED: Mapping[str, Any] = {
    **_BASE,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_LATENT: Mapping[str, Any] = {
    **_ROUTED,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
}
_LATENT_V3: Mapping[str, Any] = {**_LATENT, "n_group": 2, "topk_group": 1, "norm_topk_prob": True}
_LATENT_YARN: Mapping[str, Any] = {
    **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64},
    **{"mscale": 0.707, "mscale_all_dim": 0.707},
}
_SCALES: Mapping[str, Any] = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}
_SPACES: Mapping[str, Any] = {**_TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16}
_GRANITE_HYBRID: Mapping[str, Any] = {
    **_BASE,
    **_SCALES,
    "intermediate_size": 32,
    "shared_intermediate_size": 64,
    "num_hidden_layers": 3,
    "layer_types": ["mamba", "attention", "mamba"],
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
}
_NEMOTRON_H: Mapping[str, Any] = {
    **{key: value for key, value in _HEADS.items() if key != "num_hidden_layers"},
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 8,
}


def _windows(layers: int, period: int) -> Mapping[str, Any]:
    kinds = ["sliding_attention" if layer % period < period - 1 else "full_attention" for layer in range(layers)]
    return {"num_hidden_layers": layers, "sliding_window": _WINDOW, "layer_types": kinds}


_GEMMA4: Mapping[str, Any] = {**_HEADS, **_windows(6, 3), "global_head_dim": 32}


def _gemma3n(layers: int, **changes: Any) -> Mapping[str, Any]:
    """Gemma 3n with the numbers that llama.cpp has for constants, and few of everything else."""
    sparse = min(10, layers)
    return {
        **_HEADS,
        **_windows(layers, 5),
        "intermediate_size": [1024] * layers,
        "activation_sparsity_pattern": [0.95] * sparse + [0.0] * (layers - sparse),
        "num_kv_shared_layers": max(0, layers - 20),
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 256,
        "laurel_rank": 64,
        **changes,
    }


#: Name → model type and its config. Names with a dash are variants of one.
GGUF_FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", _BASE),
    "mistral": ("mistral", {**_BASE, "sliding_window": None}),
    "mixtral": ("mixtral", {**_BASE, **_LOCAL, "sliding_window": None}),
    "qwen2": ("qwen2", _BASE),
    "qwen3": ("qwen3", _HEADS),
    "qwen2_moe": ("qwen2_moe", {**_BASE, **_EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("qwen3_moe", {**_HEADS, **_EXPERTS, "norm_topk_prob": True}),
    "gemma": ("gemma", _HEADS),
    "gemma2": ("gemma2", {**_HEADS, "query_pre_attn_scalar": 16, **_windows(2, 2)}),
    "gemma3_text": ("gemma3_text", {**_HEADS, "query_pre_attn_scalar": 16, **_windows(7, 6)}),
    # Many layers of random weights make much of what llama.cpp's GELU and attention round, unless these are small.
    "gemma3n_text": ("gemma3n_text", _gemma3n(6, initializer_range=0.03)),
    "gemma3n_text-shared": (
        "gemma3n_text",
        _gemma3n(25, vocab_size_per_layer_input=VOCABULARY - 20, initializer_range=0.01),
    ),
    "gemma4_text": (
        "gemma4_text",
        {
            **_GEMMA4,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": VOCABULARY,
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma4_text-moe": (
        "gemma4_text",
        {
            **_GEMMA4,
            # What llama.cpp's GELU of 16 bits differs by is enough to turn a router's choice in deeper ones.
            **_windows(3, 3),
            "initializer_range": 0.05,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "phi": ("phi", _BASE),
    "phi3": ("phi3", {**_BASE, "num_key_value_heads": 4}),
    "granite": ("granite", {**_BASE, **_SCALES}),
    "granitemoe": ("granitemoe", {**_BASE, **_LOCAL, **_SCALES, "intermediate_size": 32}),
    "granitemoeshared": (
        "granitemoeshared",
        {**_BASE, **_LOCAL, **_SCALES, "intermediate_size": 32, "shared_intermediate_size": 64},
    ),
    "olmo": ("olmo", {**_BASE, "clip_qkv": 1.0}),
    "olmo2": ("olmo2", _BASE),
    "olmo3": ("olmo3", {**_BASE, **_windows(4, 4)}),
    "olmoe": ("olmoe", {**_BASE, "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}),
    "smollm3": ("smollm3", {**_BASE, "num_hidden_layers": 4}),
    "cohere": ("cohere", {**_BASE, "logit_scale": 0.5}),
    "cohere2": ("cohere2", {**_HEADS, "logit_scale": 0.5, **_windows(4, 4)}),
    "stablelm": ("stablelm", {**_BASE, "use_qkv_bias": True}),
    "gpt_oss": (
        "gpt_oss",
        {
            **_HEADS,
            **_LOCAL,
            **_windows(2, 2),
            "intermediate_size": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "deepseek_v2": ("deepseek_v2", _LATENT),
    "deepseek_v3": ("deepseek_v3", _LATENT_V3),
    "deepseek_v2-yarn": ("deepseek_v2", {**_LATENT, "rope_parameters": _LATENT_YARN}),
    "deepseek_v3-yarn": ("deepseek_v3", {**_LATENT_V3, "rope_parameters": _LATENT_YARN}),
    "glm": ("glm", _HEADS),
    "glm4": ("glm4", _HEADS),
    "glm4_moe": ("glm4_moe", {**_ROUTED, "num_key_value_heads": 2, "head_dim": 16}),
    "nemotron": ("nemotron", _HEADS),
    "falcon": ("falcon", _ALONE),
    "falcon-two-norms": ("falcon", {**_ALONE, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "mpt": ("mpt", {**_TOKENS, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 512}),
    "bloom": ("bloom", {**_TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "gpt2": ("gpt2", _GPT2),
    "gpt_bigcode": ("gpt_bigcode", _GPT2),
    "gpt_neox": ("gpt_neox", _ALONE),
    "gpt_neox-sequential": ("gpt_neox", {**_ALONE, "use_parallel_residual": False}),
    "starcoder2": ("starcoder2", _BASE),
    "exaone4": ("exaone4", {**_HEADS, "sliding_window": None, "layer_types": ["full_attention"] * 2}),
    # llama.cpp knows the size with windows by its number of layers.
    "exaone4-windows": (
        "exaone4",
        {**_BASE, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8, **_windows(64, 4)},
    ),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _HEADS),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {**_HEADS, "num_experts": 4, "moe_topk": 2}),
    "arcee": ("arcee", _HEADS),
    "seed_oss": ("seed_oss", _HEADS),
    "ernie4_5": ("ernie4_5", _HEADS),
    "dots1": ("dots1", _ROUTED),
    "llama4_text": (
        "llama4_text",
        {
            **_HEADS,
            **_LOCAL,
            "num_hidden_layers": 4,
            "intermediate_size": 32,
            "intermediate_size_mlp": 96,
            "interleave_moe_layer_step": 2,
            "moe_layers": [1, 3],
        },
    ),
    "mamba": ("mamba", _SPACES),
    "falcon_mamba": ("falcon_mamba", _SPACES),
    "mamba2": ("mamba2", {**_SPACES, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8}),
    "granitemoehybrid": ("granitemoehybrid", {**_GRANITE_HYBRID, **_LOCAL}),
    "granitemoehybrid-dense": (
        "granitemoehybrid",
        {**_GRANITE_HYBRID, "num_local_experts": 0, "num_experts_per_tok": 0},
    ),
    "nemotron_h": ("nemotron_h", {**_NEMOTRON_H, "layers_block_type": ["mamba", "attention", "mlp", "mamba"]}),
    "nemotron_h-moe": (
        "nemotron_h",
        {
            **_NEMOTRON_H,
            "layers_block_type": ["mamba", "attention", "moe", "mamba"],
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 64,
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            **_HEADS,
            "mamba_d_ssm": 128,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 2,
            "mamba_chunk_size": 8,
            "lm_head_multiplier": 0.5,
            "embedding_multiplier": 2.0,
            "mlp_multipliers": [0.7, 1.3],
            "key_multiplier": 0.8,
            "attention_out_multiplier": 0.9,
            "attention_in_multiplier": 1.1,
            "ssm_multipliers": [0.6, 0.7, 0.8, 0.9, 1.1],
            "ssm_in_multiplier": 1.2,
            "ssm_out_multiplier": 0.7,
        },
    ),
    "lfm2": ("lfm2", {**_BASE, "layer_types": ["conv", "full_attention"], "block_multiple_of": 32}),
    "lfm2_moe": (
        "lfm2_moe",
        {**_BASE, **_EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            **_HEADS,
            **_EXPERTS,
            "num_hidden_layers": 4,
            "shared_expert_intermediate_size": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
}
#: Those that llama.cpp computes otherwise: model type, config, and what the refusal says.
REFUSED_FAMILIES: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "phimoe": ("phimoe", {**_BASE, **_LOCAL, "lm_head_bias": True, "attention_bias": True}, "routes by sparse mixing"),
    "gemma3n_text-streams": (
        "gemma3n_text",
        _gemma3n(2, altup_num_inputs=2),
        "altup_num_inputs is 2; llama.cpp's gemma3n computes 4",
    ),
    "gemma3n_text-rank": (
        "gemma3n_text",
        _gemma3n(2, laurel_rank=8),
        "laurel_rank is 8; llama.cpp's gemma3n computes 64",
    ),
    "gemma3n_text-layer-input": (
        "gemma3n_text",
        _gemma3n(2, hidden_size_per_layer_input=32),
        "hidden_size_per_layer_input is 32; llama.cpp's gemma3n computes 256",
    ),
    "gemma3n_text-sparsity": (
        "gemma3n_text",
        _gemma3n(3, activation_sparsity_pattern=[0.95, 0.0, 0.0]),
        r"activation_sparsity_pattern is \[0.95, 0.0, 0.0\]; llama.cpp's gemma3n computes \[0.95, 0.95, 0.95\]",
    ),
    "gemma3n_text-shared": (
        "gemma3n_text",
        _gemma3n(7, num_kv_shared_layers=2),
        "num_kv_shared_layers is 2; llama.cpp's gemma3n computes 0",
    ),
    "gemma3n_text-cap": (
        "gemma3n_text",
        _gemma3n(2, final_logit_softcapping=20.0),
        "final_logit_softcapping is 20.0; llama.cpp's gemma3n computes 30.0",
    ),
    "gemma3n_text-windows": (
        "gemma3n_text",
        {**_gemma3n(4), **_windows(4, 2)},
        "llama.cpp's gemma3n has layers that see everything at equal distances, every 5",
    ),
    "gemma3n_text-widths": (
        "gemma3n_text",
        _gemma3n(2, intermediate_size=[96, 128]),
        r"intermediate_size is \[96, 128\]; llama.cpp's gemma3n has one for all layers",
    ),
    "exaone4": ("exaone4", {**_HEADS, **_windows(4, 4)}, "has windows in models of 64 layers alone"),
    "olmoe": ("olmoe", {**_BASE, "num_experts": 4, "num_experts_per_tok": 2}, "as many keys as queries, 4"),
    "olmo3": ("olmo3", {**_BASE, **_windows(4, 2)}, "at equal distances, every 4"),
    "deepseek_v3": (
        "deepseek_v3",
        {**_LATENT_V3, "rope_parameters": {**_LATENT_YARN, "mscale": 1.0}},
        "mscale is 1.0, mscale_all_dim 0.707, .* takes the first two for equal",
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {**_LATENT, "rope_parameters": {**_LATENT_YARN, "mscale": None, "mscale_all_dim": None}},
        "mscale is None, mscale_all_dim None",
    ),
    "gemma4_text": (
        "gemma4_text",
        {**_GEMMA4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 0},
        "num_kv_shared_layers is 2; llama.cpp's gemma4 shares the keys of the last two",
    ),
    "qwen3_moe": ("qwen3_moe", {**_HEADS, **_EXPERTS, "norm_topk_prob": False}, "norm_topk_prob is False; .* True"),
}


def save_family(directory: Path, kind: str, settings: Mapping[str, Any]) -> Path:
    """Save a random model, its norms and biases random too, with a byte-level tokenizer; returns ``directory``."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **copy.deepcopy(dict(settings))), dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, values in [*model.named_parameters(), *model.named_buffers()]:
            if values.is_floating_point() and (values.dim() == 1 or len(values.unique()) == 1):
                values.add_(0.1 * torch.randn(values.shape, generator=generator))
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
