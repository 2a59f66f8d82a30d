"""Reading bitsandbytes artifacts: 4 bits (NF4 and FP4, with or without quantized scales) and 8 bits (LLM.int8).

Sources: QLoRA (Dettmers et al. 2023, arXiv 2305.14314), LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339). With 4
bits, two codes lie in a byte, the first one in the upper half, and blocks run over the flattened weight:
``weight`` uint8 ``[rows · columns / 2, 1]``, ``weight.absmax`` one per block, ``weight.quant_map`` the 16 levels, and
JSON as bytes in ``weight.quant_state.bitsandbytes__nf4``. Quantized scales are uint8 codes of ``nested_quant_map``
times ``nested_absmax`` (one per 256) plus an offset. With 8 bits, ``weight`` is int8 and ``SCB`` the largest
magnitude of every row, which stands for 127.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.readers.base import StoredLinear, model_dtype, require_shape
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import NestedScales, QuantizedTensor
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["find"]

_STATE = ".weight.quant_state.bitsandbytes__"
_ROW_MAJOR = 0


def find(checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Iterator[StoredLinear]:
    """The quantized linears of a bitsandbytes checkpoint.

    Raises:
        UnsupportedError: another layout of rows.
        CheckpointError: parts are missing or contradict each other.
    """
    for name in checkpoint.infos:
        if _STATE in name:
            linear, _, kind = name.partition(_STATE)
            yield _four_bits(checkpoint, linear, kind)
        elif name.endswith(".SCB"):
            yield _eight_bits(checkpoint, name.removesuffix(".SCB"))


@dataclass(frozen=True)
class _FourBits(StoredLinear):
    """``kind``: nf4 or fp4. ``block``: elements per scale. ``nested_block``, ``offset``: of quantized scales."""

    kind: str
    block: int
    nested_block: int
    offset: float

    def read_rows(self, checkpoint: Checkpoint, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        columns = self.shape[1]
        first, last = start * columns, stop * columns
        levels = checkpoint[f"{self.linear}.weight.quant_map"].float()
        values = levels[self._codes(checkpoint, first, last).int()]
        scales = self._scales(checkpoint)
        blocks = torch.arange(first // self.block, -(-last // self.block))
        spread = scales[blocks].repeat_interleave(self.block)[first - int(blocks[0]) * self.block :][: last - first]
        return values.mul_(spread).view(stop - start, columns).to(dtype)

    def read(self, checkpoint: Checkpoint) -> QuantizedTensor:
        rows, columns = self.shape
        if self.kind != "nf4" or columns % self.block:
            raise UnsupportedError(
                f"{self.linear}: {self.kind} in blocks of {self.block} over {columns} columns has no scheme here"
            )
        codes = self._codes(checkpoint, 0, rows * columns).view(torch.int8).view(rows, columns)
        nested = None
        if self.scheme.nested:
            nested = NestedScales(
                checkpoint[f"{self.linear}.weight.absmax"],
                checkpoint[f"{self.linear}.weight.nested_absmax"],
                torch.tensor(self.offset, dtype=torch.float32),
            )
        return QuantizedTensor(codes, self._scales(checkpoint).view(rows, -1), None, self.scheme, nested)

    def _codes(self, checkpoint: Checkpoint, first: int, last: int) -> torch.Tensor:
        """Codes ``first:last`` of the flattened weight, uint8."""
        begin = first // 2
        stored = checkpoint.read_rows(f"{self.linear}.weight", begin, -(-last // 2)).reshape(-1)
        pairs = torch.stack((stored >> 4, stored & 15), -1).view(-1)
        return pairs[first - 2 * begin :][: last - first].contiguous()

    def _scales(self, checkpoint: Checkpoint) -> torch.Tensor:
        """Of every block, float32."""
        absmax = checkpoint[f"{self.linear}.weight.absmax"]
        if not self.scheme.nested:
            return absmax.float()
        levels = checkpoint[f"{self.linear}.weight.nested_quant_map"].float()
        outer = checkpoint[f"{self.linear}.weight.nested_absmax"].float()
        spread = outer.repeat_interleave(self.nested_block)[: absmax.numel()]
        return levels[absmax.int()] * spread + self.offset


def _four_bits(checkpoint: Checkpoint, linear: str, kind: str) -> _FourBits:
    name = f"{linear}{_STATE}{kind}"
    try:
        state = json.loads(bytes(checkpoint[name].tolist()))
        (rows, columns), block = state["shape"], int(state["blocksize"])
        dtype = getattr(torch, state["dtype"])
        offset, nested_block = float(state.get("nested_offset", 0.0)), int(state.get("nested_blocksize", 256))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"tensor {name!r} does not hold the JSON that bitsandbytes writes: {error!r}") from error
    if kind not in ("nf4", "fp4"):
        raise UnsupportedError(f"{linear}: bitsandbytes type {kind!r}; this reader knows nf4 and fp4")
    nested = f"{linear}.weight.nested_absmax" in checkpoint
    blocks = -(-rows * columns // block)
    require_shape(checkpoint, linear, "weight", (-(-rows * columns // 2), 1))
    require_shape(checkpoint, linear, "weight.absmax", (blocks,))
    names = ["weight", "weight.absmax", "weight.quant_map", name.removeprefix(f"{linear}.")]
    if nested:
        require_shape(checkpoint, linear, "weight.nested_absmax", (-(-blocks // nested_block),))
        names += ["weight.nested_absmax", "weight.nested_quant_map"]
    parts = tuple(require_shape(checkpoint, linear, part) for part in names)
    scheme = Scheme(4, block, kind="nf4", nested=nested)
    return _FourBits(linear, (rows, columns), dtype, scheme, parts, kind, block, nested_block, offset)


@dataclass(frozen=True)
class _EightBits(StoredLinear):
    def read_rows(self, checkpoint: Checkpoint, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        return self._rows(checkpoint, start, stop).dequantize(dtype)

    def read(self, checkpoint: Checkpoint) -> QuantizedTensor:
        return self._rows(checkpoint, 0, self.shape[0])

    def _rows(self, checkpoint: Checkpoint, start: int, stop: int) -> QuantizedTensor:
        largest = checkpoint.read_rows(f"{self.linear}.SCB", start, stop).float()
        codes = checkpoint.read_rows(f"{self.linear}.weight", start, stop)
        return QuantizedTensor(codes, (largest / 127).unsqueeze(1), None, self.scheme)


def _eight_bits(checkpoint: Checkpoint, linear: str) -> _EightBits:
    info = checkpoint.infos[require_shape(checkpoint, linear, "weight")]
    rows, columns = info.shape
    require_shape(checkpoint, linear, "SCB", (rows,))
    layout = f"{linear}.weight_format"
    if info.dtype != torch.int8 or (layout in checkpoint and int(checkpoint[layout]) != _ROW_MAJOR):
        raise UnsupportedError(f"{linear}: stored as {info.dtype} in a tiled layout; this reader knows int8 row by row")
    parts = (f"{linear}.weight", f"{linear}.SCB", *([layout] if layout in checkpoint else []))
    return _EightBits(linear, (rows, columns), model_dtype(checkpoint), Scheme(8, activation_bits=8), parts)
