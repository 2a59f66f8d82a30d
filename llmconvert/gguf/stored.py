"""A GGUF model's tensors as the bytes that its files hold, and these files' layout: for writing them again.

What is written with this layout has the same headers, and its tensors at the same places.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from gguf.constants import GGML_QUANT_SIZES

from llmconvert.errors import CheckpointError
from llmconvert.gguf.checkpoint import GgufCheckpoint
from llmconvert.gguf.split import gguf_models
from llmconvert.storage.checkpoint import Checkpoint, TensorInfo, TensorSpec
from llmconvert.storage.directory import is_projector
from llmconvert.storage.writer import Layout, Shard

__all__ = ["StoredGguf"]


class StoredGguf(Checkpoint):
    """Tensors by their names in the files, uint8 ``[rows, row bytes]``: all dimensions but the last taken together.

    Its config is empty, since the header says all; its files are the parts for images or sound that lie in the model's
    directory, where there is no other model in it.

    Args:
        base: the same model, open; it stays so.

    Attributes:
        layout: of the model's files.
    """

    def __init__(self, base: GgufCheckpoint) -> None:
        self._base = base
        self.identity = base.identity
        self.config = {}
        self.infos = {}
        for name, tensor in base.tensors.items():
            block, block_nbytes = GGML_QUANT_SIZES[tensor.qtype]
            shape = math.prod(tensor.shape[:-1]), tensor.shape[-1] // block * block_nbytes
            self.infos[name] = TensorInfo(name, torch.uint8, shape, base.parts[tensor.part].name)
        directory = base.parts[0].parent
        alone = list(gguf_models(directory)) == [base.parts[0]]
        beside = sorted(directory.glob("*.gguf")) if alone else []
        self.files = {path.name: path for path in beside if is_projector(path.name)}
        self.layout = self._layout()

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        rows, width = self.infos[name].shape
        start, stop = max(0, min(start, rows)), max(0, min(stop, rows))
        out = torch.empty((max(0, stop - start), width), dtype=torch.uint8)
        if out.numel():
            self._base.read_bytes(self._base.tensors[name], start * width, out.reshape(-1).numpy().data)
        return out

    def _layout(self) -> Layout:
        shards: list[Shard] = []
        placed: dict[str, Shard] = {}
        for number, path in enumerate(self._base.parts):
            offsets = {name: one.offset for name, one in self._base.tensors.items() if one.part == number}
            nbytes = path.stat().st_size
            shards.append(Shard(path.name, _first(path, min(offsets.values(), default=nbytes)), offsets, nbytes))
            placed |= dict.fromkeys(offsets, shards[-1])
        specs = {name: TensorSpec(name, info.dtype, info.shape) for name, info in self.infos.items()}
        return Layout(tuple(shards), specs, placed, None)


def _first(path: Path, nbytes: int) -> bytes:
    """So many bytes of a file: its header."""
    try:
        with path.open("rb") as file:
            return file.read(nbytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
