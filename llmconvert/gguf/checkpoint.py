"""GGUF files as Hugging Face checkpoints: names, layout, config and tokenizer restored, weights dequantized on reading.

Quantized tensors read as float32, the type llama.cpp defines their values in; F16 and BF16 stay what they are. Rows are
read with ``preadv`` and dequantized a few megabytes at a time, so memory holds what was asked for and little else.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from llmconvert.errors import ChangedError, CheckpointError, UnsupportedError, advising
from llmconvert.gguf.architectures.entries import Change
from llmconvert.gguf.architectures.pieces import ReadRows, restored
from llmconvert.gguf.architectures.placing import Place, check_tensors, place_tensors
from llmconvert.gguf.architectures.reading import build_generation_config, count_layers, read_config, sensible_values
from llmconvert.gguf.architectures.registry import described_by
from llmconvert.gguf.header import GgufHeader, GgufTensor
from llmconvert.gguf.split import gguf_models, read_model_header
from llmconvert.gguf.tokenizer import UnknownTokenizerError, tokenizer_files
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint, TensorInfo
from llmconvert.storage.directory import identity_of

__all__ = ["GgufCheckpoint", "GgufModel", "can_dequantize", "describe_model", "open_artifact", "open_gguf"]

#: Stored types that need no arithmetic.
_DIRECT: Final[Mapping[GGMLQuantizationType, torch.dtype]] = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
# Elements dequantized at a time: the intermediate arrays are a few times as large.
_PIECE_ELEMENTS: Final = 1 << 18
_READ_CHUNK: Final = 1 << 28


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file, or a split model by any of its files, as a lazy checkpoint in Hugging Face terms.

    A tokenizer that cannot be rebuilt is left out, and :attr:`Checkpoint.without_tokenizer` says why.

    Raises:
        CheckpointError: no GGUF file, truncated, corrupt or inconsistent.
        UnsupportedError: an architecture, tensor type or setting that cannot be restored; it is named.
    """
    return GgufCheckpoint(path)


def open_artifact(path: Path) -> Checkpoint:
    """A finished artifact: a directory in Hugging Face layout, a GGUF file, or a directory with one GGUF model.

    Raises:
        CheckpointError: it cannot be read.
        UnsupportedError: see :func:`open_gguf`.
    """
    if path.is_file():
        return open_gguf(path)
    models = gguf_models(path)
    if len(models) == 1 and not (path / "config.json").exists():
        return open_gguf(models[0])
    return SafetensorsCheckpoint(path)


@dataclass(frozen=True, slots=True)
class GgufModel:
    """What a file's header says of its model, in Hugging Face terms.

    Attributes:
        places: the checkpoint's tensors by name, and what of the file they are.
        config: ``config.json``.
        files: the other small files, by name.
        without_tokenizer: why the tokenizer is not among them, or "".
    """

    places: Mapping[str, Place]
    config: Mapping[str, Any]
    files: Mapping[str, bytes]
    without_tokenizer: str


def describe_model(header: GgufHeader, read_setting: Callable[[GgufTensor], np.ndarray]) -> GgufModel:
    """Translate a header, and check that it describes a whole model that can be read.

    Args:
        header: of the file.
        read_setting: the float32 values of a tensor that holds settings rather than weights.

    Raises:
        CheckpointError: it is incomplete or contradicts itself.
        UnsupportedError: an architecture, tensor type or setting that cannot be restored; it is named.
    """
    arch = described_by(header)
    _check_types(header)
    layers = count_layers(header, arch)
    check_tensors(header, arch, layers)
    config = read_config(header, arch, lambda name: read_setting(header.tensors[name]))
    with sensible_values(header, arch):
        places = place_tensors(header, arch, config, layers)
    generation = build_generation_config(config, header.metadata)
    files = {"generation_config.json": (json.dumps(generation, indent=2) + "\n").encode()}
    try:
        tokenizer = tokenizer_files(header.metadata, header.tensors["token_embd.weight"].shape[0])
    except UnknownTokenizerError as error:
        return GgufModel(places, config, files, str(error))
    return GgufModel(places, config, files | tokenizer, "")


