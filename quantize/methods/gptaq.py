"""GPTAQ (Li et al. 2025, arXiv 2504.02692): GPTQ with asymmetric calibration, toward the original's own output.

GPTQ minimizes ``‖Ŵ X − W X‖²`` on the inputs ``X`` that the quantized model so far produces; what earlier layers lost
is lost. Here the target is ``W O`` with the original model's inputs ``O``. That splits: with ``W* = W O Xᵀ (X Xᵀ)⁻¹``,
the least-squares answer of a linear that sees ``X``, ``‖Ŵ X − W O‖² = ‖(Ŵ − W*) X‖² + constant``. So the weight moves
to ``W*`` first, and GPTQ rounds that. The paper corrects column by column while solving and comes to the same sum.

We go one step further. The outputs of attention and MLP are added to the residual stream ``R``, and what ``R`` lost in
the blocks before stays lost, however well each linear does. Linears that add to it aim at ``W O + λ (R_o − R)``
instead, with the original's ``R_o``: they make up for what of the loss can be told from their inputs. ``W O`` is
what the original gives as it runs, and ``O Xᵀ`` is not summed (:attr:`~llmconvert.engine.statistics.Hessian.aim`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from llmconvert.engine.statistics import Hessian
from llmconvert.quantize.methods.base import Calibration, Numbers, Solution, Target
from llmconvert.quantize.methods.gptq import Gptq
from llmconvert.quantize.solve.hessian import lower_factor_, own_ridge, with_damping

__all__ = ["Gptaq"]


@dataclass(frozen=True, slots=True)
class Gptaq:
    """The method and its settings, beside those of :class:`~llmconvert.quantize.methods.gptq.Gptq` with the same names.

    Moments of few tokens say little about directions in which inputs hardly vary, and there ``W*`` would go astray: on
    16,384 tokens, held-out text wants both dampings far above GPTQ's.

    Attributes:
        strength: how far weights move towards ``W*``, 0 to 1.
        residual: how much of what the residual stream has lost before a linear that adds to it is to be made up for.
        shift_damping: share of the mean diagonal added to ``X Xᵀ`` before it is inverted for ``W*``.
    """

    strength: float = 1.0
    residual: float = 0.75
    shift_damping: float = 0.3
    damping: float = 0.1
    block: int = 128
    scale_steps: int = 26
    narrowest: float = 0.5
    sweeps: int = 2
    shrinkage: float = 2.0

    calibration: ClassVar[Calibration] = "inputs"
    original: ClassVar[bool] = True
    numbers: ClassVar[Numbers] = "solved"

    def quantize(
        self, targets: Sequence[Target], hessian: Hessian | None, scale_dtype: torch.dtype
    ) -> dict[str, Solution]:
        assert hessian is not None
        weight = torch.cat([target.weight for target in targets]).float()
        weight += self.strength * self.shift(targets[0].name, weight, hessian)
        moved = [
            replace(target, weight=part)
            for target, part in zip(targets, weight.split([len(target.weight) for target in targets]), strict=True)
        ]
        return self._gptq.quantize(moved, replace(hessian, cross=None, aim=None), scale_dtype)

    def nbytes(self, rows: int, columns: int) -> int:
        """The weights in float32, what they move by, and a factor of the Hessian; then what GPTQ takes."""
        return rows * columns * 4 + max(rows * columns * 8 + columns * columns * 8, self._gptq.nbytes(rows, columns))

    def shift(self, name: str, weight: torch.Tensor, hessian: Hessian) -> torch.Tensor:
        """``W* − W`` of a weight ``[rows, columns]``, by ``hessian.aim`` or ``hessian.cross``, which is overwritten.

        Raises:
            CalibrationError: no damping up to the mean diagonal itself makes ``X Xᵀ`` invertible.
        """
        # What the weight is still to be multiplied with, where it has the more rows.
        left: torch.Tensor | None = None
        if hessian.aim is not None:
            missing = hessian.aim.addmm_(weight, hessian.matrix, alpha=-1)
        else:
            assert hessian.cross is not None
            missing = hessian.cross.sub_(hessian.matrix)
            if len(weight) > len(missing):
                left = weight
            else:
                missing = weight @ missing
        diagonal = hessian.matrix.diagonal()
        ridge = own_ridge(hessian, self.shrinkage)

        def solve(damping: float) -> torch.Tensor | None:
            damped = hessian.matrix.clone()
            damped.diagonal().add_(ridge * diagonal + damping * (1 + ridge) * diagonal.mean() + (diagonal == 0))
            if not lower_factor_(damped):
                return None
            behind = torch.linalg.solve_triangular(damped, missing.T, upper=False)
            solved: torch.Tensor = torch.linalg.solve_triangular(damped.T, behind, upper=True).T
            return solved

        shift = with_damping(name, hessian, self.shift_damping, solve)
        return shift if left is None else left @ shift

    @property
    def _gptq(self) -> Gptq:
        return Gptq(
            self.damping, self.block, self.scale_steps, self.narrowest, sweeps=self.sweeps, shrinkage=self.shrinkage
        )
