"""A model on the Hub read where it lies: its headers for a few kilobytes, its tensors range by range.

Safetensors headers are read with HTTP range requests
(https://huggingface.co/docs/safetensors/metadata_parsing).
"""

from __future__ import annotations

import math
import threading
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)

from llmconvert.errors import CheckpointError, HubError
from llmconvert.hub import RemoteFile, hub_errors, iterate_content, list_files
from llmconvert.storage.checkpoint import DTYPES, Checkpoint, TensorInfo
from llmconvert.storage.directory import is_projector
from llmconvert.storage.parsing import read_json

__all__ = ["RemoteCheckpoint", "describing_files"]

# A few rows after the other are asked for often; one request brings at least this much of the tensor.
_AHEAD_BYTES = 1 << 26
# What a card, a template, and configs beside config.json are called.
_DESCRIBING = (
    *("README.md", "chat_template.jinja", "tokenizer_config.json"),
    *("hf_quant_config.json", "quantize_config.json", "quant_config.json"),
)


class RemoteCheckpoint(Checkpoint):
    """A Hub model whose tensors are fetched each time they are read, at the commit that was current when it was opened.

    Nothing is kept but the last 64 MiB, so reading it all twice downloads it twice.

    Args:
        model_id: ``org/name``.
        revision: branch, tag or commit; the default branch if None.

    Raises:
        HubError: the Hub refused or could not be reached, when opening or reading.
        CheckpointError: the repository has no safetensors, or their headers are malformed.
    """

    def __init__(self, model_id: str, revision: str | None = None) -> None:
        self._model_id = model_id
        try:
            with hub_errors(model_id, revision):
                config = _config_file(model_id, revision)
                metadata = huggingface_hub.get_safetensors_metadata(model_id, revision=revision)
            # The cache files a download under the commit that the revision stood for.
            self.commit_hash = config.parent.name
            self.config = read_json(config)
        except (NotASafetensorsRepoError, SafetensorsParsingError, ValueError) as error:
            raise CheckpointError(f"{model_id}: {str(error).splitlines()[0]}") from error
        self.files = {}
        infos: dict[str, TensorInfo] = {}
        # Where tensors begin, and where the last one ends, counted from the end of their file's header.
        self._begins: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        for shard, file in sorted(metadata.files_metadata.items()):
            # In on-disk order, as from files on this disk.
            for name, tensor in sorted(file.tensors.items(), key=lambda entry: entry[1].data_offsets):
                if tensor.dtype not in DTYPES:
                    raise CheckpointError(f"{model_id}: tensor {name!r} has dtype {tensor.dtype!r}, which is not known")
                infos[name] = TensorInfo(name, DTYPES[tensor.dtype], tuple(tensor.shape), shard)
                self._begins[name], self._ends[shard] = tensor.data_offsets
        self.infos = infos
        self._shards: dict[str, RemoteFile] = {}
        self._lock = threading.Lock()
        self._ahead: tuple[str, int, bytearray] = ("", 0, bytearray())

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        info = self.infos[name]
        shape = (max(0, stop - start), *info.shape[1:]) if info.shape else ()
        out = torch.empty(shape, dtype=info.dtype)
        if out.numel():
            row_bytes = math.prod(info.shape[1:]) * info.dtype.itemsize
            with self._lock, hub_errors(self._model_id, self.commit_hash):
                self._fill(name, start * row_bytes, out.reshape(-1).view(torch.uint8).numpy().data)
        return out

    def _fill(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` of a tensor on, from what came last or from the Hub."""
        if len(buffer) >= _AHEAD_BYTES:
            self._fetch(name, offset, buffer)
            return
        end = offset + len(buffer)
        held, begin, data = self._ahead
        if held != name or not begin <= offset < end <= begin + len(data):
            begin, data = offset, bytearray(min(_AHEAD_BYTES, self.infos[name].nbytes - offset))
            self._fetch(name, begin, memoryview(data))
            self._ahead = name, begin, data
        buffer[:] = memoryview(data)[offset - begin : end - begin]

    def _fetch(self, name: str, offset: int, buffer: memoryview) -> None:
        shard = self.infos[name].shard
        if not self._shards:
            self._shards = list_files(self._model_id, self.commit_hash, sorted(self._ends))
        file = self._shards[shard]
        start = file.size - self._ends[shard] + self._begins[name] + offset
        position = 0
        for piece in iterate_content(file, start=start, end=start + len(buffer)):
            buffer[position : position + len(piece)] = piece
            position += len(piece)


def _config_file(model_id: str, revision: str | None) -> Path:
    try:
        return Path(huggingface_hub.hf_hub_download(model_id, "config.json", revision=revision))
    except LocalEntryNotFoundError:  # the Hub can't be reached, which says nothing of the repository
        raise
    except EntryNotFoundError:
        names = huggingface_hub.list_repo_files(model_id, revision=revision)
        files = [name for name in names if name.endswith(".gguf") and not is_projector(name)]
        hint = f"; download one of its GGUF files ({', '.join(files[:3])}) and name its path" if files else ""
        raise HubError(f"{model_id}: has no config.json, so it is no transformers model{hint}") from None


def describing_files(model_id: str, revision: str | None = None) -> dict[str, Path]:
    """The small files that say what neither weights nor config.json do: card, chat template, how it is quantized.

    Raises:
        HubError: the Hub refused or could not be reached.
    """
    found: dict[str, Path] = {}
    with hub_errors(model_id, revision):
        for name in _DESCRIBING:
            with suppress(EntryNotFoundError):
                found[name] = Path(huggingface_hub.hf_hub_download(model_id, name, revision=revision))
    return found
