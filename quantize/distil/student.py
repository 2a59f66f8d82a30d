"""What is distilled, and what a student of it is to the job: its pair, its learner, and what is stored in the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import nn

from llmconvert.context import Context
from llmconvert.quantize.distil.options import DistilOptions
from llmconvert.quantize.distil.weights import LearnedWeight
from llmconvert.quantize.formats.base import Format
from llmconvert.quantize.formats.dense_view import QuantizedView
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.training.loop import Learner
from llmconvert.training.pair import Pair

__all__ = ["Student", "Subject"]


@dataclass(frozen=True, slots=True)
class Subject:
    """A quantized model that learns from its original.

    Attributes:
        original: dense weights, the teacher.
        artifact: the model as it is stored.
        view: the same as dense weights.
        format: that it is stored in.
        weights: tensors whose scales are trained, by their dense names.
        norms: norms that are trained.
        options: how.
        context: device, memory, progress.
    """

    original: Checkpoint
    artifact: Checkpoint
    view: QuantizedView
    format: Format
    weights: tuple[str, ...]
    norms: tuple[str, ...]
    options: DistilOptions
    context: Context

    #: The recipe's key of the learning rate, for errors.
    setting: ClassVar[str] = "quantize.distil.learning_rate"

    def learned(self, name: str, value: nn.Parameter, own: torch.Tensor | None = None) -> LearnedWeight:
        """One of :attr:`weights`, read from the artifact; ``value`` and ``own`` as :class:`LearnedWeight` has them."""
        start, stored, device = self.view.read_quantized(name), self.view.infos[name].dtype, self.context.device
        start = replace(
            start,
            codes=start.codes.to(device),
            scale=start.scale.to(device),
            zero=None if start.zero is None else start.zero.to(device),
            offset=None if start.offset is None else start.offset.to(device),
        )
        return LearnedWeight(start, value, stored, self.format.scale_dtype(start.scheme, stored), own)

    def packed(self, name: str, tensor: QuantizedTensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that the artifact has of a weight, made anew."""
        for part, found in self.format.pack(self.view.quantized[name].linear, tensor).items():
            # A part that says how a file is read, the order of columns for example, stays as it was.
            if part in self.artifact:
                yield part, found


class Student(Protocol):
    """A student in training.

    Attributes:
        pair: with its teacher, and the text.
        learner: what is trained of it.
        moved: codes that are not what they were, of what :meth:`stored` has given.
    """

    pair: Pair
    learner: Learner
    moved: int

    def stored(self, best: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the output that is not the artifact's own, by name, of what the learner has kept."""
