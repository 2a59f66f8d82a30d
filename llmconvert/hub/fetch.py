"""Fetching models from the Hugging Face Hub: only the files needed, pinned to a commit."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    LocalEntryNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils.tqdm import tqdm

from llmconvert.errors import HubError, one_line
from llmconvert.hub.errors import hub_errors
from llmconvert.hub.retry import TRANSPORT_ERROR, Backoff, is_unreachable, retrying
from llmconvert.hub.transfer import RemoteFile, download_file, git_blob_id, list_files
from llmconvert.progress import SILENT, Bytes, Progress, Task

__all__ = ["FetchedModel", "RemoteModel", "fetch", "fetch_adapter", "fetch_without_weights", "missing_weights"]


_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# AutoGPTQ's names, of which there is one; what it did lies in a file of its own, as with AutoAWQ.
_OLD_INDEX = "gptq_model-*.safetensors.index.json"
_OLD_SINGLE = "gptq_model-*.safetensors"
_PICKLE_INDEX = "pytorch_model.bin.index.json"
_PICKLE_SINGLE = "pytorch_model.bin"
# What has to be there to choose among the others.
_FIRST = ("config.json", _INDEX, _PICKLE_INDEX)
# The one folder whose files belong to a model: chat templates beside the default one.
_FOLDER = "additional_chat_templates/"
#: Files besides the weights that a converted model needs or must keep (licences travel with the weights, and the
#: card names them).
_NEEDED = (
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "*.model",
    "chat_template.*",
    f"{_FOLDER}*.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
)


# What an adapter of peft consists of, with what tells of its licence.
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WITH_ADAPTERS = (_ADAPTER_CONFIG, "tokenizer.json", "*.jinja", "LICENSE*", "LICENCE*", "NOTICE*", "README.md")

#: The files to fetch of those a repository has (sizes by name) and the directory they come to: others, and weights.
_Choice = Callable[[dict[str, int], Path], tuple[list[str], list[str]]]

T = TypeVar("T")

# How many weight files are on their way at the same time.
_AT_ONCE = 4
# Larger files than this are not served over plain HTTP; the client has another way for them.
_MAX_HTTP_BYTES = huggingface_hub.constants.MAX_HTTP_DOWNLOAD_SIZE


@dataclass(frozen=True, slots=True)
class FetchedModel:
    """A model in the local cache: where it lies, where it came from, and at which commit."""

    directory: Path
    repo_id: str
    commit_hash: str


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """A model whose small files are in the local cache, and whose weights are still on the Hub.

    Attributes:
        directory: the cache's snapshot, without weights.
        repo_id: ``org/name``.
        commit_hash: its commit.
        shards: the weight files, in the order of their names.
    """

    directory: Path
    repo_id: str
    commit_hash: str
    shards: tuple[RemoteFile, ...]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is to be fetched of a repository at a commit: name → size of weights and of the other files.

    ``hashes`` are those of the listing, by name; offline, with an older client's cache, there are none.
    """

    resolved: Any
    cache_dir: Path | None
    directory: Path
    weights: dict[str, int]
    others: dict[str, int]
    hashes: dict[str, str]

    @property
    def commit(self) -> str:
        return str(self.resolved.resolved)


