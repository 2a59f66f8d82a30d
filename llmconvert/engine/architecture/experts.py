"""Mixtures of experts: which modules of a class hold the experts of a layer, and where each matrix lies in them.

transformers 5 holds the experts of a layer in parameters of three dimensions. Most classes have ``gate_up_proj
[E, 2I, H]`` and ``down_proj [E, H, I]``; others hold them transposed, the gate's and up's outputs in turns, with
biases, or without a gate. What a class says of itself where it is made (``use_experts_implementation``), or what is
known here of classes that say nothing, becomes one description.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = ["ExpertsLayout", "Matrix", "expert_parameter", "find_experts"]

_GATE, _UP, _DOWN = "gate_proj", "up_proj", "down_proj"
_FUSED = "gate_up_proj"
# What a class says of itself: whether there is a gate, are biases, parameters are transposed, the gate comes whole.
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
# The same of classes that say nothing.
_UNSAID: Mapping[str, Sequence[bool]] = {
    "Llama4TextExperts": (True, False, True, True),
    "LongcatFlashExperts": (True, False, False, True),
    "Step3p7Experts": (True, False, False, True),
}


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of an expert, as a part of what a parameter holds of that expert.

    Attributes:
        leaf: the parameter, by its name in the module of the experts.
        rows: outputs.
        columns: inputs.
        outputs: which of the parameter's outputs they are.
        transposed: whether the parameter holds inputs by outputs.
    """

    leaf: str
    rows: int
    columns: int
    outputs: slice
    transposed: bool

    def of(self, part: torch.Tensor) -> torch.Tensor:
        """The matrix ``[rows, columns]`` in one expert's part of the parameter, whose memory it shares."""
        matrix = part.reshape(part.shape[-2:])
        return (matrix.T if self.transposed else matrix)[self.outputs]


@dataclass(frozen=True, slots=True)
class ExpertsLayout:
    """How a module holds the experts of a layer.

    Attributes:
        count: how many there are.
        inner_size: neurons of each.
        hidden_size: width of its inputs.
        parts: what a parameter has of one expert, by name: the shape of as many of its first rows.
        matrices: gate, up and down, or up and down, by :data:`their names here <llmconvert.engine.sites.Site>`, in the
            order in which a token meets them.
        counters: attributes of the module that say how many experts there are, with what they are for one of them.
        passing: how many experts come behind these that give tokens back as they are.
        stacked: whether the module gets one input per expert and token, zero where the token does not go there,
            instead of tokens and where they go.
    """

    count: int
    inner_size: int
    hidden_size: int
    parts: Mapping[str, tuple[int, ...]]
    matrices: Mapping[str, Matrix]
    counters: Mapping[str, int] = field(default_factory=lambda: {"num_experts": 1})
    passing: int = 0
    stacked: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> ExpertsLayout | None:
        """Of a module of a class that is known; None for any other."""
        kind = type(module).__name__
        if kind == "DbrxExperts":
            return cls._of_dbrx(module)
        said = (getattr(module, flag, None) for flag in _FLAGS)
        has_gate, has_bias, transposed, concatenated = _UNSAID.get(kind, said)
        if None in (has_gate, has_bias, transposed, concatenated):
            return None
        shapes = {leaf: tuple(value.shape) for leaf, value in module.named_parameters(recurse=False)}
        first = _FUSED if has_gate else _UP
        biases = {f"{leaf}_bias" for leaf in (first, _DOWN)} if has_bias else set()
        if set(shapes) != {first, _DOWN} | biases:
            return None
        if any(len(shapes[leaf]) != 3 for leaf in (first, _DOWN)):
            return None
        inputs, outputs = shapes[first][1:] if transposed else shapes[first][:0:-1]
        inner = outputs // 2 if has_gate else outputs
        gates = {_UP: slice(None)}
        if has_gate and concatenated:
            gates = {_GATE: slice(0, inner), _UP: slice(inner, None)}
        elif has_gate:
            gates = {_GATE: slice(0, None, 2), _UP: slice(1, None, 2)}
        found = {name: Matrix(first, inner, inputs, part, bool(transposed)) for name, part in gates.items()}
        found[_DOWN] = Matrix(_DOWN, inputs, inner, slice(None), bool(transposed))
        parts = {leaf: (1, *shape[1:]) for leaf, shape in shapes.items()}
        count = shapes[_DOWN][0]
        if kind == "LongcatFlashExperts":
            # With a single choice for a token its forward fails: the other one is an expert that passes.
            counters = {"num_routed_experts": 1, "total_experts": 2}
            return cls(count, inner, inputs, parts, found, counters, passing=shapes[first][0] - count)
        return cls(count, inner, inputs, parts, found, stacked=kind == "Llama4TextExperts")

    @classmethod
    def _of_dbrx(cls, module: nn.Module) -> ExpertsLayout:
        """Matrices of all experts one below the other, in a module inside."""
        count: Any = module.num_experts
        height, width = module.get_parameter("mlp.w1").shape
        inner = height // count
        found = {
            _GATE: Matrix("mlp.w1", inner, width, slice(None), transposed=False),
            _UP: Matrix("mlp.v1", inner, width, slice(None), transposed=False),
            _DOWN: Matrix("mlp.w2", width, inner, slice(None), transposed=True),
        }
        return cls(count, inner, width, {matrix.leaf: (inner, width) for matrix in found.values()}, found)

    @property
    def numel(self) -> int:
        """How many numbers an expert has."""
        return sum(torch.Size(shape).numel() for shape in self.parts.values())

    def stops(self) -> tuple[tuple[str, ...], ...]:
        """The matrices that share an input, in the order in which a token meets them."""
        before = tuple(name for name in self.matrices if name != _DOWN)
        return before, (_DOWN,)


def find_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module, ExpertsLayout]]:
    """The modules that hold the experts of a layer each, by name.

    Those of classes that are not known are parts of their block like any module.
    """
    for name, module in model.named_modules():
        layout = ExpertsLayout.of(module)
        if layout is not None:
            yield name, module, layout


def expert_parameter(experts: str, number: int, projection: str) -> str:
    """What one matrix of one expert is called here, as if it were the weight of a linear of its own."""
    return f"{experts}.{number}.{projection}.weight"
