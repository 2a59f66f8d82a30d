"""Where a checkpoint has the experts of a layer: a matrix each, or all of them in one tensor; and what artifacts have.

transformers' table of conversions says which matrices become rows of which parameter while it loads. What is stored
whole is read one expert at a time. Artifacts hold one matrix each, where that table has a way back from them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from llmconvert.engine.architecture.expert_names import names_elsewhere
from llmconvert.engine.architecture.experts import ExpertsLayout, expert_parameter
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.storage.checkpoint import Checkpoint, TensorInfo

__all__ = [
    "Conversion",
    "Conversions",
    "StoredExperts",
    "WholeTensor",
    "expert_number",
    "expert_projection",
    "is_joined",
    "is_whole",
]

_NUMBER = re.compile(r"(?:^|\.)experts\.(\d+)\.")
_EACH = ".*."
_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Conversion:
    """How transformers makes a parameter of a tensor and maybe others.

    Attributes:
        converter: of its table.
        pattern: the one of the converter's source patterns that the tensor has.
        kinds: of the operations that it takes.
    """

    converter: WeightConverter
    pattern: str
    kinds: frozenset[type] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", frozenset(map(type, self.converter.operations)))


class Conversions:
    """transformers' table for a model, and behind it the names that other runtimes have for single experts.

    Args:
        model: on any device, as its class has it; only names and shapes are looked at.

    Attributes:
        model: the same. What is put in the place of its modules later changes nothing here.
        shapes: of its parameters and buffers, by name.
        converters: transformers' own.
        elsewhere: those of :func:`~llmconvert.engine.architecture.expert_names.names_elsewhere`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(model)
        self._renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
        self._prefix = model.base_model_prefix
        self._states: dict[str, torch.Tensor] = model.state_dict()
        self._targets: dict[str, tuple[str, Conversion | None]] = {}
        self.model = model
        self.shapes = {name: tuple(state.shape) for name, state in self._states.items()}
        self.converters = [item for item in transforms if isinstance(item, WeightConverter)]
        self.elsewhere = names_elsewhere(str(model.config.model_type))

    def target(self, name: str) -> tuple[str, Conversion | None]:
        """The parameter that a tensor is loaded into, and how, if not as it is."""
        found = self._targets.get(name)
        if found is None:
            number = _NUMBER.search(name)
            if number is not None and number[1] != "0":  # of a layer, whose experts go where its first one goes
                first = self.target(f"{name[: number.start(1)]}0{name[number.end(1) :]}")
                if first[1] is not None and MergeModulelist in first[1].kinds:
                    found = first
            found = self._targets[name] = found or self._target(name)
        return found

    def _target(self, name: str) -> tuple[str, Conversion | None]:
        converters = [*self.converters, *self.elsewhere]
        target, pattern = rename_source_key(name, self._renamings, converters, self._prefix, self._states)
        if target not in self._states and name in self._states:  # the model's own names win, as they do there
            target, pattern = rename_source_key(name, [], [], self._prefix, self._states)
        found = next((item for item in converters if pattern in item.source_patterns), None)
        return target, None if pattern is None or found is None else Conversion(found, pattern)

    def is_elsewhere(self, name: str) -> bool:
        """Whether a tensor holds a matrix of an expert under a name that transformers does not know."""
        _, conversion = self.target(name)
        return conversion is not None and conversion.converter in self.elsewhere

    def loads_beside(self, tensor: str, parameter: str) -> bool:
        """Whether what is stored beside a weight, its scales for one, is loaded beside the parameter that it becomes.

        Not so where a name is changed of the weight alone, ``mlp.w2.weight`` into ``mlp.down_proj.weight``.
        """
        scale = f"{parameter}_scale"
        states = {scale: torch.empty(0)}
        target, _ = rename_source_key(f"{tensor}_scale", self._renamings, [], self._prefix, states)
        return scale in (target, f"{tensor}_scale")

    def one_by_one(self, parameter: str, tensor: str) -> tuple[str, ...]:
        """Names of one matrix each, with ``*`` for its expert, that become a parameter of a layer's experts.

        Args:
            parameter: of the model.
            tensor: what a checkpoint calls it, as whose neighbours they are named.

        Returns:
            In the order in which their rows are put together, those that transformers would take before those that
            others do; empty if there are none.
        """
        for converter in (*self.converters, *self.elsewhere):
            sources, target = converter._original_source_patterns, converter.target_patterns[0]
            kinds = Conversion(converter, sources[0]).kinds
            named = all(_EACH in source and source.endswith(_WEIGHT) for source in sources)
            if not named or not kinds <= {MergeModulelist, Concatenate} or not parameter.endswith(target):
                continue
            stem = (tensor if tensor.endswith(target) else parameter).removesuffix(target)
            place = f".{sources[0].partition('.')[0]}."
            if converter in self.elsewhere and place in tensor:
                stem = f"{tensor.partition(place)[0]}."
            names = tuple(stem + source.replace("\\", "") for source in sources)
            found = [self.target(name.replace("*", "0")) for name in names]
            if all(back == parameter and how is not None and how.converter is converter for back, how in found):
                return names
        return ()


