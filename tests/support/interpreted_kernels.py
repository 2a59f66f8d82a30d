"""The kernels for GPUs in Triton's interpreter, against their plain torch counterparts.

    TRITON_INTERPRET=1 PYTHONPATH=tests python tests/support/interpreted_kernels.py

A process of its own: Triton decides when it is first imported whether it interprets. Prints what agreed, case by case.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from support.quantized import hessian_of, random_inputs, random_weight

from llmconvert.quantize.methods.gptq import _solve_block_plain
from llmconvert.quantize.numbers import Int
from llmconvert.quantize.solve import triton_kernels
from llmconvert.quantize.solve.refine import _descend_plain

LIMITS = -8.0, 7.0


def main() -> None:
    agreed = []
    for rows, block, groups in ((16, 32, 2), (37, 24, 1), (5, 1, 3)):
        compare(partial(solved, rows=rows, block=block, groups=groups), _SOLVERS)
        agreed.append("solve_columns")
    for rows, count in ((16, 32), (37, 24), (5, 1)):
        compare(partial(descended, rows=rows, count=count), _DESCENTS)
        agreed.append("descend_columns")
    sys.stdout.write("\n".join(agreed))


def compare(run: Callable[[Callable[..., None]], list[torch.Tensor]], kernels: tuple[Callable[..., None], ...]) -> None:
    """Codes are the same, and so is everything else but for the order of sums."""
    (codes, *values), (expected, *others) = map(run, kernels)
    assert torch.equal(codes, expected)
    assert codes.count_nonzero() > 0
    for value, other in zip(values, others, strict=True):
        torch.testing.assert_close(value, other, atol=1e-4, rtol=1e-4)


def solved(solve: Callable[..., None], rows: int, block: int, groups: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    columns, start = 32 * groups, 32 * groups - block
    factor = torch.linalg.cholesky(hessian_of(random_inputs(256, columns)).matrix)[start:, start:].contiguous()
    order, added = torch.randperm(columns, generator=generator), torch.rand(columns, generator=generator) / 100
    scale = torch.rand((groups, rows), generator=generator) / 20 + 0.02
    zero = torch.randint(-3, 3, (groups, rows), generator=generator).float()
    errors, carried = random_weight(rows, columns).T.contiguous(), torch.randn((block, rows), generator=generator)
    codes, loss = torch.zeros((columns, rows), dtype=torch.int8), torch.ones(rows)
    solve(errors, carried, scale, zero, codes, loss, order, added, factor, start, *LIMITS)
    return [codes, errors, loss]


def descended(descend: Callable[..., None], rows: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hessian = hessian_of(random_inputs(256, count)).matrix
    scale = torch.rand(rows, generator=generator) / 20 + 0.02
    gradient, moved = torch.randn((count, rows), generator=generator), torch.empty((count, rows))
    codes = torch.randint(-8, 8, (count, rows), generator=generator).to(torch.int8)
    descend(gradient, hessian, codes, scale, moved, *LIMITS)
    return [codes, gradient, moved]


def _plain(function: Callable[..., None]) -> Callable[..., None]:
    """What takes a number, with its limits instead."""

    def run(*arguments: torch.Tensor | float) -> None:
        *others, low, high = arguments
        assert (low, high) == Int(4).limits
        function(*others, Int(4))

    return run


_SOLVERS = triton_kernels.solve_columns, _plain(_solve_block_plain)
_DESCENTS = triton_kernels.descend_columns, _plain(_descend_plain)

if __name__ == "__main__":
    main()
