"""The pieces of a model's tensors: those that a checkpoint's become in a file, and those that a file's are read as."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.architectures.architecture import GgufArchitecture, lengths
from llmconvert.gguf.architectures.entries import EXPERT, Config, Entry
from llmconvert.gguf.architectures.pieces import Piece, expert_linear, numbered, piece_shape
from llmconvert.gguf.architectures.reading import FOREIGN
from llmconvert.gguf.header import GgufHeader, GgufTensor

__all__ = ["Place", "StoredTensor", "check_tensors", "place_tensors", "plan_tensors"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file to be written: its name and shape there, and what its rows come from."""

    name: str
    shape: Shape
    pieces: tuple[Piece, ...]
    kept: bool

    @property
    def source(self) -> str:
        """The checkpoint's tensor that it comes from, the first of several."""
        return self.pieces[0].name

    @property
    def by_rows(self) -> bool:
        """Whether each row of weights is one of the checkpoint's, so that codes chosen there are this tensor's."""
        return all(piece.form.holds_codes for piece in self.pieces)


def plan_tensors(
    names: Mapping[str, Shape], arch: GgufArchitecture, config: Config, *, tied: bool
) -> tuple[StoredTensor, ...]:
    """What a checkpoint's tensors become.

    Args:
        names: its tensors, with their shapes.
        arch: the file's architecture.
        config: with transformers' defaults filled in.
        tied: whether the embedding is the output matrix too; a head is left out then.

    Raises:
        CheckpointError: a tensor is missing, or has another shape than the config says.
    """
    found: list[StoredTensor] = []
    seen: set[str] = set()
    sizes = lengths(config)
    for stored, entry, layer in arch.entries(int(config["num_hidden_layers"])):
        if (stored == "output.weight" and tied) or stored in seen:
            continue
        pieces, shape = _written(names, arch, entry, stored, layer, config)
        if not pieces:
            if entry.presence == "every" and entry.read and not _other_way(arch, entry, names, layer):
                raise CheckpointError(
                    f"the checkpoint has no tensor {numbered(entry.name, layer, 0)!r}, which {arch.name} models need"
                )
            if stored == "output.weight":
                raise CheckpointError(f"the checkpoint has no tensor {entry.name!r}, which {arch.name} models need")
            continue
        _check_shape(pieces[0].name, names[pieces[0].name], entry, sizes)
        seen.add(stored)
        found.append(StoredTensor(stored, shape, tuple(pieces), len(shape) > 1 and _is_kept(arch, stored)))
    return tuple(found)


#: Ends of names of matrices that stay F32, as ``llama-quantize`` and llama.cpp's converter have them.
_KEPT = (
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
    "position_embd.weight",
    "ssm_conv1d.weight",
    "shortconv.conv.weight",
    "ssm_norm.weight",
    "ssm_a",
    "ssm_d",
    ".bias",
    "altup_correct_coef.weight",
    "altup_predict_coef.weight",
    "altup_router.weight",
)


def _is_kept(arch: GgufArchitecture, stored: str) -> bool:
    return stored.endswith(_KEPT + arch.unquantized)


def _other_way(arch: GgufArchitecture, entry: Entry, names: Mapping[str, Shape], layer: int) -> bool:
    """Whether a checkpoint has what a file's tensor is made of in another layout."""
    stored = next(stored for stored, found, number in arch.entries(layer + 1) if found is entry and number == layer)
    others = (found for name, found, number in arch.entries(layer + 1) if name == stored and number == layer)
    return any(numbered(other.name, layer, 0) in names for other in others)


def _written(
    names: Mapping[str, Shape], arch: GgufArchitecture, entry: Entry, stored: str, layer: int, config: Config
) -> tuple[list[Piece], Shape]:
    """The pieces that an entry is, and the shape of the file's tensor; none if the checkpoint lacks it."""
    form = entry.form
    if EXPERT in entry.name:
        if numbered(entry.name, layer, 0) not in names:
            return [], ()
        count = arch.experts(config) if callable(arch.experts) else int(config[arch.experts])
        each = [numbered(entry.name, layer, number) for number in range(count)]
        if lacking := [name for name in each if name not in names]:
            raise CheckpointError(f"the checkpoint has no tensor {lacking[0]!r}, which {arch.name} models need")
        pieces: list[Piece] = []
        inner: Shape = ()
        for name in each:
            piece, inner = _piece(stored, len(pieces), name, names[name], None, entry, config)
            pieces.append(piece)
        return pieces, (count, *inner)
    name = numbered(entry.name, layer)
    if name not in names and entry.instead is not None:
        name = numbered(entry.name, entry.instead(config, layer))
    if name not in names:
        return [], ()
    shape = names[name]
    if not form.whole:
        piece, inner = _piece(stored, 0, name, shape, None, entry, config)
        return [piece], inner
    first = re.sub(r"^blk\.\d+\.", "blk.0.", stored)
    apart = next((other.name for key, other, _ in arch.entries(1) if EXPERT in other.name and key == first), "")
    pieces = []
    for number in range(shape[0]):
        piece, inner = _piece(stored, number, name, shape[1:], number, entry, config)
        projection = apart.removesuffix(".weight").rpartition(".")[2]
        called = expert_linear(name, stored, number, projection) if len(shape) > 2 else ""
        pieces.append(replace(piece, called=called))
    return pieces, (shape[0], *inner)


