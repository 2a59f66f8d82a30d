"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), head by head, and Adam for what has no heads.

A step moves every head's matrix by its averaged gradient with all singular values set to about one, so directions that
the text shows seldom are learned as fast as those that it shows all the time. A matrix that stacks heads is not
one map but many beside each other, and each is treated as its own; PyTorch's ``torch.optim.Muon`` takes the whole
matrix, and costs ten times as much on it. Steps have the size of AdamW's at a fifth of the learning rate, whatever the
shape (Liu et al. 2025, arXiv 2502.16982). Matrices without heads take Adam's: five products of a whole MLP matrix
with itself cost as much as a step of a thousand tokens does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from llmconvert.memory import row_slices
from llmconvert.training.adam import adam_step, corrections_of

__all__ = ["Muon", "orthogonalize"]

# The quintic of the post, iterated five times: singular values end between about 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# Root mean square of a step's entries, as a share of the learning rate.
_STEP_RMS = 0.2
# Adam takes slices of about so many numbers, whose copies are no larger than the cache.
_NUMBERS_AT_ONCE = 1 << 20


class Muon(torch.optim.Optimizer):
    """Muon on stacks of heads, Adam on other parameters.

    Args:
        rows: parameters whose first dimension holds heads one after the other: projections of the input, their
            biases, weights of norms.
        columns: parameters whose second dimension does: output projections.
        others: parameters that Adam moves, by a fifth of the learning rate times ``share``.
        share: of the others' steps.
        head_dim: size of a head.
        lr: learning rate.
        momentum: of the running mean of gradients, which is looked ahead by one step (Nesterov).
    """

    def __init__(
        self,
        rows: Iterable[nn.Parameter],
        columns: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter] = (),
        *,
        share: float = 1.0,
        head_dim: int,
        lr: float,
        momentum: float = 0.9,
    ) -> None:
        groups = [
            {"params": list(parameters), "kind": kind}
            for parameters, kind in ((rows, "rows"), (columns, "columns"), (others, "others"))
        ]
        super().__init__([group for group in groups if group["params"]], {"lr": lr, "momentum": momentum})
        self._head_dim, self._share = head_dim, share

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and group["kind"] == "others":
                    self._move_by_adam(parameter, parameter.grad, group["lr"] * _STEP_RMS * self._share)
                elif parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: nn.Parameter, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(mean, group["momentum"])
        if group["kind"] == "columns":
            heads = ahead.unflatten(1, (-1, self._head_dim)).transpose(0, 1)
            change = orthogonalize(heads).transpose(0, 1).reshape(parameter.shape)
        else:
            heads = ahead.reshape(-1, self._head_dim, parameter.shape[1] if parameter.dim() > 1 else 1)
            change = orthogonalize(heads).reshape(parameter.shape)
        parameter.add_(change, alpha=-group["lr"] * _STEP_RMS * math.sqrt(max(heads.shape[1:])))

    def _move_by_adam(self, parameter: nn.Parameter, gradient: torch.Tensor, rate: float) -> None:
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.int64)
            state |= {name: torch.zeros_like(parameter) for name in ("mean", "square")}
        state["step"] += 1
        corrections = corrections_of(int(state["step"]))
        weight, slope, mean, square = torch.atleast_1d(parameter, gradient, state["mean"], state["square"])
        for part in row_slices(weight.shape, _NUMBERS_AT_ONCE):
            weight[part].sub_(adam_step(slope[part], mean[part], square[part], corrections), alpha=rate)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """``[count, rows, columns]`` with every singular value moved to about one; zero stays zero.

    A step of the iteration multiplies the matrix by a polynomial of its Gram matrix, and so the Gram matrix by that
    polynomial twice: both are followed in the smaller dimension alone, and the matrix is multiplied once, at the end.
    """
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    norms = torch.linalg.matrix_norm(wide, keepdim=True)
    unit = wide / norms.clamp_min(torch.finfo(wide.dtype).tiny)
    gram = unit @ unit.mT
    first, third, fifth = _COEFFICIENTS
    product: torch.Tensor | None = None
    for _ in range(_ITERATIONS):
        # ``first · I + third · gram + fifth · gram²``
        factor = torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth)
        factor.diagonal(dim1=1, dim2=2).add_(first)
        product = factor if product is None else factor @ product
        gram = factor @ gram @ factor
    assert product is not None
    found: torch.Tensor = product @ unit
    return found.mT if matrices.shape[1] > matrices.shape[2] else found
