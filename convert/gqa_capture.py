"""What the logit refit needs of a running model: attention inputs of some windows, and the rotary angles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["RotaryAngles", "keep_inputs"]


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


def keep_inputs(
    inputs: Iterator[torch.Tensor], picks: Sequence[int], kept: list[torch.Tensor], *, wide: bool
) -> Iterator[torch.Tensor]:
    """Pass inputs on, with a column of ones for biases if ``wide``, and keep those of the picked windows."""
    for batch, values in enumerate(inputs):
        complete = torch.cat([values, values.new_ones(len(values), 1)], dim=1) if wide else values
        if batch in picks:
            kept.append(complete.float())
        yield complete
