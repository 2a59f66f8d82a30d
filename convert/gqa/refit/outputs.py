"""Refit of an output projection to what attention should add, from sums over all calibration text."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from llmconvert.convert.gqa.refit.solve import ridge

__all__ = ["OutputFit"]


class OutputFit:
    """Sums for the ridge regression of one output projection.

    Args:
        name: of its weight, for errors.
        rows: per window its inputs ``[tokens, columns]``, what it should give ``[tokens, hidden]``, and how much each
            position counts ``[tokens]``.
        device: where they are summed.
    """

    def __init__(
        self, name: str, rows: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], device: torch.device
    ) -> None:
        self._name = name
        self._total = 0.0
        self._gram = self._cross = torch.zeros(0, 0, device=device)
        for inputs, targets, importance in rows:
            roots = importance.sqrt()[:, None]
            own, wanted = inputs.float() * roots, targets.float() * roots
            if not self._gram.numel():
                self._gram = own.new_zeros(own.shape[1], own.shape[1])
                self._cross = own.new_zeros(wanted.shape[1], own.shape[1])
            self._gram.addmm_(own.mT, own)
            self._cross.addmm_(wanted.mT, own)
            self._total += float(wanted.square().sum(dtype=torch.float64))

    def loss(self, weight: torch.Tensor) -> float:
        """Squared error over the squared target; ``weight`` is float32."""
        lost = (weight @ self._gram * weight).sum() - 2 * (weight * self._cross).sum()
        return max(0.0, (float(lost) + self._total) / self._total) if self._total else 0.0

    def fit(self, prior: torch.Tensor, strength: float) -> torch.Tensor:
        """The weight, drawn towards ``prior`` by a share of the mean second moment.

        Raises:
            CalibrationError: moments that cannot be factorized.
        """
        return ridge(self._name, self._gram, self._cross, prior, strength)
