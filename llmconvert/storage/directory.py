"""A model's directory in Hugging Face layout: which of its files are what."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmconvert.errors import CheckpointError, one_line
from llmconvert.storage.parsing import read_json

__all__ = [
    "INDEX_NAME",
    "SINGLE_NAME",
    "identity_of",
    "index_name",
    "is_weight_file",
    "other_files",
    "read_config",
    "read_index",
    "shard_names",
]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

# AutoGPTQ's names of weight files: gptq_model-4bit-128g.safetensors, or shards with an index beside them.
_OLD_SINGLE = "gptq_model-*.safetensors"
_OLD_INDEX = "gptq_model-*.safetensors.index.json"

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".ckpt")


# What file systems take, in bytes.
_LONGEST_NAME = 255


def is_weight_file(name: str) -> bool:
    """Whether a file of a model repository holds weights or describes where they lie (their index)."""
    return name.endswith(_WEIGHT_SUFFIXES) or name.endswith((".safetensors.index.json", ".bin.index.json"))


def read_config(directory: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a model directory."""
    path = directory / "config.json"
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory}: has no config.json; a model directory in Hugging Face layout was expected"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(config).__name__}, expected an object")
    return config


def other_files(directory: Path) -> dict[str, Path]:
    """Name → path of a model directory's files that are neither weights nor ``config.json`` nor hidden."""
    paths = [path for path in sorted(directory.iterdir()) if path.is_file() and not path.name.startswith(".")]
    return {path.name: path for path in paths if path.name != "config.json" and not is_weight_file(path.name)}


def read_index(directory: Path, name: str = INDEX_NAME) -> dict[str, str] | None:
    """The index's tensor → shard map, or None without an index. Shard names are checked to stay in the directory."""
    path = directory / name
    try:
        weight_map = read_json(path)["weight_map"]
        if not all(isinstance(text, str) for entry in weight_map.items() for text in entry):
            raise TypeError("weight_map must map strings to strings")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is not an index of weight files: {one_line(error)}") from error
    for tensor, shard in weight_map.items():
        if shard != os.path.basename(shard) or shard in ("", ".", "..") or "\\" in shard or "\0" in shard:
            raise CheckpointError(f"{path}: tensor {tensor!r} is placed in {shard!r}, outside the model's directory")
        # Halves of surrogate pairs, which JSON can hold, count as well.
        if len(shard.encode("utf-8", "replace")) > _LONGEST_NAME or not shard.isprintable():
            raise CheckpointError(f"{path}: tensor {tensor!r:.80} is placed in {shard!r:.80}, which is no file's name")
    return dict(weight_map)


def index_name(directory: Path) -> str:
    """What the index of a model directory's weight files is called, if there is one: by transformers, or AutoGPTQ."""
    old = sorted(path.name for path in directory.glob(_OLD_INDEX))
    new = (directory / INDEX_NAME).exists() or (directory / SINGLE_NAME).exists()
    return old[0] if old and not new else INDEX_NAME


def shard_names(directory: Path) -> list[str]:
    """The safetensors files that hold a model directory's weights.

    Raises:
        CheckpointError: some are missing, or there are none.
    """
    index = index_name(directory)
    weight_map = read_index(directory, index)
    if weight_map is not None:
        shards = sorted(set(weight_map.values()))
        missing = [shard for shard in shards if not (directory / shard).is_file()]
        if missing:
            raise CheckpointError(
                f"{directory / index}: names {len(missing)} missing shard(s), first {missing[0]}; "
                "the download is incomplete, fetch it again"
            )
        return shards
    if (directory / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    old = sorted(path.name for path in directory.glob(_OLD_SINGLE))
    if len(old) == 1:
        return old
    if old:
        raise CheckpointError(f"{directory}: {' and '.join(old[:2])}; name the one to read {SINGLE_NAME}")
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    if pickles:
        raise CheckpointError(
            f"{directory}: only pickle weights ({pickles[0]}); they can run code when loaded. "
            "Use a repository with safetensors, or --allow-pickle (loads with weights_only=True)"
        )
    raise CheckpointError(f"{directory}: neither {SINGLE_NAME} nor {INDEX_NAME}")


def identity_of(files: Iterable[Path]) -> str:
    """A hash of files' names, sizes and modification times: what is known of their contents without reading them."""
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()
