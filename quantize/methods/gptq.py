"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): column by column, each rounding error compensated by later columns.

With the Hessian ``H = L Lᵀ`` of the linear's inputs, ``L`` lower triangular, the squared error of the output is
``‖(W - Ŵ) L‖²``. Columns are solved from the last to the first: column ``k`` of that product is zero for
``ŵ_k = w_k + Σ_{j>k} (w_j - ŵ_j) L[j, k] / L[k, k]``, which is what gets rounded. The paper has the same numbers from
the factor of ``H⁻¹``, and moves the columns to come after each one; without the inverse (as in LDLQ, Chee et al. 2023,
arXiv 2307.13304) there is much less to prepare. Columns go in order of falling diagonal (act-order); scales are chosen
before, on the columns in their own order (static groups), so the result needs no column index and every kernel can read
it.

``H`` is shrunk toward its diagonal first, since its tokens are few: held-out text loses less by far at 3 bits, and
text of another kind than the calibration's most of all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from llmconvert.compute.rows import over_rows
from llmconvert.engine.statistics import Hessian
from llmconvert.memory import row_slices, rows_at_once
from llmconvert.quantize.methods.base import Calibration, Numbers, Solution, Target
from llmconvert.quantize.numbers import Number
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.solve.group_scales import GroupScales, divisors
from llmconvert.quantize.solve.hessian import (
    lower_factor_,
    lower_factor_nbytes,
    mirror_upper_,
    own_ridge,
    permute_,
    quadratic_form,
    quadratic_nbytes,
    with_damping,
)
from llmconvert.quantize.solve.loops import gpu_kernels, levels_of
from llmconvert.quantize.solve.refine import Scales, refine, refine_nbytes
from llmconvert.quantize.solve.scales import search_scales
from llmconvert.quantize.solve.shared_scales import SharedScales, share_scales
from llmconvert.quantize.tensor import QuantizedTensor

__all__ = ["Gptq", "Prepared"]

# Rows are solved in slices of about this many weights: rows are independent, and the working copies stay small.
_WEIGHTS_AT_ONCE = 1 << 23


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all linears with the same inputs share.

    Attributes:
        order: int64 ``[columns]``, columns by rising diagonal: the last is solved first.
        factor: ``[columns, columns]``, lower triangular ``L`` of the damped Hessian in that order; above its diagonal
            lies what the Hessian has there.
        diagonal: of the Hessian as it was summed, in the columns' own order.
        added: to this diagonal before it was factorized, to shrink the moments and to damp them.
        damping: share of the mean diagonal it took.
    """

    order: torch.Tensor
    factor: torch.Tensor
    diagonal: torch.Tensor
    added: torch.Tensor
    damping: float

    def restore(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The damped Hessian in the columns' own order, and what of its diagonal is damping.

        It takes the place of the factor. A column without any input has only the damping.
        """
        matrix, ridge = self.factor, self.added - (self.diagonal == 0).to(self.added)
        # Only the lower triangle was overwritten.
        mirror_upper_(matrix)
        matrix.diagonal().copy_((self.diagonal + ridge)[self.order])
        permute_(matrix, torch.argsort(self.order))
        return matrix, ridge


