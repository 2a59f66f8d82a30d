"""How llama.cpp's ``mmproj`` files have a model's part for images, as data.

Such a file holds a vision tower and the projector behind it, which ``llama-mtmd-cli`` and ``llama-server`` load beside
the decoder's file. Names of tensors are those of the ``gguf`` package's table (``MODEL_ARCH.MMPROJ``); settings are
the ones that llama.cpp's ``tools/mtmd/clip.cpp`` reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from gguf.constants import MODEL_TENSOR, TENSOR_NAMES

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.architectures.architecture import Reading

__all__ = [
    "AS_IT_IS",
    "CLASS_LAST",
    "Entry",
    "Form",
    "Images",
    "Projector",
    "Settings",
    "Whole",
    "activation",
    "activation_of",
    "entries",
    "part",
    "required",
    "within",
]

#: Stands for the number of a layer.
LAYER: Final = "*"
_BOTH: Final = ("weight", "bias")
# Which key tells llama.cpp a feed-forward's activation; it takes the quick GELU where there is none.
_ACTIVATIONS: Final[Mapping[str, Mapping[str, bool]]] = {
    "gelu_pytorch_tanh": {"clip.use_gelu": True},
    "gelu_new": {"clip.use_gelu": True},
    "gelu": {"clip.use_gelu": True},
    "silu": {"clip.use_silu": True},
    "quick_gelu": {},
}


@dataclass(frozen=True, slots=True)
class Images:
    """What a checkpoint says of its part for images.

    Attributes:
        config: of the whole model.
        vision: of its tower, with transformers' defaults filled in.
        text: of its decoder.
        processor: of the image processor; empty where there is none.
    """

    config: Mapping[str, Any]
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    processor: Mapping[str, Any]


def _stored_plain(images: Images, values: torch.Tensor) -> torch.Tensor:
    """The tensor itself, without dimensions of one that it begins with."""
    while values.dim() > 1 and values.shape[0] == 1:
        values = values[0]
    return values


@dataclass(frozen=True, slots=True)
class Form:
    """How a file has a checkpoint's tensor. Both ways have to work on shapes alone (the meta device), too.

    Attributes:
        store: what the file has of the checkpoint's values.
        restore: the checkpoint's values of all tensors that the file has of them, in the order of the entries.
        exact: whether what is restored is what was stored; otherwise it is rounded, and float32.
    """

    store: Callable[[Images, torch.Tensor], torch.Tensor] = _stored_plain
    restore: Callable[[Images, Sequence[torch.Tensor]], torch.Tensor] = lambda images, parts: parts[0]
    exact: bool = True


AS_IT_IS: Final = Form()
#: Positions of patches, and behind them that of the class, which transformers has before them and llama.cpp's graph of
#: InternVL's tower behind them (``ggml_concat``).
CLASS_LAST: Final = Form(
    lambda images, values: _stored_plain(images, values).roll(-1, 0), lambda images, parts: parts[0].roll(1, 0)[None]
)


def within(dimensions: int) -> Form:
    """The tensor without dimensions of one, of which the checkpoint's begins with so many."""
    return Form(restore=lambda images, parts: parts[0][(None,) * dimensions])


