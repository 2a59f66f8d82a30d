"""Checkpoint tensor names against transformers' module names: the one place that knows they can differ.

transformers renames keys while loading (a missing ``model.`` prefix, legacy names) and merges some tensors
(per-expert weights into one). The first is a bijection and is applied here; the second is refused until the engine
can run such modules. Results are always written under checkpoint names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from llmconvert.errors import CheckpointError, UnsupportedError

__all__ = ["map_names", "module_names"]


def map_names(model: PreTrainedModel, checkpoint_names: Iterable[str]) -> Mapping[str, str]:
    """Module parameter name → checkpoint tensor name, for every state of ``model`` that the checkpoint holds.

    Args:
        model: the model, on any device; only names are looked at.
        checkpoint_names: all tensor names of the checkpoint. Those that the model does not know are left out.

    Raises:
        UnsupportedError: transformers would merge or split tensors of this checkpoint.
        CheckpointError: two tensors claim one parameter, or a parameter has no tensor.
    """
    states = model.state_dict()
    mapping: dict[str, str] = {}
    for name, target, converted in _renamed(model, checkpoint_names):
        if converted:
            raise UnsupportedError(
                f"{type(model).__name__}: tensor {name!r} is merged with others when transformers loads it "
                "(a mixture of experts, usually); the streaming engine cannot run such models yet"
            )
        if target not in states:
            continue
        if target in mapping:
            raise CheckpointError(f"tensors {mapping[target]!r} and {name!r} are both meant for {target!r}")
        mapping[target] = name
    missing = [name for name in states if name not in mapping and name not in model.all_tied_weights_keys]
    if missing:
        raise CheckpointError(
            f"{type(model).__name__}: the checkpoint has no tensor for {missing[0]!r}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + "; config.json and the weights do not belong together"
        )
    return mapping


def module_names(model: PreTrainedModel, checkpoint_names: Iterable[str]) -> Mapping[str, str]:
    """Checkpoint tensor name → parameter name, for every tensor that ``model`` loads as it is."""
    states = model.state_dict()
    renamed = _renamed(model, checkpoint_names)
    return {name: target for name, target, converted in renamed if not converted and target in states}


def _renamed(model: PreTrainedModel, checkpoint_names: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """Each tensor's name, the one that transformers loads it under, and whether it is merged with others there."""
    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    states: dict[str, torch.Tensor] = model.state_dict()
    for name in checkpoint_names:
        target, converted_by = rename_source_key(name, renamings, converters, model.base_model_prefix, states)
        yield name, target, converted_by is not None
