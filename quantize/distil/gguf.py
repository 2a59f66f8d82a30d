"""A GGUF file to be distilled: the float16 scales of its blocks and super-blocks, and its norms in float32.

A matrix of the model may be rows of a file's tensor in another order, of one that it shares with others, or of several
(:class:`~llmconvert.gguf.architectures.pieces.Piece`). Each of these is trained by itself, as its type has it, and goes
back to the bytes that it came from; all other bytes of the files are copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import nn

from llmconvert.errors import UsageError
from llmconvert.gguf.architectures.decoder import DecoderView
from llmconvert.gguf.architectures.pieces import Piece
from llmconvert.gguf.checkpoint import GgufCheckpoint
from llmconvert.gguf.ggml.blocks import BlockCodec, load_codec
from llmconvert.gguf.ggml.mix import FLOATS
from llmconvert.gguf.stored import StoredGguf
from llmconvert.quantize.distil.artifact import Take, on_device
from llmconvert.quantize.distil.requirements import require_learnable
from llmconvert.quantize.distil.trained import LearnedValue, TrainedWeight
from llmconvert.quantize.distil.weights import LearnedParts, LearnedWeight
from llmconvert.quantize.formats.gguf import Gguf
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["GgufArtifact"]

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufArtifact:
    """See :class:`~llmconvert.quantize.distil.artifact.DistilledArtifact`.

    Raises:
        UsageError: none of its tensors is in blocks.
        UnsupportedError: a type that is read here and not written.
    """

    def __init__(self, view: GgufCheckpoint) -> None:
        self.view = view
        self.stored = StoredGguf(view)
        self.layout = self.stored.layout
        self._format = Gguf()
        kinds = {name: {self._kind(piece) for piece in place.pieces} for name, place in view.places.items()}
        # Float16 may round what the original has in bfloat16.
        self.apart = frozenset(name for name, found in kinds.items() if found != {"F32"})
        self.in_codes = frozenset(name for name, found in kinds.items() if not found <= set(FLOATS))
        if not self.in_codes:
            raise UsageError(
                f"distillation: {view.path.name} stores floats alone; there are no scales to learn. Quantize to a type "
                "with blocks, q4_k_m for example"
            )

    def original(self, source: Checkpoint) -> Checkpoint:
        return DecoderView(source)

    def holds(self, name: str) -> bool:
        return all(
            self._kind(piece) not in FLOATS and piece.form.holds_codes and not piece.form.whole
            for piece in self._pieces(name)
        )

    def check(self, name: str, *, moving: bool) -> None:
        for piece in self._pieces(name):
            require_learnable(name, self._scheme(piece), moving=moving)

    def shares(self, name: str) -> Mapping[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for number, piece in enumerate(self._pieces(name)):
            codec = self._codec(piece)
            shape = piece.stored_rows, self._columns(piece) // codec.size
            found |= {f"{number}:{kind}": shape for kind in (("factor", "shift") if codec.minima else ("factor",))}
        return found

    def groups(self, name: str) -> int:
        pieces = self._pieces(name)
        return sum(piece.stored_rows * self._columns(piece) // self._codec(piece).group for piece in pieces)

    def holds_norm(self, name: str) -> bool:
        piece, *others = self._pieces(name)
        form = piece.form
        alone = not others and form.by_rows and not form.transposed and not form.whole and form.factor is None
        return alone and self._kind(piece) in FLOATS and self.view.tensors[piece.stored].shape == self._shape(name)

    def weight(self, name: str, value: nn.Parameter, own: torch.Tensor | None) -> TrainedWeight:
        parts = []
        for piece in self._pieces(name):
            start = on_device(self._read(piece), value.device)
            turned = piece.form.transposed and value.dim() > 1
            order = _order(piece, value.device)
            parts.append(LearnedWeight(start, value, torch.float32, torch.float16, own, order, transposed=turned))
        return LearnedParts(value, parts)

    def norm(self, name: str, value: nn.Parameter) -> LearnedValue:
        (piece,) = self._pieces(name)
        raw = self.stored[piece.stored].view(_FLOATS[self._kind(piece)])
        start = raw.reshape(self.view.tensors[piece.stored].shape).to(value.device)
        return LearnedValue(start, value, piece.form.change.restore, _order(piece, value.device))

    def changed(self, names: Iterable[str], take: Take) -> Iterator[tuple[str, torch.Tensor]]:
        owners: dict[str, list[tuple[Piece, str, int]]] = {}
        for name in names:
            for number, piece in enumerate(self._pieces(name)):
                owners.setdefault(piece.stored, []).append((piece, name, number))
        for stored in self.stored:
            if stored not in owners:
                continue
            rows = self.stored[stored]
            for piece, name, number in owners[stored]:
                one, kept = take(name)
                if isinstance(one, LearnedParts):
                    tensor = one.parts[number].tensor(one.of(kept, number))
                    packed = self._format.pack(_linear(piece), tensor)[f"{_linear(piece)}.weight"]
                else:
                    packed = kept["value"].contiguous().view(torch.uint8).reshape(piece.stored_rows, -1)
                rows[piece.first : piece.first + piece.stored_rows] = packed
            yield stored, rows

    def _read(self, piece: Piece) -> QuantizedTensor:
        raw = self.stored.read_rows(piece.stored, piece.first, piece.first + piece.stored_rows)
        return self._format.unpack(_linear(piece), {f"{_linear(piece)}.weight": raw}, self._scheme(piece))

    def _pieces(self, name: str) -> tuple[Piece, ...]:
        return tuple(self.view.places[name].pieces)

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.view.infos[name].shape)

    def _kind(self, piece: Piece) -> str:
        return str(self.view.tensors[piece.stored].qtype.name)

    def _codec(self, piece: Piece) -> BlockCodec:
        codec = load_codec(self._kind(piece))
        assert isinstance(codec, BlockCodec)
        return codec

    def _columns(self, piece: Piece) -> int:
        return self.view.tensors[piece.stored].shape[-1]

    def _scheme(self, piece: Piece) -> Scheme:
        return Scheme.of_block(self._kind(piece))


def _order(piece: Piece, device: torch.device) -> torch.Tensor | None:
    """The outputs of the model's tensor that a piece's rows are; None for all, as they come."""
    if piece.order is None:
        return None
    return torch.from_numpy(np.ascontiguousarray(piece.order)).to(device)


def _linear(piece: Piece) -> str:
    return piece.stored.removesuffix(".weight")
