"""Tiny seeded models of multimodal families, each by the class that it is published under, and an image for each.

Sizes come from two tables, one for the decoder and one for towers, as far as a family's config has them; what is left
is said family by family. All parameters are random, so that a tensor that went to the wrong place shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from support.tiny_models import tiny_tokenizer
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["FAMILIES", "Family", "family_config", "image_features", "save_family"]

_TEXT: Mapping[str, Any] = {
    "vocab_size": 320,
    "vocab_size_per_layer_input": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_TOWER: Mapping[str, Any] = {
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "attention_heads": 2,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "out_hidden_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.1,
}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}}
_PIXELS = {"pixel_values": (1, 3, 32, 32)}
# Qwen's patches: 4 × 4 of them, of 8 × 8 pixels at two times.
_PATCHES = {"pixel_values": (16, 3 * 2 * 8 * 8)}
_GRID = {"image_grid_thw": [[1, 4, 4]]}
# An image of which the whole and one tile are looked at.
_TILES = {"pixel_values": (1, 2, 3, 32, 32)}
_ONE = {"image_sizes": [[32, 32]]}


@dataclass(frozen=True)
class Family:
    """A family and a tiny config of it.

    Attributes:
        model_type: transformers' name.
        text: settings of the decoder beside the table's.
        tower: of the vision tower likewise.
        whole: of the whole config.
        shapes: what the vision tower takes, random values of a shape.
        values: and what it takes as it is.
        tower_name: the module that takes it, where the model has no method for images.
    """

    model_type: str
    text: Mapping[str, Any] = field(default_factory=dict)
    tower: Mapping[str, Any] = field(default_factory=dict)
    whole: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: _PIXELS)
    values: Mapping[str, Any] = field(default_factory=dict)
    tower_name: str | None = None


#: By name.
FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("qwen2_vl", _SECTIONS, {"hidden_size": 64}, shapes=_PATCHES, values=_GRID),
        Family("qwen2_5_vl", _SECTIONS, shapes=_PATCHES, values=_GRID),
        Family("qwen3_vl", _SECTIONS, {"deepstack_visual_indexes": [0]}, shapes=_PATCHES, values=_GRID),
        Family("qwen3_vl_moe", _SECTIONS, {"deepstack_visual_indexes": [0]}, shapes=_PATCHES, values=_GRID),
        Family(
            "qwen3_5",
            {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
            {"num_position_embeddings": 16},
            shapes=_PATCHES,
            values=_GRID,
        ),
        Family("gemma3", {"sliding_window": 8, "query_pre_attn_scalar": 16}, whole={"mm_tokens_per_image": 4}),
        Family(
            "gemma4",
            {
                "hidden_size_per_layer_input": 32,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            }
            | {"sliding_window": 8, "global_head_dim": 16},
            {"pooling_kernel_size": 2, "position_embedding_size": 64},
            {
                "audio_config": {
                    "num_hidden_layers": 1,
                    "hidden_size": 32,
                    "num_attention_heads": 2,
                    "output_proj_dims": 32,
                }
            }
            | {"vision_config": {}},
            shapes={"pixel_values": (1, 16, 3 * 8 * 8)},
            values={"image_position_ids": [[[place % 4, place // 4] for place in range(16)]]},
        ),
        Family("mistral3", values=_ONE),
        Family("llava"),
        Family("llava_next", whole={"image_grid_pinpoints": [[32, 32]]}, shapes=_TILES, values=_ONE),
        Family("llava_onevision", whole={"image_grid_pinpoints": [[32, 32]]}, shapes=_TILES, values=_ONE),
        Family("idefics3", whole={"scale_factor": 2}, shapes={"pixel_values": (1, 1, 3, 32, 32)}),
        Family("smolvlm", whole={"scale_factor": 2}, shapes={"pixel_values": (1, 1, 3, 32, 32)}),
        Family("internvl"),
        Family("paligemma", tower={"projection_dim": 64}, whole={"projection_dim": 64}),
        Family("glm4v", _SECTIONS | {"head_dim": 16}, shapes=_PATCHES, values=_GRID),
        Family(
            "llama4",
            {"num_experts_per_tok": 1, "interleave_moe_layer_step": 2},
            {"projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64, "intermediate_size": 128},
        ),
        Family(
            "mllama",
            {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
            {"num_global_layers": 1, "vision_output_dim": 64, "intermediate_layers_indices": [0], "max_num_tiles": 1}
            | {"supported_aspect_ratios": [[1, 1]]},
            tower_name="model.vision_model",
            shapes={"pixel_values": (1, 1, 1, 3, 32, 32)},
            values={"aspect_ratio_ids": [[1]], "aspect_ratio_mask": [[[1]]]},
        ),
        Family(
            "phi4_multimodal",
            {"original_max_position_embeddings": 512},
            {"crop_size": 32},
            tower_name="model.embed_tokens_extend.image_embed.img_processor",
            whole={
                "audio_config": {"hidden_size": 32, "intermediate_size": 48, "num_blocks": 1, "num_attention_heads": 2}
                | {"nemo_conv_channels": 16, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32}
            },
        ),
        Family(
            "kimi_k25",
            {"head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "kv_lora_rank": 32}
            | {"q_lora_rank": 32, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4}
            | {"first_k_dense_replace": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            {"pos_emb_height": 8, "pos_emb_width": 8},
            {"projection_hidden_size": 32},
            shapes={"pixel_values": (16, 3, 8, 8)},
            values=_GRID,
        ),
    )
}


def _known(kind: type[PretrainedConfig], table: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """What of a table a config class has, each setting under its own name."""
    names = set(kind().to_dict()) | set(kind.attribute_map)
    own = {name: value for name, value in table.items() if name in names and kind.attribute_map.get(name) not in table}
    return {**own, **others}


def family_config(family: Family) -> PretrainedConfig:
    """The config of a tiny model of it."""
    kind: type[PretrainedConfig] = CONFIG_MAPPING[family.model_type]
    default, parts = kind(), {}
    for name in kind.sub_configs:
        part = getattr(default, name)
        of = kind.sub_configs[name] if part is None else type(part)
        if name == "text_config":
            parts[name] = {"model_type": of.model_type, **_known(of, _TEXT, family.text)}
        elif name == "vision_config" and (part is not None or name in family.whole):
            parts[name] = {"model_type": of.model_type, **_known(of, _TOWER, family.tower)}
    whole = {} if "text_config" in parts else _known(kind, _TEXT, family.text)
    return kind(**{**whole, **family.whole, **parts})


def save_family(
    directory: Path,
    name: str,
    *,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Save a random model of a family in float32 with a tokenizer; returns ``directory``.

    Args:
        changes: of its settings: ``text``, ``tower`` and ``whole``.
        tokenizer: another than :func:`tiny_tokenizer`.
    """
    torch.manual_seed(0)
    family = FAMILIES[name]
    more = changes or {}
    text, tower, whole = ({**getattr(family, part), **more.get(part, {})} for part in ("text", "tower", "whole"))
    family = replace(family, text=text, tower=tower, whole=whole)
    config = family_config(family)
    model = transformers.AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()) or bool((parameter == 1).all()):
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(directory)
    (tokenizer or tiny_tokenizer()).save_pretrained(directory)
    return directory


def image_features(model: PreTrainedModel, name: str) -> list[torch.Tensor]:
    """All tensors of what the model's vision tower and projector make of a seeded image."""
    family, generator = FAMILIES[name], torch.Generator().manual_seed(7)
    inputs = {key: torch.randn(shape, generator=generator) for key, shape in family.shapes.items()}
    inputs |= {key: torch.tensor(value) for key, value in family.values.items()}
    look = model.get_image_features if family.tower_name is None else model.get_submodule(family.tower_name)
    with torch.no_grad():
        found = look(**inputs)
    leaves = torch.utils._pytree.tree_leaves(dict(found) if isinstance(found, Mapping) else found)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
