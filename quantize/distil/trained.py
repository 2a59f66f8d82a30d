"""What distillation trains: a parameter of the model, and what of it is stored; norms, which are stored as floats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import nn

from llmconvert.training.adam import adam_step, corrections_of

__all__ = ["LearnedValue", "Trained", "TrainedWeight", "begin_steps", "step_by"]


class Trained(Protocol):
    """Something that is trained.

    Attributes:
        value: what the model multiplies by, which has the gradient.
    """

    value: nn.Parameter

    def begin(self) -> dict[str, torch.Tensor]:
        """What training remembers of it, at the start."""

    def move(self, state: Mapping[str, torch.Tensor], rate: float, code_rate: float, step: int) -> None:
        """One step by the gradient of :attr:`value`."""

    def write(self, state: Mapping[str, torch.Tensor]) -> None:
        """Bring :attr:`value` up to date."""

    def stored(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What would be stored of it now."""


class TrainedWeight(Trained, Protocol):
    """A quantized weight that is trained, by what is learned of its scales."""

    def slopes(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The gradients of what is learned of the scales, by that of :attr:`value`."""

    def moved(self, stored: Mapping[str, torch.Tensor]) -> int:
        """How many codes of what :meth:`stored` gave are not those of the start."""


def begin_steps(learned: Iterable[str], shape: torch.Size, device: torch.device) -> dict[str, torch.Tensor]:
    """What Adam remembers of shares that are learned, and these themselves, by name, at the start."""
    return {f"{name}{kind}": torch.zeros(shape, device=device) for name in learned for kind in ("", "_mean", "_square")}


def step_by(slopes: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], rate: float, step: int) -> None:
    """One step of what is learned, by its gradients."""
    corrections = corrections_of(step)
    for name, slope in slopes.items():
        state[name].sub_(adam_step(slope, state[f"{name}_mean"], state[f"{name}_square"], corrections), alpha=rate)


class LearnedValue:
    """A tensor of floats: the weight of a norm.

    Args:
        start: as it is stored.
        value: where what it has become goes, of the same shape.
        restore: what the model multiplies by of what is stored; the same by default.
        order: where ``value`` has each element of ``start``, along its first dimension; as they come by default.
    """

    def __init__(
        self,
        start: torch.Tensor,
        value: nn.Parameter,
        restore: Callable[[torch.Tensor], torch.Tensor] = lambda stored: stored,
        order: torch.Tensor | None = None,
    ) -> None:
        self.start, self.value = start, value
        self._restore = restore
        self._rows = slice(None) if order is None else order
        size = start.float().abs()
        # Some norms multiply by one more than their weight, which may be near zero.
        self._size = size.clamp_min(0.1 * float(size.mean()) or 1.0)

    def begin(self) -> dict[str, torch.Tensor]:
        return begin_steps(("factor",), self._size.shape, self._size.device)

    def move(self, state: Mapping[str, torch.Tensor], rate: float, code_rate: float, step: int) -> None:
        assert self.value.grad is not None
        step_by({"factor": self.value.grad[self._rows].float() * self._size}, state, rate, step)

    def write(self, state: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            self.value[self._rows] = self._restore(self.stored(state)["value"]).to(self.value.dtype)

    def stored(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"value": (self.start.float() + self._size * state["factor"]).to(self.start.dtype)}
