"""Our own reader of quantized artifacts: a checkpoint seen with dense weights, dequantized as rows are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmconvert.checkpoint import Checkpoint, CheckpointView, TensorInfo
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.codes import FP8
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.pack import pack_words, unpack_words
from llmconvert.quantize.scheme import Kind, Scheme, input_kind
from llmconvert.quantize.tensor import QuantizedTensor

__all__ = ["QuantizedView", "open_dense"]

_PACKED = ".weight_packed"
_CODES = (torch.int8, FP8)
_PARTS = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point")


def open_dense(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself if it is dense, a dequantizing view of it if it is quantized.

    Raises:
        UnsupportedError: quantized in a format that this reader does not know.
        CheckpointError: the tensors contradict the config.
    """
    declared = checkpoint.config.get("quantization_config")
    return QuantizedView(checkpoint, declared) if declared else checkpoint


@dataclass(frozen=True, slots=True)
class _Quantized:
    """One quantized linear of the stored checkpoint."""

    linear: str
    scheme: Scheme
    shape: tuple[int, int]


class QuantizedView(CheckpointView):
    """A compressed-tensors checkpoint as dense weights in the dtype of its scales.

    Args:
        base: the checkpoint as stored.
        declared: its ``quantization_config``.
    """

    def __init__(self, base: Checkpoint, declared: Mapping[str, Any]) -> None:
        super().__init__(base)
        if declared.get("quant_method") != "compressed-tensors":
            raise UnsupportedError(
                f"quantized with {declared.get('quant_method')!r}; this reader knows compressed-tensors"
            )
        self._format = load_format("compressed-tensors")
        groups = [_Group.parse(value) for value in declared["config_groups"].values()]
        self.config = {key: value for key, value in base.config.items() if key != "quantization_config"}
        #: Weight name → its quantized linear.
        self.quantized: dict[str, _Quantized] = {}
        infos: dict[str, TensorInfo] = {}
        for name, info in base.infos.items():
            found = self._quantized_at(name, info, groups)
            if found is not None:
                self._check_parts(found)
                weight = f"{found.linear}.weight"
                self.quantized[weight] = found
                scale = base.infos[f"{found.linear}.weight_scale"]
                infos[weight] = TensorInfo(weight, scale.dtype, found.shape, info.shard)
            elif not self._is_part(name):
                infos[name] = info
        self.infos = infos
        inputs = {weight: input_kind(found.scheme) for weight, found in self.quantized.items()}
        self.quantized_inputs = {weight: kind for weight, kind in inputs.items() if kind is not None}

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme a weight is stored in; None for one that is dense."""
        found = self.quantized.get(name)
        return found.scheme if found else None

    def read_quantized(self, name: str) -> QuantizedTensor:
        """The canonical tensor behind a dense weight's name."""
        found = self.quantized[name]
        stored = {part: self.base[part] for part in self._stored_names(found)}
        return self._format.unpack(found.linear, stored, found.scheme)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        found = self.quantized.get(name)
        if found is None:
            return super().read_rows(name, start, stop)
        if stop <= start:
            return torch.empty((0, found.shape[1]), dtype=self.infos[name].dtype)
        stored: dict[str, torch.Tensor] = {}
        for part in self._stored_names(found):
            if part.endswith(".weight_shape"):
                stored[part] = torch.tensor([stop - start, found.shape[1]])
            elif part.endswith(".weight_zero_point"):
                stored[part] = self._zero_rows(found, part, start, stop)
            else:
                stored[part] = self.base.read_rows(part, start, stop)
        return self._format.unpack(found.linear, stored, found.scheme).dequantize(self.infos[name].dtype)

    def _zero_rows(self, found: _Quantized, part: str, start: int, stop: int) -> torch.Tensor:
        """Zero points of a slice of rows, packed again as if the weight had only these."""
        every = unpack_words(self.base[part].T.contiguous(), found.scheme.bits, found.shape[0])
        return pack_words(every[:, start:stop].contiguous(), found.scheme.bits).T.contiguous()

    def _stored_names(self, found: _Quantized) -> list[str]:
        return [spec.name for spec in self._format.specs(found.linear, found.shape, found.scheme, torch.float32)]

    def _check_parts(self, found: _Quantized) -> None:
        """Refuse a linear with a missing part, or one of another shape than its scheme says."""
        for spec in self._format.specs(found.linear, found.shape, found.scheme, torch.float32):
            stored = self.base.infos.get(spec.name)
            if stored is None:
                raise CheckpointError(f"quantized linear {found.linear!r} has no tensor {spec.name!r}")
            if stored.shape != spec.shape:
                raise CheckpointError(
                    f"tensor {spec.name!r} has shape {list(stored.shape)}; a weight of shape {list(found.shape)} "
                    f"in {found.scheme} needs {list(spec.shape)}"
                )

    def _quantized_at(self, name: str, info: TensorInfo, groups: list[_Group]) -> _Quantized | None:
        if name.endswith(_PACKED):
            linear = name.removesuffix(_PACKED)
            if f"{linear}.weight_shape" not in self.base:
                raise CheckpointError(f"quantized linear {linear!r} has no tensor '{linear}.weight_shape'")
            rows, columns = self.base[f"{linear}.weight_shape"].tolist()
            return _Quantized(linear, _scheme_for(linear, groups), (rows, columns))
        if name.endswith(".weight") and info.dtype in _CODES:
            linear = name.removesuffix(".weight")
            return _Quantized(linear, _scheme_for(linear, groups), (info.shape[0], info.shape[1]))
        return None

    def _is_part(self, name: str) -> bool:
        return any(name.endswith(part) and _has_weight(self.base, name.removesuffix(part)) for part in _PARTS)


