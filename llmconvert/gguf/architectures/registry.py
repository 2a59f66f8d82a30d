"""All architectures: which of them a checkpoint is written as, and which a file is read as."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.architectures.architecture import GgufArchitecture
from llmconvert.gguf.architectures.entries import Config
from llmconvert.gguf.architectures.families import (
    convolutions,
    decoders,
    gemma,
    gemma3n,
    gemma4,
    granite,
    hybrids,
    llama,
    mixtures,
    older,
    phi,
    qwen,
    state_spaces,
)
from llmconvert.gguf.architectures.reading import sensible_values
from llmconvert.gguf.header import GgufHeader, shown

__all__ = ["ARCHITECTURES", "architecture_of", "described_by", "described_inside"]

# What llama.cpp calls files of vision towers and projectors.
_BESIDE: Final = "clip"

ARCHITECTURES: Final[tuple[GgufArchitecture, ...]] = (
    *llama.ARCHITECTURES,
    *qwen.ARCHITECTURES,
    *gemma.ARCHITECTURES,
    *gemma3n.ARCHITECTURES,
    *gemma4.ARCHITECTURES,
    *phi.ARCHITECTURES,
    *decoders.ARCHITECTURES,
    *granite.ARCHITECTURES,
    *mixtures.ARCHITECTURES,
    *older.ARCHITECTURES,
    *state_spaces.ARCHITECTURES,
    *hybrids.ARCHITECTURES,
    *convolutions.ARCHITECTURES,
)


def architecture_of(config: Config, *, of: str = "") -> GgufArchitecture:
    """What a checkpoint with a ``config.json`` is written as.

    Args:
        config: of the decoder.
        of: the model type that the decoder is part of, if it is.

    Raises:
        UnsupportedError: it cannot be.
    """
    model_type = config.get("model_type", "")
    found = next((arch for arch in ARCHITECTURES if arch.model_type == model_type and arch.chosen(config)), None)
    if found is None:
        known = ", ".join(sorted(arch.model_type for arch in ARCHITECTURES if not arch.gap))
        part = f", of which {of!r} has its decoder," if of else ""
        raise UnsupportedError(f"architecture {model_type!r}{part} cannot be written as GGUF; supported are {known}")
    return found


def described_by(header: GgufHeader) -> GgufArchitecture:
    """What a file is read as.

    Raises:
        UnsupportedError: an architecture, or a kind of it, that is not known.
    """
    name = header.metadata.text("general.architecture")
    if name == _BESIDE:
        raise UnsupportedError(
            f"{header.path}: is a model's part for images or sound (mmproj), not the model; name the file beside it"
        )
    named = [arch for arch in ARCHITECTURES if arch.name == name]
    found = next((arch for arch in named if len(named) == 1 or _describes(arch, header)), None)
    if found is None:
        known = ", ".join(sorted({arch.name for arch in ARCHITECTURES}))
        raise UnsupportedError(
            f"{header.path}: GGUF architecture {shown(name)} is not supported; supported are {known}"
        )
    return found


def described_inside(header: GgufHeader, model_type: str) -> GgufArchitecture:
    """What a decoder's file is read as inside a model with parts for images.

    Args:
        header: of the file.
        model_type: of such decoders; "" where they are what they are alone.

    Raises:
        UnsupportedError: it is no such decoder.
    """
    if not model_type:
        return described_by(header)
    name = header.metadata.text("general.architecture")
    found = next((arch for arch in ARCHITECTURES if (arch.name, arch.model_type) == (name, model_type)), None)
    if found is None:
        raise UnsupportedError(f"{header.path}: is of architecture {shown(name)}, and no decoder of a {model_type!r}")
    return replace(found, read_type="", layer=found.inside or found.layer)


def _describes(arch: GgufArchitecture, header: GgufHeader) -> bool:
    with sensible_values(header, arch):
        return bool(arch.described(header))
