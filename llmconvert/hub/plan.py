"""Plan of a push: files, sizes and card, from the directory alone, without a token and without the network."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llmconvert.errors import HubError, SourceError
from llmconvert.hub.errors import without_tokens

__all__ = ["PlannedFile", "PushPlan", "plan_push"]

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FOLDER = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*")
# What earlier publications said about themselves, to a directory or to the Hub.
_LEFT_OUT = ("llmconvert/publication.json", "llmconvert/upload.json")
# All else could have had a token pasted, or logged, into it.
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz")
_CHUNK = 1 << 22
# Longer than any token, so that none is missed where two chunks meet.
_OVERLAP = 512


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file to publish: its path in the repository, where it lies, and its size in bytes."""

    name: str
    path: Path
    size: int


@dataclass(frozen=True, slots=True)
class PushPlan:
    """What a push will send, and where to. ``folder`` is empty or ends with a slash."""

    repo_id: str
    revision: str
    folder: str
    files: tuple[PlannedFile, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def card(self) -> str | None:
        """The model card's text, if there is one."""
        for file in self.files:
            if file.name == f"{self.folder}README.md":
                return file.path.read_text(encoding="utf-8")
        return None


def plan_push(directory: Path, repo_id: str, *, revision: str | None = None, folder: str | None = None) -> PushPlan:
    """List what :func:`~llmconvert.hub.push_folder` would send, without a token and without the network.

    Hidden files and folders are left out.

    Args:
        directory: the artifact.
        repo_id: ``user/name``.
        revision: branch; the main branch if None.
        folder: of the repository, for one of several variants; its root if None.

    Raises:
        SourceError: the directory is missing or empty, or a link in it leads out of it.
        HubError: ``repo_id`` or ``folder`` can't be a name on the Hub, or a file holds a Hub token.
    """
    if not directory.is_dir():
        raise SourceError(f"{directory}: no such directory; name the artifact's directory")
    if _REPO_ID.fullmatch(repo_id) is None:
        raise HubError(f"{repo_id!r}: is no repository; expected user/name, of letters, digits, '-', '_' and '.'")
    if folder is not None and _FOLDER.fullmatch(folder) is None:
        raise HubError(f"{folder!r}: is no folder of a repository; expected a name of letters, digits, '-', '_', '.'")
    prefix = f"{folder}/" if folder else ""
    root = directory.resolve()
    files = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if any(part.startswith(".") for part in name.parts) or not path.is_file() or name.as_posix() in _LEFT_OUT:
            continue
        if not path.resolve().is_relative_to(root):
            raise SourceError(f"{path}: is a link out of {directory}; publish a directory that holds its own files")
        _refuse_tokens(path)
        files.append(PlannedFile(prefix + name.as_posix(), path, path.stat().st_size))
    if not files:
        raise SourceError(f"{directory}: holds no files to publish")
    return PushPlan(repo_id, revision or "main", prefix, tuple(files))


def _refuse_tokens(path: Path) -> None:
    """A token that strayed into a card or a log must not become public."""
    if path.suffix.lower() in _WEIGHTS:
        return
    with path.open("rb") as file:
        end = b""
        while piece := file.read(_CHUNK):
            text = (end + piece).decode("latin-1")
            if without_tokens(text) != text:
                raise HubError(f"{path}: holds a Hub token; remove it there, and revoke it if the file was ever shared")
            end = piece[-_OVERLAP:]
