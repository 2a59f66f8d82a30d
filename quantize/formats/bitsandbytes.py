"""The formats of bitsandbytes (https://github.com/bitsandbytes-foundation/bitsandbytes), which transformers loads.

NF4 with or without quantized scales (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), and 8-bit rows that run with 8-bit
activations (LLM.int8, Dettmers et al. 2022, arXiv 2208.07339); FP4 is read too.

With 4 bits, two codes lie in a byte, the first one in the upper half, and blocks run over the flattened weight:
``weight`` uint8 ``[rows · columns / 2, 1]``, ``weight.absmax`` one per block, ``weight.quant_map`` the 16 levels, and
JSON as bytes in ``weight.quant_state.bitsandbytes__nf4``. Quantized scales are uint8 codes of ``nested_quant_map``
times ``nested_absmax`` (one per 256) plus an offset. With 8 bits, ``weight`` is int8 and ``SCB`` the largest
magnitude of every row, which stands for 127.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.base import (
    FLOATS,
    Format,
    StoredLinear,
    model_dtype,
    require_matrix,
    require_shape,
    settings,
)
from llmconvert.quantize.formats.reading import Declared
from llmconvert.quantize.numbers import FP4, LLM_INT8, NF4, Int, Levels
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import NESTED_GROUP, NestedScales, QuantizedTensor, SuperBlockScales, dynamic_levels
from llmconvert.storage.checkpoint import Checkpoint, TensorSpec

__all__ = ["BitsAndBytes"]

_STATE = ".weight.quant_state.bitsandbytes__"
_ROW_MAJOR = 0
_FOUR_BITS: Mapping[str, Levels] = {number.name: number for number in (NF4, FP4)}
_BLOCKS = (64, 128, 256, 512, 1024)
# The encoding of bitsandbytes itself, and codes down to −128, which methods other than rounding choose.
_INT8 = Scheme(Int(8), activation_bits=8)
_EIGHT_BITS = (Scheme(LLM_INT8, activation_bits=8), _INT8)
# What dequantized weights are rounded to; activations of another dtype are computed in that all the same.
_DTYPE = "bfloat16"
# The JSON of a linear is as long whatever its offset: spaces follow, which no parser minds.
_OFFSET_LENGTH = 25


class _Config(Declared):
    """What is read of a config; all else of a linear stands beside it."""

    silent: ClassVar[frozenset[str]] = frozenset(
        (
            *("quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit"),
            *("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "llm_int8_skip_modules"),
            *("llm_int8_threshold", "llm_int8_enable_fp32_cpu_offload"),
        )
    )

    bnb_4bit_quant_storage: str | None = None
    llm_int8_has_fp16_weight: bool = False


class BitsAndBytes(Format):
    """4-bit and 8-bit tensors and their configuration."""

    loaders: ClassVar[Sequence[str]] = ("bitsandbytes", "accelerate")

    def check(self, scheme: Scheme) -> None:
        if scheme in _EIGHT_BITS or (scheme.number == NF4 and scheme.group_size in _BLOCKS):
            return
        sizes = ", ".join(f"g{size}" for size in _BLOCKS)
        raise UnsupportedError(f"scheme {scheme}: bitsandbytes stores nf4 and nf4-dq (with {sizes}), llm.int8 and w8a8")

    def check_experts(self, scheme: Scheme, *, apart: bool) -> None:
        # Of those that transformers makes linears of (Llama 4) no artifact has been seen to load.
        raise UnsupportedError(
            f"scheme {scheme}: transformers reads bitsandbytes in ordinary linears alone; leave experts dense with an "
            "override (match: '*.experts.*', scheme: none), or use format: compressed-tensors"
        )

    def check_dense_experts(self, schemes: Collection[Scheme], *, apart: bool) -> None:
        if apart:
            raise UnsupportedError(
                "transformers makes linears of this model's experts where others are quantized, and finds no weights "
                "for dense ones; quantize the experts too (nf4)"
            )

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        # 127 scales in bfloat16 are exact in float32, so the row's largest magnitude gives the scale back.
        return torch.float32 if scheme.number.absmax else torch.bfloat16

    def specs(self, linear: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> list[TensorSpec]:
        rows, columns = shape
        if scheme in _EIGHT_BITS:
            return [
                TensorSpec(f"{linear}.weight", torch.int8, shape),
                TensorSpec(f"{linear}.SCB", torch.float32, (rows,)),
                TensorSpec(f"{linear}.weight_format", torch.uint8, ()),
            ]
        blocks = rows * scheme.groups(columns)
        state = len(_state(shape, scheme, None))
        specs = [
            TensorSpec(f"{linear}.weight", torch.uint8, (rows * columns // 2, 1)),
            TensorSpec(f"{linear}.weight.absmax", torch.uint8 if scheme.nested else torch.float32, (blocks,)),
            TensorSpec(f"{linear}.weight.quant_map", torch.float32, (len(NF4.levels),)),
            TensorSpec(f"{linear}{_STATE}nf4", torch.uint8, (state,)),
        ]
        if scheme.nested:
            count = -(-blocks // NESTED_GROUP)
            specs.append(TensorSpec(f"{linear}.weight.nested_absmax", torch.float32, (count,)))
            specs.append(TensorSpec(f"{linear}.weight.nested_quant_map", torch.float32, (256,)))
        return specs

    def pack(self, linear: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        if tensor.scheme in _EIGHT_BITS:
            return {
                f"{linear}.weight": tensor.codes,
                f"{linear}.SCB": _largest(tensor.scale.view(-1), half=tensor.scheme.number == LLM_INT8),
                f"{linear}.weight_format": torch.tensor(0, dtype=torch.uint8),
            }
        nested = tensor.nested
        assert not isinstance(nested, SuperBlockScales)  # of GGUF
        codes = tensor.codes.view(torch.uint8).view(-1, 2)
        state = _state(tensor.shape, tensor.scheme, nested)
        stored = {
            f"{linear}.weight": (codes[:, 0] << 4 | codes[:, 1]).unsqueeze(1),
            f"{linear}.weight.absmax": tensor.scale.reshape(-1) if nested is None else nested.codes,
            f"{linear}.weight.quant_map": torch.tensor(NF4.levels, dtype=torch.float32),
            f"{linear}{_STATE}nf4": torch.tensor(list(state), dtype=torch.uint8),
        }
        if nested is not None:
            stored[f"{linear}.weight.nested_absmax"] = nested.absmax
            stored[f"{linear}.weight.nested_quant_map"] = dynamic_levels()
        return stored

    def unpack(self, linear: str, stored: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedTensor:
        if scheme in _EIGHT_BITS:
            scale = (stored[f"{linear}.SCB"] / 127).unsqueeze(1)
            return QuantizedTensor(stored[f"{linear}.weight"], scale, None, scheme)
        state = json.loads(bytes(stored[f"{linear}{_STATE}nf4"].tolist()))
        rows, columns = state["shape"]
        pairs = stored[f"{linear}.weight"].view(-1)
        codes = torch.stack((pairs >> 4, pairs & 15), -1).view(torch.int8).view(rows, columns)
        absmax = stored[f"{linear}.weight.absmax"]
        if not scheme.nested:
            return QuantizedTensor(codes, absmax.view(rows, -1), None, scheme)
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
        nested = NestedScales(absmax, stored[f"{linear}.weight.nested_absmax"], offset)
        return QuantizedTensor(codes, nested.dequantize().view(rows, -1), None, scheme, nested)

    def quantization_config(self, schemes: Mapping[str, Scheme], kept: Sequence[str]) -> dict[str, Any]:
        used = sorted(set(schemes.values()), key=str)
        if len(used) > 1:
            raise UnsupportedError(
                f"schemes {', '.join(map(str, used))}: bitsandbytes has one scheme per model; give overrides that one "
                "or none (scheme: none), or choose compressed-tensors or gptq"
            )
        four = used[0].number == NF4
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "_load_in_4bit": four,
            "_load_in_8bit": not four,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": used[0].nested,
            "bnb_4bit_compute_dtype": _DTYPE,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_skip_modules": list(kept),
        }

    def files(self, declared: Mapping[str, Any]) -> Mapping[str, bytes]:
        return {}

    def find(self, checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Iterable[StoredLinear]:
        found = _Config.read(declared)
        if found.bnb_4bit_quant_storage not in (None, "uint8", "torch.uint8") or found.llm_int8_has_fp16_weight:
            keys = ("bnb_4bit_quant_storage", "llm_int8_has_fp16_weight")
            raise UnsupportedError(
                f"a bitsandbytes checkpoint with {settings(declared, *keys)}; this reader knows codes in uint8 and int8"
            )
        for name in checkpoint.infos:
            if _STATE in name:
                linear, _, kind = name.partition(_STATE)
                yield _four_bits(checkpoint, linear, kind)
            elif name.endswith(".SCB"):
                yield _eight_bits(checkpoint, name.removesuffix(".SCB"))


@dataclass(frozen=True)
class _FourBits(StoredLinear):
    """``block``: elements per scale. ``nested_block``, ``offset``: of quantized scales."""

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
        if columns % self.block:
            raise UnsupportedError(
                f"{self.linear}: {self.scheme.number.name} in blocks of {self.block} over {columns} columns has no "
                "scheme here"
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
        sizes = (rows, columns, block, nested_block)
        if not all(type(size) is int and size > 0 for size in sizes) or not isinstance(dtype, torch.dtype):
            raise ValueError(f"sizes {sizes}, dtype {state['dtype']}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"tensor {name!r} does not hold the JSON that bitsandbytes writes: {error!r}") from error
    if kind not in _FOUR_BITS:
        raise UnsupportedError(f"{linear}: bitsandbytes type {kind!r}; this reader knows {' and '.join(_FOUR_BITS)}")
    nested = f"{linear}.weight.nested_absmax" in checkpoint
    blocks = -(-rows * columns // block)
    require_shape(checkpoint, linear, "weight", (-(-rows * columns // 2), 1), dtypes=(torch.uint8,))
    require_shape(checkpoint, linear, "weight.absmax", (blocks,), dtypes=(torch.uint8,) if nested else FLOATS)
    require_shape(checkpoint, linear, "weight.quant_map", (1 << _FOUR_BITS[kind].bits,), dtypes=FLOATS)
    names = ["weight", "weight.absmax", "weight.quant_map", name.removeprefix(f"{linear}.")]
    if nested:
        require_shape(checkpoint, linear, "weight.nested_absmax", (-(-blocks // nested_block),), dtypes=FLOATS)
        require_shape(checkpoint, linear, "weight.nested_quant_map", (256,), dtypes=FLOATS)
        names += ["weight.nested_absmax", "weight.nested_quant_map"]
    parts = tuple(require_shape(checkpoint, linear, part) for part in names)
    scheme = Scheme(_FOUR_BITS[kind], block, nested=nested)
    return _FourBits(linear, (rows, columns), dtype, scheme, parts, block, nested_block, offset)


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
    rows, columns = require_matrix(checkpoint, linear, "weight")
    info = checkpoint.infos[f"{linear}.weight"]
    require_shape(checkpoint, linear, "SCB", (rows,), dtypes=FLOATS)
    layout = f"{linear}.weight_format"
    if info.dtype != torch.int8 or (layout in checkpoint and bool((checkpoint[layout] != _ROW_MAJOR).any())):
        raise UnsupportedError(f"{linear}: stored as {info.dtype} in a tiled layout; this reader knows int8 row by row")
    parts = (f"{linear}.weight", f"{linear}.SCB", *([layout] if layout in checkpoint else []))
    return _EightBits(linear, (rows, columns), model_dtype(checkpoint), _INT8, parts)


def _state(shape: tuple[int, int], scheme: Scheme, nested: NestedScales | None) -> bytes:
    """What bitsandbytes has to know of a linear, as JSON; of the same length for every offset."""
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": scheme.group_size, "dtype": _DTYPE, "shape": list(shape)}
    length = len(json.dumps(state))
    if scheme.nested:
        offset = 0.0 if nested is None else nested.offset.item()
        length += len(json.dumps({"nested_blocksize": NESTED_GROUP, "nested_dtype": "float32", "nested_offset": 0}))
        state |= {"nested_blocksize": NESTED_GROUP, "nested_dtype": "float32", "nested_offset": offset}
        length += _OFFSET_LENGTH
    return json.dumps(state).ljust(length).encode()


def _largest(scale: torch.Tensor, *, half: bool) -> torch.Tensor:
    """The float32 nearest to 127 scales that, over 127, gives the scale again; where none does, the nearest.

    With ``half`` it is known to have been a float16.
    """
    nearest = (scale.double() * 127).float()
    if half:
        return nearest.half().float()
    for towards in (torch.inf, -torch.inf):
        beside = torch.nextafter((scale.double() * 127).float(), torch.full_like(scale, towards))
        exact = (nearest / 127 != scale) & (beside / 127 == scale)
        nearest = torch.where(exact, beside, nearest)
    return nearest
