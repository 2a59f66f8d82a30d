"""Idefics 3 and SmolVLM: a SigLIP tower, and patches shuffled together into one linear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.architectures.architecture import Reading
from llmconvert.gguf.mmproj.projector import Images, Projector, Settings, Whole, activation, entries

__all__ = ["IDEFICS3", "SIGLIP"]

#: A SigLIP tower, without what stands before it.
SIGLIP: Final = """
embeddings.patch_embedding -> V_ENC_EMBD_PATCH
embeddings.position_embedding.weight -> V_ENC_EMBD_POS
encoder.layers.*.layer_norm1 -> V_ENC_INPUT_NORM
encoder.layers.*.self_attn.q_proj -> V_ENC_ATTN_Q
encoder.layers.*.self_attn.k_proj -> V_ENC_ATTN_K
encoder.layers.*.self_attn.v_proj -> V_ENC_ATTN_V
encoder.layers.*.self_attn.out_proj -> V_ENC_ATTN_O
encoder.layers.*.layer_norm2 -> V_ENC_POST_ATTN_NORM
encoder.layers.*.mlp.fc1 -> V_ENC_FFN_UP
encoder.layers.*.mlp.fc2 -> V_ENC_FFN_DOWN
post_layernorm -> V_POST_NORM
"""


def _edge(images: Images, name: str) -> int:
    """The longest edge that the image processor's setting says; the tower's size without one."""
    said = images.processor.get(name)
    found = said.get("longest_edge") if isinstance(said, Mapping) else None
    return int(found if isinstance(found, int) else images.vision["image_size"])


def _settings(images: Images) -> Mapping[str, Any]:
    tile = images.vision["image_size"]
    if _edge(images, "max_image_size") != tile:
        raise UnsupportedError(
            f"the image processor cuts tiles of {_edge(images, 'max_image_size')} (max_image_size); llama.cpp cuts "
            f"them of the tower's size, {tile}"
        )
    return {
        **activation("vision_config.hidden_act", images.vision["hidden_act"]),
        "clip.vision.projector.scale_factor": int(images.config["scale_factor"]),
        "clip.vision.preproc_image_size": _edge(images, "size"),
    }


def _read(file: Reading) -> Settings:
    tile, edge = file.get("image_size"), file.get("preproc_image_size")
    return Settings(
        {"scale_factor": file.get("projector.scale_factor")},
        {"num_channels": 3},
        {
            "max_image_size": {"longest_edge": tile},
            **({"size": {"longest_edge": edge}} if isinstance(edge, int) else {}),
            "do_image_splitting": True,
        },
    )


# SmolVLM's classes compute the same.
_WHOLE: Final = Whole(
    "idefics3",
    "Idefics3ForConditionalGeneration",
    "idefics3_vision",
    {"image_token_id": "<image>"},
    {"model.": "model.text_model."},
    ((r"modality_projection", "model.connector."), (r"", "model.vision_model.")),
    "Idefics3ImageProcessor",
    gelu="gelu_pytorch_tanh",
)
IDEFICS3: Final = Projector(
    "idefics3",
    entries(SIGLIP + "modality_projection.proj.weight -> V_MMPROJ_FC"),
    _settings,
    _WHOLE,
    _read,
    renames=((r"^model\.", ""), (r"^(vision_model|connector)\.", "")),
    optional=frozenset({"clip.vision.preproc_image_size"}),
)
