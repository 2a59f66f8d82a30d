"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: patches of two moments, turned by rows and columns, merged by fours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.mmproj.projector import Entry, Form, Images, Projector, activation, entries, part, required

__all__ = ["QWEN2", "QWEN25", "qwen3"]

# Constants of llama.cpp's graphs.
_EPSILON: Final = 1e-6
_WINDOW: Final = 112
_THETA: Final = 10000.0
# What positions are made for does not matter where there is no table of them.
_IMAGE_SIZE: Final = 560


def _moment(number: int) -> Form:
    """One of the two kernels of a convolution through time."""
    return lambda images, values: values[:, :, number]


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
    renames=_RENAMES,
    keys={
        **_KEYS,
        "hidden_size": "embed_dim",
        "intermediate_size": lambda images: int(images.vision["embed_dim"] * images.vision["mlp_ratio"]),
    },
    epsilon=_EPSILON,
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
    renames=_RENAMES,
    keys=_KEYS,
    epsilon=_EPSILON,
)


def qwen3(images: Images) -> Projector:
    """The file of a Qwen3-VL, whose tower hands features of several layers to the decoder."""
    layers = list(images.vision["deepstack_visual_indexes"])
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
        renames=_RENAMES,
        keys={
            **_KEYS,
            "image_size": lambda images: (
                math.isqrt(images.vision["num_position_embeddings"]) * images.vision["patch_size"]
            ),
        },
        epsilon=_EPSILON,
    )
