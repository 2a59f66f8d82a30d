"""LoRA on resident linears (Hu et al. 2021, arXiv 2106.09685): trained beside frozen weights, merged at the end.

``A`` starts as peft starts it, uniform within ``±1/√inputs``, ``B`` at zero, so that the first step starts from the
model as it is. Merging is that of adapters that are read (:mod:`llmconvert.convert.adapter.merge`): ``W + s·BA`` summed
in float64, rounded once to the dtype of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from llmconvert.memory import row_slices
from llmconvert.training.model import ResidentModel

__all__ = ["ADAPTER_PARTS", "attach", "merge_adapter"]

#: What stands behind a weight's name for its two matrices, ``[rank, inputs]`` and ``[outputs, rank]``.
ADAPTER_PARTS = (".lora_A", ".lora_B")
# Numbers of a weight that are summed at a time.
_NUMBERS_AT_ONCE = 1 << 20


def attach(student: ResidentModel, names: Sequence[str], rank: int, scale: float, seed: int) -> dict[str, nn.Parameter]:
    """Give linears adapters, in float32.

    Args:
        student: a model in which these weights are those of linears.
        names: of the weights, as the checkpoint has them.
        rank: of each adapter; no more than a weight's smaller side.
        scale: s.
        seed: of A.

    Returns:
        A and B of every weight, by its name and :data:`ADAPTER_PARTS`.
    """
    modules = {stored: name for name, stored in student.skeleton.names.items()}
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, nn.Parameter] = {}
    for name in names:
        module = student.module(modules[name].rpartition(".")[0])
        assert isinstance(module, nn.Linear)
        outputs, inputs = module.weight.shape
        size = min(rank, outputs, inputs)
        first = torch.empty(size, inputs).uniform_(-1, 1, generator=generator).div_(math.sqrt(inputs))
        a = nn.Parameter(first.to(student.skeleton.device))
        b = nn.Parameter(torch.zeros(outputs, size, device=student.skeleton.device))
        module.register_forward_hook(_adding(a, b, scale))
        found |= zip((f"{name}{part}" for part in ADAPTER_PARTS), (a, b), strict=True)
    return found


def _adding(a: nn.Parameter, b: nn.Parameter, scale: float) -> Any:
    def add(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + linear(linear(args[0], a), b) * scale

    return add


def merge_adapter(weight: torch.Tensor, parts: Mapping[str, torch.Tensor], name: str, scale: float) -> torch.Tensor:
    """``W + s·BA`` in the dtype of ``weight``, whose name is ``name``; both matrices are among ``parts``."""
    a, b = (parts[f"{name}{part}"].to(weight.device, torch.float64) for part in ADAPTER_PARTS)
    merged = torch.empty_like(weight)
    for part in row_slices(weight.shape, _NUMBERS_AT_ONCE):
        merged[part] = weight[part].double() + scale * (b[part] @ a)
    return merged
