"""Scales that rows share, chosen before rows are solved a slice at a time: those of blocks, of a tensor, and divisors.

Solvers take one scale for each group of each row. Where several rows have one, rows are solved in a scheme whose scales
are their own and say the same, and the codes are given the shared ones afterwards. A float32 divisor below all scales
of a tensor (NVFP4) is one for all linears that share an input, since runtimes fuse these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from llmconvert.compute.small_floats import E4M3_PARTS
from llmconvert.errors import CheckpointError
from llmconvert.memory import row_slices
from llmconvert.quantize.narrow import check_held
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.solve.group_scales import GroupScales
from llmconvert.quantize.tensor import QuantizedTensor

__all__ = ["SharedScales", "divisor_for", "largest_magnitude", "share_scales", "shares_divisor"]

# Rows are looked at in slices of about this many weights, for the sake of the float32 copies.
_WEIGHTS_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class SharedScales:
    """What the rows of linears with one input share.

    Attributes:
        scheme: of the linears.
        by_rows: the scheme that rows are solved in.
        divisor: float32, one number; None where the number's scales need none.
    """

    scheme: Scheme
    by_rows: Scheme
    divisor: torch.Tensor | None
    _grids: tuple[torch.Tensor, ...] = ()
    _by_row: torch.Tensor | None = None

    def fixed(self, rows: slice) -> GroupScales | None:
        """The scales of some rows, of all linears' one below the other; None where each row's are to be chosen."""
        return None if self._by_row is None else GroupScales(self._by_row[rows])

    def tensor(self, number: int, solved: QuantizedTensor) -> QuantizedTensor:
        """A linear, by its number, whose rows are solved: with the scales that they share."""
        if self._by_row is None:
            return solved
        return QuantizedTensor(solved.codes, self._grids[number], None, self.scheme)


def share_scales(
    weights: Mapping[str, torch.Tensor],
    scheme: Scheme,
    scale_dtype: torch.dtype,
    *,
    widest: bool = True,
    reach: float = 0.0,
) -> SharedScales:
    """What is to be known of linears with one input and one scheme before any of their rows is solved.

    Args:
        weights: of the linears, ``[rows, columns]`` each, by their names.
        scheme: theirs.
        scale_dtype: what scales are stored as.
        widest: whether groups may get scales beyond their full range
            (:attr:`~llmconvert.quantize.numbers.Number.widest`), for which a divisor leaves room.
        reach: the largest magnitude of other weights that have a divisor in common with them; 0 if there are none.

    Raises:
        CheckpointError: a weight is not finite.
        UnsupportedError: the weights of a linear are so small that ``scale_dtype`` holds no scales for them.
    """
    if scheme.rows == 1 or scheme.block is not None:
        shared = shares_divisor(scheme)
        largest = largest_magnitude(weights.items(), reach) if shared else 0.0
        device = next(iter(weights.values())).device
        return SharedScales(scheme, scheme, divisor_for(largest, scheme, device, widest=widest) if shared else None)
    grids = tuple(_grid(name, weight, scheme, scale_dtype) for name, weight in weights.items())
    columns = next(iter(weights.values())).shape[1]
    # Solvers want groups of one size: of a last group that is cut off, and of the others, this is a part.
    size = math.gcd(columns, scheme.columns_per_group(columns))
    by_row = []
    for weight, grid in zip(weights.values(), grids, strict=True):
        rows = len(weight)
        wide = grid.repeat_interleave(scheme.columns_per_group(columns) // size, 1)[:, : columns // size]
        by_row.append(wide.repeat_interleave(scheme.rows or rows, 0)[:rows])
    return SharedScales(scheme, replace(scheme, rows=1, group_size=size), None, grids, torch.cat(by_row))


def shares_divisor(scheme: Scheme) -> bool:
    """Whether scales lie below a float32 number of the tensor, of which linears that runtimes fuse have one."""
    return scheme.number.scales is not None and scheme.number.scales.shared


def largest_magnitude(weights: Iterable[tuple[str, torch.Tensor]], reach: float = 0.0) -> float:
    """Of weights by name, read one after the other; at least ``reach``.

    Raises:
        CheckpointError: one is not finite.
    """
    return max(reach, *(_largest(name, weight) for name, weight in weights))


def divisor_for(largest: float, scheme: Scheme, device: torch.device, *, widest: bool = True) -> torch.Tensor:
    """The divisor under which E4M3 scales reach a weight's largest magnitude; float32, a scalar."""
    room = scheme.number.widest if widest else 1.0
    value = torch.tensor(largest or 1.0, dtype=torch.float32, device=device)
    divisor = E4M3_PARTS.largest * scheme.number.largest / (value * room)
    # Of a weight that is next to nothing it would be infinite.
    return divisor.clamp(max=torch.finfo(torch.float32).max)


def _largest(name: str, weight: torch.Tensor) -> float:
    """A weight's largest magnitude."""
    found = [float(weight[rows].abs().amax()) for rows in row_slices(weight.shape, _WEIGHTS_AT_ONCE)]
    return _finite(name, max(found, key=lambda value: math.inf if math.isnan(value) else value))


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise CheckpointError(f"tensor {name!r} has values that are not finite; the checkpoint is damaged")
    return value


def _grid(name: str, weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> torch.Tensor:
    """Scales that cover each block, as they are stored."""
    rows, columns = weight.shape
    size, height = scheme.columns_per_group(columns), scheme.rows or rows
    lines: list[torch.Tensor] = []
    for start in range(0, rows, height):
        line = torch.stack(
            [weight[start : start + height][:, part : part + size].abs().amax() for part in range(0, columns, size)]
        )
        lines.append(line.float())
    largest = torch.stack(lines)
    _finite(name, float(largest.max()))
    number = scheme.number
    check_held(name, largest / number.largest, scale_dtype, lambda: largest.double().square())
    scale = number.round_scale(largest / number.largest, scale_dtype)
    # A block of zeros needs some scale that is not zero.
    return torch.where(scale > 0, scale, torch.ones_like(scale))
