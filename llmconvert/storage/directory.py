"""A model's directory in Hugging Face layout: which of its files are what."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmconvert.errors import CheckpointError, one_line
from llmconvert.storage.parsing import read_json

__all__ = [
    "CHAT_TEMPLATES",
    "INDEX_NAME",
    "SINGLE_NAME",
    "files_of",
    "identity_of",
    "index_name",
    "is_projector",
    "is_weight_file",
    "other_files",
    "read_config",
    "read_index",
    "shard_names",
]

#: The folder of chat templates beside the default one.
CHAT_TEMPLATES = "additional_chat_templates"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

# AutoGPTQ's names of weight files: gptq_model-4bit-128g.safetensors, or shards with an index beside them.
_OLD_SINGLE = "gptq_model-*.safetensors"
_OLD_INDEX = "gptq_model-*.safetensors.index.json"

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".ckpt")


# Configs that may name classes in Python files of the model's.
_MAPPING = (
    *("config.json", "tokenizer_config.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
# What a Hub's cache calls the folder of a repository.
_CACHE_FOLDER = re.compile(r"(models|datasets|spaces)--")
# What file systems take, in bytes.
_LONGEST_NAME = 255


def is_projector(name: str) -> bool:
    """Whether a file is not a model but its part for images or sound, by its name, as llama.cpp tells them apart."""
    return "mmproj" in name.lower() and name.endswith(".gguf")


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


def files_of(directory: Path) -> dict[str, Path]:
    """Name → path of a model directory's files that are not hidden, in order: its own, and its chat templates'.

    Other folders hold other models, or the same in other forms; transformers reads none of them.

    Raises:
        CheckpointError: a file is a link to somewhere that is no part of the model.
    """
    inside = [path for path in sorted(directory.iterdir()) if not path.name.startswith(".")]
    templates = directory / CHAT_TEMPLATES
    if templates.is_dir():
        inside += sorted(templates.glob("*.jinja"))
    for path in (templates, *inside):
        if path.is_symlink():
            _require_own(directory, path)
    return {path.relative_to(directory).as_posix(): path for path in inside if path.is_file()}


def _require_own(directory: Path, path: Path) -> None:
    """Refuse a link out of the model: what it points to would be copied, and published, under a name of the model's."""
    target = path.resolve()
    # In a Hub's cache, the files of a snapshot are links into the contents that it keeps by their hash.
    cached = target.parent.name == "blobs" and _CACHE_FOLDER.match(target.parent.parent.name) is not None
    if not cached and not target.is_relative_to(directory.resolve()):
        raise CheckpointError(
            f"{path}: is a link to {target}, no part of the model; put the file itself there, or remove the link"
        )
    if not target.exists():
        raise CheckpointError(f"{path}: is a link to {target}, which does not exist")


def other_files(directory: Path) -> dict[str, Path]:
    """Name → path of a model directory's files that are neither weights nor ``config.json``.

    Program code goes with the model only if its config says what it is for (``auto_map``); it is never run here.

    Raises:
        CheckpointError: see :func:`files_of`.
    """
    found = {name: path for name, path in files_of(directory).items() if not is_weight_file(name)}
    code = [name for name in found if name.endswith(".py")]
    if code and not any(_maps_code(found[name]) for name in found if name in _MAPPING):
        found = {name: path for name, path in found.items() if name not in code}
    found.pop("config.json", None)
    return found


def _maps_code(config: Path) -> bool:
    try:
        values = read_json(config)
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and bool(values.get("auto_map"))


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
    first: dict[str, str] = {}
    for tensor, shard in weight_map.items():
        first.setdefault(shard, tensor)
    for shard, tensor in first.items():
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
        CheckpointError: some are missing, there are none, or there are two sets of them.
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
        if index == INDEX_NAME and SINGLE_NAME not in shards and (directory / SINGLE_NAME).is_file():
            raise CheckpointError(
                f"{directory}: holds weights twice, in {SINGLE_NAME}, which transformers reads, and in those that "
                f"{INDEX_NAME} names ({shards[0]}, …), which vLLM reads; move away which of them is not the model"
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
            "Use a repository with safetensors, or --allow-pickle (allow_pickle: true), which reads tensors alone"
        )
    others = sorted(path.name for path in directory.iterdir() if path.name.endswith(_WEIGHT_SUFFIXES))
    found = f"; it has {others[0]}{', …' if len(others) > 1 else ''}" if others else ""
    if others and all(name.endswith(".safetensors") for name in others):
        found += f", and a model of several files needs {INDEX_NAME}, which says what lies where: fetch it too"
    raise CheckpointError(f"{directory}: has neither {SINGLE_NAME} nor {INDEX_NAME}{found}")


def identity_of(files: Iterable[Path]) -> str:
    """A hash of files' names, sizes and modification times: what is known of their contents without reading them."""
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()
