"""Quantized sources: seen as dense weights, what they are stored in, and which are quantized again on request alone.

Models are released in FP8, MXFP4, NVFP4 or int4 by who trained them, and there is no better original. What somebody
quantized to deploy it (GPTQ, AWQ, bitsandbytes, GGUF below 8 bits, artifacts of this package) has one, and loses again
what is rounded twice.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import gguf
import torch

from llmconvert.errors import HubError, UsageError
from llmconvert.gguf.checkpoint import GgufCheckpoint
from llmconvert.hub.card import CARD, front_matter
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.catalog.formats import READERS
from llmconvert.quantize.formats.dense_view import QuantizedView, open_dense
from llmconvert.quantize.formats.reading import declared_quantization
from llmconvert.quantize.numbers import Int
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["StoredAs", "dense_source", "require_released", "stored_as"]

# Bits of a weight, scales included, from which on a GGUF type counts as the model itself.
_GGUF_BITS = 8
# What our cards are tagged with.
_OWN = "llmconvert"


@dataclass(frozen=True, slots=True)
class StoredAs:
    """What a checkpoint's quantized weights are stored in.

    Attributes:
        method: ``fp8``, ``compressed-tensors``, ``gptq``, ``gguf``, …
        names: of schemes, or of GGML types; most weights first.
        schemes: the schemes among these.
        released: whether models are released so; otherwise it was made for deployment, of something better.
    """

    method: str
    names: tuple[str, ...]
    schemes: tuple[Scheme, ...]
    released: bool

    def __str__(self) -> str:
        return f"{self.method}, {' and '.join(self.names)}"


def dense_source(checkpoint: Checkpoint, dtype: torch.dtype, *, progress: Progress = SILENT) -> Checkpoint:
    """A source's dense weights: itself, or a view of what is quantized, whose weights are rounded to ``dtype`` once.

    For float16, whose range is narrow, they come in float32, so that who casts them sees what doesn't fit.

    Raises:
        UnsupportedError, CheckpointError: see :func:`llmconvert.quantize.formats.dense_view.open_dense`.
    """
    wide = torch.float32 if dtype == torch.float16 else dtype
    return open_dense(checkpoint, wide, weights_only=True, progress=progress)


def stored_as(checkpoint: Checkpoint) -> StoredAs | None:
    """What a checkpoint's weights are stored in; None where they are dense. Nothing but headers is read.

    Raises:
        UnsupportedError, CheckpointError: see :func:`llmconvert.quantize.formats.dense_view.open_dense`.
    """
    if isinstance(checkpoint, GgufCheckpoint):
        types = Counter(checkpoint.type_of(name) for name in checkpoint if len(checkpoint.infos[name].shape) > 1)
        small = tuple(name for name, _ in types.most_common() if _gguf_bits(name) < _GGUF_BITS)
        return StoredAs("gguf", small, (), False) if small else None
    view = open_dense(checkpoint)
    if not isinstance(view, QuantizedView):
        return None
    stored = Counter(found.scheme for found in view.quantized.values() if found.holds_codes)
    if not stored:
        return None
    schemes = tuple(scheme for scheme, _ in stored.most_common())
    method = str((declared_quantization(checkpoint) or {}).get("quant_method", "")).lower()
    released = method in READERS or (method == "compressed-tensors" and all(map(_released, schemes)))
    released = released and _OWN not in _tags(checkpoint)
    return StoredAs(method, tuple(map(str, schemes)), schemes, released)


def require_released(found: StoredAs | None, origin: str, *, requantize: bool) -> None:
    """Refuse to quantize again what was quantized for deployment, unless that was asked for.

    Args:
        found: what the source is stored in; None if it is dense.
        origin: what to call the source in the error.

    Raises:
        UsageError: it was, and nobody asked.
    """
    if found is not None and not found.released and not requantize:
        raise UsageError(
            f"{origin}: was quantized for deployment ({found}), and would be rounded a second time; start from the "
            "original, or say that this is meant: requantize: true in a recipe, --requantize of a command"
        )


def _released(scheme: Scheme) -> bool:
    """Floats, and symmetric integers of 4 bits in groups, which models are trained in."""
    number = scheme.number
    return not isinstance(number, Int) or (number == Int(4) and scheme.group_size is not None)


def _gguf_bits(name: str) -> float:
    size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    return 8 * float(nbytes) / float(size)


def _tags(checkpoint: Checkpoint) -> list[str]:
    if CARD not in checkpoint.files:
        return []
    try:
        tags = front_matter(checkpoint.read_file(CARD).decode(errors="replace"), CARD).get("tags")
    except (HubError, OSError):
        return []
    return tags if isinstance(tags, list) else [str(tags)]