def is_whole(conversion: Conversion | None) -> bool:
    """Whether a tensor holds a parameter of all experts of a layer, as it is or turned around."""
    if conversion is None:
        return True
    return len(conversion.converter.source_patterns) == 1 and conversion.kinds <= {Transpose, Interleave}


def is_joined(model: PreTrainedModel, parameter: str, conversion: Conversion) -> bool:
    """Whether a parameter is several tensors one behind the other: kernels of convolutions, linears side by side."""
    operations = conversion.converter.operations
    if len(operations) != 1 or not isinstance(operations[0], Concatenate) or operations[0].dim != 0:
        return False
    owner, _, leaf = parameter.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return False
    return leaf in dict(module.named_parameters(recurse=False)) and not isinstance(module, nn.Embedding)


def expert_number(name: str) -> int | None:
    """Which of a layer's experts a tensor belongs to, by its name; None where that does not say it."""
    number = _NUMBER.search(name)
    return int(number[1]) if number is not None else None


def expert_projection(
    model: PreTrainedModel, name: str, parameter: str, experts: str, layout: ExpertsLayout, conversion: Conversion
) -> str:
    """Which matrix of an expert a tensor is; the same for all experts of a layer.

    Args:
        model: for errors.
        name: of the tensor.
        parameter: what transformers merges it into.
        experts: the module that has the parameter.
        layout: of it.
        conversion: how it does so.

    Raises:
        UnsupportedError: in a way that is not known here.
    """
    leaf = parameter.removeprefix(f"{experts}.")
    sources = list(conversion.converter.source_patterns)
    projections = [projection for projection, matrix in layout.matrices.items() if matrix.leaf == leaf]
    known = conversion.kinds <= {MergeModulelist, Concatenate} and not any(
        layout.matrices[projection].transposed for projection in projections
    )
    if expert_number(name) is None or len(sources) != len(projections) or not known:
        raise UnsupportedError(
            f"{type(model).__name__}: transformers merges tensor {name!r} into {parameter!r} in a way that is not "
            "known here; save it anew in what the class holds (from_pretrained, then save_pretrained with "
            "save_original_format=False), or with a matrix for each expert"
        )
    return projections[sources.index(conversion.pattern)]


@dataclass(frozen=True, slots=True)
class WholeTensor:
    """A tensor with a parameter of all experts of a layer, whose first dimension goes through them.

    Attributes:
        name: in the checkpoint.
        rows: of it that an expert has.
        turned: whether the other two dimensions are stored the other way round.
        in_turns: whether the first of them has two halves in turns that the class has one behind the other.
    """

    name: str
    rows: int
    turned: bool = False
    in_turns: bool = False

    @classmethod
    def of(cls, info: TensorInfo, shape: tuple[int, ...], rows: int, conversion: Conversion | None) -> WholeTensor:
        """See :func:`is_whole`.

        Args:
            info: of the tensor.
            shape: of the parameter.
            rows: of it that an expert has.
            conversion: how it is loaded, if not as it is.

        Raises:
            CheckpointError: the tensor has another shape than the config asks for.
            UnsupportedError: it is turned around in a way that is not known here.
        """
        operations: Sequence[Any] = [] if conversion is None else conversion.converter.operations
        turned = in_turns = False
        for operation in operations:
            alone = len(operations) == 1
            if alone and isinstance(operation, Transpose) and {operation.dim0, operation.dim1} == {1, 2}:
                turned = not (operation.check_dims and info.shape == shape)
            elif alone and isinstance(operation, Interleave) and operation.dim == 1 and not operation.inverse:
                in_turns = True
            else:
                raise UnsupportedError(
                    f"tensor {info.name!r}: transformers turns it around ({type(operation).__name__}) in a way that is "
                    "not known here; save it anew as the class holds it (save_pretrained with "
                    "save_original_format=False)"
                )
        stored = (shape[0], shape[2], shape[1]) if turned else shape
        if info.shape != stored:
            raise CheckpointError(f"tensor {info.name!r} has shape {list(info.shape)}, config.json says {list(stored)}")
        return cls(info.name, rows, turned, in_turns)

    def read(self, checkpoint: Checkpoint, number: int) -> torch.Tensor:
        """What it has of one expert, with as many rows in front as that takes, in memory of the caller's own."""
        part = checkpoint.read_rows(self.name, number * self.rows, (number + 1) * self.rows)
        if self.turned:
            part = part.transpose(1, 2).contiguous()
        if self.in_turns:
            part = torch.cat([part[:, ::2], part[:, 1::2]], dim=1)
        return part


