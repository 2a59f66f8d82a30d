"""Round to nearest: every weight to the closest level of its group, no calibration.

Scales cover each group's full range, or minimize its squared error when ``search`` is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from llmconvert.compute.narrowing import LOST
from llmconvert.engine.statistics import Hessian
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.ggml.blocks import Codec
from llmconvert.memory import row_slices, rows_at_once
from llmconvert.quantize.methods.base import Calibration, Numbers, Solution, Target
from llmconvert.quantize.narrow import check_held
from llmconvert.quantize.numbers import LEAST_MAGNITUDE, dtype_named
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.solve.group_scales import GroupScales, divisors
from llmconvert.quantize.solve.scales import full_range_scales, search_scales
from llmconvert.quantize.solve.shared_scales import SharedScales, largest_magnitude, share_scales, shares_divisor
from llmconvert.quantize.tensor import NestedScales, QuantizedTensor

__all__ = ["Rtn", "round_full_range", "round_rows", "round_to_codes", "with_reach"]

# Rows are rounded in slices of about this many weights, for the sake of the float32 copies.
_WEIGHTS_AT_ONCE = 1 << 23


@dataclass(frozen=True, slots=True)
class Rtn:
    """The method and its one setting.

    Attributes:
        search: choose each group's scale by least squared error instead of covering its full range.
    """

    search: bool = False

    calibration: ClassVar[Calibration] = "none"
    original: ClassVar[bool] = False
    numbers: ClassVar[Numbers] = "any"

    def quantize(
        self, targets: Sequence[Target], hessian: Hessian | None, scale_dtype: torch.dtype
    ) -> dict[str, Solution]:
        return {target.name: Solution(self._round(target, scale_dtype)) for target in with_reach(targets)}

    def nbytes(self, rows: int, columns: int) -> int:
        """A slice of rows in float32: its weights, their groups' candidates or quotients, and codes; all codes."""
        at_once = rows_at_once(rows, columns, _WEIGHTS_AT_ONCE) * columns
        return at_once * 20 + rows * columns * 2

    def encode(self, codec: Codec, rows: torch.Tensor, squares: torch.Tensor | None) -> torch.Tensor:
        """As llama.cpp does without an importance matrix."""
        return torch.from_numpy(codec.encode(rows.numpy()))

    def _round(self, target: Target, scale_dtype: torch.dtype) -> QuantizedTensor:
        if target.scheme.number.absmax:
            return _round_by_absmax(target)

        def choose(weight: torch.Tensor, divisor: torch.Tensor | None) -> GroupScales:
            if not self.search:
                return full_range_scales(target.name, weight, target.scheme, scale_dtype, divisor=divisor)
            importance = torch.ones(weight.shape[1], device=weight.device)
            return search_scales(target.name, weight, importance, target.scheme, scale_dtype, divisor=divisor)

        alone = {target.name: target.weight}
        shared = share_scales(alone, target.scheme, scale_dtype, widest=self.search, reach=target.reach)
        return round_rows(target, choose, _WEIGHTS_AT_ONCE, shared)


def with_reach(targets: Sequence[Target]) -> Iterator[Target]:
    """Linears with one input, each told how far those reach whose float32 scale it shares: runtimes fuse them."""
    groups: dict[Scheme, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.scheme, []).append(target)
    for scheme, group in groups.items():
        if not shares_divisor(scheme):
            yield from group
            continue
        reach = largest_magnitude(((one.name, one.weight) for one in group), max(one.reach for one in group))
        yield from (replace(target, reach=reach) for target in group)


def _round_by_absmax(target: Target) -> QuantizedTensor:
    """Codes and scales as the number has them; there is nothing to choose."""
    scheme, (rows, columns) = target.scheme, target.weight.shape
    held = scheme.number.rounded_from
    grouped = target.weight.reshape(rows, scheme.groups(columns), -1)
    codes, scale = scheme.number.round_groups(grouped)
    if not torch.isfinite(scale).all():
        where = "" if held == "float32" else f" in {held}, to which bitsandbytes rounds"
        advice = "" if held == "float32" else ", or take another scheme"
        raise CheckpointError(
            f"tensor {target.name!r} has values that are not finite{where}; the checkpoint is damaged{advice}"
        )
    largest = grouped.abs().amax(-1).float()
    lost = (largest < LEAST_MAGNITUDE) & (largest > 0)
    if bool(lost.any()):
        squares = grouped.double().square().sum(-1)
        if float(squares[lost].sum()) > LOST**2 * float(squares.sum()):
            raise UnsupportedError(
                f"{target.name}: groups of its weights are below {LEAST_MAGNITUDE:g}, and bitsandbytes divides by no "
                "less; leave it dense with an override (scheme: none)"
            )
    if held != "float32":
        check_held(
            target.name, largest, dtype_named(held), lambda: grouped.double().square().sum(-1), what="largest weights"
        )
    codes = codes.reshape(rows, columns)
    if not scheme.nested:
        return QuantizedTensor(codes, scale, None, scheme)
    nested = NestedScales.quantize(scale)
    return QuantizedTensor(codes, nested.dequantize().view(scale.shape), None, scheme, nested)


def round_rows(
    target: Target,
    choose: Callable[[torch.Tensor, torch.Tensor | None], GroupScales],
    weights_at_once: int,
    shared: SharedScales,
) -> QuantizedTensor:
    """The nearest codes of a weight, for scales chosen a slice of rows at a time.

    Args:
        target: the weight.
        choose: scales of some rows, float32 ``[rows, columns]``, and the divisor that they share, if there is one.
        weights_at_once: about how many weights a slice has.
        shared: what all rows share; where that is all of the scales, none are chosen.
    """
    parts: list[QuantizedTensor] = []
    for rows in row_slices(target.weight.shape, weights_at_once):
        work = target.weight[rows].float()
        scales = shared.fixed(rows) or choose(work, shared.divisor)
        parts.append(round_to_codes(work, scales, shared.by_rows))
    return shared.tensor(0, QuantizedTensor.concatenate(parts))


def round_full_range(target: Target, scale_dtype: torch.dtype) -> QuantizedTensor:
    """The nearest codes of a weight under scales that cover each group's full range."""

    def choose(weight: torch.Tensor, divisor: torch.Tensor | None) -> GroupScales:
        return full_range_scales(target.name, weight, target.scheme, scale_dtype, divisor=divisor)

    shared = share_scales({target.name: target.weight}, target.scheme, scale_dtype, widest=False)
    return round_rows(target, choose, _WEIGHTS_AT_ONCE, shared)


def round_to_codes(weight: torch.Tensor, scales: GroupScales, scheme: Scheme) -> QuantizedTensor:
    """The nearest code of every weight, for given scales."""
    rows, columns = weight.shape
    grouped = scales.without_offsets(weight).reshape(rows, scales.scale.shape[1], -1)
    grouped = grouped / divisors(scales.factors.unsqueeze(-1), weight.dtype)
    codes = scheme.number.nearest(grouped, None if scales.zero is None else scales.zero.unsqueeze(-1))
    return scales.tensor(codes.reshape(rows, columns), scheme)
