"""A student of distillation with all its weights in memory: scales, norms and, where they may move, codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from llmconvert.compute.precision import compute_dtype
from llmconvert.quantize.distil.optimizer import StoredAdam
from llmconvert.quantize.distil.requirements import differing
from llmconvert.quantize.distil.student import Subject
from llmconvert.quantize.distil.trained import Trained, TrainedWeight
from llmconvert.storage.shared import share_tensors
from llmconvert.training.loop import Learner
from llmconvert.training.model import ResidentModel
from llmconvert.training.pair import Pair, ResidentPair

__all__ = ["ResidentStudent"]


class ResidentStudent:
    """See :class:`~llmconvert.quantize.distil.student.Student`."""

    def __init__(self, subject: Subject, windows: Sequence[torch.Tensor]) -> None:
        self._subject = subject
        original, view, device = subject.original, subject.view, subject.context.device
        dtype = compute_dtype(device)
        others = differing(original, view, set(view) - set(subject.artifact.apart))
        # A quantized head or embedding is not the original's, and is left as it is.
        apart = frozenset((*subject.artifact.apart, *subject.norms, *others))
        views = share_tensors((original, view), apart, device, dtype)
        teacher, student = (ResidentModel(one, device, dtype) for one in views)
        # With other norms or embeddings the artifact is in coordinates of its own: where its weights were before they
        # were quantized is not known.
        self._weights, norms = self._begin(student if others else teacher, student, dtype)
        self._trained: dict[str, Trained] = {**self._weights, **norms}
        optimizer = StoredAdam(self._trained, lr=subject.options.learning_rate, code_rate=subject.options.code_rate)
        self.pair: Pair = ResidentPair(teacher, student, windows)
        self.learner = Learner(
            {name: one.value for name, one in self._trained.items()},
            optimizer,
            optimizer.keep,
            subject.setting,
            optimizer.write,
        )
        self.moved = 0

    def stored(self, best: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """See :meth:`~llmconvert.quantize.distil.student.Student.stored`."""
        kept = {name: self._kept(best, name) for name in self._trained}
        self.moved = sum(one.moved(kept[name]) for name, one in self._weights.items())
        return self._subject.artifact.changed(self._trained, lambda name: (self._trained[name], kept[name]))

    @staticmethod
    def _kept(best: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
        prefix = f"{name}/"
        return {key.removeprefix(prefix): value.cpu() for key, value in best.items() if key.startswith(prefix)}

    def _begin(
        self, unquantized: ResidentModel, student: ResidentModel, dtype: torch.dtype
    ) -> tuple[dict[str, TrainedWeight], dict[str, Trained]]:
        """What is trained, by the names of dense tensors; codes begin towards the values of ``unquantized``."""
        subject, artifact = self._subject, self._subject.artifact
        values = student.train((*subject.weights, *subject.norms), dtype)
        own = unquantized.weights(subject.weights) if subject.options.code_rate else {}
        weights = {name: artifact.weight(name, values[name], own.get(name)) for name in subject.weights}
        return weights, {name: artifact.norm(name, values[name]) for name in subject.norms}
