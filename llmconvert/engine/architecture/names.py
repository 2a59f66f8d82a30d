"""Checkpoint tensor names against transformers' module names: the one place that knows they can differ.

transformers renames keys while loading (a missing ``model.`` prefix, legacy names) and merges some tensors (the
weights of experts into one). The first is a bijection and is applied here; of the second, experts are known, whose
matrices get names of their own. Results are always written under checkpoint names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from llmconvert.engine.architecture.experts import (
    PROJECTIONS,
    expert_parameter,
    expert_sizes,
    expert_weight,
    find_experts,
)
from llmconvert.errors import CheckpointError, UnsupportedError

__all__ = ["map_names"]


def map_names(
    model: PreTrainedModel, checkpoint_names: Iterable[str], needed: Callable[[str], bool] = lambda state: True
) -> Mapping[str, str]:
    """Module parameter name → checkpoint tensor name, for every state of ``model`` that the checkpoint holds.

    In the place of the parameters that hold all experts of a layer stand the matrices of each, under the names of
    :func:`~llmconvert.engine.architecture.experts.expert_parameter`.

    Args:
        model: the model, on any device; only names are looked at.
        checkpoint_names: all tensor names of the checkpoint. Those that the model does not know are left out.
        needed: whether a state, by its name in the model, is going to be loaded. Others may be missing, or merged in
            any way.

    Raises:
        UnsupportedError: transformers would merge or split tensors of this checkpoint in a way that is not known.
        CheckpointError: two tensors claim one parameter, or a needed parameter has no tensor.
    """
    states = model.state_dict()
    renamed = list(_renamed(model, checkpoint_names))
    wanted = _one_by_one(model, states, {target for _, target, conversion in renamed if conversion is None})
    mapping: dict[str, str] = {}
    for name, target, conversion in renamed:
        if conversion is not None:
            if not needed(target):
                continue
            target = expert_weight(model, name, target, *conversion)
            if target not in wanted:
                raise UnsupportedError(
                    f"{type(model).__name__}: tensor {name!r} is merged with others when transformers loads it, "
                    "into experts of a layout that is not known here; mixtures that can be run have a gate, an up and "
                    "a down matrix per expert, without biases (Mixtral, Qwen-MoE, DeepSeek, OLMoE, …)"
                )
        if target not in wanted:
            continue
        if target in mapping:
            raise CheckpointError(f"tensors {mapping[target]!r} and {name!r} are both meant for {target!r}")
        mapping[target] = name
    absent = [name for name in wanted if name not in mapping and name not in model.all_tied_weights_keys]
    missing = [name for name in absent if needed(name)]
    if missing:
        raise CheckpointError(
            f"{type(model).__name__}: the checkpoint has no tensor for {missing[0]!r}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + "; config.json and the weights do not belong together"
        )
    return mapping


def _renamed(
    model: PreTrainedModel, checkpoint_names: Iterable[str]
) -> Iterator[tuple[str, str, tuple[str, WeightConverter] | None]]:
    """Each tensor's name, the one that transformers loads it under, and how it is merged with others there, if it is.

    That is the conversion, and the one of its source patterns that the tensor has.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    states: dict[str, torch.Tensor] = model.state_dict()
    for name in checkpoint_names:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, states)
        found = next((item for item in converters if pattern in item.source_patterns), None)
        yield name, target, None if pattern is None or found is None else (pattern, found)


def _one_by_one(model: PreTrainedModel, states: Iterable[str], stored: Collection[str]) -> dict[str, None]:
    """The states of a model, the matrices of its experts in the place of what holds them together and is not stored."""
    experts = {name: module for name, module in find_experts(model) if f"{name}.gate_up_proj" not in stored}
    wanted: dict[str, None] = {}
    for name in states:
        owner = name.rpartition(".")[0]
        if owner not in experts:
            wanted[name] = None
            continue
        for number in range(expert_sizes(experts[owner])[0]):
            wanted |= dict.fromkeys(expert_parameter(owner, number, part) for part in PROJECTIONS)
    return wanted