def _piece(
    stored: str, place: int, name: str, shape: Shape, expert: int | None, entry: Entry, config: Config
) -> tuple[Piece, Shape]:
    form = entry.form.of_shape(shape, config)
    outputs = shape[-1] if form.transposed and len(shape) > 1 else (shape[0] if shape else 1)
    order = None if form.rows is None else form.rows(config, outputs)
    rows = outputs if order is None else len(order)
    inner = piece_shape(form, shape, rows, config)
    height = math.prod(inner[:-1])
    return Piece(stored, place * height, rows, height, name, expert, order, form, entry), inner


def _check_shape(name: str, shape: Shape, entry: Entry, sizes: Mapping[str, int]) -> None:
    if not entry.shape:
        return
    expected = tuple(sizes[symbol] for symbol in entry.shape)
    if shape != expected:
        raise CheckpointError(
            f"tensor {name!r} has shape {list(shape)}, config.json asks for {list(expected)} "
            f"({' × '.join(entry.shape)})"
        )


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of the checkpoint that a file is read as: its shape, and the pieces of it."""

    name: str
    shape: Shape
    pieces: tuple[Piece, ...]


def check_tensors(header: GgufHeader, arch: GgufArchitecture, layers: int) -> None:
    """See that a file has every tensor that its architecture needs, and no other.

    Raises:
        CheckpointError: one is missing.
        UnsupportedError: this architecture has no place for one.
    """
    known = {stored for stored, entry, _ in arch.entries(layers) if entry.read} | arch.consumed
    unknown = next((name for name in header.tensors if name not in known), None)
    if unknown is not None:
        raise UnsupportedError(
            f"{header.path}: tensor {unknown!r} has no place in {arch.model_class}; "
            "this variant of the architecture is not supported"
        )
    _check_complete(header, arch, layers)


def place_tensors(header: GgufHeader, arch: GgufArchitecture, config: Config, layers: int) -> dict[str, Place]:
    """Where every tensor in a file goes.

    Args:
        header: the file.
        arch: its architecture.
        config: of the model.
        layers: how many decoder layers the metadata promises.

    Returns:
        By the checkpoint's names; tensors in ``arch.consumed`` are left out.

    Raises:
        CheckpointError: a shape contradicts the metadata.
    """
    parts: dict[str, list[tuple[Entry, GgufTensor]]] = {}
    for stored, entry, layer in arch.entries(layers):
        if entry.read and stored in header.tensors:
            parts.setdefault(numbered(entry.name, layer), []).append((entry, header.tensors[stored]))
    sizes = lengths(config)
    places: dict[str, Place] = {}
    for name, group in parts.items():
        for place in _placed(header, name, group, config, sizes):
            places[place.name] = place
    return places


def _placed(
    header: GgufHeader,
    name: str,
    group: Sequence[tuple[Entry, GgufTensor]],
    config: Config,
    sizes: Mapping[str, int],
) -> list[Place]:
    """The tensors of the checkpoint that come of one name."""
    entry, tensor = group[0]
    form = entry.form
    if EXPERT in name:
        if len(tensor.shape) < 2 or len(group) > 1:
            raise _misshapen(header, tensor, "one matrix for each expert")
        count, inner = tensor.shape[0], tensor.shape[1:]
        return [
            _place(header, name.replace(EXPERT, str(number)), [(entry, tensor, number, inner)], config, sizes)
            for number in range(count)
        ]
    if not form.whole:
        return [_place(header, name, [(part, found, 0, found.shape) for part, found in group], config, sizes)]
    counts = {found.shape[0] if len(found.shape) > 1 else 0 for _, found in group}
    if len(counts) > 1 or not min(counts):
        raise _misshapen(header, tensor, "as many experts as the tensors beside it")
    (count,) = counts
    pieces: list[Piece] = []
    shape: Shape = ()
    for number in range(count):
        place = _place(
            header, name, [(part, found, number, found.shape[1:]) for part, found in group], config, {}, expert=number
        )
        pieces += place.pieces
        shape = place.shape
    return [Place(name, (count, *shape), tuple(pieces))]


def _place(
    header: GgufHeader,
    name: str,
    group: Sequence[tuple[Entry, GgufTensor, int, Shape]],
    config: Config,
    sizes: Mapping[str, int],
    *,
    expert: int | None = None,
) -> Place:
    """One matrix or vector of the checkpoint; parts with their tensor, which matrix of it, and its shape."""
    heights = [_outputs(entry, inner, config) for entry, _, _, inner in group]
    outputs = sum(heights)
    pieces: list[Piece] = []
    for (entry, tensor, number, inner), height in zip(group, heights, strict=True):
        order = None if entry.form.rows is None or entry.form.padded else _order(header, entry, tensor, config, outputs)
        if order is not None and len(order) != height:
            raise _misshapen(header, tensor, f"{len(order)} of {outputs} rows of {name!r}")
        stored_rows = math.prod(inner[:-1])
        pieces.append(
            Piece(tensor.name, number * stored_rows, height, stored_rows, name, expert, order, entry.form, entry)
        )
    entry, tensor, _, inner = group[0]
    _check_whole(header, tensor, pieces, outputs)
    shape = _source_shape(entry, inner, outputs)
    if entry.form.heads is not None:
        _check_heads(header, tensor, entry, inner, config)
    if entry.shape and sizes:
        expected = tuple(sizes[symbol] for symbol in entry.shape)
        if shape != expected:
            raise CheckpointError(
                f"{header.path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, the metadata asks for "
                f"{list(expected)} ({' × '.join(entry.shape)}); the file is inconsistent"
            )
    return Place(name, shape, tuple(pieces))


def _check_whole(header: GgufHeader, tensor: GgufTensor, pieces: Sequence[Piece], outputs: int) -> None:
    """See that parts of a matrix are all of it, each output once."""
    orders = [np.arange(piece.rows) if piece.order is None else piece.order for piece in pieces]
    if all(piece.order is None for piece in pieces) and len(pieces) == 1:
        return
    if not np.array_equal(np.sort(np.concatenate(orders)), np.arange(outputs)):
        raise _misshapen(header, tensor, f"parts of {pieces[0].name!r} that are all of it")


def _check_heads(header: GgufHeader, tensor: GgufTensor, entry: Entry, inner: Shape, config: Config) -> None:
    assert entry.form.heads is not None
    try:
        heads = entry.form.heads(config)
    except FOREIGN:
        heads = 0
    if heads < 1 or not inner or inner[0] != heads:
        raise _misshapen(header, tensor, f"one matrix for each of {heads} heads or groups")


def _order(header: GgufHeader, entry: Entry, tensor: GgufTensor, config: Config, outputs: int) -> np.ndarray:
    assert entry.form.rows is not None
    try:
        return entry.form.rows(config, outputs)
    except FOREIGN:
        raise _misshapen(header, tensor, "rows that the model's heads divide") from None


def _outputs(entry: Entry, inner: Shape, config: Config) -> int:
    """How many outputs of the checkpoint's matrix a tensor of that shape holds."""
    form = entry.form
    if form.padded is not None:
        return min(form.padded(config), inner[0] if inner else 1)
    if form.heads is not None:
        return inner[0] * (inner[2] if form.turned and len(inner) > 2 else inner[1] if len(inner) > 1 else 1)
    return inner[0] if inner else 1


