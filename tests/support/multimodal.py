"""A tiny Qwen3.5 as it is published: a decoder of two kinds of blocks, a vision tower, layers that predict ahead."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import tiny_tokenizer
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

__all__ = ["AHEAD", "tiny_qwen35_dir"]

_TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "initializer_range": 0.1,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
}
_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
}
_TOKENS = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
#: Tensors that transformers has no module for, with their shapes.
AHEAD = {
    "mtp.fc.weight": (64, 128),
    "mtp.layers.0.mlp.up_proj.weight": (96, 64),
    "mtp.layers.0.input_layernorm.weight": (64,),
}


def tiny_qwen35_dir(directory: Path) -> Path:
    """Save it in bfloat16, and return ``directory``."""
    torch.manual_seed(0)
    config = Qwen3_5Config(text_config=_TEXT, vision_config=_VISION, **_TOKENS)
    Qwen3_5ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    tensors |= {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in AHEAD.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory
