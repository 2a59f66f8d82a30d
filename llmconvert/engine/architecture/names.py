"""Checkpoint tensor names against transformers' module names: the one place that knows they can differ.

transformers renames keys while loading (a missing ``model.`` prefix, legacy names) and merges some tensors (the
weights of experts into one). The first is a bijection and is applied here; of the second, experts are known, whose
matrices get names of their own. Results are always written under checkpoint names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

from llmconvert.engine.architecture.expert_storage import (
    Conversions,
    StoredExperts,
    WholeTensor,
    expert_number,
    expert_projection,
    is_joined,
    is_whole,
)
from llmconvert.engine.architecture.experts import ExpertsLayout, expert_parameter, find_experts
from llmconvert.engine.architecture.loading.held import HeldTensors
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["joined_tensors", "map_names", "stored_experts"]


def map_names(
    conversions: Conversions, checkpoint_names: Iterable[str], needed: Callable[[str], bool] = lambda state: True
) -> Mapping[str, str]:
    """Module parameter name → checkpoint tensor name, for every state of a model that the checkpoint holds.

    Where the checkpoint has a tensor for each matrix of each expert, these stand in the place of the parameters that
    hold all experts of a layer, under the names of
    :func:`~llmconvert.engine.architecture.experts.expert_parameter`.

    Args:
        conversions: of the model; only names are looked at.
        checkpoint_names: all tensor names of the checkpoint. Those that the model does not know are left out.
        needed: whether a state, by its name in the model, is going to be loaded. Others may be missing, or merged in
            any way.

    Raises:
        UnsupportedError: transformers would merge or split tensors of this checkpoint in a way that is not known.
        CheckpointError: two tensors claim one parameter, or a needed parameter has no tensor.
    """
    model = conversions.model
    loaded = [(name, *conversions.target(name)) for name in checkpoint_names]
    layouts = {name: layout for name, _, layout in find_experts(model)}
    held = {f"{name}.{matrix.leaf}": name for name, layout in layouts.items() for matrix in layout.matrices.values()}
    whole = {target for _, target, conversion in loaded if target in held and is_whole(conversion)}
    wanted = _one_by_one(conversions.shapes, layouts, held, whole)
    mapping: dict[str, str] = {}
    projections: dict[tuple[str, str], str] = {}
    for name, target, conversion in loaded:
        if conversion is not None and target not in whole:
            if target not in conversions.shapes or not needed(target):  # of a layer that the class does not have
                continue
            if is_joined(model, target, conversion):
                continue
            if target not in held:
                raise UnsupportedError(
                    f"{type(model).__name__}: tensor {name!r} is made into {target!r} when transformers loads it, in a "
                    "way that is not known here; save it anew as the class holds it (from_pretrained, then "
                    "save_pretrained with save_original_format=False)"
                )
            experts, number, kind = held[target], expert_number(name), (target, conversion.pattern)
            if number is None or kind not in projections:
                layout = layouts[experts]
                projections[kind] = expert_projection(model, name, target, experts, layout, conversion)
            target = expert_parameter(experts, number or 0, projections[kind])
        if target not in wanted:
            continue
        if target in mapping:
            raise CheckpointError(f"tensors {mapping[target]!r} and {name!r} are both meant for {target!r}")
        mapping[target] = name
    absent = [name for name in wanted if name not in mapping and name not in model.all_tied_weights_keys]
    joined = {target for _, target, conversion in loaded if conversion is not None and target not in held}
    missing = [name for name in absent if needed(name) and name not in joined]
    if missing:
        raise CheckpointError(
            f"{type(model).__name__}: the checkpoint has no tensor for {missing[0]!r}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + "; config.json and the weights do not belong together"
        )
    return mapping


def joined_tensors(conversions: Conversions, checkpoint_names: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
    """Parameters that transformers makes of several tensors, one behind the other → these, in order.

    Kernels of short convolutions of queries, keys and values are such, and gate and up projections in some classes.

    Raises:
        CheckpointError: some of the tensors of one are missing.
    """
    parts: dict[str, dict[str, str]] = {}
    orders: dict[str, list[str]] = {}
    for name in checkpoint_names:
        target, conversion = conversions.target(name)
        if conversion is not None and is_joined(conversions.model, target, conversion):
            parts.setdefault(target, {})[conversion.pattern] = name
            orders[target] = list(conversion.converter.source_patterns)
    for target, order in orders.items():
        if len(parts[target]) != len(order):
            raise CheckpointError(
                f"{target!r} is made of {len(order)} tensors, the checkpoint has {len(parts[target])}"
            )
    return {target: tuple(parts[target][pattern] for pattern in order) for target, order in orders.items()}


def stored_experts(
    conversions: Conversions, checkpoint: Checkpoint, names: Mapping[str, str]
) -> Mapping[str, StoredExperts]:
    """Where a checkpoint has the experts of each layer, by the names of their modules.

    Args:
        conversions: of what runtimes load, and read artifacts with.
        checkpoint: whose headers are looked at.
        names: of :func:`map_names`.

    Raises:
        CheckpointError: a tensor has another shape than the config asks for.
        UnsupportedError: it is turned around in a way that is not known here.
    """
    modules = list(find_experts(conversions.model))
    made = checkpoint.made if isinstance(checkpoint, HeldTensors) else {}
    found: dict[str, StoredExperts] = {}
    for name, module, layout in modules:
        first = next(iter(layout.matrices))
        if f"{name}.{layout.matrices[first].leaf}" not in names and expert_parameter(name, 0, first) not in names:
            continue  # nothing needs them
        whole: dict[str, WholeTensor] = {}
        written: dict[str, str] = {}
        apart = type(module).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION
        each = [expert_parameter(name, 0, projection) for projection in layout.matrices]
        elsewhere = any(conversions.is_elsewhere(names[one]) for one in each if one in names)
        for leaf in layout.parts:
            tensor = names.get(f"{name}.{leaf}")
            if tensor is None:
                continue
            shape = tuple(module.get_parameter(leaf).shape)
            target, conversion = conversions.target(tensor)
            whole[leaf] = WholeTensor.of(checkpoint.infos[tensor], shape, layout.parts[leaf][0], conversion)
            matrices = [projection for projection, matrix in layout.matrices.items() if matrix.leaf == leaf]
            stored = made[tensor].sources[0] if tensor in made else tensor
            named = conversions.one_by_one(target, stored)
            if named and len(named) == len(matrices):
                paired = zip(matrices, named, strict=True)
                written |= {projection: other.removesuffix(".weight") for projection, other in paired}
                elsewhere |= conversions.is_elsewhere(named[0].replace("*", "0"))
            elif apart:
                stem = tensor.removesuffix(leaf)
                written |= {projection: f"{stem}*.{projection}" for projection in matrices}
        complete = set(written) == {key for key, matrix in layout.matrices.items() if matrix.leaf in whole}
        written = written if complete else {}
        found[name] = StoredExperts(name, layout, names, whole, written, apart, elsewhere and complete)
    return found


def _one_by_one(
    states: Iterable[str], layouts: Mapping[str, ExpertsLayout], held: Mapping[str, str], whole: Collection[str]
) -> dict[str, None]:
    """The states of a model, each matrix of its experts in the place of what holds them together and is not stored."""
    wanted: dict[str, None] = {}
    for name in states:
        if name not in held or name in whole:
            wanted[name] = None
            continue
        layout, leaf = layouts[held[name]], name.removeprefix(f"{held[name]}.")
        matrices = [projection for projection, matrix in layout.matrices.items() if matrix.leaf == leaf]
        for number in range(layout.count):
            wanted |= dict.fromkeys(expert_parameter(held[name], number, part) for part in matrices)
    return wanted
