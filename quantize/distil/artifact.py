"""A quantized model as it lies on disk, to be distilled: what of it can be learned, and where that is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from llmconvert.errors import UnsupportedError, UsageError
from llmconvert.quantize.distil.requirements import Counted, numbers_of, require_learnable
from llmconvert.quantize.distil.trained import LearnedValue, Trained, TrainedWeight
from llmconvert.quantize.distil.weights import LearnedWeight
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.formats.dense_view import QuantizedView, open_dense
from llmconvert.quantize.formats.reading import declared_quantization
from llmconvert.quantize.tensor import QuantizedTensor, SuperBlockScales
from llmconvert.storage.checkpoint import Checkpoint, TensorSpec
from llmconvert.storage.writer import DEFAULT_SHARD_BYTES, Layout, plan_layout

__all__ = ["DistilledArtifact", "PackedArtifact", "Take", "counted", "on_device"]

#: What is trained of a tensor, and what is to be stored of it, by its parts.
Take = Callable[[str], tuple[Trained, Mapping[str, torch.Tensor]]]


class DistilledArtifact(Protocol):
    """A quantized model as it lies on disk.

    Attributes:
        stored: its tensors as they are stored, its config and its files.
        layout: of its weight files, and of those of what is made of it.
        view: it with dense weights, by the names that the model has for them.
        apart: names of the view's tensors that are not the original's; some others may not be, too.
        in_codes: those of them that are stored as codes.
    """

    @property
    def stored(self) -> Checkpoint: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def view(self) -> Checkpoint: ...
    @property
    def apart(self) -> Collection[str]: ...
    @property
    def in_codes(self) -> Collection[str]: ...

    def original(self, source: Checkpoint) -> Checkpoint:
        """The model that it was made of, by the view's names."""

    def holds(self, name: str) -> bool:
        """Whether a matrix has scales that can be learned: whether it is quantized."""

    def check(self, name: str, *, moving: bool) -> None:
        """Refuse a matrix that is quantized in a way in which nothing can be learned, or no codes can move.

        Raises:
            UnsupportedError: naming tensor and scheme.
        """

    def shares(self, name: str) -> Mapping[str, tuple[int, int]]:
        """Shapes of what is learned of a matrix, by the names that its state has for them."""

    def groups(self, name: str) -> int:
        """How many groups of weights a matrix has."""

    def holds_norm(self, name: str) -> bool:
        """Whether the weight of a norm is stored as floats that can be learned."""

    def weight(self, name: str, value: nn.Parameter, own: torch.Tensor | None) -> TrainedWeight:
        """A matrix in training; see :class:`~llmconvert.quantize.distil.weights.LearnedWeight`."""

    def norm(self, name: str, value: nn.Parameter) -> LearnedValue:
        """The weight of a norm in training."""

    def changed(self, names: Iterable[str], take: Take) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of :attr:`stored` that are others now.

        Args:
            names: what was trained, as the view calls it.
            take: what has come of one of them; some may be asked for several times.
        """


class PackedArtifact:
    """A directory of safetensors whose ``config.json`` says how they are quantized.

    Raises:
        UsageError: it is not quantized.
        UnsupportedError: its format has no scales to learn.
    """

    def __init__(self, stored: Checkpoint, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        declared = declared_quantization(stored)
        if not declared:
            raise UsageError("distillation: the model is not quantized; there are no scales to learn")
        self._format = load_format(str(declared.get("quant_method", "")).lower())
        if "distillation" in self._format.lacks:
            raise UnsupportedError(f"distillation: {self._format.lacks['distillation']}")
        view = open_dense(stored, weights_only=True)
        assert isinstance(view, QuantizedView)
        self.stored, self.view = stored, view
        specs = (TensorSpec(info.name, info.dtype, info.shape) for info in stored.infos.values())
        self.layout = plan_layout(specs, max_shard_bytes)
        self.apart = self.in_codes = view.quantized

    def original(self, source: Checkpoint) -> Checkpoint:
        return source

    def holds(self, name: str) -> bool:
        return self.view.scheme_of(name) is not None

    def check(self, name: str, *, moving: bool) -> None:
        scheme = self.view.scheme_of(name)
        assert scheme is not None
        require_learnable(name, scheme, moving=moving)

    def shares(self, name: str) -> Mapping[str, tuple[int, int]]:
        scheme, (rows, columns) = self.view.scheme_of(name), self.view.infos[name].shape
        assert scheme is not None
        kinds = ("factor", "shift") if scheme.number.minima else ("factor",)
        return dict.fromkeys(kinds, (rows, scheme.groups(columns)))

    def groups(self, name: str) -> int:
        return math.prod(self.shares(name)["factor"])

    def holds_norm(self, name: str) -> bool:
        return True

    def weight(self, name: str, value: nn.Parameter, own: torch.Tensor | None) -> TrainedWeight:
        start, dtype = on_device(self.view.read_quantized(name), value.device), self.view.infos[name].dtype
        return LearnedWeight(start, value, dtype, self._format.scale_dtype(start.scheme, dtype), own)

    def norm(self, name: str, value: nn.Parameter) -> LearnedValue:
        return LearnedValue(self.stored[name].to(value.device), value)

    def changed(self, names: Iterable[str], take: Take) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            one, kept = take(name)
            if not isinstance(one, LearnedWeight):
                yield name, kept["value"]
                continue
            packed = self._format.pack(self.view.quantized[name].linear, one.tensor(kept))
            # A part that says how a file is read, the order of columns for example, stays as it was.
            yield from ((part, tensor) for part, tensor in packed.items() if part in self.stored)


def counted(artifact: DistilledArtifact, weights: Sequence[str], norms: Sequence[str]) -> Counted:
    """What of an artifact these matrices and norms are."""
    view, trained = artifact.view, {*weights, *norms}
    return Counted(
        sum(numbers_of(view, name) for name in weights),
        sum(artifact.groups(name) for name in weights),
        sum(math.prod(shape) for name in weights for shape in artifact.shares(name).values()),
        sum(numbers_of(view, name) for name in norms),
        sum(numbers_of(view, name) for name in artifact.apart if name not in trained),
    )


def on_device(start: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    """A quantized weight, moved there."""

    def there(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values.to(device)

    nested = start.nested
    if isinstance(nested, SuperBlockScales):
        nested = replace(
            nested,
            scale=nested.scale.to(device),
            subs=nested.subs.to(device),
            minimum=there(nested.minimum),
            sub_minima=there(nested.sub_minima),
        )
    codes, scale = start.codes.to(device), start.scale.to(device)
    return replace(start, codes=codes, scale=scale, zero=there(start.zero), offset=there(start.offset), nested=nested)