def _source_shape(entry: Entry, inner: Shape, outputs: int) -> Shape:
    form = entry.form
    if form.squeezed:
        return (inner[0], 1, *inner[1:])
    if form.column:
        return (inner[0],)
    if form.heads is not None:
        return (outputs, inner[1] if form.turned else inner[2]) if len(inner) > 2 else (outputs,)
    shape = (outputs, *inner[1:])
    return (shape[1], shape[0]) if form.transposed and len(shape) == 2 else shape


def _misshapen(header: GgufHeader, tensor: GgufTensor, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{header.path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, expected {expected}; "
        "the file is inconsistent"
    )


def _check_complete(header: GgufHeader, arch: GgufArchitecture, layers: int) -> None:
    missing = [
        stored
        for stored, entry, _ in arch.entries(layers)
        if entry.presence == "every" and entry.read and stored not in header.tensors
    ]
    if missing:
        raise CheckpointError(
            f"{header.path}: {len(missing)} of {arch.model_class}'s tensors are missing, first {missing[0]!r}; "
            "the file is incomplete"
        )
    # A bias that only some layers have would leave the others' random in transformers.
    having: dict[Entry, int] = {}
    for stored, entry, _ in arch.entries(layers):
        if entry.presence == "all or none" and entry in arch.layer:
            having[entry] = having.get(entry, 0) + (stored in header.tensors)
    for entry, count in having.items():
        if count not in (0, layers):
            stem = next(stored for stored, found, _ in arch.entries(1) if found == entry).removeprefix("blk.0.")
            raise CheckpointError(
                f"{header.path}: only {count} of {layers} layers have {stem!r}; the file is incomplete"
            )
