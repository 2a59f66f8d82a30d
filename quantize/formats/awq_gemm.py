"""The AWQ format (GEMM version) as AutoAWQ defined it (https://github.com/casper-hansen/AutoAWQ): vLLM, transformers.

A linear of ``n`` inputs and ``r`` outputs is stored transposed: ``qweight`` int32 ``[n, r / 8]`` and ``qzeros`` int32
``[groups, r / 8]``, unsigned codes of 4 bits packed along the outputs, and ``scales`` float16 ``[groups, r]``. Within
a word, eight outputs lie in the order 0, 2, 4, 6, 1, 3, 5, 7, lowest bits first, which suits the kernel's unpacking.
Asymmetric only: the scale is always beside a zero point, stored as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from llmconvert.quantize.narrow import half_scale_dtype, half_scales
from llmconvert.quantize.numbers import Int
from llmconvert.quantize.pack import pack_words, signed_codes, unpack_words, unsigned_codes
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.checkpoint import Checkpoint, TensorSpec

__all__ = ["AwqGemm"]

_WORDS = ".qweight"
_BITS = 4
_NUMBER = Int(_BITS, symmetric=False)
_LANES = 8
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)


class _Config(Declared):
    """What is read of a config. The tensors tell the size of groups, and which linears have none."""

    silent: ClassVar[frozenset[str]] = frozenset(
        (
            *("quant_method", "group_size", "q_group_size", "modules_to_not_convert", "meta", "dynamic", "lm_head"),
            *("backend", "do_fuse", "modules_to_fuse", "fuse_max_seq_len", "exllama_config", "use_exllama"),
            *(
                "method",
                "desc_act",
                "model_name_or_path",
                "model_file_base_name",
                "dataset",
                "tokenizer",
                "damp_percent",
            ),
            *("true_sequential", "act_group_aware", "static_groups", "batch_size", "model_seqlen", "pad_token_id"),
        )
    )

    version: str | None = None
    checkpoint_format: str | None = None
    format: str | None = None
    bits: int | None = None
    w_bit: int | None = None
    zero_point: bool = True
    sym: bool = False
    pack_dtype: str | None = "int32"


class AwqGemm(Format):
    """``qweight``, ``qzeros`` and ``scales`` and their configuration."""

    loaders: ClassVar[Sequence[str]] = ("gptqmodel", "accelerate")

    def check(self, scheme: Scheme) -> None:
        if scheme.number != _NUMBER or scheme.activation_bits != 16:
            raise UnsupportedError(f"scheme {scheme}: awq stores asymmetric weights of 4 bits, w4a16-g128-asym for one")
        if scheme.group_size is None:
            raise UnsupportedError(f"scheme {scheme}: awq needs a group size, w4a16-g128-asym for one")

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        return half_scale_dtype(dtype)

    def specs(self, linear: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> list[TensorSpec]:
        rows, columns = shape
        if rows % _LANES:
            raise UnsupportedError(
                f"{linear}: a weight of shape {list(shape)}; awq needs a multiple of {_LANES} outputs; "
                "leave it dense with an override (scheme: none), or choose compressed-tensors"
            )
        groups = scheme.groups(columns)
        return [
            TensorSpec(f"{linear}.qweight", torch.int32, (columns, rows // _LANES)),
            TensorSpec(f"{linear}.qzeros", torch.int32, (groups, rows // _LANES)),
            TensorSpec(f"{linear}.scales", torch.float16, (groups, rows)),
        ]

    def pack(self, linear: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        assert tensor.zero is not None, "awq is asymmetric; check() refuses the rest"
        scales = half_scales(linear, tensor).T.contiguous()
        return {
            f"{linear}.qweight": _interleave(tensor.codes),
            f"{linear}.qzeros": _interleave(tensor.zero),
            f"{linear}.scales": scales,
        }

    def unpack(self, linear: str, stored: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedTensor:
        codes, zero = _deinterleave(stored[f"{linear}.qweight"]), _deinterleave(stored[f"{linear}.qzeros"])
        return QuantizedTensor(codes, stored[f"{linear}.scales"].T.contiguous(), zero, scheme)

    def quantization_config(self, schemes: Mapping[str, Scheme], kept: Sequence[str]) -> dict[str, Any]:
        used = sorted(set(schemes.values()), key=str)
        if len(used) > 1:
            raise UnsupportedError(
                f"schemes {', '.join(map(str, used))}: awq has one scheme per model; give overrides that one or none "
                "(scheme: none), or choose compressed-tensors or gptq"
            )
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": _BITS,
            "group_size": used[0].group_size,
            "zero_point": True,
            "modules_to_not_convert": list(kept),
        }

    def files(self, declared: Mapping[str, Any]) -> Mapping[str, bytes]:
        return {}

    def find(self, checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Iterable[StoredLinear]:
        found = _Config.read(declared)
        version = (found.version or found.checkpoint_format or found.format or "gemm").lower()
        bits, known = found.bits or found.w_bit or _BITS, found.zero_point and not found.sym
        if version != "gemm" or bits != _BITS or not known or found.pack_dtype != "int32":
            keys = ("version", "checkpoint_format", "format", "bits", "w_bit", "zero_point", "sym", "pack_dtype")
            raise UnsupportedError(
                f"an AWQ checkpoint with {settings(declared, *keys)}; this reader knows version gemm with 4 bits and "
                "zero points"
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
        return AwqGemm().unpack(self.linear, stored, self.scheme)


def _linear(checkpoint: Checkpoint, linear: str) -> _Awq:
    columns, words = require_matrix(checkpoint, linear, "qweight", dtypes=(torch.int32,))
    rows = words * _LANES
    groups, _ = require_matrix(checkpoint, linear, "scales", dtypes=FLOATS)
    require_shape(checkpoint, linear, "scales", (groups, rows))
    require_shape(checkpoint, linear, "qzeros", (groups, words), dtypes=(torch.int32,))
    if columns % groups:
        raise CheckpointError(
            f"quantized linear {linear!r} has {columns} inputs in {groups} groups, which do not divide"
        )
    scheme = Scheme(_NUMBER, columns // groups)
    parts = tuple(f"{linear}.{part}" for part in ("qweight", "qzeros", "scales"))
    return _Awq(linear, (rows, columns), model_dtype(checkpoint), scheme, parts)


def _interleave(codes: torch.Tensor) -> torch.Tensor:
    """Signed codes ``[rows, n]`` as words ``[n, rows / 8]``."""
    unsigned = unsigned_codes(codes, _BITS).T
    lanes = unsigned.reshape(unsigned.shape[0], -1, _LANES)[..., list(_ORDER)]
    return pack_words(lanes.reshape(unsigned.shape), _BITS)


def _deinterleave(words: torch.Tensor) -> torch.Tensor:
    """Words ``[n, rows / 8]`` as signed codes ``[rows, n]``."""
    count = words.shape[1] * _LANES
    lanes = unpack_words(words, _BITS, count).view(words.shape[0], -1, _LANES)[..., list(_INVERSE)]
    return signed_codes(lanes.reshape(words.shape[0], count), _BITS).T.contiguous()
