"""A GGUF file to be written from a checkpoint: its header, the type of each tensor, and rows as the file has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmconvert.compute.narrowing import LOST, bounds
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.architectures.pieces import Piece, ReadRows, source_rows
from llmconvert.gguf.architectures.placing import StoredTensor
from llmconvert.gguf.architectures.writing import check_same_model
from llmconvert.gguf.checkpoint import describe_model
from llmconvert.gguf.export import GgufExport, export_checkpoint
from llmconvert.gguf.ggml.blocks import Codec, load_codec
from llmconvert.gguf.ggml.mix import GgmlMix, MixContext
from llmconvert.gguf.header import parse_gguf_header
from llmconvert.gguf.layout import GgufSpec, plan_parts
from llmconvert.gguf.split import join_headers, part_names
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.writer import Layout, TensorWriter

__all__ = ["Encode", "GgufFile", "PlannedTensor", "encode_rows", "plan_file"]

#: Bytes, uint8 ``[rows, row bytes]``, of finite float32 ``[rows, columns]`` in a type.
Encode = Callable[[Codec, torch.Tensor], torch.Tensor]

# Weights encoded at a time.
_WEIGHTS_AT_ONCE = 1 << 22
_HALF_MAX = 65504.0
# From here on bfloat16 rounds to infinity: half a step above its largest value.
_BFLOAT16_END = (2.0 - 2.0**-8) * 2.0**127
# Scales are float16, and a part of a block's largest weight, 4,096th at the smallest (Q6_K). Only blocks that stay
# below this can lose theirs.
_FADING = 2.0**-12


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the file: where its values come from, and what they are stored in."""

    exported: StoredTensor
    spec: GgufSpec

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.spec.rows * self.spec.row_nbytes


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The plan of a file, and how its tensors are written, in any order.

    Attributes:
        layout: where everything goes; a shard is a file, with its header.
        config: the model's, with transformers' defaults filled in.
        tensors: by their names in the file.
        parts: what each tensor of the checkpoint becomes: tensors and pieces of them.
        settings: float32 tensors that hold settings, by the name in the file.
        notes: what is otherwise than asked for, or in llama.cpp than in transformers, a sentence each.
        beside: the checkpoint's tensors of parts for images or sound, which are not in it.
    """

    layout: Layout
    config: Mapping[str, Any]
    tensors: Mapping[str, PlannedTensor]
    parts: Mapping[str, Sequence[tuple[PlannedTensor, Piece]]]
    settings: Mapping[str, np.ndarray]
    notes: tuple[str, ...]
    beside: tuple[str, ...]

    def write_settings(self, writer: TensorWriter) -> None:
        """Write the tensors that come from the config."""
        for name, values in self.settings.items():
            writer.write(name, torch.from_numpy(load_codec("F32").encode(values[None])))

    def write_rows(
        self,
        writer: TensorWriter,
        name: str,
        shape: Sequence[int],
        read: ReadRows,
        encode: Callable[[Piece], Encode],
        wanted: Callable[[Piece], bool] = lambda piece: True,
    ) -> None:
        """Encode a tensor of the checkpoint and write it where it goes, some rows at a time.

        Args:
            name: in the checkpoint.
            shape: there.
            read: rows ``start:stop`` of it.
            encode: what makes bytes of a piece's rows.
            wanted: which pieces.

        Raises:
            CheckpointError: values that are not finite.
            UnsupportedError: values beyond the type's range.
        """
        for planned, piece in self.parts[name]:
            if wanted(piece):
                self._write_piece(writer, planned, piece, shape[0] if shape else 1, read, encode(piece))

    def _write_piece(
        self, writer: TensorWriter, planned: PlannedTensor, piece: Piece, length: int, read: ReadRows, encode: Encode
    ) -> None:
        spec = planned.spec
        codec, columns = load_codec(spec.qtype), spec.shape[-1]
        step = piece.rows if piece.stored_rows == 1 else max(1, _WEIGHTS_AT_ONCE // columns)
        for first, values in source_rows(piece, read, length, self.config, step):
            rows = values.reshape(-1, columns)
            start = first if piece.stored_rows > 1 else piece.first
            writer.write_rows(spec.name, start, encode_rows(piece.name, codec, rows, encode))


def encode_rows(name: str, codec: Codec, values: torch.Tensor, encode: Encode) -> torch.Tensor:
    """Bytes of a tensor's rows, held against its values.

    Args:
        name: in the checkpoint, for errors.
        codec: of the type.
        values: float32 ``[rows, columns]``.
        encode: makes the bytes.

    Raises:
        CheckpointError: values that are not finite.
        UnsupportedError: values beyond the type's range, or so small that it makes them zero.
    """
    from llmconvert.compute.peaks import block_peaks  # compiled loops, which a plan has no use for

    peaks = block_peaks(values, codec.size).reshape(-1)
    _check_values(name, peaks, codec.name)
    encoded = encode(codec, values)
    _check_faded(name, codec, values, peaks, encoded)
    return encoded


def plan_file(
    source: Checkpoint,
    file_name: str,
    name: str,
    mix: GgmlMix,
    *,
    importance: bool,
    types: Mapping[str, str] | None = None,
    split_nbytes: int | None = None,
    about: Mapping[str, Any] | None = None,
) -> GgufFile:
    """Settle everything about a file but its weights.

    Args:
        source: dense weights under Hugging Face names.
        file_name: in the directory that it is built in.
        name: of the model, for the file's metadata.
        mix: the tensors' types.
        importance: whether an importance matrix weighs errors, which gives some tensors other types.
        types: of the tensors, by their names in the file; the mix's by default.
        split_nbytes: of tensors in a file, above which another one is begun; None for one file.
        about: more metadata, of how the file was made.

    Raises:
        UnsupportedError: an architecture, setting, tensor or tokenizer that llama.cpp does not have.
        CheckpointError: tensors are missing.
    """
    export = export_checkpoint(source, name)
    context, usual = export.context(importance=importance), export.types(mix, importance=importance)
    kinds = usual if types is None else types
    tensors = {
        tensor.name: PlannedTensor(tensor, GgufSpec(tensor.name, kinds[tensor.name], tensor.shape))
        for tensor in export.tensors
    }
    parts: dict[str, list[tuple[PlannedTensor, Piece]]] = {}
    for planned in tensors.values():
        for piece in planned.exported.pieces:
            parts.setdefault(piece.name, []).append((planned, piece))
    settings = [GgufSpec(stored, "F32", values.shape) for stored, values in export.settings.items()]
    said = {"general.file_type": mix.file_type, "general.quantization_version": 2, **(about or {})}
    specs = [*settings, *(planned.spec for planned in tensors.values())]
    stem = file_name.removesuffix(".gguf")
    most = 2 * sum(spec.nbytes for spec in specs) if split_nbytes is None else split_nbytes
    layout = plan_parts(lambda count: part_names(stem, count), {**export.metadata, **said}, specs, most)
    _read_back(layout, export)
    mixed = [tensor for name, tensor in tensors.items() if tensor.spec.qtype == usual[name]]
    return GgufFile(
        layout,
        export.config,
        tensors,
        parts,
        export.settings,
        (*_fallbacks(mixed, mix, context), *export.notes),
        export.beside,
    )


def _read_back(layout: Layout, export: GgufExport) -> None:
    """Refuse a file that would be refused when it is opened, or taken for another model."""
    paths = tuple(Path(shard.name) for shard in layout.shards)
    headers = [parse_gguf_header(Path(shard.name), shard.header, shard.nbytes) for shard in layout.shards]
    header = headers[0] if len(headers) == 1 else join_headers(headers, paths)
    try:
        described = describe_model(header, lambda tensor: export.settings[tensor.name])
    except (CheckpointError, UnsupportedError) as error:
        raise UnsupportedError(
            f"this model cannot be written as GGUF; read back, it would be refused: {error}"
        ) from error
    check_same_model(export.config, described.config, export.arch)


def _fallbacks(tensors: Iterable[PlannedTensor], mix: GgmlMix, context: MixContext) -> Iterator[str]:
    """A sentence on the tensors whose rows are no whole blocks of the type that the mix has for them."""
    changed: Counter[tuple[str, str]] = Counter()
    widths: set[int] = set()
    for tensor in tensors:
        spec = tensor.spec
        wanted = mix.wanted(spec.name, spec.shape, context)
        if wanted != spec.qtype and not tensor.exported.kept:
            changed[wanted, spec.qtype] += 1
            widths.add(spec.shape[-1])
    if changed:
        counts = ", ".join(f"{number} {found} for {wanted}" for (wanted, found), number in sorted(changed.items()))
        yield (
            f"{mix}: rows of {', '.join(map(str, sorted(widths)))} weights are no whole blocks of its types, so as "
            f"llama-quantize does, others take their place: {counts}"
        )


def _check_values(name: str, peaks: torch.Tensor, qtype: str) -> None:
    largest = peaks.max().item() if peaks.numel() else 0.0
    if not largest < float("inf"):
        raise CheckpointError(f"tensor {name!r} holds NaN or infinity; it cannot be written as {qtype}")
    if qtype != "F32" and largest >= _BFLOAT16_END:
        raise UnsupportedError(f"tensor {name!r} holds {largest:g}, which {qtype} would make infinite; write f32")
    if largest > _HALF_MAX and qtype not in ("F32", "BF16"):
        raise UnsupportedError(
            f"tensor {name!r} holds {largest:g}, {qtype} reaches to {_HALF_MAX:g}; write bf16 or f32"
        )


def _check_faded(name: str, codec: Codec, values: torch.Tensor, peaks: torch.Tensor, encoded: torch.Tensor) -> None:
    """Refuse encoded values ``[rows, columns]`` whose scales are below float16's range.

    A block that loses more than half of itself is gone; a hundredth of the values' norm may be.
    """
    blocks = values.reshape(-1, codec.size)
    small = (peaks < _FADING).nonzero().squeeze(-1)
    if not len(small):
        return
    before = blocks[small]
    after = torch.from_numpy(codec.decode(encoded.reshape(-1, codec.nbytes)[small].numpy())).reshape(before.shape)
    squares = before.double().square().sum(-1)
    gone = (after - before).double().square().sum(-1) > squares / 4
    share = float(squares[gone].sum().sqrt() / blocks.double().square().sum().sqrt()) if bool(gone.any()) else 0.0
    if share > LOST:
        raise UnsupportedError(
            f"tensor {name!r}: {share:.0%} of it (by norm) are values so small that {codec.name} makes them zero or "
            f"near it; {bounds(torch.float16)}, which its scales are stored in; write bf16 or f32"
        )
