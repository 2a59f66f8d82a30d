"""A student of distillation in the memory of one block: the gradients of whole models, block by block.

Forward, the hidden states at every block go onto a tape on disk; back, each block is loaded once more, its windows are
run again with gradients, and of the gradient of a weight only what it says of the scales is kept. The original runs
once, before the first step: what leaves its last block is kept for every window, and its head turns that into
predictions when they are asked for. Losses, steps and what is stored are those of a resident student.

Of a mixture one expert is loaded at a time beside its block, forward and back, and what its gradients say of its
scales is kept while it is there. An expert that no token of a step meets has no gradient in that step: its scales and
what Adam remembers of them stay as they are, and its own steps alone count where Adam corrects its means for having
begun at zero. (A resident tensor of all experts would have zeros there, and Adam would move on by its momentum; such a
step knows nothing of the text.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from llmconvert.compute.precision import compute_dtype
from llmconvert.engine.skeleton import Skeleton
from llmconvert.quantize.distil.optimizer import StoredAdam
from llmconvert.quantize.distil.requirements import differing
from llmconvert.quantize.distil.streamed_pair import StreamedPair
from llmconvert.quantize.distil.student import Subject
from llmconvert.quantize.distil.trained import Trained, begin_steps, step_by
from llmconvert.storage.checkpoint import Checkpoint, CheckpointView
from llmconvert.storage.shared import share_tensors
from llmconvert.training.loop import Learner
from llmconvert.training.pair import Pair

__all__ = ["StreamedStudent"]


class StreamedStudent:
    """See :class:`~llmconvert.quantize.distil.student.Student`.

    Args:
        subject: codes of which stay as they are.
        windows: token ids, each ``[1, length]``.
        work: a directory for the tape.
    """

    moved = 0

    def __init__(self, subject: Subject, windows: Sequence[torch.Tensor], work: Path) -> None:
        self._subject, view = subject, subject.view
        device = subject.context.device
        dtype = compute_dtype(device)
        # Only what both have outside their blocks is held once; what is in them is read when it is needed.
        outer = _outer(Skeleton(view, device, dtype)) - {*subject.artifact.apart, *subject.norms}
        outer -= set(differing(subject.original, view, outer))
        apart = frozenset((*view, *subject.original)) - outer
        original, artifact = share_tensors((subject.original, view), apart, device, dtype)
        self._weights = {name: _Scales(subject, name) for name in subject.weights}
        self._norms = {
            name: subject.artifact.norm(name, nn.Parameter(view[name].to(device, dtype, copy=True)))
            for name in subject.norms
        }
        trained: dict[str, Trained] = {**self._weights, **self._norms}
        self._optimizer = StoredAdam(trained, lr=subject.options.learning_rate, code_rate=0.0)
        student = _LearnedView(artifact, self)
        self.pair: Pair = StreamedPair(original, student, subject, self.take, windows, dtype, work)
        self.learner = Learner(
            {name: one.value for name, one in trained.items()},
            self._optimizer,
            self._optimizer.keep,
            subject.setting,
            self._optimizer.write,
        )

    def value(self, name: str) -> torch.Tensor | None:
        """The present values of a trained tensor; None of others."""
        if name in self._norms:
            return self._norms[name].value.detach()
        if name not in self._weights:
            return None
        shape, device = self._subject.view.infos[name].shape, self._subject.context.device
        value = nn.Parameter(torch.empty(shape, dtype=compute_dtype(device), device=device), requires_grad=False)
        self._subject.artifact.weight(name, value, None).write(self._state(name))
        return value.data

    def take(self, name: str, gradient: torch.Tensor) -> None:
        """Keep what the gradient of a trained tensor, shaped as it is, says of what is learned of it."""
        if name in self._norms:
            _add(self._norms[name].value, gradient)
            return
        parameter = nn.Parameter(gradient, requires_grad=False)  # whose values are not asked for
        parameter.grad = gradient
        slopes = self._subject.artifact.weight(name, parameter, None).slopes(self._state(name))
        _add(self._weights[name].value, torch.cat([slope.flatten() for slope in slopes.values()]))

    def stored(self, best: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """See :meth:`~llmconvert.quantize.distil.student.Student.stored`."""
        artifact, device = self._subject.artifact, self._subject.context.device

        def take(name: str) -> tuple[Trained, Mapping[str, torch.Tensor]]:
            if name in self._norms:
                return self._norms[name], {"value": best[f"{name}/value"].cpu()}
            learned = artifact.weight(name, nn.Parameter(torch.empty(0, device=device), requires_grad=False), None)
            state = {kind: best[f"{name}/{kind}"] for kind in self._weights[name].shapes}
            return learned, {part: value.cpu() for part, value in learned.stored(state).items()}

        return artifact.changed((*self._weights, *self._norms), take)

    def _state(self, name: str) -> Mapping[str, torch.Tensor]:
        state: Mapping[str, torch.Tensor] = self._optimizer.state[self._weights[name].value]
        return state


class _Scales:
    """What is learned of one weight, without the weight; see :class:`~llmconvert.quantize.distil.weights.Trained`.

    Attributes:
        shapes: of shares that are learned: the scales' factors, and their shifts where values are added to.
        value: has their gradients, one behind the other, as its own.
    """

    def __init__(self, subject: Subject, name: str) -> None:
        self.shapes = subject.artifact.shares(name)
        count = sum(map(math.prod, self.shapes.values()))
        self.value = nn.Parameter(torch.zeros(count, device=subject.context.device), requires_grad=False)

    def begin(self) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = {}
        for kind, shape in self.shapes.items():
            state |= begin_steps((kind,), torch.Size(shape), self.value.device)
        return state

    def move(self, state: Mapping[str, torch.Tensor], rate: float, code_rate: float, step: int) -> None:
        assert self.value.grad is not None
        slopes = self.value.grad.split([math.prod(shape) for shape in self.shapes.values()])
        found = {kind: slope.view(shape) for (kind, shape), slope in zip(self.shapes.items(), slopes, strict=True)}
        step_by(found, state, rate, step)

    def write(self, state: Mapping[str, torch.Tensor]) -> None:
        """Values are made when their block is loaded."""

    def stored(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {kind: state[kind] for kind in self.shapes}


def _add(value: nn.Parameter, gradient: torch.Tensor) -> None:
    found = gradient.to(value.dtype, copy=True)
    value.grad = found if value.grad is None else value.grad.add_(found)


class _LearnedView(CheckpointView):
    """The artifact's dense weights as they have become."""

    def __init__(self, base: Checkpoint, student: StreamedStudent) -> None:
        super().__init__(base)
        self._student = student

    def __getitem__(self, name: str) -> torch.Tensor:
        value = self._student.value(name)
        return super().__getitem__(name) if value is None else value

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        value = self._student.value(name)
        return super().read_rows(name, start, stop) if value is None else value[start:stop]


def _outer(skeleton: Skeleton) -> set[str]:
    """What the checkpoint calls the parameters outside the blocks."""
    return {stored for name, stored in skeleton.names.items() if not skeleton.holds(name)}