def fetch(
    model_id: str,
    revision: str | None = None,
    *,
    cache_dir: Path | None = None,
    allow_pickle: bool = False,
    progress: Progress = SILENT,
) -> FetchedModel:
    """Download what is needed of a model repository: config, safetensors, tokenizer, chat template, licence.

    Files already in the cache are not fetched again, and a file that was cut off is continued, by a later process
    too. When the Hub can't be reached, a complete cached copy is used.

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
    choice = partial(_choose, model_id, allow_pickle=allow_pickle)
    return _fetch(model_id, revision, cache_dir, _FIRST, choice, progress)


def fetch_adapter(
    adapter_id: str, revision: str | None = None, *, cache_dir: Path | None = None, progress: Progress = SILENT
) -> FetchedModel:
    """Download an adapter of peft, its config and its weights, as :func:`fetch` downloads a model.

    Raises:
        HubError: see :func:`fetch`; or the repository has no adapter, or one in pickle alone.
        CapacityError: the disk is full.
    """

    def choice(names: dict[str, int], directory: Path) -> tuple[list[str], list[str]]:
        missing = [name for name in (_ADAPTER_CONFIG, _ADAPTER_WEIGHTS) if name not in names]
        if missing:
            found = ", ".join(sorted(name for name in names if name.startswith("adapter_"))) or "nothing of one"
            raise HubError(f"{adapter_id}: has no {missing[0]}, so it is no adapter that can be read; it has {found}")
        others = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in _WITH_ADAPTERS)]
        return others, [_ADAPTER_WEIGHTS]

    return _fetch(adapter_id, revision, cache_dir, [_ADAPTER_CONFIG], choice, progress)


def _fetch(
    model_id: str,
    revision: str | None,
    cache_dir: Path | None,
    first: Sequence[str],
    choice: _Choice,
    progress: Progress,
) -> FetchedModel:
    with hub_errors(model_id, revision):
        wanted = _look_up(model_id, revision, cache_dir, first, choice)
        total = sum(wanted.weights.values()) + sum(wanted.others.values())
        with progress.task(f"fetching {model_id}", Bytes(total)) as task:
            _fetch_weights(model_id, wanted, task)
            _snapshot(model_id, wanted, list(wanted.weights), _bar(task))
            directory = _small_files(model_id, wanted)
            task.advance(sum(wanted.others.values()))
    return FetchedModel(directory, model_id, wanted.commit)


def fetch_without_weights(model_id: str, revision: str | None = None, *, cache_dir: Path | None = None) -> RemoteModel:
    """Download everything :func:`fetch` would but the weights, and say where those are.

    Raises:
        HubError, CapacityError: see :func:`fetch`; also if the weights are no safetensors.
    """
    with hub_errors(model_id, revision):
        wanted = _look_up(model_id, revision, cache_dir, _FIRST, partial(_choose, model_id, allow_pickle=False))
        directory = _small_files(model_id, wanted)
        names = sorted(name for name in wanted.weights if name.endswith(".safetensors"))
        files = list_files(model_id, wanted.commit, names)
    return RemoteModel(directory, model_id, wanted.commit, tuple(files[name] for name in names))


def missing_weights(
    model_id: str, revision: str | None = None, *, cache_dir: Path | None = None, allow_pickle: bool = False
) -> dict[str, int]:
    """The weight files that :func:`fetch` would have to download, by name → bytes; config and listing are fetched.

    Raises:
        HubError: see :func:`fetch`.
    """
    with hub_errors(model_id, revision):
        wanted = _look_up(model_id, revision, cache_dir, _FIRST, partial(_choose, model_id, allow_pickle=allow_pickle))
    return {name: size for name, size in wanted.weights.items() if not (wanted.directory / name).exists()}


def _look_up(
    model_id: str, revision: str | None, cache_dir: Path | None, first: Sequence[str], choice: _Choice
) -> _Wanted:
    api = huggingface_hub.HfApi()
    resolved = _retrying(lambda: api.resolve_revision(model_id, revision=revision, cache_dir=cache_dir))
    wanted = _Wanted(resolved, cache_dir, Path(), {}, {}, {})
    directory = _snapshot(model_id, wanted, first)
    sizes, hashes = _listing(model_id, wanted.commit, cache_dir, directory)
    others, weights = choice(sizes, directory)
    return replace(
        wanted,
        directory=directory,
        weights={name: sizes[name] for name in weights},
        others={name: sizes[name] for name in others},
        hashes=hashes,
    )


def _snapshot(model_id: str, wanted: _Wanted, names: Sequence[str], bar: type[Any] | None = None) -> Path:
    """The cache's directory for this commit, with these files in it; small ones need no progress bar."""
    patterns = [glob.escape(name) for name in names]
    directory = _retrying(
        lambda: huggingface_hub.snapshot_download(
            model_id,
            revision=wanted.resolved,
            cache_dir=wanted.cache_dir,
            allow_patterns=patterns,
            tqdm_class=bar or _bar(None),
        )
    )
    return Path(directory)


def _small_files(model_id: str, wanted: _Wanted) -> Path:
    """The cache's directory for this commit with the files beside the weights in it, each as the Hub lists it.

    The client believes what it receives and what lies in its cache; a damaged file would stay there under the right
    name. Such a file is removed and fetched once more.

    Raises:
        HubError: it came damaged again; it is not kept.
    """
    names = list(wanted.others)
    for last in (False, True):
        directory = _snapshot(model_id, wanted, names)
        damaged = [name for name in names if not _is_whole(directory / name, wanted.hashes.get(name))]
        for name in damaged:
            (directory / name).resolve().unlink(missing_ok=True)
            (directory / name).unlink(missing_ok=True)
        if not damaged:
            break
        if last:
            raise HubError(f"{model_id}: {damaged[0]} arrived damaged, twice; run the same command again later")
    return directory


def _is_whole(path: Path, listed: str | None) -> bool:
    """Whether a file has the hash that the Hub lists for it, of either kind; what isn't listed can't be told."""
    if listed is None or not path.is_file():
        return listed is None
    content = path.read_bytes()
    return listed in (git_blob_id(content), hashlib.sha256(content).hexdigest())


