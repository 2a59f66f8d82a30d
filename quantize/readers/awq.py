"""Reading AWQ artifacts in their GEMM version: of AutoAWQ, and of those who write as it does.

The layout is in :mod:`llmconvert.quantize.formats.awq_gemm`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.readers.base import StoredLinear, model_dtype, require_shape, settings
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["find"]

_WORDS = ".qweight"
_LANES = 8


def find(checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Iterator[StoredLinear]:
    """The quantized linears of an AWQ checkpoint.

    Raises:
        UnsupportedError: another version of the layout.
        CheckpointError: parts are missing or contradict each other.
    """
    version = str(declared.get("version") or declared.get("checkpoint_format") or declared.get("format") or "gemm")
    if version.lower() != "gemm" or int(declared.get("bits", 4)) != 4 or not declared.get("zero_point", True):
        raise UnsupportedError(
            f"an AWQ checkpoint with {settings(declared, 'version', 'checkpoint_format', 'bits', 'zero_point')}; "
            "this reader knows version gemm with 4 bits and zero points"
        )
    for name in checkpoint.infos:
        if name.endswith(_WORDS):
            yield _linear(checkpoint, name.removesuffix(_WORDS))


@dataclass(frozen=True)
class _Awq(StoredLinear):
    def read_rows(self, checkpoint: Checkpoint, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        # Whole words of outputs around the rows.
        first, last = start // _LANES, -(-stop // _LANES)
        outputs = slice(first * _LANES, last * _LANES)
        tensor = self._unpack(checkpoint, slice(first, last), outputs)
        return tensor.rows(start - outputs.start, stop - outputs.start).dequantize(dtype)

    def read(self, checkpoint: Checkpoint) -> QuantizedTensor:
        return self._unpack(checkpoint, slice(None), slice(None))

    def _unpack(self, checkpoint: Checkpoint, words: slice, outputs: slice) -> QuantizedTensor:
        kept = (words, words, outputs)
        stored = {name: checkpoint[name][:, part].contiguous() for name, part in zip(self.parts, kept, strict=True)}
        return load_format("awq").unpack(self.linear, stored, self.scheme)


def _linear(checkpoint: Checkpoint, linear: str) -> _Awq:
    columns, words = checkpoint.infos[f"{linear}{_WORDS}"].shape
    rows = words * _LANES
    groups = checkpoint.infos[require_shape(checkpoint, linear, "scales")].shape[0]
    require_shape(checkpoint, linear, "scales", (groups, rows))
    require_shape(checkpoint, linear, "qzeros", (groups, words))
    if columns % groups:
        raise CheckpointError(
            f"quantized linear {linear!r} has {columns} inputs in {groups} groups, which do not divide"
        )
    scheme = Scheme(4, columns // groups, symmetric=False)
    parts = tuple(f"{linear}.{part}" for part in ("qweight", "qzeros", "scales"))
    return _Awq(linear, (rows, columns), model_dtype(checkpoint), scheme, parts)
