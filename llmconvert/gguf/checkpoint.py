"""GGUF files as Hugging Face checkpoints: names, layout, config and tokenizer restored, weights dequantized on reading.

Quantized tensors read as float32, the type llama.cpp defines their values in; F16 and BF16 stay what they are. Rows are
read with ``preadv`` and dequantized a few megabytes at a time, so memory holds what was asked for and little else.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from llmconvert.errors import ChangedError, CheckpointError, UnsupportedError
from llmconvert.gguf.config import Geometry, build_config, build_generation_config, read_geometry
from llmconvert.gguf.header import GgufHeader, GgufTensor, shown
from llmconvert.gguf.names import ARCHITECTURES, Place, Storage, place_tensors
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
        geometry: the sizes.
        places: GGUF tensor name → where it goes.
        config: ``config.json``.
        files: the other small files, by name.
        without_tokenizer: why the tokenizer is not among them, or "".
    """

    geometry: Geometry
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
    arch = header.metadata.text("general.architecture")
    if arch not in ARCHITECTURES:
        raise UnsupportedError(
            f"{header.path}: GGUF architecture {shown(arch)} is not supported; "
            f"supported are {', '.join(sorted(ARCHITECTURES))}"
        )
    _check_types(header)
    architecture = ARCHITECTURES[arch]
    geometry = read_geometry(header, arch)
    places = place_tensors(header, architecture, geometry.layers, geometry.symbols)
    config = build_config(header, arch, architecture, geometry, lambda name: read_setting(header.tensors[name]))
    generation = build_generation_config(config, header.metadata)
    files = {"generation_config.json": (json.dumps(generation, indent=2) + "\n").encode()}
    try:
        return GgufModel(geometry, places, config, files | tokenizer_files(header.metadata, geometry.vocab), "")
    except UnknownTokenizerError as error:
        return GgufModel(geometry, places, config, files, str(error))


class GgufCheckpoint(Checkpoint):
    """See :func:`open_gguf`. The descriptors stay open until :meth:`close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fds: list[int] = []
        header = read_model_header(path)
        self._parts = header.parts
        #: The file's metadata about the model as a whole, ``general.*``.
        self.general = {key: value for key, value in header.metadata.items() if key.startswith("general.")}
        self.identity = identity_of(header.parts)
        try:
            self._open()
            described = describe_model(header, self._read_setting)
        except BaseException:
            self.close()
            raise
        self._geometry = described.geometry
        self._sources = {place.name: (header.tensors[stored], place) for stored, place in described.places.items()}
        self.infos = {name: self._info(*source) for name, source in self._sources.items()}
        self.config = described.config
        self.files = described.files
        self.without_tokenizer = described.without_tokenizer

    @property
    def geometry(self) -> Geometry:
        """The model's sizes."""
        return self._geometry

    @property
    def stored_nbytes(self) -> int:
        """Bytes that the tensors take in the file."""
        return sum(tensor.nbytes for tensor, _ in self._sources.values())

    def type_of(self, name: str) -> str:
        """What a tensor is stored as: ``q4_k``."""
        return str(self._sources[name][0].qtype.name).lower()

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor, place = self._sources[name]
        total = tensor.shape[0]
        start, stop = max(0, min(start, total)), max(0, min(stop, total))
        if place.storage in (Storage.QUERY_ROWS, Storage.KEY_ROWS):
            return self._deinterleaved(tensor, start, stop)
        rows = self._stored_rows(tensor, start, max(start, stop))
        return rows.float().sub_(1.0) if place.storage is Storage.PLUS_ONE else rows

    def _open(self) -> None:
        for part in self._parts:
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

    def _info(self, tensor: GgufTensor, place: Place) -> TensorInfo:
        # Subtracting one rounds differently in half precision, so such tensors are float32 whatever is stored.
        dtype = torch.float32 if place.storage is Storage.PLUS_ONE else _DIRECT.get(tensor.qtype, torch.float32)
        return TensorInfo(place.name, dtype, tensor.shape, self._parts[tensor.part].name)

    def _read_setting(self, tensor: GgufTensor) -> np.ndarray:
        values: np.ndarray = self._stored_rows(tensor, 0, tensor.shape[0]).float().numpy()
        return values

    def _deinterleaved(self, tensor: GgufTensor, start: int, stop: int) -> torch.Tensor:
        """Rows of a query or key projection in transformers' order.

        Within a head of ``d`` rows, transformers' row ``j * d/2 + i`` is stored as row ``2 * i + j``.
        """
        if stop <= start:
            return self._stored_rows(tensor, start, start)
        size = self._geometry.head_dim
        first = start // size * size
        stored = self._stored_rows(tensor, first, -(-stop // size) * size)
        rows = torch.arange(start, stop)
        within = rows % size
        return stored[rows - within - first + within % (size // 2) * 2 + within // (size // 2)]

    def _stored_rows(self, tensor: GgufTensor, start: int, stop: int) -> torch.Tensor:
        """Rows as they are stored, dequantized, in fresh memory."""
        block, block_bytes = GGML_QUANT_SIZES[tensor.qtype]
        width = math.prod(tensor.shape[1:])
        if len(tensor.shape) == 1 and block > 1:  # a block is many rows of a vector: read it whole
            flat = torch.empty(tensor.shape[0], dtype=torch.float32)
            self._dequantize_into(tensor, 0, flat)
            return flat[start:stop].clone()
        out = torch.empty((stop - start, *tensor.shape[1:]), dtype=_DIRECT.get(tensor.qtype, torch.float32))
        if out.numel() == 0:
            return out
        offset = start * width // block * block_bytes
        if tensor.qtype in _DIRECT:
            self._pread(tensor, offset, out.reshape(-1).view(torch.uint8).numpy().data)
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
            self._pread(tensor, offset + done * block_bytes, piece.data)
            # One long row: the package works on few rows at a time, which is slow when they are short.
            values[done * block : (done + count) * block] = dequantize(piece[None], tensor.qtype)[0]

    def _pread(self, tensor: GgufTensor, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with a tensor's bytes from its byte ``offset`` on."""
        path = self._parts[tensor.part]
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
