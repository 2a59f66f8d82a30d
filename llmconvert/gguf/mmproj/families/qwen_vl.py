"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: patches of two moments, turned by rows and columns, merged by fours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.architectures.architecture import Reading
from llmconvert.gguf.mmproj.projector import (
    Entry,
    Form,
    Images,
    Projector,
    Settings,
    Whole,
    activation,
    entries,
    part,
    required,
)

__all__ = ["QWEN2", "QWEN25", "qwen3", "qwen3_read"]

# Constants of llama.cpp's graphs.
_EPSILON: Final = 1e-6
_WINDOW: Final = 112
_THETA: Final = 10000.0
# What positions are made for does not matter where there is no table of them.
_IMAGE_SIZE: Final = 560


def _moment(number: int) -> Form:
    """One of the two kernels of a convolution through time."""
    return Form(lambda images, values: values[:, :, number], lambda images, parts: torch.stack(tuple(parts), 2))


_PATCHES: Final = """
patch_embed.proj.weight -> V_ENC_EMBD_PATCH
patch_embed.proj.weight -> V_ENC_EMBD_PATCH.weight.1
"""
_FUSED: Final = """
blocks.*.attn.qkv.weight -> V_ENC_ATTN_Q
blocks.*.attn.qkv.bias -> V_ENC_ATTN_Q
blocks.*.attn.qkv.weight -> V_ENC_ATTN_K
blocks.*.attn.qkv.bias -> V_ENC_ATTN_K
blocks.*.attn.qkv.weight -> V_ENC_ATTN_V
blocks.*.attn.qkv.bias -> V_ENC_ATTN_V
blocks.*.attn.proj -> V_ENC_ATTN_O
merger.mlp.0 -> V_MMPROJ:0
merger.mlp.2 -> V_MMPROJ:2
"""
_OPTIONAL: Final = frozenset({"clip.vision.spatial_merge_size"})
# How many moments of a film are a second is for films alone, and no file says it: the published models'.
_MOMENTS: Final = 2
_RENAMES: Final = ((r"^model\.", ""), (r"^visual\.", ""))
_KEYS: Final[Mapping[str, str | Callable[[Images], int]]] = {
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "image_size": lambda images: _IMAGE_SIZE,
}


def _settings(images: Images) -> Mapping[str, Any]:
    required(images.vision, spatial_merge_size=2, temporal_patch_size=2, in_channels=3)
    theta = (images.vision.get("rope_parameters") or {}).get("rope_theta", _THETA)
    if theta != _THETA:
        raise UnsupportedError(f"vision_config: rope_theta is {theta:g}; llama.cpp computes {_THETA:g}")
    return {
        **activation("vision_config.hidden_act", images.vision["hidden_act"]),
        "clip.vision.spatial_merge_size": 2,
    }


def _of_windows(images: Images) -> Mapping[str, Any]:
    required(images.vision, window_size=_WINDOW)
    full, depth = list(images.vision["fullatt_block_indexes"]), images.vision["depth"]
    pattern = full[0] + 1 if full else depth + 1
    if [index for index in full if index < depth] != list(range(pattern - 1, depth, pattern)):
        raise UnsupportedError(f"fullatt_block_indexes is {full}; llama.cpp looks at the whole in every n-th layer")
    return {**_settings(images), "clip.vision.n_wa_pattern": pattern}


