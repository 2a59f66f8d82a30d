"""Mixtures of seeded weights with any number of experts, whose memory is looked at."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

__all__ = ["EXPERT_NBYTES", "random_mixture"]

WIDTH, LAYERS = 512, 1
#: Of one expert, in 16 bits.
EXPERT_NBYTES = 3 * WIDTH * WIDTH * 2


def random_mixture(directory: Path, experts: int, *, whole: bool) -> Path:
    """A mixture of seeded weights, those of its experts in a tensor each or in one for all of a layer."""
    settings = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=128,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=2,
        moe_intermediate_size=WIDTH,
    )
    settings.architectures, settings.dtype = ["Qwen3MoeForCausalLM"], "bfloat16"
    with torch.device("meta"):
        states = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).state_dict()
    torch.manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    for name, state in states.items():
        value = (0.05 * torch.randn(state.shape[-2:])).bfloat16()
        if state.dim() == 1:
            value = 1 + value
        if state.dim() < 3:
            weights[name] = value
        elif whole:
            weights[name] = torch.stack([value.roll(number, 0) for number in range(experts)])
        else:
            halves = value.chunk(2) if name.endswith("gate_up_proj") else (value,)
            leaves = ("gate_proj", "up_proj") if len(halves) == 2 else ("down_proj",)
            for leaf, half in zip(leaves, halves, strict=True):
                stem = name.rpartition(".")[0]
                for number in range(experts):
                    weights[f"{stem}.{number}.{leaf}.weight"] = half.roll(number, 0).contiguous()
    directory.mkdir()
    settings.save_pretrained(directory)
    save_file(weights, directory / "model.safetensors")
    return directory