@dataclass(frozen=True, slots=True)
class StoredExperts:
    """The experts of a layer in a checkpoint, and in artifacts that are made of it.

    Attributes:
        name: of their module in the model.
        layout: of that module.
        names: parameters of the model → tensors of the checkpoint.
        whole: parameters of the module that the checkpoint has in one tensor, by their names in it.
        written: matrix → what artifacts call it, without ``.weight`` and with ``*`` for the expert, where transformers
            reads experts so; empty where it does not.
        apart: whether transformers puts a linear for each matrix in their place as it loads a quantized model.
        elsewhere: whether these names are other runtimes' alone
            (:mod:`~llmconvert.engine.architecture.expert_names`): transformers would load experts at random.
    """

    name: str
    layout: ExpertsLayout
    names: Mapping[str, str]
    whole: Mapping[str, WholeTensor]
    written: Mapping[str, str]
    apart: bool
    elsewhere: bool = False

    @property
    def unread(self) -> str:
        """Why transformers reads no artifact that has these experts quantized; "" where it does."""
        if self.layout.passing:
            return "transformers takes no quantized experts of a class that has others without weights behind them"
        first = next(iter(self.layout.matrices))
        if self.elsewhere and not self.whole:
            return (
                "transformers reads the experts of a layer from one tensor, and has no names for each of them "
                f"({self.tensor(0, first)})"
            )
        if self.elsewhere or self.artifact_name(0, first) is None:
            return (
                f"transformers reads the experts of a layer from one tensor ({self.tensor(0, first)}), which no format "
                "holds quantized, and has no names for each of them"
            )
        return ""

    def tensor(self, number: int, projection: str) -> str:
        """The tensor that holds a matrix, by itself or with others."""
        whole = self.whole.get(self.layout.matrices[projection].leaf)
        return whole.name if whole is not None else self.names[expert_parameter(self.name, number, projection)]

    def artifact_name(self, number: int, projection: str) -> str | None:
        """What an artifact calls a matrix, without ``.weight``; None where no reader would take it."""
        if self.layout.matrices[projection].leaf not in self.whole:
            return self.tensor(number, projection).removesuffix(_WEIGHT)
        return self.written[projection].replace("*", str(number)) if projection in self.written else None

    def read(self, checkpoint: Checkpoint, number: int, leaf: str, dtype: torch.dtype) -> torch.Tensor:
        """What a parameter of the module has of one expert (:attr:`ExpertsLayout.parts`), in CPU memory."""
        if leaf in self.whole:
            return self.whole[leaf].read(checkpoint, number).to(dtype)
        part = torch.empty(self.layout.parts[leaf], dtype=dtype)
        for projection, matrix in self.layout.matrices.items():
            if matrix.leaf == leaf:
                matrix.of(part).copy_(checkpoint[self.tensor(number, projection)])
        return part

    def read_matrix(self, checkpoint: Checkpoint, number: int, projection: str) -> torch.Tensor:
        """One matrix ``[rows, columns]``, in CPU memory of the caller's own."""
        matrix = self.layout.matrices[projection]
        if matrix.leaf in self.whole:
            return matrix.of(self.whole[matrix.leaf].read(checkpoint, number)).clone(
                memory_format=torch.contiguous_format
            )
        return checkpoint[self.tensor(number, projection)]
