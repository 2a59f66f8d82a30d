"""As much damping as a Hessian needs: a share of its mean diagonal that grows tenfold until the matrix factorizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from llmconvert.engine.statistics import Hessian
from llmconvert.errors import CalibrationError

__all__ = ["with_damping"]

T = TypeVar("T")

_MAX_DAMPING = 1.0


def with_damping(name: str, hessian: Hessian, first: float, attempt: Callable[[float], T | None]) -> T:
    """What ``attempt`` gives for the least damping that suffices.

    Args:
        name: of a linear, for errors.
        hessian: what is to be factorized, for errors.
        first: the share to begin with.
        attempt: called with a share of the mean diagonal; gives None if it does not suffice.

    Raises:
        CalibrationError: not even the mean diagonal itself does.
    """
    damping = first
    while damping <= _MAX_DAMPING:
        found = attempt(damping)
        if found is not None:
            return found
        damping *= 10
    raise CalibrationError(
        f"{name}: the Hessian of its inputs ({hessian.tokens} tokens, {len(hessian.matrix)} columns) cannot be "
        f"factorized even with damping {_MAX_DAMPING}; use more calibration text, or quantize this linear with rtn"
    )
