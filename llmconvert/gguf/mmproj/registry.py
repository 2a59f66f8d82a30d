"""Which kind of ``mmproj`` file a model has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.mmproj.families.gemma3 import GEMMA3
from llmconvert.gguf.mmproj.families.idefics3 import IDEFICS3
from llmconvert.gguf.mmproj.families.internvl import INTERNVL
from llmconvert.gguf.mmproj.families.pixtral import MISTRAL3, PIXTRAL
from llmconvert.gguf.mmproj.families.qwen_vl import QWEN2, QWEN25, qwen3
from llmconvert.gguf.mmproj.projector import Images, Projector

__all__ = ["MODEL_TYPES", "projector_of"]


def _llava(images: Images) -> Projector:
    """Pixtral was published as a LLaVA.

    LLaVA's own files (``mlp``, a CLIP tower) are not written. llama.cpp as xllamacpp 2026.10.11549 has it puts CLIP's
    class behind the patches and then takes all rows but the first: the first patch is lost, and the class follows the
    last one. So computed in transformers, a tiny model is 0.003 nat from it; as it should be, 0.2. Its source of later
    on has the class before them, and runs one layer more of the same file.
    """
    tower = images.vision["model_type"]
    if tower != "pixtral":
        raise UnsupportedError(
            f"the tower is a {tower!r}, and of LLaVA an mmproj file is written with Pixtral's alone; of CLIP's "
            "llama.cpp leaves out the first patch, and takes the class behind the last one"
        )
    return PIXTRAL


MODEL_TYPES: Final[Mapping[str, Callable[[Images], Projector]]] = {
    "gemma3": lambda images: GEMMA3,
    "idefics3": lambda images: IDEFICS3,
    "internvl": lambda images: INTERNVL,
    "llava": _llava,
    "mistral3": lambda images: MISTRAL3,
    "qwen2_5_vl": lambda images: QWEN25,
    "qwen2_vl": lambda images: QWEN2,
    "qwen3_vl": qwen3,
    "qwen3_vl_moe": qwen3,
    "smolvlm": lambda images: IDEFICS3,
}


def projector_of(images: Images) -> Projector:
    """The kind of file of a model.

    Raises:
        UnsupportedError: none is written of its type.
    """
    model_type = str(images.config.get("model_type"))
    if model_type not in MODEL_TYPES:
        raise UnsupportedError(
            f"no mmproj file is written of model type {model_type!r}, only of {', '.join(sorted(MODEL_TYPES))}"
        )
    return MODEL_TYPES[model_type](images)
