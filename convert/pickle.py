"""Reading PyTorch pickle weights (``pytorch_model.bin``, sharded or not), for those who allow it.

Files are opened with ``torch.load(weights_only=True)``, which builds tensors and plain containers and calls nothing
else. One shard is mapped at a time: at most its pages count as memory, and they are the kernel's to take back.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import torch

from llmconvert.engine.architecture.config import declares_tied_embeddings
from llmconvert.errors import CheckpointError, one_line
from llmconvert.storage.checkpoint import DTYPE_NAMES, Checkpoint, TensorInfo
from llmconvert.storage.directory import identity_of, other_files, read_config, read_index

__all__ = ["PickleCheckpoint"]

PICKLE_NAME = "pytorch_model.bin"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"


class PickleCheckpoint(Checkpoint):
    """A model directory whose weights are pickled state dicts.

    Names that share one tensor (tied weights, which a state dict lists under every name) are kept once, under the
    first name, where ``config.json`` says ``tie_word_embeddings``, so that the loader ties them again; otherwise each
    name keeps its own copy.

    Raises:
        CheckpointError: no ``config.json`` or weights, a missing shard, or a file that is no state dict of tensors.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.config = read_config(self.directory)
        self.files = other_files(self.directory)
        self._shard: str | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        infos: dict[str, TensorInfo] = {}
        weight_map = read_index(self.directory, PICKLE_INDEX_NAME)
        tied = declares_tied_embeddings(self.config) is True
        for shard in _shards(self.directory, weight_map):
            tensors = self._load(shard)
            aliases = _aliases(tensors) if tied else set()
            for name, tensor in tensors.items():
                if name in infos:
                    raise CheckpointError(f"{self.directory}: tensor {name!r} is in {infos[name].shard} and in {shard}")
                if name not in aliases:
                    infos[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape), shard)
        self.infos = infos
        self.identity = identity_of(self.directory / shard for shard in _shards(self.directory, weight_map))

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor = self._load(self.infos[name].shard)[name]
        rows = tensor[start:stop] if tensor.dim() else tensor
        return rows.clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        self._shard, self._tensors = None, {}

    def _load(self, shard: str) -> dict[str, torch.Tensor]:
        if shard != self._shard:
            self.close()
            self._tensors = _load_state_dict(self.directory / shard)
            self._shard = shard
        return self._tensors


def _shards(directory: Path, weight_map: dict[str, str] | None) -> list[str]:
    shards = [PICKLE_NAME] if weight_map is None else sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing and weight_map is None:
        raise CheckpointError(f"{directory}: neither safetensors nor {PICKLE_NAME} nor {PICKLE_INDEX_NAME}")
    if missing:
        raise CheckpointError(
            f"{directory / PICKLE_INDEX_NAME}: names {len(missing)} missing shard(s), first {missing[0]}; "
            "the download is incomplete, fetch it again"
        )
    return shards


def _load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    try:
        zipped = _check_archive(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors, which would be run to be read, and never is: {one_line(error)}"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # of an unpickler that somebody else's file drives
        raise CheckpointError(f"{path}: cannot be loaded: {one_line(error)}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, expected a dict of tensors")
    size = path.stat().st_size
    for name, value in loaded.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: has an entry under a {type(name).__name__}, expected names")
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: entry {name!r} is a {type(value).__name__}, expected a tensor")
        if value.dtype not in DTYPE_NAMES or value.layout != torch.strided:
            raise CheckpointError(f"{path}: tensor {name!r} has dtype {value.dtype} ({value.layout}), not storable")
        if value.device.type != "cpu":
            raise CheckpointError(f"{path}: tensor {name!r} is on the {value.device.type!r} device: it has no values")
        if value.numel() * value.dtype.itemsize > size:
            raise CheckpointError(
                f"{path}: tensor {name!r} has {value.numel() * value.dtype.itemsize:,} bytes as it is shaped, the file "
                f"{size:,}; save it contiguous"
            )
    return {name: value.detach() for name, value in loaded.items()}


def _check_archive(path: Path) -> bool:
    """Whether a file is a zip archive, which torch maps; those from before torch 1.6 are none.

    Raises:
        CheckpointError: an archive with compressed records, which no version of torch writes: they can't be mapped, and
            unpack to any size.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                    raise CheckpointError(
                        f"{path}: record {record.filename!r} is compressed ({record.compress_size:,} bytes for "
                        f"{record.file_size:,}), expected it stored as torch.save does"
                    )
    return True


def _aliases(tensors: dict[str, torch.Tensor]) -> set[str]:
    """Names of tensors that are, element for element in memory, one that came before."""
    seen: set[tuple[object, ...]] = set()
    aliases: set[str] = set()
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen:
            aliases.add(name)
        seen.add(key)
    return aliases