class GgufCheckpoint(Checkpoint):
    """See :func:`open_gguf`. The descriptors stay open until :meth:`close`.

    Attributes:
        parts: the model's files.
        tensors: of the files, by the names there.
        places: what of them the checkpoint's tensors are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fds: list[int] = []
        header = read_model_header(path)
        self.parts = header.parts
        #: The file's metadata about the model as a whole, ``general.*``.
        self.general = {key: value for key, value in header.metadata.items() if key.startswith("general.")}
        self.identity = identity_of(header.parts)
        try:
            self._open()
            with advising("take the model that the file was made from, in safetensors"):
                described = describe_model(header, self._read_setting)
        except BaseException:
            self.close()
            raise
        self.tensors = header.tensors
        self.places = described.places
        self.infos = {name: self._info(place) for name, place in self.places.items()}
        self.config = described.config
        self.files = described.files
        self.without_tokenizer = described.without_tokenizer

    @property
    def stored_nbytes(self) -> int:
        """Bytes that the tensors take in the file."""
        names = {piece.stored for place in self.places.values() for piece in place.pieces}
        return sum(self.tensors[name].nbytes for name in names)

    def type_of(self, name: str) -> str:
        """What a tensor is stored as, the first part of one of several: ``q4_k``."""
        return str(self._stored(self.places[name]).qtype.name).lower()

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        place = self.places[name]
        total = place.shape[0] if place.shape else 1
        start, stop = max(0, min(start, total)), max(0, min(stop, total))
        dtype = self.infos[name].dtype
        reads = {piece.stored: self._reader(self.tensors[piece.stored], dtype) for piece in place.pieces}
        return restored(place.pieces, reads, place.shape, self.config, start, max(start, stop))

    def _stored(self, place: Place) -> GgufTensor:
        return self.tensors[place.pieces[0].stored]

    def _reader(self, tensor: GgufTensor, dtype: torch.dtype = torch.float32) -> ReadRows:
        """Rows of all of a tensor's dimensions but the last."""
        flat = replace(tensor, shape=(math.prod(tensor.shape[:-1]), tensor.shape[-1]))
        return lambda start, stop: self._stored_rows(flat, start, stop).to(dtype)

    def _open(self) -> None:
        for part in self.parts:
            try:
                self._fds.append(os.open(part, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as error:
                raise CheckpointError(f"{part}: cannot be opened: {error.strerror}") from error

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def __del__(self) -> None:
        if hasattr(self, "_fds"):
            self.close()

    def _info(self, place: Place) -> TensorInfo:
        tensor = self._stored(place)
        # What was computed rounds differently in half precision, so such tensors are float32 whatever is stored.
        kinds = {self.tensors[piece.stored].qtype for piece in place.pieces}
        forms = [piece.form for piece in place.pieces]
        changed = any(form.change is not Change.NONE or form.factor is not None for form in forms)
        dtype = torch.float32 if changed or len(kinds) > 1 else _DIRECT.get(tensor.qtype, torch.float32)
        return TensorInfo(place.name, dtype, place.shape, self.parts[tensor.part].name)

    def _read_setting(self, tensor: GgufTensor) -> np.ndarray:
        values: np.ndarray = self._reader(tensor)(0, math.prod(tensor.shape[:-1])).float().numpy()
        return values.reshape(tensor.shape)

    def _stored_rows(self, tensor: GgufTensor, start: int, stop: int) -> torch.Tensor:
        """Rows as they are stored, dequantized, in fresh memory."""
        block, block_bytes = GGML_QUANT_SIZES[tensor.qtype]
        width = math.prod(tensor.shape[1:])
        out = torch.empty((stop - start, *tensor.shape[1:]), dtype=_DIRECT.get(tensor.qtype, torch.float32))
        if out.numel() == 0:
            return out
        offset = start * width // block * block_bytes
        if tensor.qtype in _DIRECT:
            self.read_bytes(tensor, offset, out.reshape(-1).view(torch.uint8).numpy().data)
        else:
            self._dequantize_into(tensor, offset, out.reshape(-1))
        return out

    def _dequantize_into(self, tensor: GgufTensor, offset: int, out: torch.Tensor) -> None:
        """Fill flat ``out`` with the values of the blocks from byte ``offset`` of ``tensor`` on."""
        block, block_bytes = GGML_QUANT_SIZES[tensor.qtype]
        values = out.numpy()
        blocks = values.size // block
        step = max(1, _PIECE_ELEMENTS // block)
        buffer = np.empty(min(step, blocks) * block_bytes, dtype=np.uint8)
        for done in range(0, blocks, step):
            count = min(step, blocks - done)
            piece = buffer[: count * block_bytes]
            self.read_bytes(tensor, offset + done * block_bytes, piece.data)
            # One long row: the package works on few rows at a time, which is slow when they are short.
            values[done * block : (done + count) * block] = dequantize(piece[None], tensor.qtype)[0]

    def read_bytes(self, tensor: GgufTensor, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with a tensor's bytes from its byte ``offset`` on."""
        path = self.parts[tensor.part]
        if not self._fds:
            raise ValueError(f"{path}: reading {tensor.name} from a closed checkpoint")
        done = 0
        while done < len(buffer):
            try:
                part = buffer[done : done + _READ_CHUNK]
                count = os.preadv(self._fds[tensor.part], [part], tensor.offset + offset + done)
            except OSError as error:
                raise CheckpointError(f"{path}: reading {tensor.name}: {error.strerror}") from error
            if count == 0:
                raise ChangedError(f"{path}: the file ended inside {tensor.name}; it changed on disk")
            done += count


@cache
def can_dequantize(qtype: GGMLQuantizationType) -> bool:
    """Whether the installed ``gguf`` package can dequantize a tensor type."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[qtype][1]), dtype=np.uint8), qtype)
    except NotImplementedError:
        return False
    return True


def _check_types(header: GgufHeader) -> None:
    for tensor in header.tensors.values():
        if not can_dequantize(tensor.qtype):
            readable = sorted(qtype.name for qtype in GGMLQuantizationType if can_dequantize(qtype))
            raise UnsupportedError(
                f"{header.path}: tensor {tensor.name!r} is stored as {tensor.qtype.name}, which cannot be dequantized; "
                f"readable are {', '.join(readable)}"
            )
