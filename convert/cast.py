"""Casting floating-point tensors, with an account of what the cast cost, and checkpoints seen through a cast.

NaN and infinities exist in every floating-point type here; they stay what they are and are counted. A finite value
beyond the target's range becomes its largest finite value, and is counted: the caller decides if that is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from llmconvert.compute.narrowing import FADED, LOST, bounds
from llmconvert.errors import UnsupportedError
from llmconvert.storage.checkpoint import Checkpoint, CheckpointView

__all__ = [
    "CASTABLE",
    "TARGETS",
    "CastErrors",
    "CastView",
    "Overflow",
    "cast_into",
    "check_overflow",
    "check_underflow",
    "with_dtype",
]

Overflow = Literal["error", "clip"]

#: What can be cast to, and from. Other dtypes (integers, bool, 8-bit floats) pass through untouched.
TARGETS = (torch.float32, torch.float16, torch.bfloat16)
CASTABLE = (torch.float64, *TARGETS)

_LOSSLESS = {
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
    *((dtype, dtype) for dtype in CASTABLE),
}
# Pieces that fit a core's cache with their scratch, and stay below torch's threshold of 2**15 elements for spreading
# an operation over threads: the pipeline's own threads do that with less waiting.
_PIECE = 32_256
# Sums of squares below it are taken again in float64.
_SMALL = 1e-20


@dataclass(frozen=True, slots=True)
class CastErrors:
    """What casting cost.

    Attributes:
        largest_relative: largest ``|cast(x) - x| / |x|`` over finite values within the target's range; 1 where a value
            became zero.
        overflows: finite values beyond the target's range.
        largest_overflow: the one of largest magnitude, 0 if there is none.
        underflows: values other than zero that became zero.
        non_finite: NaN and infinities in the source.
        squares: sum of the squares of all finite values; 0 where the target's range is no narrower.
        faded: sum of the squares of the errors of values below the target's range, which are zero or near it there.
    """

    largest_relative: float = 0.0
    overflows: int = 0
    largest_overflow: float = 0.0
    underflows: int = 0
    non_finite: int = 0
    squares: float = 0.0
    faded: float = 0.0

    def __add__(self, other: CastErrors) -> CastErrors:
        return CastErrors(
            max(self.largest_relative, other.largest_relative),
            self.overflows + other.overflows,
            max(self.largest_overflow, other.largest_overflow, key=abs),
            self.underflows + other.underflows,
            self.non_finite + other.non_finite,
            self.squares + other.squares,
            self.faded + other.faded,
        )


def cast_into(source: torch.Tensor, out: torch.Tensor) -> CastErrors:
    """Fill ``out`` with ``source`` rounded to nearest, ties to even; values out of range are clipped.

    Args:
        source: contiguous CPU tensor ``[n]`` of a dtype in :data:`CASTABLE`.
        out: contiguous CPU tensor ``[n]``.
    """
    if (source.dtype, out.dtype) in _LOSSLESS:
        return _widen(source, out)
    wide = torch.float64 if source.dtype == torch.float64 else torch.float32
    narrower = torch.finfo(out.dtype).tiny > torch.finfo(source.dtype).tiny
    scratch = torch.empty(2, min(_PIECE, source.numel()), dtype=wide)
    errors = CastErrors()
    for start in range(0, source.numel(), _PIECE):
        piece, target = source[start : start + _PIECE], out[start : start + _PIECE]
        values, error = scratch[0, : piece.numel()], scratch[1, : piece.numel()]
        if piece.dtype == wide:
            values = piece
        else:
            values.copy_(piece)
        target.copy_(values)
        error.copy_(target)
        error.sub_(values).div_(values)
        low, high = torch.aminmax(error)
        largest = max(-low.item(), high.item())
        # Zeros (0/0), NaN, infinities and overflows all show up as a largest error that is not below one.
        if largest < 1:
            errors = replace(errors, largest_relative=max(errors.largest_relative, largest))
        else:
            errors += _special_cases(values, target, error)
        if narrower:
            errors += _faded(values, error, 0.0 if largest < FADED else FADED)
    return errors


def _faded(values: torch.Tensor, error: torch.Tensor, limit: float) -> CastErrors:
    """The squares of a piece, and those of its errors whose relative size is above ``limit``; 0 for none."""
    squares = torch.dot(values, values).item()
    # The squares of small values vanish in float32, and what is not finite counts for nothing.
    if not _SMALL < squares < math.inf:
        squares = float(values.nan_to_num(0.0, 0.0, 0.0).double().square().sum())
    if not limit:
        return CastErrors(squares=squares)
    # Values that became infinite are counted elsewhere, and have an error of infinity here.
    lost = (error.abs() > limit).nonzero().squeeze(-1)
    moved = (error[lost].double() * values[lost]).square()
    return CastErrors(squares=squares, faded=float(moved[torch.isfinite(moved)].sum()))


def _widen(source: torch.Tensor, out: torch.Tensor) -> CastErrors:
    non_finite = 0
    for start in range(0, source.numel(), _PIECE):
        piece = out[start : start + _PIECE]
        piece.copy_(source[start : start + _PIECE])
        low, high = torch.aminmax(piece)
        if not math.isfinite(high.item() - low.item()):
            non_finite += piece.numel() - int(torch.isfinite(piece).sum())
    return CastErrors(non_finite=non_finite)


def _special_cases(values: torch.Tensor, target: torch.Tensor, error: torch.Tensor) -> CastErrors:
    """Account for a piece with zeros or values that are not finite before or after the cast; clips in ``target``."""
    finite = torch.isfinite(values)
    over = finite & torch.isinf(target)
    overflows = int(over.sum())
    largest_overflow = 0.0
    if overflows:
        beyond = values[over]
        largest_overflow = beyond[beyond.abs().argmax()].item()
        limit = torch.finfo(target.dtype).max
        target.copy_(torch.where(over, values.clamp(-limit, limit).to(target.dtype), target))
    underflows = int(((target == 0) & (values != 0)).sum())
    # What remains: the ordinary values, and zeros, which are exact.
    ordinary = finite & ~over & (values != 0)
    largest = error.abs().masked_fill_(~ordinary, 0.0).max().item()
    return CastErrors(largest, overflows, largest_overflow, underflows, values.numel() - int(finite.sum()))


def check_overflow(name: str, errors: CastErrors, dtype: torch.dtype) -> None:
    """Refuse values out of range.

    Raises:
        UnsupportedError: naming the tensor, the value and the limit.
    """
    if errors.overflows:
        label = str(dtype).removeprefix("torch.")
        raise UnsupportedError(
            f"tensor {name}: holds {errors.largest_overflow:g}, beyond {label}'s largest value "
            f"{torch.finfo(dtype).max:g}; convert to bfloat16 or float32, or have such values clipped (--overflow clip)"
        )


def check_underflow(name: str, errors: CastErrors, dtype: torch.dtype) -> None:
    """Refuse a tensor that goes below the range: one of which more than a hundredth of the norm is lost.

    Raises:
        UnsupportedError: naming the tensor and the limit.
    """
    if errors.faded > LOST**2 * errors.squares:
        share = math.sqrt(errors.faded / errors.squares)
        raise UnsupportedError(
            f"tensor {name}: {share:.0%} of it (by norm) are values so small that they would be zero or near it; "
            f"{bounds(dtype)}; convert to bfloat16 or float32, or have such values become zero (--overflow clip)"
        )


def with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """``config`` with the dtype it declares replaced, under its current and its older key, in submodels too."""
    label = str(dtype).removeprefix("torch.")
    changed = _replace_dtype(config, label)
    if "dtype" not in changed and "torch_dtype" not in changed:
        changed["dtype"] = label
    return changed


def _replace_dtype(config: Mapping[str, Any], label: str) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            changed[key] = _replace_dtype(value, label)
        elif key in ("dtype", "torch_dtype"):
            changed[key] = label
        else:
            changed[key] = value
    return changed


class CastView(CheckpointView):
    """A checkpoint whose floating-point tensors appear in ``dtype``; each read casts what it reads.

    Args:
        base: the checkpoint to see through.
        dtype: one of :data:`TARGETS`.
        overflow: what reading does about values out of range: ``"error"`` refuses, ``"clip"`` clips.
    """

    def __init__(self, base: Checkpoint, dtype: torch.dtype, overflow: Overflow = "error") -> None:
        super().__init__(base)
        self.dtype = dtype
        self.overflow = overflow
        self.config = with_dtype(base.config, dtype)
        self.infos = {
            name: replace(info, dtype=dtype) if info.dtype != dtype and info.dtype in CASTABLE else info
            for name, info in base.infos.items()
        }

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """As in :class:`Checkpoint`; also raises ``UnsupportedError`` for a value out of range, at either end."""
        rows = self.base.read_rows(name, start, stop)
        if rows.dtype == self.infos[name].dtype:
            return rows
        out = torch.empty(rows.shape, dtype=self.dtype)
        errors = cast_into(rows.contiguous().view(-1), out.view(-1))
        if self.overflow == "error":
            check_overflow(name, errors, self.dtype)
            if rows.shape == self.infos[name].shape:  # a few rows tell nothing of the whole
                check_underflow(name, errors, self.dtype)
        return out
