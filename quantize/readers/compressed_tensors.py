"""Reading compressed-tensors artifacts, llm-compressor's among them: ``pack-``, ``int-`` and ``float-quantized``.

The layouts are in :mod:`llmconvert.quantize.formats.compressed_tensors`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.codes import FP8
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.pack import pack_words, unpack_words
from llmconvert.quantize.readers.base import StoredLinear, require_shape
from llmconvert.quantize.scheme import Kind, Scheme
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["find"]

_PACKED = ".weight_packed"
_CODES = (torch.int8, FP8)
# Written by some producers beside the parts that a scheme needs; they say nothing that is not said otherwise.
_SURPLUS = ("weight_zero_point", "weight_g_idx", "input_scale", "output_scale")


def find(checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Iterator[StoredLinear]:
    """The quantized linears of a compressed-tensors checkpoint.

    Raises:
        UnsupportedError: a type of weights that this reader does not know.
        CheckpointError: parts are missing or contradict the config.
    """
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
        return load_format("compressed-tensors").unpack(self.linear, stored, self.scheme).dequantize(dtype)

    def read(self, checkpoint: Checkpoint) -> QuantizedTensor:
        stored = {part: checkpoint[part] for part in self.needed}
        return load_format("compressed-tensors").unpack(self.linear, stored, self.scheme)

    def _zero_rows(self, packed: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Zero points of a slice of rows, packed again as if the weight had only these."""
        every = unpack_words(packed.T.contiguous(), self.scheme.bits, self.shape[0])
        return pack_words(every[:, start:stop].contiguous(), self.scheme.bits).T.contiguous()


def _linear(checkpoint: Checkpoint, linear: str, shape: tuple[int, int], groups: list[_Group]) -> _Compressed:
    scheme = _scheme_for(linear, groups)
    scale = checkpoint.infos[require_shape(checkpoint, linear, "weight_scale")]
    specs = load_format("compressed-tensors").specs(linear, shape, scheme, scale.dtype)
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
        kinds: dict[tuple[str, int], Kind] = {("int", bits): "int" for bits in range(2, 9)}
        kinds["float", 8] = "fp8"
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
