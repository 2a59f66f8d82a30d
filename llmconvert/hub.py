"""Fetching models from the Hugging Face Hub, and the one-line errors of everything that talks to it.

``HF_TOKEN``, ``HF_HOME``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` are honoured by ``huggingface_hub`` itself; nothing
here reads or passes a token. A revision is resolved to a commit hash once, and everything after that is pinned to it.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils.tqdm import tqdm

from llmconvert.errors import CapacityError, HubError, LlmconvertError
from llmconvert.progress import SILENT, Progress, Task

__all__ = ["FetchedModel", "fetch", "hub_errors", "without_tokens"]

# The transport's own base class, whichever httpx the client is built on.
_TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
_TOKEN = re.compile(r"\b(?:hf|api_org)_\w{8,}")

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


def without_tokens(text: str) -> str:
    """``text`` without anything that looks like, or is, a Hub token."""
    token = huggingface_hub.get_token()
    return _TOKEN.sub("[token]", text.replace(token, "[token]") if token else text)


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn every failure of ``huggingface_hub`` into one line that says what to do, free of tokens."""
    try:
        yield
    except LlmconvertError:
        raise
    except (OSError, ValueError, RevisionResolutionError, EntryNotFoundError, _TRANSPORT_ERROR) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = error.filename or "the cache (HF_HOME)"
            raise CapacityError(f"{repo_id}: the disk that holds {where} is full; free some space") from None
        # Without the cause: its text is the server's, and may quote the request.
        raise HubError(without_tokens(f"{repo_id}: {_explain(error, repo_id, revision)}")) from None


def _explain(error: Exception, repo_id: str, revision: str | None) -> str:
    endpoint = huggingface_hub.constants.ENDPOINT
    match error:
        case RevisionNotFoundError():
            return f"has no revision {revision or 'main'!r}; name a branch, tag or commit that is listed there"
        case GatedRepoError():
            return f"is gated; accept its terms at {endpoint}/{repo_id} and set HF_TOKEN to a token of that account"
        case RepositoryNotFoundError():
            return (
                f"no such model on {endpoint}, or it is private; check the spelling (org/name), "
                "and set HF_TOKEN if it is private"
            )
        case DisabledRepoError():
            return "was disabled on the Hub"
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set and this needs the Hub; unset it"
        case LocalEntryNotFoundError() | RevisionResolutionError():
            if huggingface_hub.constants.HF_HUB_OFFLINE:
                return "HF_HUB_OFFLINE is set and the model is not (completely) in the cache; fetch it once online"
            cause = type(error.__cause__ or error).__name__
            return f"{endpoint} could not be reached ({cause}), and the model is not in the cache"
        case HFValidationError():
            return f"is no valid repository id: {_first_line(error)}"
        case HfHubHTTPError():
            return _explain_status(error)
        case _:
            if isinstance(error, _TRANSPORT_ERROR):
                return f"{endpoint} could not be reached ({type(error).__name__}: {_first_line(error)})"
            return _first_line(error)


def _explain_status(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = f" (the Hub says: {' '.join(error.server_message.split())})" if error.server_message else ""
    advice = {
        401: "the token was rejected; set HF_TOKEN to a valid one, or unset it",
        403: "the token does not allow this; use one with the needed permission",
        404: "not found",
        409: "conflicts with what is there",
        412: "the branch has moved meanwhile; run the same command again",
        429: "too many requests; wait a few minutes and run the same command again",
    }
    default = "the Hub failed; run the same command again later" if status >= 500 else "the Hub refused the request"
    return f"HTTP {status}: {advice.get(status, default)}{said}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