def _whole(kind: str, name: str, before: str, **more: Any) -> Whole:
    """Args:
    kind: the model type.
    name: of its class.
    before: what names of the tower's tensors begin with.
    more: what else :class:`Whole` says.
    """
    return Whole(
        kind,
        f"{name}ForConditionalGeneration",
        f"{kind}_vision",
        {
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
        {"model.": "model.language_model."} if before.startswith("model.") else {},
        ((r"", before),),
        "Qwen2VLImageProcessor",
        f"{kind}_text",
        **more,
    )


def _read(file: Reading, **vision: Any) -> Settings:
    merged = file.get("spatial_merge_size", 2)
    return Settings(
        {},
        {
            "in_channels": 3,
            "rope_parameters": {"rope_type": "axial", "rope_theta": _THETA},
            "spatial_merge_size": merged,
            "temporal_patch_size": 2,
            **vision,
        },
        {"merge_size": merged, "patch_size": file.get("patch_size"), "temporal_patch_size": 2},
    )


def _read2(file: Reading) -> Settings:
    ratio = file.get("feed_forward_length") / file.get("embedding_length")
    return _read(file, hidden_size=file.config["hidden_size"], mlp_ratio=int(ratio) if ratio == int(ratio) else ratio)


def _read25(file: Reading) -> Settings:
    pattern = file.get("n_wa_pattern")
    return _read(
        file,
        fullatt_block_indexes=list(range(pattern - 1, file.layers, pattern)),
        out_hidden_size=file.config["hidden_size"],
        tokens_per_second=_MOMENTS,
        window_size=_WINDOW,
    )


def _read3(file: Reading) -> Settings:
    return _read(
        file,
        deepstack_visual_indexes=_deep(file),
        num_position_embeddings=(file.get("image_size") // file.get("patch_size")) ** 2,
        out_hidden_size=file.config["hidden_size"],
    )


def _deep(file: Reading) -> list[int]:
    """The layers whose features go to the decoder's first ones."""
    return [layer for layer, flag in enumerate(file.get("is_deepstack_layers")) if flag]


def _of_pieces(text: str) -> tuple[Entry, ...]:
    """Entries in which queries, keys and values, and the two moments, are told apart by what a file calls them."""
    forms: dict[str, Form] = {"attn_q.": part(0, 3), "attn_k.": part(1, 3), "attn_v.": part(2, 3)}
    forms |= {"patch_embd.weight.1": _moment(1), "patch_embd.weight": _moment(0)}
    found = []
    for entry in entries(text):
        form = next((form for name, form in forms.items() if name in entry.stored), entry.form)
        found.append(replace(entry, form=form))
    return tuple(found)


QWEN2: Final = Projector(
    "qwen2vl_merger",
    _of_pieces(
        _PATCHES
        + _FUSED
        + """
blocks.*.norm1 -> V_ENC_INPUT_NORM
blocks.*.norm2 -> V_ENC_POST_ATTN_NORM
blocks.*.mlp.fc1 -> V_ENC_FFN_UP
blocks.*.mlp.fc2 -> V_ENC_FFN_DOWN
merger.ln_q -> V_POST_NORM
"""
    ),
    _settings,
    _whole("qwen2_vl", "Qwen2VL", "visual."),
    _read2,
    renames=_RENAMES,
    keys={
        **_KEYS,
        "hidden_size": "embed_dim",
        "intermediate_size": lambda images: int(images.vision["embed_dim"] * images.vision["mlp_ratio"]),
    },
    epsilon=_EPSILON,
    optional=_OPTIONAL,
)
QWEN25: Final = Projector(
    "qwen2.5vl_merger",
    _of_pieces(
        _PATCHES
        + _FUSED
        + """
blocks.*.norm1.weight -> V_ENC_INPUT_NORM
blocks.*.norm2.weight -> V_ENC_POST_ATTN_NORM
blocks.*.mlp.gate_proj -> V_ENC_FFN_GATE
blocks.*.mlp.up_proj -> V_ENC_FFN_UP
blocks.*.mlp.down_proj -> V_ENC_FFN_DOWN
merger.ln_q.weight -> V_POST_NORM
"""
    ),
    _of_windows,
    _whole("qwen2_5_vl", "Qwen2_5_VL", "visual."),
    _read25,
    renames=_RENAMES,
    keys=_KEYS,
    epsilon=_EPSILON,
    optional=_OPTIONAL,
)


def qwen3_read(file: Reading, *, experts: bool) -> Projector:
    """What a file of a Qwen3-VL is read as, dense or a mixture of experts."""
    return _qwen3(_deep(file), experts)


def qwen3(images: Images) -> Projector:
    """The file of a Qwen3-VL, whose tower hands features of several layers to the decoder."""
    return _qwen3(list(images.vision["deepstack_visual_indexes"]), images.config["model_type"] == "qwen3_vl_moe")


def _qwen3(layers: Sequence[int], experts: bool) -> Projector:
    kind, name = ("qwen3_vl_moe", "Qwen3VLMoe") if experts else ("qwen3_vl", "Qwen3VL")
    deep = "".join(
        f"""
deepstack_merger_list.{number}.norm -> V_DS_NORM:{layer}
deepstack_merger_list.{number}.linear_fc1 -> V_DS_FC1:{layer}
deepstack_merger_list.{number}.linear_fc2 -> V_DS_FC2:{layer}
"""
        for number, layer in enumerate(layers)
    )
    return Projector(
        "qwen3vl_merger",
        _of_pieces(
            _PATCHES
            + """
patch_embed.proj.bias -> V_ENC_EMBD_PATCH
pos_embed.weight -> V_ENC_EMBD_POS
blocks.*.norm1 -> V_ENC_INPUT_NORM
blocks.*.attn.qkv -> V_ENC_ATTN_QKV
blocks.*.attn.proj -> V_ENC_ATTN_O
blocks.*.norm2 -> V_ENC_POST_ATTN_NORM
blocks.*.mlp.linear_fc1 -> V_ENC_FFN_UP
blocks.*.mlp.linear_fc2 -> V_ENC_FFN_DOWN
merger.norm -> V_POST_NORM
merger.linear_fc1 -> V_MMPROJ:0
merger.linear_fc2 -> V_MMPROJ:2
"""
            + deep
        ),
        lambda images: {
            **_settings(images),
            "clip.vision.is_deepstack_layers": np.array(
                [index in layers for index in range(images.vision["depth"])], np.bool_
            ),
        },
        _whole(kind, name, "model.visual.", gelu="gelu_pytorch_tanh"),
        _read3,
        renames=_RENAMES,
        keys={
            **_KEYS,
            "image_size": lambda images: (
                math.isqrt(images.vision["num_position_embeddings"]) * images.vision["patch_size"]
            ),
        },
        epsilon=_EPSILON,
        optional=_OPTIONAL,
    )
