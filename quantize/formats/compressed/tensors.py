"""The compressed-tensors format (https://github.com/vllm-project/compressed-tensors): vLLM, transformers, SGLang.

Its layouts: ``pack-quantized`` for integer weights of 2 to 8 bits with 16-bit or E4M3 activations (codes packed into
int32 words along the columns, zero points along the rows), ``int-quantized`` for 8-bit weights with 8-bit activations
(codes as int8, activations quantized per token while running), and ``float-quantized`` for E4M3 weights, with or
without E4M3 activations; those of floats with scales of other kinds are in
:mod:`~llmconvert.quantize.formats.compressed.floats`. Artifacts of llm-compressor and others are read in all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch

from llmconvert.compute.activations import InputKind
from llmconvert.engine.sites import Site
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.base import FLOATS, Feature, Format, OuterUse, StoredLinear, require_shape
from llmconvert.quantize.formats.compressed.config import Config, read_config, stored_layout, written_config
from llmconvert.quantize.formats.compressed.floats import (
    find_floats,
    float_specs,
    holds_floats,
    pack_floats,
    unpack_floats,
)
from llmconvert.quantize.formats.compressed.numbers import CACHE_ARGS, INTS
from llmconvert.quantize.formats.compressed.outer import (
    Outer,
    check_outer,
    orphans,
    plain_specs,
    tied_scales,
    unpacked_layout,
)
from llmconvert.quantize.numbers import E4M3, MXFP4, MXFP8, NVFP4
from llmconvert.quantize.pack import pack_words, packed_length, signed_codes, unpack_words, unsigned_codes
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.checkpoint import Checkpoint, TensorSpec

__all__ = ["CompressedTensors"]

_PACKED = ".weight_packed"
# Numbers that have groups of one size, and the usual scheme.
_GROUPED = {NVFP4: (16, "nvfp4"), MXFP4: (32, "mxfp4"), MXFP8: (32, "mxfp8")}
# Rows and columns that share a scale: of a channel, a tensor, a block.
_E4M3_GROUPINGS = ((1, None), (None, None), (128, 128))
_CODES = (torch.int8, E4M3.code_dtype)
_INTEGERS = (torch.int64, torch.int32)
_ORDER = "weight_g_idx"
_ZEROS = "weight_zero_point"
# Written by some producers beside the parts that a scheme needs. Inputs are quantized with scales of their own here,
# which no file has; zero points and orders say nothing new, or else they contradict the config.
_SURPLUS = (_ZEROS, _ORDER, "input_scale", "input_zero_point")
_Tensor = tuple[str, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class CompressedTensors(Format):
    """``pack-quantized``, ``int-quantized`` and ``float-quantized`` tensors and their configuration.

    Attributes:
        model: embedding and head of the model that it stores.
    """

    model: Outer = field(default_factory=Outer)

    joins: ClassVar[bool] = True
    outer: ClassVar[OuterUse] = "asked"
    lacks: ClassVar[Mapping[Feature, str]] = {
        # Seen: 5.23. It dequantizes all of them by one scheme.
        "mixed zero points": "transformers can't load asymmetric weights of several schemes",
    }

    def check(self, scheme: Scheme) -> None:
        number = scheme.number
        if number in _GROUPED:
            size, name = _GROUPED[number]
            wanted = Scheme.parse(name)
            if scheme.group_size != size or scheme.activation_bits not in (16, wanted.activation_bits):
                raise UnsupportedError(
                    f"scheme {scheme}: {number.name} has groups of {size}, and inputs of 16 or "
                    f"{wanted.activation_bits} bits: {name}a16 or {name}"
                )
            return
        if number not in (E4M3, *INTS):
            raise UnsupportedError(f"scheme {scheme}: compressed-tensors has no {number.name}; format bitsandbytes has")
        if number == E4M3:
            grouping = (scheme.rows, scheme.group_size)
            if grouping not in _E4M3_GROUPINGS:
                raise UnsupportedError(
                    f"scheme {scheme}: runtimes read E4M3 weights with one scale per channel (fp8-dynamic), per tensor "
                    "(fp8-static) or per block of 128 × 128 (fp8-block)"
                )
            return
        if scheme.float_inputs and (scheme.bits != 4 or not scheme.symmetric):
            raise UnsupportedError(
                f"scheme {scheme}: runtimes read E4M3 inputs beside symmetric 4-bit integers (w4afp8)"
            )
        plain = scheme.bits == 8 and scheme.group_size is None and scheme.symmetric
        if scheme.activation_bits == 8 and not (plain or scheme.float_inputs):
            raise UnsupportedError(
                f"scheme {scheme}: compressed-tensors stores int8 activations with w8a8-channel-sym weights only"
            )

    def check_experts(self, scheme: Scheme, *, apart: bool) -> None:
        # transformers 5.23 merges the experts of a layer as it loads them, from these two layouts alone.
        unread = stored_layout(scheme) == "int-quantized" or holds_floats(scheme) or scheme.float_inputs
        if not scheme.symmetric or unread:
            raise UnsupportedError(
                f"scheme {scheme}: transformers reads experts in symmetric integers with 16-bit activations and in "
                "E4M3 only (w4a16-g64, w8a16-g128, fp8); what else they have would be lost there. Give them one of "
                "these with an override (match: '*.experts.*')"
            )
        if apart and scheme.input_kind is not None:
            raise UnsupportedError(
                f"scheme {scheme}: transformers makes linears of these experts and quantizes what comes to them, which "
                "is not measured here; give them a scheme with 16-bit activations with an override "
                "(match: '*.experts.*', scheme: w8a16-g128)"
            )

    def check_dense_experts(self, schemes: Collection[Scheme], *, apart: bool) -> None:
        if apart:
            raise UnsupportedError(
                "transformers makes linears of this model's experts where others are quantized, and finds no weights "
                "for dense ones; quantize the experts too (w4a16-g64, w8a16-g128)"
            )
        # transformers 5.23 looks for codes in the tensors of experts wherever a group has integers, and drops the rest.
        others = [scheme for scheme in schemes if stored_layout(scheme) != "float-quantized"]
        if others:
            raise UnsupportedError(
                f"scheme {others[0]}: transformers can't load dense experts in tensors of their own beside integers; "
                "quantize the experts too (w4a16-g64, w8a16-g128, fp8), or use fp8 for all other linears"
            )

    def check_outer(self, site: Site, scheme: Scheme) -> bool:
        return check_outer(site, scheme)

    def for_model(self, outer: Mapping[str, Site], *, dense: bool) -> Format:
        return replace(self, model=Outer.of(outer, packed=dense)) if outer else self

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def specs(self, linear: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> list[TensorSpec]:
        if linear == self.model.embedding:
            return plain_specs(self.model, shape, scheme, scale_dtype)
        stored = _stored_tensors(shape, scheme, scale_dtype)
        return [TensorSpec(linear + leaf, dtype, size) for leaf, dtype, size in stored]

    def pack(self, linear: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        scheme = tensor.scheme
        if linear == self.model.embedding:
            scales = {f"{name}.weight_scale": tensor.scale for name in (linear, self.model.head) if name}
            return {f"{linear}.weight": tensor.codes, **scales}
        if holds_floats(scheme):
            return pack_floats(linear, tensor)
        if stored_layout(scheme) != "pack-quantized":
            return {f"{linear}.weight": tensor.codes, f"{linear}.weight_scale": tensor.scale}
        stored = {
            f"{linear}.weight_packed": pack_words(unsigned_codes(tensor.codes, scheme.bits), scheme.bits),
            f"{linear}.weight_scale": tensor.scale,
            f"{linear}.weight_shape": torch.tensor(tensor.shape, dtype=torch.int64),
        }
        if tensor.zero is not None:
            packed = pack_words(unsigned_codes(tensor.zero, scheme.bits).T.contiguous(), scheme.bits)
            stored[f"{linear}.weight_zero_point"] = packed.T.contiguous()
        return stored

    def unpack(self, linear: str, stored: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedTensor:
        if holds_floats(scheme):
            return unpack_floats(linear, stored, scheme)
        scale = stored[f"{linear}.weight_scale"]
        if f"{linear}.weight" in stored:
            return QuantizedTensor(stored[f"{linear}.weight"], scale, None, scheme)
        words = stored[f"{linear}.weight_packed"]
        rows, columns = words.shape[0], int(stored[f"{linear}.weight_shape"][1])
        codes = signed_codes(unpack_words(words, scheme.bits, columns), scheme.bits)
        zero = None
        if not scheme.symmetric:
            # Zero points are packed along the rows: all of them are needed to find those of a few rows.
            packed = stored[f"{linear}.weight_zero_point"].T.contiguous()
            zero = signed_codes(unpack_words(packed, scheme.bits, rows).T.contiguous(), scheme.bits)
        return QuantizedTensor(codes, scale, zero, scheme)

    def quantization_config(self, schemes: Mapping[str, Scheme], kept: Sequence[str]) -> dict[str, Any]:
        model = self.model
        tied = next((schemes[name] for name in model.names if model.head and name in schemes), None)
        if tied is not None:
            schemes = {**schemes, model.head: tied}
        layout = unpacked_layout if model.embedding else stored_layout
        layouts = {name: layout(schemes[name]) for name in model.names if name in schemes}
        layouts |= {name: stored_layout(schemes[name]) for name in model.heads if name in schemes}
        return written_config(schemes, [name for name in kept if name not in schemes], layouts)

    def remarks(self, source: Checkpoint) -> tuple[str, ...]:
        return self.model.remarks

    def cache_config(self, *, by_head: bool) -> Mapping[str, Any] | None:
        return {**CACHE_ARGS, "strategy": "attn_head"} if by_head else CACHE_ARGS

    def loaded_dense(self, schemes: Collection[Scheme]) -> Mapping[str, Any]:
        # transformers 5.23 dequantizes all linears by one group then, and no longer quantizes any inputs.
        one = len(schemes) == 1 and all(scheme.input_kind is None for scheme in schemes)
        return {"dequantize": True} if one else {}

    def files(self, declared: Mapping[str, Any]) -> Mapping[str, bytes]:
        return {}

    def find(self, checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Iterable[StoredLinear]:
        config, heads = read_config(declared), orphans(checkpoint)
        for name, info in checkpoint.infos.items():
            linear = name.rpartition(".")[0]
            if name.endswith(_PACKED) and info.dtype == torch.uint8:
                yield find_floats(checkpoint, linear, config)
            elif name.endswith(_PACKED):
                shape = require_shape(checkpoint, linear, "weight_shape", (2,), dtypes=_INTEGERS)
                rows, columns = checkpoint[shape].tolist()
                yield _linear(checkpoint, linear, (rows, columns), config)
            elif name.endswith(".weight") and info.dtype in _CODES:
                if len(info.shape) != 2:
                    raise UnsupportedError(f"tensor {name!r} has shape {list(info.shape)}; this reader knows matrices")
                found = _linear(checkpoint, linear, (info.shape[0], info.shape[1]), config)
                copies = tied_scales(checkpoint, linear, config.group_of(linear).targets, heads) if heads else ()
                yield replace(found, parts=(*found.parts, *copies))
            elif name.endswith(".weight") and f"{linear}.weight_scale" in checkpoint:
                yield _decompressed(checkpoint, linear, config, str(declared.get("quantization_status")))


@dataclass(frozen=True)
class _Compressed(StoredLinear):
    """``needed``: the parts that hold the weight. ``order``: holds the group of every column; None if they stand in it.

    ``zeros``: is stored although the scheme has none, and has to be zero; None if it isn't stored.
    """

    needed: tuple[str, ...]
    order: str | None
    zeros: str | None
    unmeasured: str = ""
    kind: InputKind | None = None

    @property
    def unmeasured_inputs(self) -> str:
        return self.unmeasured

    @property
    def input_kind(self) -> InputKind | None:
        return self.kind

    def read_rows(self, checkpoint: Checkpoint, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        stored: dict[str, torch.Tensor] = {}
        for part in self.needed:
            if part.endswith(".weight_shape"):
                stored[part] = torch.tensor([stop - start, self.shape[1]])
            elif part.endswith(".weight_zero_point"):
                stored[part] = self._zero_rows(checkpoint[part], start, stop)
            else:
                stored[part] = checkpoint.read_rows(part, start, stop)
        self._check_zeros(checkpoint)
        tensor = CompressedTensors().unpack(self.linear, stored, self.scheme)
        return tensor.dequantize(dtype) if self.order is None else _scattered(tensor, checkpoint, self.order, dtype)

    def read(self, checkpoint: Checkpoint) -> QuantizedTensor:
        if self.order is not None:
            raise UnsupportedError(f"{self.linear}: its groups are scattered columns (activation order)")
        self._check_zeros(checkpoint)
        stored = {part: checkpoint[part] for part in self.needed}
        return CompressedTensors().unpack(self.linear, stored, self.scheme)

    def _zero_rows(self, packed: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Zero points of a slice of rows, packed again as if the weight had only these."""
        every = unpack_words(packed.T.contiguous(), self.scheme.bits, self.shape[0])
        return pack_words(every[:, start:stop].contiguous(), self.scheme.bits).T.contiguous()

    def _check_zeros(self, checkpoint: Checkpoint) -> None:
        if self.zeros is not None and bool(checkpoint[self.zeros].float().any()):
            raise CheckpointError(f"{self.linear}: config.json says symmetric, tensor {self.zeros!r} says otherwise")


