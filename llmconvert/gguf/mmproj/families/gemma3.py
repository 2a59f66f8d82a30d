"""Gemma 3: a SigLIP tower, its patches averaged by squares, a norm, and one matrix, stored as inputs by outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.mmproj.families.idefics3 import SIGLIP
from llmconvert.gguf.mmproj.projector import Images, Projector, activation, entries

__all__ = ["GEMMA3"]


def _plus_one(images: Images, values: torch.Tensor) -> torch.Tensor:
    """Gemma's norms multiply by one more than what is stored."""
    return values + 1


def _settings(images: Images) -> Mapping[str, Any]:
    tokens, vision = int(images.config["mm_tokens_per_image"]), images.vision
    patches, side = vision["image_size"] // vision["patch_size"], math.isqrt(tokens)
    if side * side != tokens or patches % side:
        raise UnsupportedError(f"{patches} patches to a side do not become a square of {tokens} (mm_tokens_per_image)")
    return {
        **activation("vision_config.hidden_act", vision["hidden_act"]),
        "clip.vision.projector.scale_factor": patches // side,
    }


GEMMA3: Final = Projector(
    "gemma3",
    entries(
        SIGLIP
        + """
mm_input_projection_weight -> V_MM_INP_PROJ.weight
mm_soft_emb_norm.weight -> V_MM_SOFT_EMB_NORM
""",
        {"mm_soft_emb_norm.weight": _plus_one},
    ),
    _settings,
    renames=((r"^model\.", ""), (r"^(vision_tower|multi_modal_projector)\.", ""), (r"^vision_model\.", "")),
    unused=(r"head\..*",),
)
