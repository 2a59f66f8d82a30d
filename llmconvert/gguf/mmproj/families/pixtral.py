"""Pixtral and Mistral Small 3: a tower whose heads are turned by rows and columns, and ``[IMG_BREAK]`` between rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from gguf.constants import MODEL_TENSOR, TENSOR_NAMES

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.architectures.architecture import Reading
from llmconvert.gguf.mmproj.projector import Form, Images, Projector, Settings, Whole, activation, entries, required

__all__ = ["MISTRAL3", "PIXTRAL"]

# Constants of transformers' class and of llama.cpp's.
_EPSILON: Final = 1e-5
_THETA: Final = 10000.0
_PROJECTOR: Final = "gelu"


def _interleaved(images: Images, values: torch.Tensor) -> torch.Tensor:
    """Pairs (i, i + half) of each head side by side, as llama.cpp turns them."""
    heads = images.vision["num_attention_heads"]
    return values.reshape(heads, 2, -1, values.shape[-1]).transpose(1, 2).reshape(values.shape)


def _halves(images: Images, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """And back."""
    (values,), heads = parts, images.vision["num_attention_heads"]
    return values.reshape(heads, -1, 2, values.shape[-1]).transpose(1, 2).reshape(values.shape)


_TEXT: Final = """
patch_conv.weight -> V_ENC_EMBD_PATCH
ln_pre.weight -> V_PRE_NORM
transformer.layers.*.attention_norm.weight -> V_ENC_INPUT_NORM
transformer.layers.*.attention.q_proj.weight -> V_ENC_ATTN_Q
transformer.layers.*.attention.k_proj.weight -> V_ENC_ATTN_K
transformer.layers.*.attention.v_proj.weight -> V_ENC_ATTN_V
transformer.layers.*.attention.o_proj.weight -> V_ENC_ATTN_O
transformer.layers.*.ffn_norm.weight -> V_ENC_POST_ATTN_NORM
transformer.layers.*.feed_forward.gate_proj.weight -> V_ENC_FFN_GATE
transformer.layers.*.feed_forward.up_proj.weight -> V_ENC_FFN_UP
transformer.layers.*.feed_forward.down_proj.weight -> V_ENC_FFN_DOWN
linear_1.weight -> V_MMPROJ:1
linear_1.bias? -> V_MMPROJ:1
linear_2.weight -> V_MMPROJ:2
linear_2.bias? -> V_MMPROJ:2
"""
_MERGER: Final = """
norm.weight -> V_MM_INP_NORM
patch_merger.merging_layer.weight -> V_MM_PATCH_MERGER
"""
_FORMS: Final = {f"transformer.layers.*.attention.{name}_proj.weight": Form(_interleaved, _halves) for name in "qk"}
_RENAMES: Final = ((r"^model\.", ""), (r"^(vision_tower|multi_modal_projector)\.", ""))
_BREAK: Final = {TENSOR_NAMES[MODEL_TENSOR.V_TOK_EMBD_IMG_BREAK]: "[IMG_BREAK]"}


def _settings(images: Images) -> Mapping[str, Any]:
    theta = (images.vision.get("rope_parameters") or {}).get("rope_theta", _THETA)
    if theta != _THETA:
        raise UnsupportedError(f"vision_config: rope_theta is {theta:g}; llama.cpp computes {_THETA:g}")
    required(images.config, vision_feature_layer=-1, projector_hidden_act=_PROJECTOR)
    return activation("vision_config.hidden_act", images.vision["hidden_act"])


def _of_pixtral(images: Images) -> Mapping[str, Any]:
    required(images.config, vision_feature_select_strategy="full")
    return _settings(images)


def _of_mistral3(images: Images) -> Mapping[str, Any]:
    epsilon = images.text["rms_norm_eps"]
    if epsilon != _EPSILON:
        raise UnsupportedError(f"rms_norm_eps is {epsilon:g}; llama.cpp norms patches by {_EPSILON:g}")
    return {**_settings(images), "clip.vision.spatial_merge_size": int(images.config["spatial_merge_size"])}


def _read(file: Reading, **more: Any) -> Settings:
    patch = file.get("patch_size")
    return Settings(
        {
            "multimodal_projector_bias": "mm.1.bias" in file.header.tensors,
            "projector_hidden_act": _PROJECTOR,
            "vision_feature_layer": -1,
            **more,
        },
        {
            "head_dim": file.get("embedding_length") // file.get("attention.head_count"),
            "num_channels": 3,
            "rope_parameters": {"rope_type": "axial", "rope_theta": _THETA},
        },
        {"size": {"longest_edge": file.get("image_size")}, "patch_size": {"height": patch, "width": patch}},
    )


_WHOLE: Final = Whole(
    "llava",
    "LlavaForConditionalGeneration",
    "pixtral",
    {"image_token_index": "[IMG]"},
    {"": "language_model."},
    ((r"linear_|norm|patch_merger", "multi_modal_projector."), (r"", "vision_tower.")),
    "PixtralImageProcessor",
)
PIXTRAL: Final = Projector(
    "pixtral",
    entries(_TEXT, _FORMS),
    _of_pixtral,
    _WHOLE,
    lambda file: _read(file, vision_feature_select_strategy="full"),
    renames=_RENAMES,
    epsilon=_EPSILON,
    embedded=_BREAK,
)
MISTRAL3: Final = Projector(
    "pixtral",
    entries(_TEXT + _MERGER, _FORMS),
    _of_mistral3,
    replace(_WHOLE, model_type="mistral3", model_class="Mistral3ForConditionalGeneration"),
    lambda file: _read(file, spatial_merge_size=file.get("spatial_merge_size")),
    renames=_RENAMES,
    epsilon=_EPSILON,
    embedded=_BREAK,
)
