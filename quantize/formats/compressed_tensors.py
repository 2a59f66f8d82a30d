"""The compressed-tensors format (https://github.com/vllm-project/compressed-tensors): vLLM, transformers, SGLang.

Three of its layouts: ``pack-quantized`` for integer weights of 2 to 8 bits with 16-bit activations (codes packed into
int32 words along the columns, zero points along the rows), ``int-quantized`` for 8-bit weights with 8-bit activations
(codes as int8, activations quantized per token while running), and ``float-quantized`` for E4M3 weights, with or
without E4M3 activations. Artifacts of llm-compressor and others are read in all three.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.base import Feature, Format, StoredLinear, require_shape
from llmconvert.quantize.numbers import E4M3, Int, Number
from llmconvert.quantize.pack import pack_words, packed_length, signed_codes, unpack_words, unsigned_codes
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.checkpoint import Checkpoint, TensorSpec

__all__ = ["CompressedTensors"]

_PACKED = ".weight_packed"
_INTS = tuple(Int(bits, symmetric) for bits in range(2, 9) for symmetric in (True, False))
_CODES = (torch.int8, E4M3.code_dtype)
# Written by some producers beside the parts that a scheme needs; they say nothing that is not said otherwise.
_SURPLUS = ("weight_zero_point", "weight_g_idx", "input_scale", "output_scale")


class CompressedTensors(Format):
    """``pack-quantized``, ``int-quantized`` and ``float-quantized`` tensors and their configuration."""

    lacks: ClassVar[Mapping[Feature, str]] = {
        # Seen: 5.23. It dequantizes all of them by one scheme.
        "mixed zero points": "transformers can't load asymmetric weights of several schemes",
    }

    def check(self, scheme: Scheme) -> None:
        if scheme.number not in (E4M3, *_INTS):
            raise UnsupportedError(
                f"scheme {scheme}: compressed-tensors has no {scheme.number.name}; format bitsandbytes has"
            )
        if scheme.number == E4M3:
            if scheme.group_size is not None:
                raise UnsupportedError(
                    f"scheme {scheme}: runtimes read E4M3 weights with one scale per channel only (w8a8-channel-fp8)"
                )
            return
        if scheme.activation_bits == 8 and (scheme.bits != 8 or scheme.group_size is not None or not scheme.symmetric):
            raise UnsupportedError(
                f"scheme {scheme}: compressed-tensors stores int8 activations with w8a8-channel-sym weights only"
            )

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def specs(self, linear: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> list[TensorSpec]:
        rows, columns = shape
        groups = scheme.groups(columns)
        scale = TensorSpec(f"{linear}.weight_scale", scale_dtype, (rows, groups))
        if _layout(scheme) != "pack-quantized":
            return [TensorSpec(f"{linear}.weight", scheme.number.code_dtype, shape), scale]
        packed = (rows, packed_length(columns, scheme.bits))
        specs = [
            TensorSpec(f"{linear}.weight_packed", torch.int32, packed),
            scale,
            TensorSpec(f"{linear}.weight_shape", torch.int64, (2,)),
        ]
        if not scheme.symmetric:
            zeros = (packed_length(rows, scheme.bits), groups)
            specs.append(TensorSpec(f"{linear}.weight_zero_point", torch.int32, zeros))
        return specs

    def pack(self, linear: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        scheme = tensor.scheme
        if _layout(scheme) != "pack-quantized":
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
        scale = stored[f"{linear}.weight_scale"]
        if _layout(scheme) != "pack-quantized":
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
        by_scheme: dict[Scheme, list[str]] = {}
        for linear, scheme in schemes.items():
            by_scheme.setdefault(scheme, []).append(linear)
        # The commonest scheme is for every linear that nothing else names; names win over classes in every reader.
        ordered = sorted(by_scheme, key=lambda scheme: -len(by_scheme[scheme]))
        groups = {
            f"group_{index}": {
                "targets": ["Linear"] if index == 0 else by_scheme[scheme],
                "weights": _weight_args(scheme),
                "input_activations": _activation_args(scheme),
                "output_activations": None,
                "format": _layout(scheme),
            }
            for index, scheme in enumerate(ordered)
        }
        layouts = {_layout(scheme) for scheme in ordered}
        return {
            "quant_method": "compressed-tensors",
            "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(kept),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def files(self, declared: Mapping[str, Any]) -> Mapping[str, bytes]:
        return {}

    def find(self, checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Iterable[StoredLinear]:
        groups = [_Group.parse(value) for value in declared["config_groups"].values()]
        for name, info in checkpoint.infos.items():
            if name.endswith(_PACKED):
                linear = name.removesuffix(_PACKED)
                rows, columns = checkpoint[require_shape(checkpoint, linear, "weight_shape", (2,))].tolist()
                yield _linear(checkpoint, linear, (rows, columns), groups)
            elif name.endswith(".weight") and info.dtype in _CODES:
                yield _linear(checkpoint, name.removesuffix(".weight"), (info.shape[0], info.shape[1]), groups)


@dataclass(frozen=True)
class _Compressed(StoredLinear):
    """``needed``: the parts that hold the weight; ``parts`` may have others."""

    needed: tuple[str, ...]

    def read_rows(self, checkpoint: Checkpoint, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        stored: dict[str, torch.Tensor] = {}
        for part in self.needed:
            if part.endswith(".weight_shape"):
                stored[part] = torch.tensor([stop - start, self.shape[1]])
            elif part.endswith(".weight_zero_point"):
                stored[part] = self._zero_rows(checkpoint[part], start, stop)
            else:
                stored[part] = checkpoint.read_rows(part, start, stop)
        return CompressedTensors().unpack(self.linear, stored, self.scheme).dequantize(dtype)

    def read(self, checkpoint: Checkpoint) -> QuantizedTensor:
        stored = {part: checkpoint[part] for part in self.needed}
        return CompressedTensors().unpack(self.linear, stored, self.scheme)

    def _zero_rows(self, packed: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Zero points of a slice of rows, packed again as if the weight had only these."""
        every = unpack_words(packed.T.contiguous(), self.scheme.bits, self.shape[0])
        return pack_words(every[:, start:stop].contiguous(), self.scheme.bits).T.contiguous()


