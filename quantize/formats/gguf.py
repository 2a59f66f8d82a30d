"""GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): llama.cpp's file, in GGML's block types.

Every block type is a scheme: a number, and groups whose scales the type quantizes in its own way
(:meth:`~llmconvert.quantize.scheme.Scheme.of_block`). Codes that a method chose for it are stored as they are, and so
are those of ``w4a16-g32-sym`` and ``w8a16-g32-sym``. All other tensors, and all of a file by a method that chooses
blocks itself (:class:`~llmconvert.quantize.methods.base.GgmlQuantizer`), are encoded by it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, overload

import numpy as np
import torch

from llmconvert.errors import CheckpointError, OutputError, UnsupportedError, advising
from llmconvert.gguf.architectures.pieces import Piece
from llmconvert.gguf.export import TensorTypes, check_exportable, tensor_types
from llmconvert.gguf.file import Encode, GgufFile, PlannedTensor, plan_file
from llmconvert.gguf.ggml.blocks import BlockCodec, Blocks, load_codec
from llmconvert.gguf.ggml.mix import FLOATS, MIXES, GgmlMix
from llmconvert.gguf.ggml.overrides import TypeOverride
from llmconvert.gguf.mmproj.beside import plan_beside, with_images
from llmconvert.gguf.records.importance import ImportanceMatrix
from llmconvert.quantize.formats.base import Feature, FileFormat, StoredLinear
from llmconvert.quantize.formats.container import Container, ContainerRequest, Packed
from llmconvert.quantize.formats.dense_view import QuantizedView
from llmconvert.quantize.formats.encoded import Encoded
from llmconvert.quantize.methods.base import GgmlQuantizer
from llmconvert.quantize.methods.imatrix import Imatrix, weighs
from llmconvert.quantize.narrow import half_scale_dtype
from llmconvert.quantize.scheme import Override, Scheme, SchemeOrMix
from llmconvert.quantize.solve.group_scales import nested_scales
from llmconvert.quantize.tensor import QuantizedTensor, SuperBlockScales
from llmconvert.storage.checkpoint import Checkpoint, TensorSpec
from llmconvert.storage.writer import TensorWriter, check_output_directory

__all__ = ["Gguf", "GgufContainer"]

#: Scheme → the block type that holds its codes and scales as they are. The schemes of block types need no line here.
_CARRIERS: Final[Mapping[str, str]] = {"w4a16-g32-sym": "Q4_0", "w8a16-g32-sym": "Q8_0"}
_SUFFIX = ".gguf"
_INSTEAD = "use format: compressed-tensors, for transformers and vLLM"


class Gguf(FileFormat):
    """One file with names, header and tokenizer of its own."""

    library: ClassVar[str] = "gguf"
    fuses: ClassVar[bool] = False
    transposes: ClassVar[bool] = True
    stacks_experts: ClassVar[bool] = True
    lacks: ClassVar[Mapping[Feature, str]] = {
        "rotations": "llama.cpp was never seen to run a rotated model",
        "streaming": "a GGUF file is written from the whole model",
        "generation": "it is measured with transformers, which does not run GGUF",
    }

    def check(self, scheme: Scheme) -> None:
        if _carrier(scheme) is None:
            raise UnsupportedError(
                f"scheme {scheme}: no GGUF type holds its codes; GGUF takes {', '.join(MIXES)}, or the codes of "
                f"{' and '.join(_CARRIERS)}"
            )

    def check_experts(self, scheme: Scheme, *, apart: bool) -> None:
        """llama.cpp has experts in every type."""

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        return half_scale_dtype(dtype)

    def specs(self, linear: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> list[TensorSpec]:
        codec = _codec(scheme)
        rows, columns = shape
        if columns % codec.size:
            raise UnsupportedError(f"{linear}: rows of {columns} weights are no whole blocks of {codec.name}")
        return [TensorSpec(f"{linear}.weight", torch.uint8, (rows, columns // codec.size * codec.nbytes))]

    def pack(self, linear: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        return {f"{linear}.weight": _blocks(linear, tensor)}

    def unpack(self, linear: str, stored: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedTensor:
        codec = _codec(scheme)
        raw = stored[f"{linear}.weight"]
        rows = len(raw)
        blocks = codec.unpack(raw.numpy().reshape(-1, codec.nbytes))
        codes = torch.from_numpy(blocks.codes.view(np.int8) - np.int8(codec.shift)).reshape(rows, -1)
        nested = nested_scales(blocks, codec, rows)
        if nested is not None:
            return QuantizedTensor(codes, nested.steps, None, scheme, nested, offset=nested.offsets)
        offset = None if blocks.minimum is None else torch.from_numpy(blocks.minimum).reshape(rows, -1)
        return QuantizedTensor(codes, torch.from_numpy(blocks.scale).reshape(rows, -1), None, scheme, offset=offset)

    def find(self, checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Iterable[StoredLinear]:
        raise UnsupportedError(
            "GGUF weights lie in a file of their own, which says all about them; name the .gguf file"
        )

    def quantization_config(self, schemes: Mapping[str, Scheme], kept: Sequence[str]) -> dict[str, Any]:
        return {}  # the file's header says the type of each tensor

    def files(self, declared: Mapping[str, Any]) -> Mapping[str, bytes]:
        return {}

    def mix_of(self, scheme: SchemeOrMix) -> GgmlMix:
        """The types of a file's tensors; of a scheme, those of the mix whose base holds its codes."""
        if isinstance(scheme, GgmlMix):
            return scheme
        kind = _codec(scheme).name.lower()
        return MIXES.get(kind) or MIXES[f"{kind}_m"]

    def types(
        self, source: Checkpoint, scheme: SchemeOrMix, overrides: Sequence[Override], *, importance: bool
    ) -> TensorTypes:
        given = [TypeOverride(one.match, None if one.scheme is None else _codec(one.scheme).name) for one in overrides]
        weighed = importance and isinstance(scheme, GgmlMix)
        return tensor_types(source, self.mix_of(scheme), given, importance=weighed)

    def schemes(self, types: TensorTypes, scheme: SchemeOrMix) -> Mapping[str, Scheme]:
        own = {_carrier(scheme): scheme} if isinstance(scheme, Scheme) else {}
        return {
            name: own.get(kind) or Scheme.of_block(kind) for name, kind in types.linears.items() if kind not in FLOATS
        }

    def check_output(self, output: Path) -> None:
        """A file ending in ``.gguf``, or a directory for one."""
        if output.suffix == _SUFFIX and (output.exists() or output.is_symlink()):
            raise OutputError(f"{output}: exists already; name another output or remove it first")
        check_output_directory(output)

    def check_source(self, source: Checkpoint) -> None:
        with advising(_INSTEAD):
            check_exportable(source)

    def container(self, source: Checkpoint, output: Path, request: ContainerRequest) -> Container:
        with advising(_INSTEAD):
            return GgufContainer(source, output, request, self.mix_of(request.scheme))


