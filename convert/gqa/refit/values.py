"""Refit of values and output projections to what attention should add, at what the merged layer's heads attend to.

The merge weighs values by the second moments of the layer's input; what reaches the output projection are means of them
under attention, which are other directions. With attention as it is, an output is linear in the values' weights and in
the output projection's, so the two take turns: the output projection by ridge regression, the values by a few steps of
conjugate gradients. Few rows leave the output projection, which is fitted to all text afterwards, as it is, or both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from llmconvert.convert.gqa.refit.solve import conjugate_gradients, ridge
from llmconvert.convert.gqa.weights import LayerWeights

__all__ = ["ValueFit"]

_TURNS = 2
# Damping of the preconditioner, as shares of mean diagonals.
_DAMPING = 1e-2
# Fewer equations than so many times what each row of a weight multiplies would be fitted by heart.
_LEAST_ROWS, _LEAST_MEANS = 2, 4


class ValueFit:
    """One layer's values and output projection.

    Args:
        name: of the output projection, for errors.
        attended: what each query head attends to, means of inputs: ``[rows, heads, inputs]``, one tensor per window.
        targets: what attention should add, ``[rows, hidden]`` per window.
        importance: how much each row counts, ``[rows]`` per window.
        ridge: how strongly both weights are drawn to what they were, as a share of mean second moments.
        steps: of conjugate gradients.
    """

    def __init__(
        self,
        name: str,
        attended: Iterable[torch.Tensor],
        targets: Sequence[torch.Tensor],
        importance: Sequence[torch.Tensor],
        *,
        ridge: float,
        steps: int = 6,
    ) -> None:
        self._name, self._ridge, self._steps = name, ridge, steps
        roots = torch.cat(list(importance)).float().sqrt()
        self._targets = torch.cat(list(targets)).float().mul_(roots[:, None])
        parts, done = iter(attended), 0
        for part in parts:
            if not done:
                self._attended = part.new_empty(len(roots), *part.shape[1:], dtype=torch.float32)
            self._attended[done : done + len(part)] = part
            done += len(part)
        self._attended.mul_(roots[:, None, None])
        flat = self._attended.flatten(0, 1)
        self._moments = flat.mT @ flat
        self._power = self._moments.diagonal().mean()

    @staticmethod
    def enough(weights: LayerWeights, rows: int) -> bool:
        """Whether so many rows tell what values should be."""
        return rows * len(weights.output) >= _LEAST_MEANS * len(weights.value) * weights.value.shape[-1]

    def fit(self, weights: LayerWeights) -> LayerWeights:
        """``weights`` with values and, if there are rows enough for it, output projection refitted, in turns.

        Raises:
            CalibrationError: moments that cannot be factorized.
        """
        value, output = weights.value.float(), weights.output.float()
        if not self._power > 0:
            return weights  # nothing ever comes in here
        both = len(self._attended) >= _LEAST_ROWS * len(output) * output.shape[-1]
        inverse = _damped_inverse(self._moments)
        for _ in range(_TURNS):
            output = self._fit_output(value, output) if both else output
            value = value + self._change_of_value(value, output, inverse)
        return replace(weights, value=value, output=output)

    def loss(self, weights: LayerWeights) -> float:
        """Squared error over the squared target."""
        error = self._targets - self._added(weights.value.float(), weights.output.float())
        return float(error.square().sum() / self._targets.square().sum().clamp_min(torch.finfo(torch.float32).tiny))

    def _heads(self, value: torch.Tensor, heads: int) -> torch.Tensor:
        """What goes into the output projection, ``[rows, heads, head_dim]``."""
        by_head = value.repeat_interleave(heads // len(value), 0)
        return torch.einsum("nhi,hdi->nhd", self._attended, by_head)

    def _added(self, value: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nhd,hod->no", self._heads(value, len(output)), output)

    def _fit_output(self, value: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        inner = self._heads(value, len(output)).flatten(1)
        prior = output.transpose(0, 1).flatten(1)
        fitted = ridge(self._name, inner.mT @ inner, self._targets.mT @ inner, prior, self._ridge)
        by_head: torch.Tensor = fitted.unflatten(1, (len(output), -1))
        return by_head.transpose(0, 1).contiguous()

    def _change_of_value(self, value: torch.Tensor, output: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        shared = (len(value), -1)
        metric = (output.mT @ output).unflatten(0, shared).sum(1)
        back = _damped_inverse(metric)
        damping = self._ridge * metric.diagonal(dim1=1, dim2=2).mean() * self._power / len(output)

        def adjoint(error: torch.Tensor) -> torch.Tensor:
            by_head = torch.einsum("nhd,nhi->hdi", torch.einsum("no,hod->nhd", error, output), self._attended)
            summed: torch.Tensor = by_head.unflatten(0, shared).sum(1)
            return summed

        def normal(change: torch.Tensor) -> torch.Tensor:
            mapped: torch.Tensor = adjoint(self._added(change, output)) + damping * change
            return mapped

        error = adjoint(self._targets - self._added(value, output))
        return conjugate_gradients(normal, error, lambda residual: back @ residual @ inverse, self._steps)


def _damped_inverse(matrices: torch.Tensor) -> torch.Tensor:
    size = matrices.shape[-1]
    power = matrices.diagonal(dim1=-2, dim2=-1).mean().clamp_min(torch.finfo(matrices.dtype).tiny)
    found: torch.Tensor = torch.linalg.inv(matrices + _DAMPING * power * torch.eye(size, device=matrices.device))
    return found
