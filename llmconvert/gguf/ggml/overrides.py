"""Types of single tensors, given by name: what somebody wants of a file otherwise than its mix has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from llmconvert.errors import SchemeError, UnsupportedError
from llmconvert.gguf.ggml.blocks import load_codec
from llmconvert.gguf.ggml.mix import BLOCK_TYPES

__all__ = ["Matrix", "TypeOverride", "override_types"]

#: Word → the tensor that it stands for.
_WORDS: Final[Mapping[str, str]] = {"head": "output.weight", "embedding": "token_embd.weight"}


@dataclass(frozen=True, slots=True)
class TypeOverride:
    """Matrices whose name matches a pattern get a type; None: that of floats as the checkpoint has them.

    ``head`` and ``embedding`` are words for two of them; otherwise shell patterns of names in the checkpoint or in the
    file, both without ``.weight``.
    """

    match: str
    qtype: str | None


@dataclass(frozen=True, slots=True)
class Matrix:
    """A tensor of a file.

    Attributes:
        name: in the file.
        sources: what it is called in the checkpoint, and by quantization; several names if several become one.
        shape: slowest dimension first; those of one dimension are no matrices, and have no other types.
        dense: the type of floats that its values have in the checkpoint.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dense: str


def override_types(
    types: Mapping[str, str], tensors: Sequence[Matrix], overrides: Sequence[TypeOverride], *, tied: bool
) -> dict[str, str]:
    """The types of a file's tensors, by their names there.

    Args:
        types: what the mix gives them.
        tensors: of the file.
        overrides: the first that matches a tensor counts.
        tied: whether the embedding is the output head as well: both words mean it then.

    Raises:
        SchemeError: one matches nothing; or rows are no whole number of blocks of a type.
        UnsupportedError: head and embedding are one and were given two types.
    """
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    outer = {override.match: override.qtype for override in reversed(overrides) if override.match in _WORDS}
    if tied and len(set(outer.values())) > 1:
        found = ", ".join(f"{word}: {str(qtype or 'none').lower()}" for word, qtype in sorted(outer.items()))
        raise UnsupportedError(f"{found}: the model's head is its embedding, one tensor of one type; say one of them")
    names = {tensor: tuple(_names(tensor, tied=tied)) for tensor in matrices}
    for override in overrides:
        if not any(_matches(override, called) for called in names.values()):
            raise SchemeError(
                f"override {override.match!r} matches no matrix of this model; they look like "
                f"{_bare(matrices[0].sources[0])}, in the file {_bare(matrices[0].name)}; or say head or embedding"
            )
    assigned = dict(types)
    for tensor, called in names.items():
        found_first = next((override for override in overrides if _matches(override, called)), None)
        if found_first is not None:
            assigned[tensor.name] = _fitting(tensor, found_first)
    return assigned


def _names(tensor: Matrix, *, tied: bool) -> Iterator[str]:
    yield from (_bare(name) for name in (tensor.name, *tensor.sources))
    for word, name in _WORDS.items():
        if tensor.name == name or (tied and word == "head" and tensor.name == _WORDS["embedding"]):
            yield word


def _bare(name: str) -> str:
    return name.removesuffix(".weight")


def _matches(override: TypeOverride, names: Sequence[str]) -> bool:
    return any(fnmatchcase(name, override.match) for name in names)


def _fitting(tensor: Matrix, override: TypeOverride) -> str:
    if override.qtype is None:
        return tensor.dense
    columns = tensor.shape[-1]
    if columns % load_codec(override.qtype).size:
        fitting = [kind.lower() for kind in BLOCK_TYPES if columns % load_codec(kind).size == 0]
        raise SchemeError(
            f"override {override.match!r}: rows of {tensor.sources[0]} have {columns} weights, no whole blocks of "
            f"{override.qtype.lower()}; types that fit: {', '.join(fitting) or 'none'}; scheme: none "
            "leaves it in floats"
        )
    return override.qtype
