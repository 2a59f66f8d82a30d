"""What an architecture's tensors are called in checkpoints, and how a GGUF file has them otherwise, as data.

Their names in files are those that the ``gguf`` package's tables have for the names in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from typing import Any, Final, Literal

import gguf
import numpy as np
import torch

__all__ = ["EXPERT", "LAYER", "Change", "Config", "Entry", "Form", "entries", "stored_name", "transposable"]

#: A parsed ``config.json``, completed by transformers' class, or one that was read from a file.
Config = Mapping[str, Any]

#: Stand for the number of a layer and of an expert in names.
LAYER, EXPERT = "*", "#"


class Change(Enum):
    """What a file's values are of the checkpoint's."""

    NONE = "as they are"
    PLUS_ONE = "plus one"
    #: Mamba's decay is stored as it is used: minus the exponential.
    MINUS_EXP = "minus the exponential"

    def store(self, values: torch.Tensor) -> torch.Tensor:
        """The file's values, float32, of the checkpoint's, float32."""
        if self is Change.PLUS_ONE:
            return values + 1
        return -values.exp() if self is Change.MINUS_EXP else values

    def restore(self, values: torch.Tensor) -> torch.Tensor:
        """The checkpoint's values of the file's; the inverse but for rounding."""
        if self is Change.NONE:
            return values
        values = values.float()
        return values - 1 if self is Change.PLUS_ONE else (-values).log()


@dataclass(frozen=True, slots=True)
class Form:
    """How a file has a tensor.

    Attributes:
        rows: given the config and how many outputs (rows, or elements of a vector) the checkpoint's matrix has, the
            outputs that the file's tensor has, in its order: all of them, or a part; None for all as they come.
        change: of the values.
        transposed: whether the checkpoint has inputs by outputs.
        plain: given the config, the shape of a matrix as the checkpoint's class has it, where checkpoints of another
            shape have it transposed; None where all have it the same.
        whole: whether the first dimension of the checkpoint's tensor goes through a layer's experts.
        heads: given the config, into how many matrices the outputs are cut, one behind the other in a tensor of three
            dimensions; None: they are not.
        turned: whether the file has inputs by outputs.
        factor: given the config and how many outputs there are, what each of them is multiplied by; None: by nothing.
        squeezed: whether the checkpoint has a dimension of one in the middle (kernels of convolutions).
        column: whether the file has a vector as a matrix of one column.
        padded: given the config, how many rows the checkpoint has, where the file has more behind them.
    """

    rows: Callable[[Config, int], np.ndarray] | None = None
    change: Change = Change.NONE
    transposed: bool = False
    plain: Callable[[Config], tuple[int, int]] | None = None
    whole: bool = False
    heads: Callable[[Config], int] | None = None
    turned: bool = False
    factor: Callable[[Config, int], np.ndarray] | None = None
    squeezed: bool = False
    column: bool = False
    padded: Callable[[Config], int] | None = None

    def of_shape(self, shape: tuple[int, ...], config: Config) -> Form:
        """The form of a matrix that a checkpoint has in a shape."""
        if self.plain is None or shape == self.plain(config):
            return self
        return replace(self, transposed=True)

    @property
    def holds_codes(self) -> bool:
        """Whether codes that were chosen for rows of the checkpoint are the file's."""
        return self.by_rows and self.factor is None and self.change is Change.NONE

    @property
    def by_rows(self) -> bool:
        """Whether rows of the file are rows of the checkpoint's matrices, which some can be read of."""
        return not (self.turned or self.squeezed or self.column or self.heads)


PLAIN: Final = Form()
Presence = Literal["every", "all or none", "some"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of checkpoints, or one for each layer, or for each expert of a layer.

    Attributes:
        name: with :data:`LAYER` and :data:`EXPERT` for the numbers.
        stored: the file's, with :data:`LAYER`; "" for what the ``gguf`` package's table has for ``name``.
        shape: what its lengths are called; empty where nothing is said of them.
        form: how the file has it.
        presence: in which layers it is: in every one, in all or none, or in some.
        read: whether it is what a file is read as; otherwise another layout that checkpoints have, too.
        instead: given the config and a layer, the one whose tensor a file has where the checkpoint has none; None: no
            file has one then.
    """

    name: str
    stored: str = ""
    shape: tuple[str, ...] = ()
    form: Form = PLAIN
    presence: Presence = "every"
    read: bool = True
    instead: Callable[[Config, int], int] | None = None


def entries(
    text: str, forms: Mapping[str, Form] | None = None, *, prefix: str = f"model.layers.{LAYER}.", read: bool = True
) -> tuple[Entry, ...]:
    """Entries from a table: a line each of name, lengths and, after an arrow, the file's name.

    Args:
        text: names without ``prefix``; a ``?`` behind them for what all layers may lack, ``~`` for what some may. The
            file's name is one of ``gguf.MODEL_TENSOR`` and what it ends with: ``ATTN_SINKS.weight``.
        forms: by name without ``.weight`` or ``.bias``; others are plain.
        prefix: of every name.
        read: see :class:`Entry`.
    """
    forms = forms or {}
    found: list[Entry] = []
    for line in filter(str.strip, text.splitlines()):
        left, _, target = (part.strip() for part in line.partition("->"))
        name, *shape = left.split()
        presence: Presence = {"?": "all or none", "~": "some"}.get(name[-1], "every")  # type: ignore[assignment]
        name = name.rstrip("?~")
        stem = name.removesuffix(".weight").removesuffix(".bias")
        form = forms.get(name, forms.get(stem, PLAIN))
        found.append(Entry(prefix + name, _target(target), tuple(shape), form, presence, read))
    return tuple(found)


def _target(target: str) -> str:
    if not target:
        return ""
    kind, dot, suffix = target.partition(".")
    name: str = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR[kind]].format(bid=LAYER)
    return name + dot + suffix


def without(found: Iterable[Entry], *names: str) -> tuple[Entry, ...]:
    """Entries but for those whose names end with one of ``names``."""
    return tuple(entry for entry in found if not entry.name.endswith(names))


def formed(found: Iterable[Entry], form: Form, *endings: str) -> tuple[Entry, ...]:
    """Entries, of which those whose names end with one of ``endings`` have another form."""
    return tuple(replace(entry, form=form) if entry.name.endswith(endings) else entry for entry in found)


def transposable(found: Iterable[Entry], inner: str) -> tuple[Entry, ...]:
    """Entries, of which the tensors with all experts of a layer may be transposed in checkpoints.

    Args:
        found: them all.
        inner: the setting that counts an expert's neurons.
    """

    def up(config: Config) -> tuple[int, int]:
        return 2 * config[inner], config["hidden_size"]

    def down(config: Config) -> tuple[int, int]:
        return config["hidden_size"], config[inner]

    return tuple(
        replace(entry, form=replace(entry.form, plain=down if entry.name.endswith("down_proj") else up))
        if entry.form.whole
        else entry
        for entry in found
    )


@cache
def stored_name(arch: str, entry: Entry) -> str:
    """What files of an architecture call an entry, with :data:`LAYER` for the layer."""
    if entry.stored:
        return entry.stored
    key = entry.name.replace(LAYER, "0").replace(f".{EXPERT}.", ".")
    found = _names(arch).get_name(key, (".weight", ".bias"))
    if found is None:
        raise LookupError(f"the gguf package has no name for {entry.name!r} in architecture {arch!r}")
    return str(found).replace("blk.0.", f"blk.{LAYER}.")


@cache
def _names(arch: str) -> gguf.TensorNameMap:
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    return gguf.get_tensor_name_map(kind, 1)
