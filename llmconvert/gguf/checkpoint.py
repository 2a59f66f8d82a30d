"""GGUF files as Hugging Face checkpoints: names, layout, config and tokenizer restored, weights dequantized on reading.

Quantized tensors read as float32, the type llama.cpp defines their values in; F16 and BF16 stay what they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from llmconvert.errors import UnsupportedError, advising
from llmconvert.gguf.architectures.architecture import GgufArchitecture
from llmconvert.gguf.architectures.entries import Change
from llmconvert.gguf.architectures.pieces import ReadRows, restored
from llmconvert.gguf.architectures.placing import Place, check_tensors, place_tensors
from llmconvert.gguf.architectures.reading import build_generation_config, count_layers, read_config, sensible_values
from llmconvert.gguf.architectures.registry import described_by
from llmconvert.gguf.header import GgufHeader, GgufTensor
from llmconvert.gguf.opened import OpenedGguf, can_dequantize, read_as
from llmconvert.gguf.split import gguf_models, read_model_header
from llmconvert.gguf.tokenizer import UnknownTokenizerError, tokenizer_files
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint, TensorInfo
from llmconvert.storage.directory import identity_of

__all__ = ["GgufCheckpoint", "GgufModel", "check_types", "describe_model", "open_artifact", "open_gguf"]


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


def describe_model(
    header: GgufHeader, read_setting: Callable[[GgufTensor], np.ndarray], arch: GgufArchitecture | None = None
) -> GgufModel:
    """Translate a header, and check that it describes a whole model that can be read.

    Args:
        header: of the file.
        read_setting: the float32 values of a tensor that holds settings rather than weights.
        arch: what to read it as; by default what it is as a model of its own.

    Raises:
        CheckpointError: it is incomplete or contradicts itself.
        UnsupportedError: an architecture, tensor type or setting that cannot be restored; it is named.
    """
    arch = arch or described_by(header)
    check_types(header)
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
        decoder: the decoder's ``config.json``, which says how tensors lie in the files.
        alone: why a part for images beside the file is not read; "" where there is none, or nobody asked.
    """

    alone: str = ""

    def __init__(self, path: Path, arch: GgufArchitecture | None = None) -> None:
        self.path = path
        header = read_model_header(path)
        self.parts = header.parts
        #: The file's metadata about the model as a whole, ``general.*``.
        self.general = {key: value for key, value in header.metadata.items() if key.startswith("general.")}
        self.identity = identity_of(header.parts)
        self.opened = OpenedGguf(header.parts)
        try:
            with advising("take the model that the file was made from, in safetensors"):
                described = describe_model(header, self._read_setting, arch)
        except BaseException:
            self.close()
            raise
        self.tensors = header.tensors
        self.places = described.places
        self.infos = {name: self._info(place) for name, place in self.places.items()}
        self.config = self.decoder = described.config
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
        return restored(place.pieces, reads, place.shape, self.decoder, start, max(start, stop))

    def _stored(self, place: Place) -> GgufTensor:
        return self.tensors[place.pieces[0].stored]

    def _reader(self, tensor: GgufTensor, dtype: torch.dtype = torch.float32) -> ReadRows:
        """Rows of all of a tensor's dimensions but the last."""
        flat = replace(tensor, shape=(math.prod(tensor.shape[:-1]), tensor.shape[-1]))
        return lambda start, stop: self.opened.read_rows(flat, start, stop).to(dtype)

    def close(self) -> None:
        self.opened.close()

    def read_bytes(self, tensor: GgufTensor, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with a tensor's bytes from its byte ``offset`` on."""
        self.opened.read_bytes(tensor, offset, buffer)

    def _info(self, place: Place) -> TensorInfo:
        tensor = self._stored(place)
        # What was computed rounds differently in half precision, so such tensors are float32 whatever is stored.
        kinds = {self.tensors[piece.stored].qtype for piece in place.pieces}
        forms = [piece.form for piece in place.pieces]
        changed = any(form.change is not Change.NONE or form.factor is not None for form in forms)
        dtype = torch.float32 if changed or len(kinds) > 1 else read_as(tensor.qtype)
        return TensorInfo(place.name, dtype, place.shape, self.parts[tensor.part].name)

    def _read_setting(self, tensor: GgufTensor) -> np.ndarray:
        values: np.ndarray = self._reader(tensor)(0, math.prod(tensor.shape[:-1])).float().numpy()
        return values.reshape(tensor.shape)


def check_types(header: GgufHeader) -> None:
    """Refuse tensors whose type cannot be dequantized.

    Raises:
        UnsupportedError: one is of such a type.
    """
    for tensor in header.tensors.values():
        if not can_dequantize(tensor.qtype):
            readable = sorted(qtype.name for qtype in GGMLQuantizationType if can_dequantize(qtype))
            raise UnsupportedError(
                f"{header.path}: tensor {tensor.name!r} is stored as {tensor.qtype.name}, which cannot be dequantized; "
                f"readable are {', '.join(readable)}"
            )
