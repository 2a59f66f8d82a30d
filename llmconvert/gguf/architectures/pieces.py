"""Which rows of which tensor of a checkpoint the rows of a GGUF file's tensors are, both ways.

A piece is a matrix of the checkpoint, one expert's for example, or a part of its outputs, among the rows of a tensor of
the file. Planning a file and reading one give the same pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llmconvert.gguf.architectures.entries import EXPERT, LAYER, Config, Entry, Form

__all__ = ["Piece", "ReadRows", "expert_linear", "gather", "numbered", "piece_shape", "restored", "source_rows"]

#: Rows ``start:stop`` of a tensor.
ReadRows = Callable[[int, int], torch.Tensor]

# Rows are read together where no more than this many times as many lie between the first and the last.
_SPARSE = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a file's tensor that come from one matrix of a checkpoint.

    Attributes:
        stored: the file's tensor.
        first: of its rows, all dimensions but the last taken together.
        rows: how many outputs of the checkpoint's matrix they are.
        stored_rows: how many rows of the file's tensor that takes; a vector is one.
        name: the checkpoint's tensor.
        expert: which of the matrices along its first dimension; None where it is one.
        order: the output of the checkpoint's matrix that each row is; None for all as they come.
        form: how they are stored.
        entry: what it is one of.
        called: what quantization calls the matrix, where it is one expert's of many in a tensor.
    """

    stored: str
    first: int
    rows: int
    stored_rows: int
    name: str
    expert: int | None
    order: np.ndarray | None
    form: Form
    entry: Entry
    called: str = ""

    @property
    def linear(self) -> str:
        """What quantization calls the matrix: the checkpoint's name without ``.weight``, or the expert's."""
        return self.called or self.name.removesuffix(".weight")


def expert_linear(name: str, stored: str, number: int, projection: str = "") -> str:
    """What quantization calls one expert's matrix in a tensor of all: their module, the expert, and the projection.

    Args:
        name: of the tensor.
        stored: the file's.
        number: of the expert.
        projection: as checkpoints call it that have a matrix each; by default as the engine does.
    """
    module = name.removesuffix(".weight").rpartition(".")[0]
    module += "" if module.endswith("experts") else ".experts"
    kind = next(kind for kind in ("gate", "up", "down") if f"_{kind}_" in stored)
    return f"{module}.{number}.{projection or kind + '_proj'}"


def numbered(template: str, layer: int, expert: int | None = None) -> str:
    """A name with its numbers."""
    name = template.replace(LAYER, str(layer))
    return name if expert is None else name.replace(EXPERT, str(expert))


