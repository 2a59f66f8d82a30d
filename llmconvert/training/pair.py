"""A student and the teacher that it learns from, on the same windows of text: losses, gradients, divergence."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from llmconvert.memory import release_freed_memory
from llmconvert.training.loss import Losses, hidden_divergence, prediction_divergence
from llmconvert.training.model import ResidentModel

__all__ = ["Pair", "ResidentPair"]


class Pair(Protocol):
    """What a training asks of its two models.

    Attributes:
        device: where the student's parameters are.
        windows: token ids, each ``[1, length]``, that both read; asked for by their numbers.
    """

    device: torch.device
    windows: Sequence[torch.Tensor]

    def differentiate(self, numbers: Sequence[int], *, positions: slice, hidden: float) -> Losses:
        """Means over some windows, whose gradients are added to those of the student's parameters.

        Args:
            numbers: of the windows.
            positions: of each window whose predictions are compared.
            hidden: weight of the hidden states' error beside the divergence of predictions.
        """

    def divergence(self, numbers: Sequence[int]) -> float:
        """KL(teacher ‖ student) in nats, mean over the positions of each of some windows and over these."""


class ResidentPair:
    """Two models with all their weights in memory.

    Args:
        teacher: the original.
        student: what is trained.
        windows: token ids, each ``[1, length]``.
    """

    def __init__(self, teacher: ResidentModel, student: ResidentModel, windows: Sequence[torch.Tensor]) -> None:
        self._teacher, self._student = teacher, student
        self.device = student.skeleton.device
        self.windows: Sequence[torch.Tensor] = tuple(windows)
        self._expected: dict[int, torch.Tensor] = {}  # of windows that are looked at again and again

    def differentiate(self, numbers: Sequence[int], *, positions: slice, hidden: float) -> Losses:
        kl = apart = 0.0
        count = len(numbers)
        for window in (self.windows[number] for number in numbers):
            with torch.no_grad(), self._autocast():
                target_final, targets = self._teacher.decode(window)
            with self._autocast():
                final, states = self._student.decode(window)
                target_final, final = target_final[:, positions], final[:, positions]
                divergence, slope = prediction_divergence(
                    self._teacher, self._student, target_final, final, gradient=True, share=1 / count
                )
                with torch.set_grad_enabled(hidden > 0):  # told in any case; learned from, it keeps states in float32
                    error = hidden_divergence(targets, states)
            assert slope is not None
            del targets, states
            ends, slopes = [final], [slope / count]
            if hidden > 0:
                ends, slopes = [*ends, error], [*slopes, error.new_tensor(hidden / count)]
            torch.autograd.backward(ends, slopes)
            kl, apart = kl + divergence / count, apart + float(error.detach()) / count
            del final, error, slope, ends, slopes
            release_freed_memory()  # gradients lie between the activations of a window, whose holes the next one misses
        return Losses(kl, apart)

    @torch.no_grad()
    def divergence(self, numbers: Sequence[int]) -> float:
        kl = 0.0
        with self._autocast():
            for number in numbers:
                if number not in self._expected:
                    self._expected[number] = self._teacher.decode(self.windows[number])[0]
            for number in numbers:
                final, _ = self._student.decode(self.windows[number])
                target = self._expected[number]
                kl += prediction_divergence(self._teacher, self._student, target, final, gradient=False)[0]
        return kl / len(numbers)

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = self._student.skeleton.dtype
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype)