@dataclass(frozen=True, slots=True)
class Gptq:
    """The method and its settings.

    Attributes:
        damping: share of the mean diagonal that is added to the diagonal; grows tenfold until ``H`` factorizes.
        shrinkage: how strongly ``H`` is drawn toward its diagonal, in tokens by its columns
            (:func:`~llmconvert.quantize.solve.hessian.own_ridge`); 0 for the paper's.
        block: columns solved before their errors are carried to the rest in one product.
        scale_steps: fractions of a group's range that are tried as its scale.
        narrowest: the smallest of these fractions.
        scale_stride: every so many of them are tried first, and then those around each group's best.
        sweeps: how often codes and scales are then refined in turn (:mod:`~llmconvert.quantize.solve.refine`).
        dtype: what is computed in.
    """

    damping: float = 0.01
    block: int = 128
    scale_steps: int = 26
    narrowest: float = 0.5
    scale_stride: int = 2
    sweeps: int = 0
    shrinkage: float = 2.0
    dtype: torch.dtype = torch.float32

    calibration: ClassVar[Calibration] = "inputs"
    original: ClassVar[bool] = False
    numbers: ClassVar[Numbers] = "solved"

    def quantize(
        self, targets: Sequence[Target], hessian: Hessian | None, scale_dtype: torch.dtype
    ) -> dict[str, Solution]:
        assert hessian is not None
        energies = _energies(targets, hessian.matrix)
        prepared = self.prepare(targets[0].name, hessian)
        schemes = dict.fromkeys(target.scheme for target in targets)
        stacks = {scheme: [target for target in targets if target.scheme == scheme] for scheme in schemes}
        shared = {
            scheme: share_scales({target.name: target.weight for target in stack}, scheme, scale_dtype)
            for scheme, stack in stacks.items()
        }
        solved = {
            scheme: self._solve_rows(stack, prepared, shared[scheme], scale_dtype) for scheme, stack in stacks.items()
        }
        if self.sweeps:
            matrix, ridge = prepared.restore()
            for scheme, stack in stacks.items():
                scales: Scales = "kept" if scheme.rows != 1 else "moved"
                solved[scheme] = self._refine_rows(stack, *solved[scheme], matrix, ridge, scales)
        solutions: dict[str, Solution] = {}
        for scheme, stack in stacks.items():
            whole, losses = solved[scheme]
            for number, (target, rows) in enumerate(zip(stack, _rows_of(stack), strict=True)):
                energy, loss = energies[target.name], float(losses[rows].sum())
                error = loss / energy if energy > 0 else 0.0
                tensor = shared[scheme].tensor(number, whole.rows(rows.start, rows.stop))
                solutions[target.name] = Solution(tensor, error, prepared.damping, energy=energy)
        return solutions

    def nbytes(self, rows: int, columns: int) -> int:
        """The stacked weights, all codes, and a slice of rows being solved; or the codes twice, to join the slices.

        A slice being solved holds its float32 weights, its errors, a block's share of the errors before it, and its
        scale candidates; one being refined its weights, gradients and errors, and a group's, if that is all columns.
        The Hessian is permuted and factorized in place, a panel of columns at a time.
        """
        at_once = rows_at_once(rows, columns, _WEIGHTS_AT_ONCE) * columns
        # Per group and step a scale and a zero of 4 bytes, for the smallest usual group.
        candidates = at_once // 32 * self.scale_steps * 8
        work = at_once * 8 + at_once // columns * min(self.block, columns) * 4 + candidates
        if self.sweeps:
            work = max(work, at_once * 4 + refine_nbytes(at_once // columns, columns))
        prepared = lower_factor_nbytes(columns)
        return max(quadratic_nbytes(rows, columns), prepared, rows * columns * 4, rows * columns * 3 + work)

    def prepare(self, name: str, hessian: Hessian) -> Prepared:
        """Order the columns and factorize the Hessian, in its own memory.

        Args:
            name: of a linear, for errors.
            hessian: overwritten, if it has the dtype to compute in. A column whose inputs were all zero gets a
                diagonal of one.

        Raises:
            CalibrationError: no damping up to the mean diagonal itself makes the matrix factorizable.
        """
        matrix = hessian.matrix.to(self.dtype)
        original = matrix.diagonal().clone()
        order = torch.argsort(original, descending=True, stable=True).flip(0)
        permute_(matrix, order)
        diagonal = original[order]
        diagonal[diagonal == 0] = 1
        ridge = own_ridge(hessian, self.shrinkage)
        shrunk = ridge * original

        def factorize(damping: float) -> Prepared | None:
            even = damping * (1 + ridge) * diagonal.mean()
            matrix.diagonal().copy_(diagonal + shrunk[order] + even)
            if lower_factor_(matrix):
                added = shrunk + even + (original == 0)
                return Prepared(order, matrix, original, added, damping)
            # Factorizing changed only the lower triangle; the upper one still holds the matrix.
            mirror_upper_(matrix)
            return None

        return with_damping(name, hessian, self.damping, factorize)

    def solve(
        self, weight: torch.Tensor, prepared: Prepared, scheme: Scheme, scales: GroupScales
    ) -> tuple[QuantizedTensor, torch.Tensor]:
        """Codes for given scales, and each row's squared output error per token."""
        # Transposed throughout: the solver works through columns, and a column's rows are independent of each other.
        errors = _transpose_in_order(scales.without_offsets(weight), prepared.order)
        columns, rows = errors.shape
        codes = torch.empty((columns, rows), dtype=scheme.number.code_dtype, device=weight.device)
        loss = torch.zeros(rows, dtype=self.dtype, device=weight.device)
        scale = divisors(scales.factors.T, self.dtype).contiguous()
        zero = torch.zeros_like(scale) if scales.zero is None else scales.zero.T.to(self.dtype).contiguous()
        order, added = prepared.order, prepared.added
        for start in reversed(range(0, columns, self.block)):
            stop = start + self.block
            carried = prepared.factor[stop:, start:stop].T @ errors[stop:]
            within = prepared.factor[start:stop, start:stop].contiguous()
            _solve_block(errors, carried, scale, zero, codes, loss, order, added, within, start, scheme)
        del errors
        return scales.tensor(codes.T.contiguous(), scheme), loss.clamp_(min=0)

    def _solve_rows(
        self, targets: Sequence[Target], prepared: Prepared, shared: SharedScales, scale_dtype: torch.dtype
    ) -> tuple[QuantizedTensor, torch.Tensor]:
        """Solve several weights as one matrix of all their rows, a slice of rows at a time; with each row's loss."""
        names = "+".join(target.name for target in targets)

        def solve(part: torch.Tensor, rows: slice) -> tuple[QuantizedTensor, torch.Tensor]:
            scales = shared.fixed(rows) or search_scales(
                names,
                part,
                prepared.diagonal,
                shared.by_rows,
                scale_dtype,
                steps=self.scale_steps,
                narrowest=self.narrowest,
                stride=self.scale_stride,
                divisor=shared.divisor,
            )
            return self.solve(part, prepared, shared.by_rows, scales)

        return self._in_slices(targets, solve)

    def _refine_rows(
        self,
        targets: Sequence[Target],
        whole: QuantizedTensor,
        losses: torch.Tensor,
        matrix: torch.Tensor,
        ridge: torch.Tensor,
        scales: Scales,
    ) -> tuple[QuantizedTensor, torch.Tensor]:
        """The same rows with better codes and, unless others share them, scales; each row's loss without damping."""

        def improve(part: torch.Tensor, rows: slice) -> tuple[QuantizedTensor, torch.Tensor]:
            tensor = whole.rows(rows.start, rows.stop)
            damped = losses[rows] + _weighted_squares(part, tensor, ridge)
            tensor, loss = refine(part, tensor, matrix, self.sweeps, scales=scales, loss=damped)
            return tensor, (loss - _weighted_squares(part, tensor, ridge)).clamp_(min=0)

        return self._in_slices(targets, improve)

    def _in_slices(
        self,
        targets: Sequence[Target],
        solve: Callable[[torch.Tensor, slice], tuple[QuantizedTensor, torch.Tensor]],
    ) -> tuple[QuantizedTensor, torch.Tensor]:
        weight = torch.cat([target.weight for target in targets])
        slices = row_slices(weight.shape, _WEIGHTS_AT_ONCE)
        parts = [solve(weight[part].to(self.dtype), part) for part in slices]
        return QuantizedTensor.concatenate([part for part, _ in parts]), torch.cat([loss for _, loss in parts])


def _energies(targets: Sequence[Target], hessian: torch.Tensor) -> dict[str, float]:
    """``tr(W H Wᵀ)`` by target; of a weight that is solved in several schemes once."""
    found: dict[int, float] = {}
    for target in targets:
        if id(target.weight) not in found:
            found[id(target.weight)] = quadratic_form(target.weight, hessian)
    return {target.name: found[id(target.weight)] for target in targets}


def _rows_of(targets: Sequence[Target]) -> list[slice]:
    """Where each weight lies in the matrix of all rows."""
    ends = list(itertools.accumulate(len(target.weight) for target in targets))
    return [slice(end - len(target.weight), end) for target, end in zip(targets, ends, strict=True)]


def _transpose_in_order(weight: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The columns of a weight as rows, in the given order."""
    if weight.device.type != "cpu":
        return weight.T.index_select(0, order).contiguous()
    from llmconvert.quantize.solve.kernels import transpose_in_order

    transposed = weight.new_empty(weight.shape[::-1])
    over_rows(transpose_in_order, len(weight), weight, order, transposed)
    return transposed


def _weighted_squares(weight: torch.Tensor, tensor: QuantizedTensor, importance: torch.Tensor) -> torch.Tensor:
    """``Σ importance (w - ŵ)²`` of every row."""
    if weight.device.type != "cpu":
        return (tensor.dequantize(weight.dtype) - weight).square() @ importance
    if tensor.offset is not None or not tensor.scheme.number.even:
        return (tensor.dequantize(weight.dtype) - weight).square_() @ importance.to(weight.dtype)
    from llmconvert.quantize.solve.search_kernels import weighted_squares

    scale = tensor.scale.to(weight.dtype)
    zero = torch.zeros_like(scale) if tensor.zero is None else tensor.zero.to(weight.dtype)
    sums = weight.new_empty(len(weight))
    over_rows(weighted_squares, len(weight), weight, tensor.codes, scale, zero, importance.to(weight.dtype), sums)
    return sums


def _solve_block(
    errors: torch.Tensor,
    carried: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    codes: torch.Tensor,
    loss: torch.Tensor,
    order: torch.Tensor,
    added: torch.Tensor,
    factor: torch.Tensor,
    start: int,
    scheme: Scheme,
) -> None:
    """One block of columns; see :func:`~llmconvert.quantize.solve.kernels.solve_columns`."""
    number = scheme.number
    if errors.device.type == "cpu":
        from llmconvert.quantize.solve.kernels import solve_columns

        held = errors, carried, scale, zero, codes.view(torch.int8), loss, order, added, factor, start
        over_rows(solve_columns, errors.shape[1], *held, *number.limits, *levels_of(number, errors))
        return
    arguments = errors, carried, scale, zero, codes, loss, order, added, factor, start
    if number.even and codes.dtype == torch.int8 and (kernels := gpu_kernels(errors)):
        kernels.solve_columns(*arguments, *number.limits)
    else:
        _solve_block_plain(*arguments, number)


def _solve_block_plain(
    errors: torch.Tensor,
    carried: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    codes: torch.Tensor,
    loss: torch.Tensor,
    order: torch.Tensor,
    added: torch.Tensor,
    factor: torch.Tensor,
    start: int,
    number: Number,
) -> None:
    """What the kernels do, in torch, for any device and number."""
    size = errors.shape[0] // scale.shape[0]
    places = order[start : start + len(factor)].tolist()
    for column in reversed(range(len(factor))):
        place, pivot = places[column], factor[column, column]
        step, origin, value = scale[place // size], zero[place // size], errors[start + column]
        wanted = value + carried[column] / pivot
        code = number.nearest(wanted / step, origin)
        codes[place] = code
        level = (number.values(code).to(origin.dtype) - origin) * step
        value -= level
        loss += ((wanted - level) * pivot).square() - added[place] * value.square()
        carried[:column].addr_(factor[column, :column], value)