def piece_shape(form: Form, shape: Sequence[int], rows: int, config: Config) -> tuple[int, ...]:
    """Shape that a file's tensor has of one matrix of the checkpoint's.

    Args:
        form: how it is stored.
        shape: of the matrix, or vector, in the checkpoint.
        rows: how many of its outputs are in the file's.
        config: of the model.
    """
    if form.squeezed:
        return (shape[0], *shape[2:])
    if form.column:
        return (math.prod(shape), 1)
    columns = (shape[0],) if form.transposed and len(shape) > 1 else tuple(shape[1:])
    if form.heads is not None:
        heads = form.heads(config)
        inner = (rows // heads, *columns)
        return (heads, *(reversed(inner) if form.turned else inner))
    return (rows, *columns)


def gather(read: ReadRows, rows: np.ndarray) -> torch.Tensor:
    """Some rows of a tensor, in any order."""
    if not len(rows):
        return read(0, 0)
    low, high = int(rows.min()), int(rows.max()) + 1
    if high - low <= _SPARSE * len(rows):
        block = read(low, high)
        wanted = rows - low
        return block if len(block) == len(wanted) and (np.diff(wanted) == 1).all() else block[torch.from_numpy(wanted)]
    unique, inverse = np.unique(rows, return_inverse=True)
    cuts = np.flatnonzero(np.diff(unique) > _SPARSE) + 1
    parts = [gather(read, run) for run in np.split(unique, cuts)]
    return torch.cat(parts)[torch.from_numpy(inverse)]


def source_rows(
    piece: Piece, read: ReadRows, length: int, config: Config, step: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """A piece's rows as the file has them, in float32: the first row in the tensor, and rows behind it.

    Args:
        piece: which.
        read: rows of the checkpoint's tensor.
        length: of the checkpoint's tensor along its first dimension.
        config: of the model.
        step: how many rows at a time, where they can be read so.
    """
    form = piece.form
    factor = None if form.factor is None else torch.from_numpy(form.factor(config, piece.rows)).float()
    if piece.expert is None and form.by_rows and not form.transposed:
        for start in range(0, piece.rows, step):
            stop = min(start + step, piece.rows)
            rows = read(start, stop) if piece.order is None else gather(read, piece.order[start:stop])
            values = form.change.store(rows.float())
            if factor is not None:
                values = values * factor[start:stop].reshape(-1, *(1 for _ in values.shape[1:]))
            yield piece.first + start, values
        return
    matrix = read(0, length) if piece.expert is None else read(piece.expert, piece.expert + 1)[0]
    if form.transposed and matrix.dim() == 2:
        matrix = matrix.T
    if form.squeezed:
        matrix = matrix.squeeze(1)
    if form.column:
        matrix = matrix.reshape(-1, 1)
    if piece.order is not None:
        matrix = matrix[torch.from_numpy(piece.order)]
    if form.heads is not None and matrix.dim() == 1:
        matrix = matrix.reshape(form.heads(config), -1)
    elif form.heads is not None:
        matrix = matrix.reshape(form.heads(config), -1, matrix.shape[-1])
        matrix = matrix.transpose(1, 2) if form.turned else matrix
    elif matrix.dim() == 1:
        matrix = matrix.reshape(1, -1)  # a vector of one expert's is a row
    flat = matrix.reshape(-1, matrix.shape[-1])
    for start in range(0, len(flat), step):
        yield piece.first + start, form.change.store(flat[start : start + step].float().contiguous())


def restored(
    pieces: Sequence[Piece],
    reads: Mapping[str, ReadRows],
    shape: Sequence[int],
    config: Config,
    start: int,
    stop: int,
) -> torch.Tensor:
    """Rows of a checkpoint's tensor from the file's.

    Args:
        pieces: all of the tensor's.
        reads: rows of the file's tensors, of all their dimensions but the last taken together, by name.
        shape: of the checkpoint's tensor.
        config: of the model.
        start, stop: along its first dimension.
    """
    first = pieces[0]
    if first.expert is not None and first.form.whole:
        found = [
            _matrix([piece for piece in pieces if piece.expert == number], reads, shape[1:], config, None)
            for number in range(start, stop)
        ]
        return torch.stack(found) if found else torch.empty((0, *shape[1:]))
    simple = len(pieces) == 1 and first.form.by_rows and not first.form.transposed
    if simple and first.order is None and len(shape) > 1:
        rows = first.form.change.restore(reads[first.stored](first.first + start, first.first + stop))
        if first.form.factor is not None:
            factor = torch.from_numpy(first.form.factor(config, first.rows)[start:stop]).float()
            rows = rows.float() / factor.reshape(-1, *(1 for _ in rows.shape[1:]))
        return rows
    wanted = None if first.form.transposed or not first.form.by_rows else np.arange(start, stop)
    found_rows = _matrix(pieces, reads, shape, config, wanted)
    return found_rows if wanted is not None else found_rows[start:stop].clone()


def _matrix(
    pieces: Sequence[Piece],
    reads: Mapping[str, ReadRows],
    shape: Sequence[int],
    config: Config,
    wanted: np.ndarray | None,
) -> torch.Tensor:
    """A matrix or vector of the checkpoint, or some of its outputs where it is stored by rows."""
    form = pieces[0].form
    if len(shape) == 1 or not form.by_rows:
        whole = _whole(pieces, reads, shape, config)
        return whole if wanted is None else whole[torch.from_numpy(wanted)]
    outputs = sum(piece.rows for piece in pieces)
    place = np.concatenate([_order(piece) for piece in pieces])
    where = np.empty(outputs, dtype=np.int64)
    where[place] = np.arange(outputs)
    chosen = where if wanted is None else where[wanted]
    out: torch.Tensor | None = None
    before = 0
    for piece in pieces:
        mine = np.flatnonzero((chosen >= before) & (chosen < before + piece.rows))
        rows = gather(reads[piece.stored], piece.first + chosen[mine] - before)
        rows = piece.form.change.restore(rows)
        assert piece.form.factor is None  # no class has both: rows in another order, and factors
        if len(pieces) == 1:
            out = rows
        else:
            out = torch.empty((len(chosen), rows.shape[-1]), dtype=rows.dtype) if out is None else out
            out[torch.from_numpy(mine)] = rows
        before += piece.rows
    assert out is not None
    return out.T.contiguous() if form.transposed and wanted is None else out


def _whole(
    pieces: Sequence[Piece], reads: Mapping[str, ReadRows], shape: Sequence[int], config: Config
) -> torch.Tensor:
    out: torch.Tensor | None = None
    outputs = sum(len(_order(piece)) for piece in pieces)
    for piece in pieces:
        form = piece.form
        stored = form.change.restore(reads[piece.stored](piece.first, piece.first + piece.stored_rows))
        if len(shape) == 1 or form.column:
            stored = stored.reshape(-1)
        elif form.heads is not None:
            heads = form.heads(config)
            stored = stored.reshape(heads, -1, stored.shape[-1])
            stored = stored.transpose(1, 2) if form.turned else stored
            stored = stored.reshape(-1, stored.shape[-1])
        if out is None:
            out = torch.empty((outputs, *stored.shape[1:]), dtype=stored.dtype)
        out[torch.from_numpy(_order(piece))] = stored
    assert out is not None
    return out.reshape(tuple(shape))


def _order(piece: Piece) -> np.ndarray:
    """The outputs of the checkpoint's matrix that the rows of a piece are."""
    return np.arange(piece.rows) if piece.order is None else piece.order


def pieces_by_name(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    """Pieces by the tensor of the checkpoint that they belong to."""
    found: dict[str, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.name, []).append(piece)
    return found
