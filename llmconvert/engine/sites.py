"""What of a model can be quantized by itself, and where it lies: in the model, in the checkpoint, in an artifact.

A site is one weight matrix with a scheme of its own. Whoever plans, solves, measures or writes knows it by its name and
asks it for the rest, so that another kind of site is described here, and nowhere else is a name put together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["Site", "find_sites"]

_WEIGHT = "weight"


@dataclass(frozen=True, slots=True)
class Site:
    """One weight matrix ``[rows, columns]``; its output has ``rows`` numbers, its input ``columns``.

    Attributes:
        name: what schemes, overrides and stops know it by: its module in the model, ``model.layers.0.mlp.up_proj``.
        tensor: the tensor of the checkpoint that holds it.
        rows: outputs.
        columns: inputs.
        block: index of the decoder block that it is in.
        kind: how the model holds it: as the weight of a linear of its own.
    """

    name: str
    tensor: str
    rows: int
    columns: int
    block: int
    kind: Literal["linear"] = "linear"

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, columns)``."""
        return self.rows, self.columns

    @property
    def weights(self) -> int:
        """How many numbers it has."""
        return self.rows * self.columns

    @property
    def parameter(self) -> str:
        """The parameter of the model that holds it."""
        return f"{self.name}.{_WEIGHT}"

    @property
    def stored(self) -> str:
        """What artifacts and reports call it: the checkpoint's name of its module."""
        return self.tensor.removesuffix(f".{_WEIGHT}")

    @property
    def prefix(self) -> str:
        """What the name of every tensor begins with that an artifact holds of it."""
        return f"{self.stored}."

    def read(self, checkpoint: Checkpoint) -> torch.Tensor:
        """Its values in a checkpoint of the model's names, ``[rows, columns]``, in CPU memory of the caller's own."""
        return checkpoint[self.tensor]

    def value(self, module: nn.Linear) -> torch.Tensor:
        """Its values ``[rows, columns]`` in the loaded module called :attr:`name`; the model's own memory."""
        return module.weight.data

    def put(self, module: nn.Linear, value: torch.Tensor) -> None:
        """Let the loaded module called :attr:`name` compute with other values."""
        self.value(module).copy_(value)


def find_sites(linears: Sequence[Mapping[str, nn.Linear]], names: Mapping[str, str]) -> dict[str, Site]:
    """The sites of a model by name, block after block.

    Args:
        linears: of each block, by their names in the model.
        names: the model's parameters → the checkpoint's tensors.
    """
    return {
        name: Site(name, names[f"{name}.{_WEIGHT}"], linear.out_features, linear.in_features, block)
        for block, inside in enumerate(linears)
        for name, linear in inside.items()
    }
