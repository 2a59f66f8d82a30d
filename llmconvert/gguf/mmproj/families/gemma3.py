"""Gemma 3: a SigLIP tower, its patches averaged by squares, a norm, and one matrix, stored as inputs by outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.architectures.architecture import Reading
from llmconvert.gguf.mmproj.families.idefics3 import SIGLIP
from llmconvert.gguf.mmproj.projector import Form, Images, Projector, Settings, Whole, activation, entries

__all__ = ["GEMMA3"]


# Gemma's norms multiply by one more than what is stored.
_PLUS_ONE: Final = Form(lambda images, values: values + 1, lambda images, parts: parts[0].float() - 1, exact=False)


def _settings(images: Images) -> Mapping[str, Any]:
    tokens, vision = int(images.config["mm_tokens_per_image"]), images.vision
    patches, side = vision["image_size"] // vision["patch_size"], math.isqrt(tokens)
    if side * side != tokens or patches % side:
        raise UnsupportedError(f"{patches} patches to a side do not become a square of {tokens} (mm_tokens_per_image)")
    return {
        **activation("vision_config.hidden_act", vision["hidden_act"]),
        "clip.vision.projector.scale_factor": patches // side,
    }


def _read(file: Reading) -> Settings:
    side = file.get("image_size")
    tokens = (side // file.get("patch_size") // file.get("projector.scale_factor")) ** 2
    return Settings(
        {"mm_tokens_per_image": tokens},
        # Its head is no part of what is seen.
        {"num_channels": 3, "vision_use_head": False},
        {"size": {"height": side, "width": side}, "image_seq_length": tokens},
    )


_WHOLE: Final = Whole(
    "gemma3",
    "Gemma3ForConditionalGeneration",
    "siglip_vision_model",
    {
        "image_token_index": "<image_soft_token>",
        "boi_token_index": "<start_of_image>",
        "eoi_token_index": "<end_of_image>",
    },
    {"": "language_model."},
    ((r"mm_", "multi_modal_projector."), (r"", "vision_tower.")),
    "Gemma3ImageProcessor",
    gelu="gelu_pytorch_tanh",
)
GEMMA3: Final = Projector(
    "gemma3",
    entries(
        SIGLIP
        + """
mm_input_projection_weight -> V_MM_INP_PROJ.weight
mm_soft_emb_norm.weight -> V_MM_SOFT_EMB_NORM
""",
        {"mm_soft_emb_norm.weight": _PLUS_ONE},
    ),
    _settings,
    _WHOLE,
    _read,
    renames=((r"^model\.", ""), (r"^(vision_tower|multi_modal_projector)\.", ""), (r"^vision_model\.", "")),
    unused=(r"head\..*",),
)
