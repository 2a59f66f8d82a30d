"""Statistics for the refit of attention: its inputs, rotary angles, and how much a position's error counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["PositionWeights", "RotaryAngles", "keep_inputs"]


# A state's mean square counts as this share of the median at least.
_LEAST_SQUARE = 0.1


class RotaryAngles:
    """Writes down the rotary cosines and sines that an attention module is called with, while it is open."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._found: tuple[torch.Tensor, torch.Tensor] | None = None

    def __enter__(self) -> RotaryAngles:
        self._hook = self._module.register_forward_pre_hook(self._record, with_kwargs=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self._hook.remove()

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pair = kwargs.get("position_embeddings")
        if pair is not None and (self._found is None or pair[0].shape[1] > self._found[0].shape[1]):
            self._found = pair[0], pair[1]

    @property
    def found(self) -> bool:
        """Whether the module was called with any."""
        return self._found is not None

    def by_pair(self, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[tokens, count]``, one column for each rotated pair."""
        if self._found is None or count == 0:
            return torch.zeros(0, 0, device=device), torch.zeros(0, 0, device=device)
        cosines, sines = (values[0].to(device, torch.float32) for values in self._found)
        # Every angle is there twice: side by side in some models, in two halves in the others.
        columns = slice(0, None, 2) if torch.equal(sines[:, 0::2], sines[:, 1::2]) else slice(count)
        return cosines[:, columns], sines[:, columns]


class PositionWeights:
    """How much an error at each position counts, written down for every window that enters a block while it is open.

    Every later layer divides the hidden state by its root mean square, so what an attention output does wrong counts
    relative to that: by one over the mean square. Some positions have states a thousand times larger than others
    (Sun et al. 2024, arXiv 2402.17762), and would outweigh all of them; states close to zero (the embedding of padding)
    count no more than states of a tenth of the median's square.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._found: list[torch.Tensor] = []

    def __enter__(self) -> PositionWeights:
        self._hook = self._block.register_forward_pre_hook(self._record)
        return self

    def __exit__(self, *exc: object) -> None:
        self._hook.remove()

    def _record(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._found.append(args[0].float().square().mean(-1).reshape(-1))

    def by_window(self) -> list[torch.Tensor]:
        """``[tokens]`` per window, in the order in which they entered; one on the average."""
        squares = torch.cat(self._found)
        least = (_LEAST_SQUARE * squares.median()).clamp_min(torch.finfo(torch.float32).tiny)
        weights = squares.clamp_min(least).reciprocal()
        return list((weights / weights.mean()).split([len(found) for found in self._found]))


def keep_inputs(
    inputs: Iterator[torch.Tensor], picks: Mapping[int, torch.Tensor], kept: list[torch.Tensor], *, wide: bool
) -> Iterator[torch.Tensor]:
    """Pass inputs on, with a column of ones for biases if ``wide``, and keep those of picked windows.

    ``picks`` tells of each which positions are of interest; it is kept up to the last of them.
    """
    for batch, values in enumerate(inputs):
        complete = torch.cat([values, values.new_ones(len(values), 1)], dim=1) if wide else values
        if batch in picks:
            kept.append(complete[: int(picks[batch][-1]) + 1].to(torch.float32, copy=True))
        yield complete