def _retrying(call: Callable[[], T]) -> T:
    """``call()``, again after a failure of the Hub that may pass. The client hides those behind errors of its own."""

    def unwrapped() -> T:
        try:
            return call()
        except (LocalEntryNotFoundError, RevisionResolutionError) as error:
            # Without any connection, the client's own error knows better, and waiting a few seconds doesn't help.
            if isinstance(error.__cause__, TRANSPORT_ERROR) and not is_unreachable(error.__cause__):
                raise error.__cause__ from None
            raise

    return retrying(unwrapped, Backoff())


def _fetch_weights(model_id: str, wanted: _Wanted, task: Task) -> None:
    """Put missing weight files where the client's cache keeps contents, under their hash; it links them itself."""
    missing = [name for name in wanted.weights if not (wanted.directory / name).exists()]
    task.advance(sum(size for name, size in wanted.weights.items() if name not in missing))
    if not missing or huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    files = list_files(model_id, wanted.commit, missing).values()
    blobs = wanted.directory.parent.parent / "blobs"
    blobs.mkdir(exist_ok=True)
    stop = threading.Event()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        downloads = [
            pool.submit(download_file, file, blobs / file.digest, advance=task.advance, stop=stop)
            for file in files
            if file.size <= _MAX_HTTP_BYTES
        ]
        try:
            for download in as_completed(downloads):
                download.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _listing(
    model_id: str, commit: str, cache_dir: Path | None, directory: Path
) -> tuple[dict[str, int], dict[str, str]]:
    """Name → size in bytes, and name → hash, of the repository's files, from the listing the client has cached.

    Of its folders only that of chat templates is looked into.
    """
    try:
        tree = huggingface_hub.get_cached_repo_tree(model_id, revision=commit, cache_dir=cache_dir)
        root = [file for file in tree if "/" not in file.path.removeprefix(_FOLDER)]
        hashes = {file.path: file.lfs.sha256 if file.lfs is not None else file.blob_id for file in root}
        return {file.path: file.size for file in root}, hashes
    except CachedRepoTreeNotFoundError:  # offline, and cached by an older client: what is there is all there is
        there = [path for path in (*directory.iterdir(), *directory.glob(f"{_FOLDER}*")) if path.is_file()]
        return {path.relative_to(directory).as_posix(): path.stat().st_size for path in there}, {}


def _choose(model_id: str, names: dict[str, int], directory: Path, allow_pickle: bool) -> tuple[list[str], list[str]]:
    """The files to fetch: what goes with the weights, and exactly one complete set of these."""
    if "config.json" not in names:
        hint = "; download a .gguf file and name its path instead" if any(n.endswith(".gguf") for n in names) else ""
        raise HubError(f"{model_id}: has no config.json, so it is no transformers model{hint}")
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in _NEEDED)]
    old_index, old_single = (next(iter(fnmatch.filter(names, old)), old) for old in (_OLD_INDEX, _OLD_SINGLE))
    for index, single in ((_INDEX, _SINGLE), (old_index, old_single), (_PICKLE_INDEX, _PICKLE_SINGLE)):
        if index not in names and single not in names:
            continue
        if single == _PICKLE_SINGLE and not allow_pickle:
            raise HubError(
                f"{model_id}: only pickle weights ({_PICKLE_SINGLE}); they can run code when loaded. "
                "Use a repository with safetensors, or --allow-pickle (allow_pickle: true), which reads tensors alone"
            )
        weights = [index, *_shards(model_id, directory / index)] if index in names else [single]
        missing = [name for name in weights if name not in names]
        if missing:
            raise HubError(f"{model_id}: {index} names {len(missing)} file(s) the repository lacks, first {missing[0]}")
        return chosen + [name for name in weights if name == index], [name for name in weights if name != index]
    found = sorted(name for name in names if name.endswith((".safetensors", ".gguf", ".bin", ".pth", ".pt")))
    raise HubError(
        f"{model_id}: neither {_SINGLE} nor {_INDEX}"
        + (f"; of weights it has {', '.join(found[:3])}" if found else "; it has no weights")
        + ("; download a .gguf file and name its path instead" if any(n.endswith(".gguf") for n in found) else "")
    )


def _shards(model_id: str, index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HubError(f"{model_id}: {index.name} is not an index of weight files: {one_line(error)}") from error


def _bar(task: Task | None) -> type[Any]:
    """A progress bar class for ``huggingface_hub`` that draws nothing and passes the bytes on to ``task``, if any."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Of the client's three bars (files, bytes over the network, bytes on disk) the last one is reported.
            self._counts = str(kwargs.get("desc", "")).startswith("Reconstruct")
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts and n and task is not None:
                task.advance(n)
            return None

    return Bar
