"""Output heads and embeddings: matrices outside the blocks, quantized behind the last one.

A head is a linear, whose inputs are what the last norm gives: calibrated methods see their moments as those of any
other. An embedding has no inputs: a row is taken as it is, as often as its token comes. That is a factor of the whole
row, which the scales of its own groups do not depend on, so groups are searched for the least squared error. A matrix
that is both (tied) is solved as the head, without a method's aim at the original's outputs: what would make up for
errors before the head would be an error of the embedding.

Rows do not depend on each other; so a vocabulary of any size is solved in slices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.engine.evaluation import head_inputs
from llmconvert.engine.sites import Site
from llmconvert.engine.statistics import Hessian, HessianSum, accumulate_hessian
from llmconvert.engine.stream import Stream
from llmconvert.memory import row_slices, rows_at_once
from llmconvert.phases import Phases
from llmconvert.quantize.methods.base import InputSquares, Quantizer, Solution, Target
from llmconvert.quantize.methods.imatrix import mean_squares
from llmconvert.quantize.methods.ranks.together import solve_together
from llmconvert.quantize.methods.rtn import Rtn
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.solve.hessian import quadratic_form
from llmconvert.quantize.tensor import QuantizedTensor

__all__ = ["head_hessian", "head_squares", "outer_nbytes", "solve_outer"]

# Rows are solved in slices of about this many weights.
_WEIGHTS_AT_ONCE = 1 << 24


def head_hessian(
    sites: Iterable[Site], stream: Stream, original: Stream | None, phases: Phases, ranks: Ranks = ALONE
) -> Hessian | None:
    """Moments of what comes to the output head, if one of the sites is one.

    Args:
        sites: to be quantized.
        stream: at its last block, which is left.
        original: the same in the original model, for methods that want it.
        phases: where time is counted.
        ranks: the processes, each of which streams a part of the batches.

    Raises:
        CalibrationError: an input is not finite.
    """
    head = next((site for site in sites if site.kind in ("head", "tied")), None)
    if head is None:
        return None
    device = stream.skeleton.device
    arrivals = phases.pull("forward", head_inputs(stream))
    with phases.measure("Hessians"):
        if original is None:
            inputs = (one.inputs for one in arrivals)
            return accumulate_hessian(head.name, inputs, head.columns, device, ranks=ranks)
        total = HessianSum(head.name, head.columns, device, original=True, ranks=ranks)
        for here, there in zip(arrivals, phases.pull("forward", head_inputs(original)), strict=True):
            total.add(here, there)
        return total.hessian()


def head_squares(stream: Stream, phases: Phases, ranks: Ranks = ALONE) -> InputSquares:
    """What is known of the output head, once a stream's batches have been through the last block.

    ``ranks`` are the processes, each of which streams a part of them.
    """
    arrivals = phases.pull("forward", head_inputs(stream))
    with phases.measure("importance"):
        inputs = (one.inputs for one in arrivals)
        return InputSquares(mean_squares("the output head", inputs, stream.skeleton.architecture.hidden_size, ranks))


def solve_outer(
    site: Site,
    weight: torch.Tensor,
    scheme: Scheme,
    method: Quantizer,
    hessian: Hessian | None,
    scale_dtype: torch.dtype,
    ranks: Ranks = ALONE,
) -> Solution:
    """Quantize an embedding or a head.

    Args:
        site: which.
        weight: its values, ``[rows, columns]``.
        scheme: of it.
        method: what chooses codes.
        hessian: of what comes to the head, which is not changed and which an embedding alone has no use for; None for a
            method without calibration.
        scale_dtype: what scales are stored as.
        ranks: the processes that solve it together.

    Raises:
        CheckpointError: the weight is not finite.
        CalibrationError: the statistics are unusable.
    """
    hessian = None if site.kind == "embedding" else hessian
    chosen: Quantizer = Rtn(search=True) if hessian is None and method.calibration != "none" else method
    parts: list[QuantizedTensor] = []
    lost = energy = 0.0
    damping: float | None = None
    for rows in row_slices(weight.shape, _WEIGHTS_AT_ONCE):
        target = Target(site.name, weight[rows], scheme)
        given = None if hessian is None else _copy(hessian, site, method)
        solution = solve_together(chosen, [target], given, scale_dtype, ranks)[site.name]
        parts.append(solution.tensor)
        damping = solution.damping
        if hessian is not None and solution.error is not None:
            share = quadratic_form(target.weight.float(), hessian.matrix)
            lost, energy = lost + solution.error * share, energy + share
    error = None if hessian is None else lost / energy if energy > 0 else 0.0
    return Solution(QuantizedTensor.concatenate(parts), error, damping)


def outer_nbytes(site: Site, method: Quantizer, dtype: torch.dtype) -> int:
    """Peak bytes of reading and solving a site: its weights, a slice of its rows, and its codes twice."""
    rows, columns = site.shape
    part = rows_at_once(rows, columns, _WEIGHTS_AT_ONCE)
    moments = 4 * columns * columns * (2 * (2 if method.original else 1)) if method.calibration != "none" else 0
    return rows * columns * (dtype.itemsize + 2) + moments + part * columns * 4 + method.nbytes(part, columns)


def _copy(hessian: Hessian, site: Site, method: Quantizer) -> Hessian:
    """Moments for a method to overwrite."""
    cross = hessian.cross
    if method.original and (site.kind == "tied" or cross is None):
        cross = hessian.matrix
    copied = Hessian(hessian.matrix.clone(), hessian.tokens)
    return copied if cross is None else replace(copied, cross=cross.clone())