def _scattered(tensor: QuantizedTensor, checkpoint: Checkpoint, order: str, dtype: torch.dtype) -> torch.Tensor:
    """The weight of a tensor whose columns are in groups as ``order`` says; see :meth:`QuantizedTensor.dequantize`."""
    group = checkpoint[order].long()
    weight = tensor.scheme.number.values(tensor.codes)
    if tensor.zero is not None:
        weight -= tensor.zero.float()[:, group]
    return weight.mul_(tensor.scale.float()[:, group]).to(dtype)


@dataclass(frozen=True)
class _Decompressed(StoredLinear):
    """A weight that was decompressed and saved with its scales beside it: it is dense, its inputs may not be."""

    @property
    def holds_codes(self) -> bool:
        return False

    def read_rows(self, checkpoint: Checkpoint, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        return checkpoint.read_rows(f"{self.linear}.weight", start, stop).to(dtype)

    def read(self, checkpoint: Checkpoint) -> QuantizedTensor:
        raise UnsupportedError(f"{self.linear}: it was decompressed, and its codes are gone")


def _decompressed(checkpoint: Checkpoint, linear: str, config: Config, status: str) -> _Decompressed:
    info = checkpoint.infos[f"{linear}.weight"]
    if not config.decompressed:
        raise UnsupportedError(
            f"tensor {info.name!r} is {str(info.dtype).removeprefix('torch.')} with scales beside it, and "
            f"quantization_status is {status!r}: it is quantized while the model runs; compress the model, or save it "
            "decompressed"
        )
    if len(info.shape) != 2:
        raise UnsupportedError(f"tensor {info.name!r} has shape {list(info.shape)}; this reader knows matrices")
    scheme = config.group_of(linear).scheme
    beside = ("weight_scale", "weight_shape", *_SURPLUS)
    parts = tuple(name for part in beside if (name := f"{linear}.{part}") in checkpoint)
    return _Decompressed(linear, (info.shape[0], info.shape[1]), info.dtype, scheme, (info.name, *parts))


def _linear(checkpoint: Checkpoint, linear: str, shape: tuple[int, int], config: Config) -> StoredLinear:
    group = config.group_of(linear)
    scheme = group.scheme
    if holds_floats(scheme):
        return find_floats(checkpoint, linear, config)
    scale = checkpoint.infos[require_shape(checkpoint, linear, "weight_scale")]
    if scale.dtype not in FLOATS:
        raise UnsupportedError(
            f"tensor {scale.name!r} is {str(scale.dtype).removeprefix('torch.')}; this reader knows floating scales"
        )
    if min(shape) < 1 or shape[1] % scheme.columns_per_group(shape[1]):
        raise CheckpointError(f"quantized linear {linear!r}: a weight of shape {list(shape)} can't be in {scheme}")
    if not scheme.symmetric and stored_layout(scheme) != "pack-quantized":
        raise UnsupportedError(f"{linear}: {scheme}; this reader knows zero points beside packed weights alone")
    unpacked = f"{linear}.weight" in checkpoint and scheme.symmetric and scheme.activation_bits != 8
    layout = CompressedTensors(Outer(embedding=linear) if unpacked else Outer())
    specs = layout.specs(linear, shape, scheme, scale.dtype)
    for spec in specs:
        part = spec.name.removeprefix(f"{linear}.")
        dtypes = _INTEGERS if part == "weight_shape" else (spec.dtype,)
        stored = checkpoint.infos[require_shape(checkpoint, linear, part, dtypes=dtypes)]
        if stored.shape != spec.shape:
            raise CheckpointError(
                f"tensor {spec.name!r} has shape {list(stored.shape)}; a weight of shape {list(shape)} "
                f"in {scheme} needs {list(spec.shape)}"
            )
    needed = tuple(spec.name for spec in specs)
    surplus = tuple(name for part in _SURPLUS if (name := f"{linear}.{part}") in checkpoint and name not in needed)
    zeros = next((name for name in surplus if name.endswith(_ZEROS)), None)
    order = _order(checkpoint, linear, shape[1], scheme, declared=group.ordered)
    parts = needed + surplus
    return _Compressed(
        linear, shape, scale.dtype, scheme, parts, needed, order, zeros, group.unmeasured, group.input_kind
    )


def _order(checkpoint: Checkpoint, linear: str, columns: int, scheme: Scheme, *, declared: bool) -> str | None:
    """The tensor with the group of every column, where that isn't the one in which the columns stand."""
    name = f"{linear}.{_ORDER}"
    if name not in checkpoint:
        if declared:
            raise CheckpointError(f"quantized linear {linear!r} has no tensor {name!r}, and actorder is 'group'")
        return None
    group = checkpoint[require_shape(checkpoint, linear, _ORDER, (columns,), dtypes=_INTEGERS)].long()
    # The library's mark of an order that was never chosen.
    if bool((group == -1).any()):
        return None
    size = scheme.columns_per_group(columns)
    if torch.equal(group, torch.arange(columns) // size):
        return None
    if not declared:
        raise CheckpointError(
            f"tensor {name!r} puts columns into groups of its own, and config.json declares no actorder 'group'"
        )
    count = scheme.groups(columns)
    if int(group.min()) < 0 or not torch.equal(torch.bincount(group), torch.full((count,), size)):
        raise CheckpointError(f"tensor {name!r} does not put {size} columns into each of {count} groups")
    return name


@lru_cache
def _stored_tensors(shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> tuple[_Tensor, ...]:
    """What the name of each tensor of a linear ends in, its dtype and shape; thousands of experts have the same."""
    if holds_floats(scheme):
        return tuple((spec.name, spec.dtype, spec.shape) for spec in float_specs("", shape, scheme, scale_dtype))
    rows, columns = shape
    groups = scheme.groups(columns)
    scale = (".weight_scale", scale_dtype, (rows, groups))
    if stored_layout(scheme) != "pack-quantized":
        return (".weight", scheme.number.code_dtype, shape), scale
    packed = (_PACKED, torch.int32, (rows, packed_length(columns, scheme.bits)))
    stored = (packed, scale, (".weight_shape", torch.int64, (2,)))
    if scheme.symmetric:
        return stored
    return *stored, (".weight_zero_point", torch.int32, (packed_length(rows, scheme.bits), groups))