class GgufContainer:
    """One GGUF file of a checkpoint.

    Args:
        source: dense weights; of a :class:`~llmconvert.quantize.formats.dense_view.QuantizedView` the codes are taken
            over where the mix gives a tensor the type that holds them.
        output: a ``.gguf`` file, or a directory to become one with ``NAME-MIX.gguf`` in it, and beside it
            ``mmproj-NAME-f16.gguf`` of a model with a part for images.
        request: what was decided.
        mix: the tensors' types.
    """

    config: Mapping[str, Any] | None = None
    files: Mapping[str, Path | bytes] = {}

    def __init__(self, source: Checkpoint, output: Path, request: ContainerRequest, mix: GgmlMix) -> None:
        self.single = output.suffix == _SUFFIX
        name = request.name.removesuffix(_SUFFIX)
        file_name = output.name if self.single else f"{name}-{mix.name.upper()}{_SUFFIX}"
        self._read = request.method.read if isinstance(request.method, Imatrix) else None
        self._weighed = weighs(request.method)
        weighed = isinstance(request.scheme, GgmlMix) and self._weighed
        self._source = source
        self._file = plan_file(
            source,
            file_name,
            name,
            mix,
            importance=weighed,
            types=request.types,
            split_nbytes=request.split_nbytes,
            about=self._about(request),
        )
        # What a method leaves that chooses codes of schemes alone, embedding and head, is rounded with importance.
        self._method = request.method if isinstance(request.method, GgmlQuantizer) else Imatrix()
        self._rounding = repr(self._method)
        if self._read is not None and isinstance(request.method, Imatrix):
            _check_importance(request.method.file, self._read, self._file)
        parts = len(self._file.layout.shards)
        if self.single and parts > 1:
            raise OutputError(
                f"{output}: the model is split into {parts} files of {request.split_nbytes:,} bytes; name a directory "
                "for them"
            )
        kind = mix.name.upper() if mix.name.upper() in ("F32", "BF16") else "F16"
        self._images, said = plan_beside(source, self._file.beside, name, kind, single=self.single)
        self.layout = with_images(self._file.layout, self._images)
        self.notes = (*self._file.notes, *said)
        self._linears: dict[str, list[tuple[PlannedTensor, Piece]]] = {}
        for pieces in self._file.parts.values():
            for planned, piece in pieces:
                self._linears.setdefault(piece.linear, []).append((planned, piece))
        self.types: Mapping[str, int] = Counter(
            ["F32"] * len(self._file.settings) + [planned.spec.qtype for planned in self._file.tensors.values()]
        )

    def begin(self, writer: TensorWriter) -> None:
        self._file.write_settings(writer)
        if self._images is not None:
            self._images.write(writer)

    def pack(self, linear: str, tensor: QuantizedTensor) -> Iterable[Packed]:
        blocks: torch.Tensor | None = None
        for planned, piece in self._linears[linear]:
            blocks = _blocks(linear, tensor) if blocks is None else blocks
            # An expert's matrix was taken out of the tensor that holds it, its rows in the file's order.
            same = piece.order is None or piece.expert is not None
            rows = blocks if same else blocks[torch.from_numpy(piece.order)]
            yield Packed(planned.spec.name, rows, piece.first)

    def write_values(self, writer: TensorWriter, name: str, values: torch.Tensor) -> None:
        info = self._source.infos[name]
        rounded = values.to(info.dtype)
        self._file.write_rows(
            writer, name, info.shape, lambda start, stop: rounded[start:stop], lambda piece: self._encode(None)
        )

    def copy(
        self,
        writer: TensorWriter,
        name: str,
        squares: Mapping[str, torch.Tensor] | None = None,
        encoded: Encoded | None = None,
    ) -> None:
        """Encode a tensor; those that the file does without (a tied head, computed buffers) are passed over."""
        parts = self._file.parts.get(name, ())
        if not parts:
            return
        codes = self._stored_codes(name, parts[0][0].spec.qtype)
        if codes is not None:
            for packed in self.pack(name.removesuffix(".weight"), codes):
                writer.write_rows(packed.name, packed.start, packed.rows)
        else:
            measured, had = squares or {}, encoded or Encoded()
            weighed = {
                (piece.stored, piece.first): self._importance(piece, measured.get(piece.linear)) for _, piece in parts
            }

            def key(piece: Piece) -> tuple[str, ...]:
                given = weighed[piece.stored, piece.first]
                digest = "" if given is None else hashlib.sha256(given.numpy().tobytes()).hexdigest()
                kind = self._file.tensors[piece.stored].spec.qtype
                return piece.stored, str(piece.first), kind, digest, self._rounding

            def copied(piece: Piece) -> bool:
                spec = self._file.tensors[piece.stored].spec
                start, nbytes = piece.first * spec.row_nbytes, piece.stored_rows * spec.row_nbytes
                return spec.qtype not in FLOATS and had.copy(key(piece), writer, piece.stored, start, nbytes)

            self._file.write_rows(
                writer,
                name,
                self._source.infos[name].shape,
                partial(self._source.read_rows, name),
                lambda piece: self._encode(weighed[piece.stored, piece.first]),
                lambda piece: not copied(piece),
            )
            for _, piece in parts:
                had.keep(key(piece), writer)

    def _importance(self, piece: Piece, squares: torch.Tensor | None) -> torch.Tensor | None:
        """What weighs the columns of a piece: what was measured, or read; of the embedding, for example, all alike."""
        planned = self._file.tensors[piece.stored]
        found = self._read.squares.get(piece.stored) if self._read is not None else None
        if squares is None and found is not None:
            squares = torch.from_numpy(found if found.ndim == 1 else found[piece.first // piece.stored_rows])
        if squares is None and self._weighed and len(planned.spec.shape) > 1:
            squares = torch.ones(planned.spec.shape[-1])
        return squares

    def _about(self, request: ContainerRequest) -> dict[str, Any]:
        """What llama-quantize says of the importance matrix that it was given."""
        if not isinstance(request.method, Imatrix):
            return {}
        dataset, chunks = request.text
        entries, found = sum(kind not in FLOATS for kind in (request.types or {}).values()), self._read
        said: dict[str, Any] = {}
        if found is not None:
            said["quantize.imatrix.file"] = Path(request.method.file).name
            dataset, chunks, entries = ", ".join(found.datasets), found.chunks, len(found.squares)
        if dataset:
            said["quantize.imatrix.dataset"] = dataset
        return {**said, "quantize.imatrix.entries_count": entries, "quantize.imatrix.chunks_count": chunks}

    def _encode(self, squares: torch.Tensor | None) -> Encode:
        return lambda codec, rows: self._method.encode(codec, rows, squares)

    def _stored_codes(self, name: str, qtype: str) -> QuantizedTensor | None:
        """The source's own codes, where the type holds them."""
        if not isinstance(self._source, QuantizedView):
            return None
        scheme = self._source.scheme_of(name)
        if scheme is None or _carrier(scheme) != qtype:
            return None
        try:
            return self._source.read_quantized(name)
        except UnsupportedError:  # groups of scattered columns: the weights are encoded anew
            return None


def _check_importance(file: str, found: ImportanceMatrix, planned: GgufFile) -> None:
    """Refuse an importance matrix of another model.

    Raises:
        CheckpointError: it lacks a linear of the blocks, or has other columns for one.
    """
    for tensor in planned.tensors.values():
        name, shape = tensor.spec.name, tensor.spec.shape
        if len(shape) < 2 or tensor.spec.qtype in FLOATS:
            continue
        squares = found.squares.get(name)
        if squares is None and name.startswith("blk."):
            raise CheckpointError(f"{file}: has no importance of {name}; it is of another model, or not of all of it")
        if squares is not None and squares.shape not in (shape[-1:], (*shape[:-2], shape[-1])):
            raise CheckpointError(
                f"{file}: the importance of {name} has shape {list(squares.shape)}, the tensor {list(shape)}"
            )


def _carrier(scheme: Scheme) -> str | None:
    """The block type that stores a scheme's codes; None if there is none."""
    return scheme.block or _CARRIERS.get(str(scheme))


def _codec(scheme: Scheme) -> BlockCodec:
    codec = load_codec(_carrier(scheme) or "")
    assert isinstance(codec, BlockCodec)
    return codec


def _blocks(linear: str, tensor: QuantizedTensor) -> torch.Tensor:
    """A quantized linear's bytes in the type that holds its codes, uint8 ``[rows, row bytes]``; nothing is rounded.

    Raises:
        UnsupportedError: a scale is too large or too small for float16.
    """
    codec = _codec(tensor.scheme)
    codes = (tensor.codes.cpu().numpy().reshape(-1, codec.size) + np.int8(codec.shift)).view(np.uint8)
    nested = tensor.nested
    if isinstance(nested, SuperBlockScales):
        size = codec.size // codec.group

        def subs(values: torch.Tensor | None) -> np.ndarray | None:
            kind = np.int8 if nested.limits[0] < 0 else np.uint8
            return None if values is None else values.cpu().numpy().astype(kind).reshape(-1, size)

        blocks = Blocks(codes, _half(linear, nested.scale), _half(linear, nested.minimum), subs(nested.subs))
        blocks = replace(blocks, sub_minima=subs(nested.sub_minima))
    else:
        blocks = Blocks(codes, _half(linear, tensor.scale), _half(linear, tensor.offset))
    return torch.from_numpy(codec.pack(blocks).reshape(tensor.shape[0], -1))


@overload
def _half(linear: str, values: torch.Tensor) -> np.ndarray: ...
@overload
def _half(linear: str, values: None) -> None: ...
@overload
def _half(linear: str, values: torch.Tensor | None) -> np.ndarray | None: ...
def _half(linear: str, values: torch.Tensor | None) -> np.ndarray | None:
    """Scales or minima as float16, one after the other."""
    if values is None:
        return None
    half = values.to(torch.float16)
    if not torch.equal(half.to(values.dtype), values):
        raise UnsupportedError(f"{linear}: its scales do not fit float16, which GGUF stores them in; quantize it anew")
    found: np.ndarray = half.cpu().numpy().reshape(-1)
    return found
