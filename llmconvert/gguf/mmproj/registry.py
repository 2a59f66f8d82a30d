"""Which kind of ``mmproj`` file a model has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.architectures.architecture import Reading
from llmconvert.gguf.header import shown
from llmconvert.gguf.mmproj.families.gemma3 import GEMMA3
from llmconvert.gguf.mmproj.families.idefics3 import IDEFICS3
from llmconvert.gguf.mmproj.families.internvl import INTERNVL
from llmconvert.gguf.mmproj.families.pixtral import MISTRAL3, PIXTRAL
from llmconvert.gguf.mmproj.families.qwen_vl import QWEN2, QWEN25, qwen3, qwen3_read
from llmconvert.gguf.mmproj.projector import Images, Projector

__all__ = ["MODEL_TYPES", "described_as", "projector_of"]


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


# What a file is read as: what its kind is called there and the architecture of the decoder's, where that matters.
_READ: Final[Mapping[tuple[str, str], Callable[[Reading], Projector]]] = {
    ("gemma3", "gemma3"): lambda file: GEMMA3,
    ("idefics3", ""): lambda file: IDEFICS3,
    ("internvl", ""): lambda file: INTERNVL,
    ("pixtral", ""): lambda file: MISTRAL3 if "mm.patch_merger.weight" in file.header.tensors else PIXTRAL,
    ("qwen2.5vl_merger", "qwen2vl"): lambda file: QWEN25,
    ("qwen2vl_merger", "qwen2vl"): lambda file: QWEN2,
    ("qwen3vl_merger", "qwen3vl"): lambda file: qwen3_read(file, experts=False),
    ("qwen3vl_merger", "qwen3vlmoe"): lambda file: qwen3_read(file, experts=True),
}


def described_as(file: Reading, decoder: str) -> Projector:
    """The kind that a file is read as.

    Args:
        file: what is read.
        decoder: the architecture of the decoder's file.

    Raises:
        UnsupportedError: none is read of its kind.
        CheckpointError: its kind goes with another decoder.
    """
    path, metadata = file.header.path, file.header.metadata
    name = metadata.text("clip.projector_type", "") or metadata.text("clip.vision.projector_type", "")
    found = _READ.get((name, "")) or _READ.get((name, decoder))
    if found is None and (others := sorted(of for kind, of in _READ if kind == name)):
        raise CheckpointError(
            f"{path}: its kind, {name!r}, goes with a decoder of architecture {' or '.join(others)}, and the model "
            f"beside it is a {shown(decoder)}: it belongs to another model"
        )
    if found is None:
        kinds = ", ".join(sorted({kind for kind, _ in _READ}))
        raise UnsupportedError(f"{path}: clip.projector_type is {shown(name)}; read are {kinds}")
    return found(file)
