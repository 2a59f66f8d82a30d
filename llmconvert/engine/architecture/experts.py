"""Mixtures of experts: where a model's class holds them, and which tensors of a checkpoint they are.

transformers 5 holds the experts of a layer in two three-dimensional parameters, ``experts.gate_up_proj [E, 2I, H]`` and
``experts.down_proj [E, H, I]``; checkpoints hold three matrices per expert under each family's own names. Its table of
conversions says which of them become rows of which parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from llmconvert.errors import UnsupportedError

__all__ = ["PROJECTIONS", "expert_parameter", "expert_sizes", "expert_weight", "find_experts"]

#: What an expert's matrices are called here, whatever the checkpoint calls them.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

_FUSED: Mapping[str, Sequence[str]] = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_NUMBER = re.compile(r"(?:^|\.)experts\.(\d+)\.")
# What a class says of itself (``use_experts_implementation``): a gate, no biases, ``[E, 2I, H]`` with the gate first.
_PLAIN: Mapping[str, bool] = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
}


def find_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold the experts of a layer each, by name, as far as their layout is known here.

    Others are parts of their block like any module.
    """
    for name, module in model.named_modules():
        shapes = {leaf: value.dim() for leaf, value in module.named_parameters(recurse=False)}
        if shapes.get("gate_up_proj") != 3 or shapes.get("down_proj") != 3:
            continue
        others = [leaf for leaf in shapes if leaf not in _FUSED]
        plain = all(getattr(module, flag, None) is wanted for flag, wanted in _PLAIN.items())
        if plain and not others and hasattr(module, "num_experts"):
            yield name, module


def expert_sizes(experts: nn.Module) -> tuple[int, int, int]:
    """How many experts a module of :func:`find_experts` holds, the neurons of each, and the width of its inputs."""
    fused = experts.get_parameter("gate_up_proj")
    return len(fused), fused.shape[1] // 2, fused.shape[2]


def expert_parameter(experts: str, number: int, projection: str) -> str:
    """What one matrix of one expert is called here, as if it were the weight of a linear of its own."""
    return f"{experts}.{number}.{projection}.weight"


def expert_weight(model: PreTrainedModel, name: str, fused: str, pattern: str, conversion: WeightConverter) -> str:
    """The matrix of an expert that a tensor of a checkpoint is, under the name of :func:`expert_parameter`.

    Args:
        model: for errors.
        name: of the tensor.
        fused: the parameter that transformers merges it into.
        pattern: the one of the conversion's source patterns that the tensor has.
        conversion: what does so.

    Raises:
        UnsupportedError: transformers does something else with it.
    """
    experts, _, leaf = fused.rpartition(".")
    number, sources = _NUMBER.search(name), list(conversion.source_patterns)
    kinds = {type(operation) for operation in conversion.operations}
    if number is None or len(sources) != len(_FUSED.get(leaf, ())) or not kinds <= {MergeModulelist, Concatenate}:
        raise UnsupportedError(
            f"{type(model).__name__}: transformers merges tensor {name!r} into {fused!r} in a way that is not known "
            "here; checkpoints that can be read hold either what the class holds, or a gate, an up and a down matrix "
            "per expert"
        )
    return expert_parameter(experts, int(number[1]), _FUSED[leaf][sources.index(pattern)])
