"""The two linear solvers of the refit: ridge regression from Gram matrices, and preconditioned conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmconvert.errors import CalibrationError

__all__ = ["conjugate_gradients", "ridge"]

# Tried in turn where rounding leaves a Gram matrix indefinite.
_DAMPING_STEPS = (1.0, 10.0, 100.0, 1000.0)


def ridge(name: str, gram: torch.Tensor, cross: torch.Tensor, prior: torch.Tensor, strength: float) -> torch.Tensor:
    """The weight W that minimizes ``‖X Wᵀ − Y‖² + λ ‖W − prior‖²``, computed in float64.

    Args:
        name: of the weight, for errors.
        gram: ``XᵀX``, ``[columns, columns]``.
        cross: ``YᵀX``, ``[rows, columns]``.
        prior: ``[rows, columns]``, what W is drawn towards.
        strength: λ as a share of the Gram matrix's mean diagonal.

    Returns:
        W in the dtype of ``prior``.

    Raises:
        CalibrationError: the Gram matrix cannot be factorized.
    """
    gram, cross, start = gram.double(), cross.double(), prior.double()
    diagonal = gram.diagonal().mean()
    if not diagonal > 0:
        return prior  # nothing ever comes in here
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for step in _DAMPING_STEPS:
        factor, info = torch.linalg.cholesky_ex(gram + step * strength * diagonal * identity)
        if not int(info):
            return (start + torch.cholesky_solve((cross - start @ gram).mT, factor).mT).to(prior.dtype)
    raise CalibrationError(
        f"{name}: the second moments of its input cannot be factorized; use more or other calibration text"
    )


def conjugate_gradients(
    apply: Callable[[torch.Tensor], torch.Tensor],
    target: torch.Tensor,
    precondition: Callable[[torch.Tensor], torch.Tensor],
    steps: int,
) -> torch.Tensor:
    """Approximately solve ``apply(x) = target`` for a symmetric positive definite linear map, from zero.

    Few steps regularize: directions that the data hardly determine are not moved (Hestenes & Stiefel 1952).
    """
    solution = torch.zeros_like(target)
    residual = target
    direction = scaled = precondition(residual)
    product = (residual * scaled).sum()
    for _ in range(steps):
        if not product > 0:
            break
        image = apply(direction)
        curvature = (direction * image).sum()
        if not curvature > 0:
            break
        length = product / curvature
        solution = solution + length * direction
        residual = residual - length * image
        scaled = precondition(residual)
        previous, product = product, (residual * scaled).sum()
        direction = scaled + product / previous * direction
    return solution