def _has_weight(checkpoint: Checkpoint, linear: str) -> bool:
    stored = checkpoint.infos.get(f"{linear}.weight")
    return f"{linear}{_PACKED}" in checkpoint or (stored is not None and stored.dtype in _CODES)


@dataclass(frozen=True, slots=True)
class _Group:
    """A config group: the linears it names, by pattern or by class, and their scheme."""

    targets: tuple[str, ...]
    scheme: Scheme

    @classmethod
    def parse(cls, group: Mapping[str, Any]) -> _Group:
        weights = group["weights"]
        kinds: Mapping[tuple[str, int], Kind] = {("float", 8): "fp8"} | {("int", bits): "int" for bits in range(2, 9)}
        kind = kinds.get((weights["type"], weights["num_bits"]))
        if kind is None or weights["strategy"] not in ("group", "channel"):
            raise UnsupportedError(
                f"compressed-tensors weights of {weights['num_bits']}-bit type {weights['type']!r} with strategy "
                f"{weights['strategy']!r}; this reader knows int and 8-bit float weights by group or channel"
            )
        activations = group.get("input_activations")
        size = weights["group_size"] if weights["strategy"] == "group" else None
        bits = activations["num_bits"] if activations else 16
        scheme = Scheme(weights["num_bits"], size, weights["symmetric"], bits, kind)
        return cls(tuple(group["targets"]), scheme)

    def names(self, linear: str) -> bool:
        """Whether the group names a linear. A checkpoint's names may lack the prefix that its modules' names have."""
        return any(
            re.match(target[3:], linear) is not None
            if target.startswith("re:")
            else target == linear or target.endswith(f".{linear}")
            for target in self.targets
        )


def _scheme_for(linear: str, groups: list[_Group]) -> Scheme:
    """Names and patterns come before classes, as in every reader of the format."""
    for group in groups:
        if group.names(linear):
            return group.scheme
    for group in groups:
        if "Linear" in group.targets:
            return group.scheme
    raise CheckpointError(f"linear {linear!r} is stored quantized, but no config group of config.json names it")
