"""Merging LoRA into one weight: ``W + s·BA`` by rows, and DoRA's norms.

Sums are taken in float64 and rounded once by who reads, so that rows don't depend on how many are read. LoRA: Hu et al.
2021, arXiv 2106.09685; rank-stabilized scaling: arXiv 2312.03732; DoRA: arXiv 2402.09353; all as peft has them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmconvert.convert.adapter.files import CONFIG, Adapter
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["Merge", "Update"]

# Rows that are summed at a time.
_NORM_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Update:
    """What is added to one weight.

    Attributes:
        weight: its name in the checkpoint.
        a, b: the adapter's tensors, ``[r, inputs]`` and ``[outputs, r]``; of an embedding ``[r, rows]`` and
            ``[columns, r]``.
        scale: s.
        magnitude: DoRA's, one number per output; "" without.
        columns_first: whether A is along the stored weight's rows: that of an embedding, and of linears that are stored
            inputs first.
    """

    weight: str
    a: str
    b: str
    scale: float
    magnitude: str
    columns_first: bool

    @classmethod
    def of(cls, adapter: Adapter, module: str, weight: str, names: Mapping[str, str], shape: tuple[int, ...]) -> Update:
        config, tensors = adapter.config, adapter.tensors
        embedding = "lora_embedding_A" in names
        a, b = (names.get(f"lora_embedding_{part}" if embedding else f"lora_{part}", "") for part in "AB")
        if not a or not b:
            raise CheckpointError(f"adapter {adapter.origin}: {module} has one of its two matrices alone")
        magnitude = names.get("lora_magnitude_vector", "")
        if bool(magnitude) != bool(config.get("use_dora")) or (magnitude and embedding):
            raise UnsupportedError(
                f"adapter {adapter.origin}: {module}: DoRA is read of linears that have its magnitudes "
                "(lora_magnitude_vector); merge it with peft (merge_and_unload)"
            )
        first, second = tensors.infos[a].shape, tensors.infos[b].shape
        columns_first = embedding or bool(config.get("fan_in_fan_out"))
        expected = shape[::-1] if columns_first else shape
        if len(first) != 2 or len(second) != 2 or first[0] != second[1] or (second[0], first[1]) != tuple(expected):
            raise CheckpointError(
                f"adapter {adapter.origin}: {module}: matrices of {list(first)} and {list(second)} don't go with the "
                f"model's weight of {list(shape)}; the adapter is of another model"
            )
        rank = first[0]
        declared = _by_pattern(config.get("rank_pattern"), module, config.get("r", rank))
        if declared != rank:
            raise CheckpointError(f"adapter {adapter.origin}: {module} has rank {rank}, {CONFIG} says {declared}")
        alpha = float(_by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        return cls(weight, a, b, scale, magnitude, columns_first)


@dataclass
class Merge:
    """One weight being merged: its matrices, float64, and how to read the weight itself."""

    name: str
    update: Update
    a: torch.Tensor
    b: torch.Tensor
    read: Callable[[int, int], torch.Tensor]
    count: int
    factors: torch.Tensor | None = None

    @classmethod
    def of(
        cls, name: str, update: Update, tensors: Checkpoint, read: Callable[[int, int], torch.Tensor], count: int
    ) -> Merge:
        made = cls(name, update, tensors[update.a].double(), tensors[update.b].double(), read, count)
        if update.magnitude:
            made.factors = tensors[update.magnitude].double().reshape(-1)
            if update.columns_first:  # norms run over all inputs, which are the rows
                squares = torch.zeros_like(made.factors)
                for start in range(0, count, _NORM_ROWS):
                    squares += made.sum(start, min(start + _NORM_ROWS, count)).square().sum(0)
                made.factors /= squares.sqrt()
        return made

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the merged weight, float64."""
        merged = self.sum(start, stop)
        if self.factors is None:
            return merged
        if self.update.columns_first:
            return merged * self.factors
        norms: torch.Tensor = torch.linalg.vector_norm(merged, dim=1)
        return merged * (self.factors[start:stop] / norms).unsqueeze(1)

    def sum(self, start: int, stop: int) -> torch.Tensor:
        """Rows of ``W + s·BA``, float64."""
        along = self.a[:, start:stop].T @ self.b.T if self.update.columns_first else self.b[start:stop] @ self.a
        return self.read(start, stop).double() + self.update.scale * along


def _by_pattern(patterns: Any, module: str, usual: Any) -> Any:
    """As peft looks patterns up: a name, or an expression that its end matches."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return usual
