"""Fetching models from the Hugging Face Hub: only the files needed, pinned to a commit."""

from __future__ import annotations

import fnmatch
import glob
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from huggingface_hub.utils.tqdm import tqdm

from llmconvert.errors import HubError
from llmconvert.hub.errors import hub_errors
from llmconvert.progress import SILENT, Progress, Task

__all__ = ["FetchedModel", "fetch"]


_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLE_INDEX = "pytorch_model.bin.index.json"
_PICKLE_SINGLE = "pytorch_model.bin"
#: Root files besides the weights that a converted model needs or must keep (licences travel with the weights).
_NEEDED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "*.model",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)


@dataclass(frozen=True, slots=True)
class FetchedModel:
    """A model in the local cache: where it lies, where it came from, and at which commit."""

    directory: Path
    repo_id: str
    commit_hash: str


def fetch(
    model_id: str,
    revision: str | None = None,
    *,
    cache_dir: Path | None = None,
    allow_pickle: bool = False,
    progress: Progress = SILENT,
) -> FetchedModel:
    """Download what is needed of a model repository: config, safetensors, tokenizer, chat template, licence.

    Files already in the cache are not fetched again. When the Hub can't be reached, a complete cached copy is used.

    Args:
        model_id: ``org/name``.
        revision: branch, tag or commit; the default branch if None.
        cache_dir: instead of ``HF_HOME``'s cache.
        allow_pickle: fetch ``.bin`` weights of a repository that has no safetensors.

    Raises:
        HubError: unknown or gated repository, unknown revision, rejected token, no connection, offline and not
            cached, or a repository without usable weights.
        CapacityError: the disk is full.
    """
    with hub_errors(model_id, revision):
        resolved = huggingface_hub.HfApi().resolve_revision(model_id, revision=revision, cache_dir=cache_dir)
        commit = resolved.resolved

        def download(names: Sequence[str], bar: type[Any]) -> Path:
            patterns = [glob.escape(name) for name in names]
            return Path(
                huggingface_hub.snapshot_download(
                    model_id, revision=resolved, cache_dir=cache_dir, allow_patterns=patterns, tqdm_class=bar
                )
            )

        with SILENT.task("", 0) as silent:
            directory = download(["config.json", _INDEX, _PICKLE_INDEX], _bar(silent))
        sizes = _listing(model_id, commit, cache_dir, directory)
        names = _choose(model_id, sizes, directory, allow_pickle)
        with progress.task(f"fetching {model_id}", sum(sizes[name] for name in names)) as task:
            directory = download(names, _bar(task))
    return FetchedModel(directory, model_id, commit)


def _listing(model_id: str, commit: str, cache_dir: Path | None, directory: Path) -> dict[str, int]:
    """Name → size in bytes of the repository's root files, from the listing the client has just cached."""
    try:
        tree = huggingface_hub.get_cached_repo_tree(model_id, revision=commit, cache_dir=cache_dir)
        return {file.path: file.size for file in tree if "/" not in file.path}
    except CachedRepoTreeNotFoundError:  # offline, and cached by an older client: what is there is all there is
        return {path.name: path.stat().st_size for path in directory.iterdir() if path.is_file()}


def _choose(model_id: str, names: dict[str, int], directory: Path, allow_pickle: bool) -> list[str]:
    """The files to fetch: exactly one complete set of weights, and what goes with it."""
    if "config.json" not in names:
        raise HubError(f"{model_id}: has no config.json, so it is no transformers model")
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in _NEEDED)]
    for index, single in ((_INDEX, _SINGLE), (_PICKLE_INDEX, _PICKLE_SINGLE)):
        if index not in names and single not in names:
            continue
        if single == _PICKLE_SINGLE and not allow_pickle:
            raise HubError(
                f"{model_id}: only pickle weights ({_PICKLE_SINGLE}); they can run code when loaded. "
                "Use a repository with safetensors, or --allow-pickle (loads with weights_only=True)"
            )
        weights = [index, *_shards(model_id, directory / index)] if index in names else [single]
        missing = [name for name in weights if name not in names]
        if missing:
            raise HubError(f"{model_id}: {index} names {len(missing)} file(s) the repository lacks, first {missing[0]}")
        return chosen + weights
    found = sorted(name for name in names if name.endswith((".safetensors", ".gguf", ".bin", ".pth", ".pt")))
    raise HubError(
        f"{model_id}: neither {_SINGLE} nor {_INDEX}"
        + (f"; of weights it has {', '.join(found[:3])}" if found else "; it has no weights")
        + ("; download a .gguf file and name its path instead" if any(n.endswith(".gguf") for n in found) else "")
    )


def _shards(model_id: str, index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(f"{model_id}: {index.name} is not an index of weight files: {error!r}") from error


def _bar(task: Task) -> type[Any]:
    """A progress bar class for ``huggingface_hub`` that draws nothing and passes the bytes on to ``task``."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Of the client's three bars (files, bytes over the network, bytes on disk) the last one is reported.
            self._counts = str(kwargs.get("desc", "")).startswith("Reconstruct")
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts and n:
                task.advance(n)
            return None

    return Bar
