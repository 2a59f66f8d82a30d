"""What is distilled, and what a student of it is to the job: its pair, its learner, and what is stored in the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from llmconvert.context import Context
from llmconvert.quantize.distil.artifact import DistilledArtifact
from llmconvert.quantize.distil.options import DistilOptions
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.training.loop import Learner
from llmconvert.training.pair import Pair

__all__ = ["Student", "Subject"]


@dataclass(frozen=True, slots=True)
class Subject:
    """A quantized model that learns from its original.

    Attributes:
        original: dense weights, the teacher, by the names of the view.
        artifact: the model as it lies on disk.
        weights: tensors whose scales are trained, by their dense names.
        norms: norms that are trained.
        options: how.
        context: device, memory, progress.
    """

    original: Checkpoint
    artifact: DistilledArtifact
    weights: tuple[str, ...]
    norms: tuple[str, ...]
    options: DistilOptions
    context: Context

    #: The recipe's key of the learning rate, for errors.
    setting: ClassVar[str] = "quantize.distil.learning_rate"

    @property
    def view(self) -> Checkpoint:
        """The artifact as dense weights."""
        return self.artifact.view


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
