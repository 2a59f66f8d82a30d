"""What text reaches: of models whose parts their config does not tell, of experts for images, where masks choose."""

from __future__ import annotations

import torch
from support.tiny_checkpoints import tiny_config
from torch import nn

from llmconvert.engine.architecture.model import build_meta_model
from llmconvert.engine.architecture.reach import Reach, find_reach, on_shapes


def reach_of(model_type: str, class_name: str) -> Reach:
    config = tiny_config(model_type)
    config.architectures = [class_name]
    model = build_meta_model(config, torch.float32, "sdpa")
    return find_reach(model, config, torch.float32, "sdpa")


def test_an_encoder_for_something_else_is_idle_though_no_config_of_transformers_is_for_it() -> None:
    reach = reach_of("evolla", "EvollaForProteinText2Text")
    assert reach.blocks == "model.layers" and reach.positions == (0, 1, 2, 3)
    assert "model.protein_encoder" in reach.idle and not reach.needs("model.protein_encoder.latents")
    assert reach.needs("model.layers.3.self_attn.q_proj.weight")


def test_experts_for_images_are_idle_inside_the_blocks() -> None:
    reach = reach_of("ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration")
    layer = f"{reach.blocks}.1.mlp"
    assert not reach.needs(f"{layer}.vision_moe.experts.0.up_proj.weight")
    assert not reach.needs(f"{layer}.vision_moe.gate.weight")
    assert reach.needs(f"{layer}.text_moe.experts.0.up_proj.weight") and reach.needs(f"{layer}.text_moe.gate.weight")


def test_a_mask_chooses_all_that_there_is_where_there_are_no_values() -> None:
    class Masked(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            chosen = hidden[:, hidden.any(-1).any(0)]
            return chosen[hidden > 0]

    model = Masked()
    with on_shapes(model, torch.device("cpu")):
        assert model(torch.ones(2, 5, 3)).shape == (30,)