def part(number: int, count: int) -> Form:
    """One of several equal parts of the outputs: of fused queries, keys and values, for example."""
    return Form(lambda images, values: values.chunk(count)[number], lambda images, parts: torch.cat(tuple(parts)))


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file, or one for each layer.

    Attributes:
        name: of the checkpoint's tensor, as :attr:`Projector.renames` leaves it, with :data:`LAYER`.
        stored: the file's, with ``{bid}``.
        form: what the file has of it.
        needed: whether a model without it is none.
    """

    name: str
    stored: str
    form: Form = AS_IT_IS
    needed: bool = True


def entries(text: str, forms: Mapping[str, Form] | None = None) -> tuple[Entry, ...]:
    """Entries from a table: a line each of a name and, after an arrow, one of ``gguf.MODEL_TENSOR``.

    Args:
        text: names with ``.weight`` or ``.bias``, or without for both; a ``?`` behind what may be lacking. The
            table's numbers that are no layer's stand behind a colon: ``V_MMPROJ:1``.
        forms: by what stands left of the arrow, without ``?``; others are taken as they are.
    """
    found: list[Entry] = []
    for line in filter(str.strip, text.splitlines()):
        left, _, right = (side.strip() for side in line.partition("->"))
        name, needed = left.rstrip("?"), not left.endswith("?")
        key, _, ending = right.partition(".")
        kind, _, number = key.partition(":")
        stored = TENSOR_NAMES[MODEL_TENSOR[kind]]
        stored = stored.replace("{bid}", number) if number else stored
        form = (forms or {}).get(name, AS_IT_IS)
        if ending or name.rpartition(".")[2] in _BOTH:
            ending = ending or name.rpartition(".")[2]
            found.append(Entry(name, stored if ending == "-" else f"{stored}.{ending}", form, needed))
        else:
            found += [Entry(f"{name}.{kind}", f"{stored}.{kind}", form, needed) for kind in _BOTH]
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Settings:
    """What is read of a file beside the sizes that every file has.

    Attributes:
        whole: for the model's ``config.json``.
        vision: for its ``vision_config``.
        processor: for ``preprocessor_config.json``.
    """

    whole: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Whole:
    """What a decoder's file and the one beside it are read as.

    Attributes:
        model_type: as in ``config.json``.
        model_class: as in its ``architectures``.
        tower: the ``model_type`` of its ``vision_config``.
        tokens: settings that are numbers of tokens → what these are in the vocabulary, one or another.
        outside: what names of the decoder's tensors begin with → what they begin with in the model.
        places: patterns of what entries call tensors → what stands before them in the model; the first counts.
        processor: the class of its image processor.
        decoder: the model type of its decoder, where that is another one than alone.
        gelu: which of its kinds a tower's GELU is.
    """

    model_type: str
    model_class: str
    tower: str
    tokens: Mapping[str, str]
    outside: Mapping[str, str]
    places: tuple[tuple[str, str], ...]
    processor: str
    decoder: str = ""
    gelu: str = "gelu"

    def decoder_name(self, name: str) -> str:
        """What the model calls a tensor of the decoder."""
        for start, instead in self.outside.items():
            if name.startswith(start):
                return instead + name.removeprefix(start)
        return name

    def tower_name(self, name: str) -> str:
        """What the model calls a tensor that an entry does."""
        return next((before for pattern, before in self.places if re.match(pattern, name)), "") + name


@dataclass(frozen=True, slots=True)
class Projector:
    """A kind of file.

    Attributes:
        name: llama.cpp's, ``clip.projector_type``.
        entries: its tensors.
        settings: keys beside those that every file has; refuses what llama.cpp computes otherwise.
        whole: what it is read as, with the decoder's file.
        read: the settings that these keys are of, and those that llama.cpp computes whatever a file says.
        renames: patterns and what they become, in the names of tensors, which differ from release to release.
        unused: patterns of tensors that the model does not look at images with.
        keys: what the tower's config calls a setting, or what it is, where it is not the usual name.
        epsilon: of the norms; a number, or what the tower's config calls it.
        embedded: file's tensors that are rows of the decoder's embedding: name → the token.
        optional: keys of :attr:`settings` that files of old lack, with what is read then in llama.cpp, too.
        notes: where llama.cpp computes a little otherwise, a sentence each.
    """

    name: str
    entries: tuple[Entry, ...]
    settings: Callable[[Images], Mapping[str, Any]]
    whole: Whole
    read: Callable[[Reading], Settings]
    renames: Sequence[tuple[str, str]] = ()
    unused: Sequence[str] = ()
    keys: Mapping[str, str | Callable[[Images], int]] = field(default_factory=dict)
    epsilon: float | str = "layer_norm_eps"
    embedded: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    notes: Callable[[Images], tuple[str, ...]] = lambda images: ()

    def canonical(self, names: Iterable[str]) -> dict[str, str]:
        """What entries call tensors → what the checkpoint does, without those that nothing is computed with."""
        found = {}
        for actual in names:
            name = actual
            for pattern, instead in self.renames:
                name = re.sub(pattern, instead, name)
            if not any(re.fullmatch(pattern, name) for pattern in self.unused):
                found[name] = actual
        return found

    def of_layers(self, layers: int) -> Iterator[tuple[str, str, Entry]]:
        """The checkpoint's name, the file's, and the entry, for each tensor."""
        for entry in self.entries:
            for layer in range(layers) if LAYER in entry.name else (None,):
                name, stored = entry.name, entry.stored
                if layer is not None:
                    name, stored = name.replace(LAYER, str(layer)), stored.replace("{bid}", str(layer))
                yield name, stored, entry


def activation(name: str, function: str) -> Mapping[str, bool]:
    """The keys that tell llama.cpp an activation.

    Args:
        name: of the setting, for the refusal.
        function: transformers' name.

    Raises:
        UnsupportedError: llama.cpp has no such one.
    """
    if function not in _ACTIVATIONS:
        raise UnsupportedError(f"{name} is {function!r}; llama.cpp has {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[function]


def activation_of(file: Reading, gelu: str) -> str:
    """The activation that a file's keys tell.

    Args:
        file: what is read.
        gelu: which of its kinds GELU is.
    """
    flags = file.header.metadata
    if flags.flag("clip.use_gelu", False):
        return gelu
    return "silu" if flags.flag("clip.use_silu", False) else "quick_gelu"


def required(values: Mapping[str, Any], **expected: Any) -> None:
    """Refuse settings that llama.cpp takes for granted.

    Raises:
        UnsupportedError: one is otherwise.
    """
    for name, wanted in expected.items():
        if values.get(name) != wanted:
            raise UnsupportedError(f"{name} is {values.get(name)!r}; llama.cpp computes {wanted!r}")
