"""InternVL in transformers' layout: scaled residuals, patches shuffled together, a norm and two linears."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.architectures.architecture import Reading
from llmconvert.gguf.mmproj.projector import (
    CLASS_LAST,
    Images,
    Projector,
    Settings,
    Whole,
    activation,
    entries,
    required,
    within,
)

__all__ = ["INTERNVL"]

# The tower of 6 billion weights, which llama.cpp knows by its size, norms by the root mean square.
_LARGE: Final = (3200, 45)
# Between a projector's two matrices.
_PROJECTOR: Final = "gelu"


def _settings(images: Images) -> Mapping[str, Any]:
    vision, config = images.vision, images.config
    large = (vision["hidden_size"], vision["num_hidden_layers"]) == _LARGE
    required(vision, norm_type="rms_norm" if large else "layer_norm", use_absolute_position_embeddings=True)
    required(config, vision_feature_layer=-1, vision_feature_select_strategy="default", projector_hidden_act=_PROJECTOR)
    factor = round(1 / config["downsample_ratio"])
    if factor * config["downsample_ratio"] != 1:
        raise UnsupportedError(
            f"downsample_ratio is {config['downsample_ratio']}; llama.cpp takes one by whole patches"
        )
    tiles = {
        f"clip.vision.preproc_{key}_tiles": int(value)
        for key in ("min", "max")
        if isinstance(value := images.processor.get(f"{key}_patches"), int)
    }
    return {
        **activation("vision_config.hidden_act", vision["hidden_act"]),
        "clip.vision.projector.scale_factor": factor,
        **tiles,
    }


def _read(file: Reading) -> Settings:
    side, patch, factor = (file.get(key) for key in ("image_size", "patch_size", "projector.scale_factor"))
    large = (file.get("embedding_length"), file.layers) == _LARGE
    tiles = {key: file.get(f"preproc_{key}_tiles") for key in ("min", "max")}
    return Settings(
        {
            "downsample_ratio": 1 / factor,
            "image_seq_length": (side // patch // factor) ** 2,
            "projector_hidden_act": _PROJECTOR,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
        },
        {
            "attention_bias": file.has("attn_q.bias"),
            "image_size": [side, side],
            "norm_type": "rms_norm" if large else "layer_norm",
            "num_channels": 3,
            "patch_size": [patch, patch],
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_qk_norm": file.has("attn_q_norm.weight"),
        },
        {
            "size": {"height": side, "width": side},
            "crop_to_patches": True,
            **{f"{key}_patches": value for key, value in tiles.items() if isinstance(value, int)},
        },
    )


_WHOLE: Final = Whole(
    "internvl",
    "InternVLForConditionalGeneration",
    "internvl_vision",
    {"image_token_id": "<IMG_CONTEXT>"},
    {"": "language_model."},
    ((r"layer_norm|linear_", "multi_modal_projector."), (r"", "vision_tower.")),
    "GotOcr2ImageProcessor",
)
INTERNVL: Final = Projector(
    "internvl",
    entries(
        """
embeddings.cls_token -> V_ENC_EMBD_CLS.-
embeddings.position_embeddings -> V_ENC_EMBD_POS.weight
embeddings.patch_embeddings.projection -> V_ENC_EMBD_PATCH
encoder.layer.*.layernorm_before.weight -> V_ENC_INPUT_NORM
encoder.layer.*.layernorm_before.bias? -> V_ENC_INPUT_NORM
encoder.layer.*.attention.q_proj.weight -> V_ENC_ATTN_Q
encoder.layer.*.attention.q_proj.bias? -> V_ENC_ATTN_Q
encoder.layer.*.attention.k_proj.weight -> V_ENC_ATTN_K
encoder.layer.*.attention.k_proj.bias? -> V_ENC_ATTN_K
encoder.layer.*.attention.v_proj.weight -> V_ENC_ATTN_V
encoder.layer.*.attention.v_proj.bias? -> V_ENC_ATTN_V
encoder.layer.*.attention.q_norm.weight? -> V_ENC_ATTN_Q_NORM
encoder.layer.*.attention.k_norm.weight? -> V_ENC_ATTN_K_NORM
encoder.layer.*.attention.projection_layer -> V_ENC_ATTN_O
encoder.layer.*.lambda_1 -> V_LAYER_SCALE_1.weight
encoder.layer.*.lambda_2 -> V_LAYER_SCALE_2.weight
encoder.layer.*.layernorm_after.weight -> V_ENC_POST_ATTN_NORM
encoder.layer.*.layernorm_after.bias? -> V_ENC_POST_ATTN_NORM
encoder.layer.*.mlp.fc1 -> V_ENC_FFN_UP
encoder.layer.*.mlp.fc2 -> V_ENC_FFN_DOWN
layer_norm -> V_MMPROJ_MLP:0
linear_1 -> V_MMPROJ_MLP:1
linear_2 -> V_MMPROJ_MLP:3
""",
        {"embeddings.position_embeddings": CLASS_LAST, "embeddings.cls_token": within(2)},
    ),
    _settings,
    _WHOLE,
    _read,
    renames=((r"^model\.", ""), (r"^(vision_tower|multi_modal_projector)\.", "")),
    unused=(r"embeddings\.mask_token",),
    optional=frozenset({"clip.vision.preproc_min_tiles", "clip.vision.preproc_max_tiles"}),
)
