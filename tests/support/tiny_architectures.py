"""Tiny seeded models of every architecture that the streaming engine is tested on, saved in Hugging Face layout.

Hidden size 64, a few layers, every width a multiple of 32. All parameters are random, biases and norms included, so
that a tensor that went missing or to the wrong place shows in the logits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

__all__ = ["ARCHITECTURES", "Architecture", "ids", "tiny_model", "unreached_model"]

VOCABULARY = 128
#: Shorter than the windows of the tests, so that layers with a sliding window differ from those without.
SLIDING_WINDOW = 8

_BASE: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GROUPED: Mapping[str, Any] = {**_BASE, "intermediate_size": 96, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Architecture:
    """A model type, its config and what is known about its blocks.

    Attributes:
        model_type: transformers' name.
        config: keyword arguments of its config class.
        shared: the linears of a block that get the same tensor, as a forward meets them.
        residuals: linears whose output is added to what another module gets first, with that module.
    """

    model_type: str
    config: Mapping[str, Any]
    shared: tuple[tuple[str, ...], ...] = field(
        default=(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        )
    )
    residuals: Mapping[str, str] = field(
        default_factory=lambda: {
            "self_attn.o_proj": "input_layernorm",
            "mlp.down_proj": "post_attention_layernorm",
        }
    )


_LLAMA = Architecture("llama", {**_GROUPED, "tie_word_embeddings": False})

#: Name → architecture; ``-tied`` and ``-untied`` are variants of one.
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "llama-tied": Architecture("llama", {**_GROUPED, "tie_word_embeddings": True}),
    "mistral": Architecture("mistral", {**_GROUPED, "sliding_window": SLIDING_WINDOW, "tie_word_embeddings": False}),
    "qwen2": Architecture("qwen2", {**_GROUPED, "tie_word_embeddings": False}),
    "qwen2-tied": Architecture(
        "qwen2",
        {
            **_GROUPED,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": SLIDING_WINDOW,
            "max_window_layers": 1,
        },
    ),
    "qwen3": Architecture("qwen3", {**_GROUPED, "head_dim": 32, "tie_word_embeddings": False}),
    "qwen3-tied": Architecture("qwen3", {**_GROUPED, "head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": Architecture(
        "gemma2",
        {
            **_GROUPED,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": SLIDING_WINDOW,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "hidden_activation": "gelu_pytorch_tanh",
        },
        residuals={},
    ),
    "phi3": Architecture(
        "phi3",
        {**_GROUPED, "sliding_window": SLIDING_WINDOW, "tie_word_embeddings": False, "partial_rotary_factor": 0.5},
        (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    ),
    "gpt_neox": Architecture(
        "gpt_neox",
        {**_BASE, "intermediate_size": 96, "use_parallel_residual": True, "tie_word_embeddings": False},
        (("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)),
        {"mlp.dense_4h_to_h": "post_attention_dropout"},  # attention and MLP are added to each other first
    ),
    "opt": Architecture(
        "opt",
        {**_BASE, "ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.1, "tie_word_embeddings": True},
        (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.out_proj",),
            ("fc1",),
            ("fc2",),
        ),
        {"self_attn.out_proj": "self_attn_layer_norm", "fc2": "final_layer_norm"},
    ),
    "opt-untied": Architecture(
        "opt",
        {
            **_BASE,
            "ffn_dim": 96,
            "word_embed_proj_dim": 32,
            "do_layer_norm_before": False,
            "init_std": 0.1,
            "tie_word_embeddings": False,
        },
        (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.out_proj",),
            ("fc1",),
            ("fc2",),
        ),
        {"self_attn.out_proj": "self_attn.q_proj", "fc2": "fc1"},
    ),
    "olmo2": Architecture("olmo2", {**_GROUPED, "tie_word_embeddings": False}, residuals={}),
    "olmo2-tied": Architecture("olmo2", {**_GROUPED, "tie_word_embeddings": True}, residuals={}),
}


def tiny_model(
    directory: Path,
    name: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **config: Any,
) -> Path:
    """Save a model of :data:`ARCHITECTURES` with every parameter random, and return ``directory``.

    ``config`` overrides keys of its configuration.
    """
    architecture = ARCHITECTURES[name]
    settings = AutoConfig.for_model(architecture.model_type, **copy.deepcopy({**architecture.config, **config}))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    _randomize(model, torch.Generator().manual_seed(seed))
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def unreached_model(directory: Path) -> Path:
    """A BART decoder by itself: it has linears for cross-attention, and no encoder to attend to."""
    settings = AutoConfig.for_model(
        "bart",
        vocab_size=VOCABULARY,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        decoder_ffn_dim=96,
        decoder_attention_heads=4,
        is_decoder=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(settings).save_pretrained(directory)
    return directory


def _randomize(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Give vectors (biases, norm weights), which are initialized to constants, random values around these."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def ids(lengths: tuple[int, ...] = (24, 24, 24), *, seed: int = 0, vocabulary: int = VOCABULARY) -> list[torch.Tensor]:
    """Random token windows, each ``[1, length]``."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (1, length), generator=generator) for length in lengths]