def _linear(checkpoint: Checkpoint, linear: str, shape: tuple[int, int], groups: list[_Group]) -> _Compressed:
    scheme = _scheme_for(linear, groups)
    scale = checkpoint.infos[require_shape(checkpoint, linear, "weight_scale")]
    specs = CompressedTensors().specs(linear, shape, scheme, scale.dtype)
    for spec in specs:
        stored = checkpoint.infos[require_shape(checkpoint, linear, spec.name.removeprefix(f"{linear}."))]
        if stored.shape != spec.shape:
            raise CheckpointError(
                f"tensor {spec.name!r} has shape {list(stored.shape)}; a weight of shape {list(shape)} "
                f"in {scheme} needs {list(spec.shape)}"
            )
    needed = tuple(spec.name for spec in specs)
    surplus = tuple(name for part in _SURPLUS if (name := f"{linear}.{part}") in checkpoint and name not in needed)
    return _Compressed(linear, shape, scale.dtype, scheme, needed + surplus, needed)


@dataclass(frozen=True, slots=True)
class _Group:
    """A config group: the linears it names, by pattern or by class, and their scheme."""

    targets: tuple[str, ...]
    scheme: Scheme

    @classmethod
    def parse(cls, group: Mapping[str, Any]) -> _Group:
        weights = group["weights"]
        number = _number(weights)
        if number is None or weights["strategy"] not in ("group", "channel"):
            raise UnsupportedError(
                f"compressed-tensors weights of {weights['num_bits']}-bit type {weights['type']!r} with strategy "
                f"{weights['strategy']!r}; this reader knows int and 8-bit float weights by group or channel"
            )
        activations = group.get("input_activations")
        size = weights["group_size"] if weights["strategy"] == "group" else None
        bits = activations["num_bits"] if activations else 16
        return cls(tuple(group["targets"]), Scheme(number, size, bits))

    def names(self, linear: str) -> bool:
        """Whether the group names a linear. A checkpoint's names may lack the prefix that its modules' names have."""
        return any(
            re.match(target[3:], linear) is not None
            if target.startswith("re:")
            else target == linear or target.endswith(f".{linear}")
            for target in self.targets
        )


def _number(weights: Mapping[str, Any]) -> Number | None:
    """What a config's weights are; None for what is not read here."""
    if weights["type"] == "float":
        return E4M3 if (weights["num_bits"], weights["symmetric"]) == (E4M3.bits, True) else None
    number = Int(weights["num_bits"], weights["symmetric"])
    return number if weights["type"] == "int" and number in _INTS else None


def _scheme_for(linear: str, groups: list[_Group]) -> Scheme:
    """Names and patterns come before classes, as in every reader of the format."""
    for group in groups:
        if group.names(linear):
            return group.scheme
    for group in groups:
        if "Linear" in group.targets:
            return group.scheme
    raise CheckpointError(f"linear {linear!r} is stored quantized, but no config group of config.json names it")


def _layout(scheme: Scheme) -> str:
    if scheme.number == E4M3:
        return "float-quantized"
    return "int-quantized" if scheme.activation_bits == 8 else "pack-quantized"


def _type(scheme: Scheme) -> str:
    return "float" if scheme.number == E4M3 else "int"


def _weight_args(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": _type(scheme),
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _activation_args(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.activation_bits == 16:
        return None
    return {
        "num_bits": 8,
        "type": _type(scheme),
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
        "observer": None,
        "observer_kwargs": {},
    }
