"""MLX's affine format (https://github.com/ml-explore/mlx): what mlx-lm, LM Studio and other runtimes on Macs read.

A linear, or an embedding, of ``r`` rows and ``n`` columns is stored as ``weight`` uint32 ``[r, n · bits / 32]`` (codes
from zero up, packed along the columns as one string of bits, the lowest first; codes of 3, 5 and 6 bits may straddle
words), ``scales`` and ``biases`` ``[r, groups]`` in the model's dtype: ``w = scale · code + bias``, as ``mx.quantize``
has it. The layer's own bias is ``bias``. Which layers are quantized, and into what, stands in ``config.json``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from llmconvert.engine.architecture.auto import has_parts
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.base import (
    FLOATS,
    Feature,
    Format,
    OuterUse,
    StoredLinear,
    require_matrix,
    require_shape,
)
from llmconvert.quantize.formats.mlx.config import BITS, GROUPS, read_schemes, with_plain_rope, written
from llmconvert.quantize.formats.mlx.model_types import DIFFERS, KNOWN, SEEN, VERSION
from llmconvert.quantize.numbers import AFFINE
from llmconvert.quantize.pack import pack_words, packed_length, unpack_words
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.checkpoint import Checkpoint, TensorSpec

__all__ = ["Mlx"]

_SCALES = ".scales"


class Mlx(Format):
    """``weight``, ``scales`` and ``biases``, and two copies of what they are in ``config.json``."""

    library: ClassVar[str] = "mlx"
    outer: ClassVar[OuterUse] = "always"
    fuses: ClassVar[bool] = False
    lacks: ClassVar[Mapping[Feature, str]] = {
        "rotations": "mlx-lm was never seen to run a rotated model",
        "streaming": "the embedding and the head lie outside the blocks, which a download is quantized by",
        "repair": "it was never tried with embedding and head quantized too",
        "generation": "it is measured with transformers, which does not run MLX",
    }

    def check(self, scheme: Scheme) -> None:
        if scheme.number.name != AFFINE.name or scheme.bits not in BITS or scheme.group_size not in GROUPS:
            raise UnsupportedError(
                f"scheme {scheme}: mlx stores affine weights of {', '.join(map(str, BITS))} bits in groups of "
                f"{', '.join(map(str, GROUPS))}, for example w4a16-g64-affine"
            )

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def specs(self, linear: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> list[TensorSpec]:
        rows, columns = shape
        floats = (rows, scheme.groups(columns))
        return [
            TensorSpec(f"{linear}.weight", torch.uint32, (rows, packed_length(columns, scheme.bits))),
            TensorSpec(f"{linear}.scales", scale_dtype, floats),
            TensorSpec(f"{linear}.biases", scale_dtype, floats),
        ]

    def pack(self, linear: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        assert tensor.offset is not None
        return {
            f"{linear}.weight": pack_words(tensor.codes.view(torch.uint8), tensor.scheme.bits).view(torch.uint32),
            f"{linear}.scales": tensor.scale,
            f"{linear}.biases": tensor.offset,
        }

    def unpack(self, linear: str, stored: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedTensor:
        scale = stored[f"{linear}.scales"]
        columns = scale.shape[1] * (scheme.group_size or 1)
        codes = unpack_words(stored[f"{linear}.weight"].view(torch.int32), scheme.bits, columns)
        dtype = scheme.number.code_dtype
        return QuantizedTensor(codes.view(dtype), scale, None, scheme, offset=stored[f"{linear}.biases"])

    def quantization_config(self, schemes: Mapping[str, Scheme], kept: Sequence[str]) -> dict[str, Any]:
        return written(schemes)

    def config(self, source: Mapping[str, Any], declared: Mapping[str, Any]) -> dict[str, Any]:
        return {**with_plain_rope(source), **dict.fromkeys(("quantization", "quantization_config"), declared)}

    def files(self, declared: Mapping[str, Any]) -> Mapping[str, bytes]:
        return {}

    def check_source(self, source: Checkpoint) -> None:
        kind = str(source.config.get("model_type"))
        if kind not in KNOWN:
            raise UnsupportedError(
                f"architecture {kind!r}: mlx-lm {VERSION} has no module for it, and could not load what would be "
                "written; choose another format (compressed-tensors, gguf)"
            )
        if has_parts(source.config):
            raise UnsupportedError(
                f"architecture {kind!r} has more than a decoder of text, whose tensors mlx-lm and mlx-vlm call "
                "otherwise than this checkpoint does; choose another format (compressed-tensors)"
            )

    def remarks(self, source: Checkpoint) -> tuple[str, ...]:
        kind = str(source.config.get("model_type"))
        if kind in SEEN:
            return ()
        if kind in DIFFERS:
            return (f"mlx-lm {VERSION} computes {kind!r} otherwise than transformers: {DIFFERS[kind]}",)
        return (
            f"mlx-lm {VERSION} has a module for {kind!r}, but was not seen to load what is written here; "
            "compare its logits before you publish",
        )

    def find(self, checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Iterable[StoredLinear]:
        usual, layers = read_schemes(declared)
        for name in checkpoint.infos:
            if name.endswith(_SCALES):
                linear = name.removesuffix(_SCALES)
                yield _linear(checkpoint, linear, layers.get(linear, usual))


@dataclass(frozen=True)
class _Affine(StoredLinear):
    """One layer."""

    def read_rows(self, checkpoint: Checkpoint, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        stored = {part: checkpoint.read_rows(part, start, stop) for part in self.parts}
        return Mlx().unpack(self.linear, stored, self.scheme).dequantize(dtype)

    def read(self, checkpoint: Checkpoint) -> QuantizedTensor:
        return Mlx().unpack(self.linear, {part: checkpoint[part] for part in self.parts}, self.scheme)


def _linear(checkpoint: Checkpoint, linear: str, scheme: Scheme | None) -> _Affine:
    if scheme is None:
        raise CheckpointError(f"config.json: quantization says that {linear!r} is dense, and it has scales")
    found = checkpoint.infos[f"{linear}{_SCALES}"]
    if len(found.shape) == 3:
        raise UnsupportedError(
            f"tensor {found.name!r} has shape {list(found.shape)}, of experts in one tensor; this reader knows matrices"
        )
    rows, groups = require_matrix(checkpoint, linear, "scales", dtypes=FLOATS)
    columns = groups * (scheme.group_size or 1)
    words = (rows, packed_length(columns, scheme.bits))
    weight = require_shape(checkpoint, linear, "weight", dtypes=(torch.uint32,))
    if checkpoint.infos[weight].shape != words:
        raise CheckpointError(
            f"tensor {weight!r} has shape {list(checkpoint.infos[weight].shape)}, expected {list(words)}: "
            f"config.json says {scheme.bits} bits in groups of {scheme.group_size}, and there are {groups} groups"
        )
    require_shape(checkpoint, linear, "biases", (rows, groups), dtypes=(found.dtype,))
    parts = tuple(f"{linear}.{part}" for part in ("weight", "scales", "biases"))
    return _Affine(linear, (rows, columns), found.dtype, scheme, parts)
