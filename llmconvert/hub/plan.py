"""Plan of a push: files, sizes and card, from the directory alone, without a token and without the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmconvert.errors import HubError, SourceError
from llmconvert.hub.card import CARD, front_matter, require_other_base
from llmconvert.hub.collection import require_title
from llmconvert.hub.errors import without_tokens
from llmconvert.hub.names import require_folder, require_ref, require_repository
from llmconvert.hub.retry import Backoff

__all__ = ["WEIGHTS", "PlannedFile", "PushOptions", "PushPlan", "plan_push"]

# What earlier publications said about themselves, to a directory or to the Hub.
_LEFT_OUT = ("llmconvert/publication.json", "llmconvert/upload.json")
#: Files of weights, by their ends; all else could have had a token pasted, or logged, into it.
WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz")
_CHUNK = 1 << 22
# Longer than any token, so that none is missed where two chunks meet.
_OVERLAP = 512


@dataclass(frozen=True, slots=True)
class PushOptions:
    """How to publish.

    Attributes:
        private: visibility of a new repository; True also refuses to publish into one that is public.
        revision: branch to commit to, made if need be; the main branch if None.
        folder: of the repository, for one of several variants; its root if None.
        create_pr: open a pull request instead of committing to the branch.
        tag: name to give the new commit.
        message: the commit's title, and after its first line a description; a pull request's as well.
        replace: remove the files that are there and don't belong to the artifact, in the same commit.
        verify_download: fetch what was published again and compare it byte for byte.
        gated: who wants a new repository's files has to ask, and is let in at once (``"auto"``) or by hand
            (``"manual"``); also refuses to publish into one that is open.
        collection: title or address of a collection that shall list the repository, made if need be.
        backoff: how to repeat failed requests.
    """

    private: bool | None = None
    revision: str | None = None
    folder: str | None = None
    create_pr: bool = False
    tag: str | None = None
    message: str | None = None
    replace: bool = False
    verify_download: bool = False
    gated: Literal["auto", "manual"] | None = None
    collection: str | None = None
    backoff: Backoff = Backoff()  # noqa: RUF009 (frozen)

    def check(self, repo_id: str) -> None:
        """Refuse names that can't be, and what contradicts itself.

        Raises:
            HubError: saying what to leave out, or what was expected.
        """
        require_repository(repo_id)
        if self.folder is not None:
            require_folder(self.folder)
        for what, name in (("branch", self.revision), ("tag", self.tag)):
            if name is not None:
                require_ref(repo_id, what, name)
        if self.message is not None and not self.message.strip():
            raise HubError(f"{repo_id}: the commit's message is empty; leave it out, or say something")
        if self.create_pr and (self.revision or "main") != "main":
            raise HubError(f"{repo_id}: a pull request goes to main, not to {self.revision!r}; leave one of them out")
        if self.create_pr and self.tag is not None:
            raise HubError(f"{repo_id}: a pull request can't be tagged; tag the commit when it is merged")
        if self.collection is not None:
            require_title(repo_id, self.collection)
            if self.create_pr:
                raise HubError(
                    f"{repo_id}: a pull request goes into no collection; add the repository when it is merged"
                )


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file to publish: its path in the repository, its content or where that lies, and its size in bytes."""

    name: str
    source: Path | bytes
    size: int


@dataclass(frozen=True, slots=True)
class PushPlan:
    """What a push will send, and where to.

    Attributes:
        repo_id: ``user/name``.
        revision: the branch.
        folder: empty, or ends with a slash.
        files: what is sent.
        card: the model card's text, if there is one.
    """

    repo_id: str
    revision: str
    folder: str
    files: tuple[PlannedFile, ...]
    card: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)


def plan_push(
    directory: Path,
    repo_id: str,
    *,
    revision: str | None = None,
    folder: str | None = None,
    instead: Mapping[str, bytes] | None = None,
) -> PushPlan:
    """List what :func:`~llmconvert.hub.push_folder` would send, without a token and without the network.

    Hidden files and folders are left out.

    Args:
        directory: the artifact.
        repo_id: ``user/name``.
        revision: branch; the main branch if None.
        folder: of the repository, for one of several variants; its root if None.
        instead: name → what is sent in place of that file of the directory.

    Raises:
        SourceError: the directory is missing or empty, or a link in it leads out of it.
        HubError: ``repo_id``, ``revision`` or ``folder`` can't be a name on the Hub, a file holds a Hub token, the
            card's front matter can't be read, or its base model is what would be replaced.
    """
    if not directory.is_dir():
        raise SourceError(f"{directory}: no such directory; name the artifact's directory")
    PushOptions(revision=revision, folder=folder).check(repo_id)
    prefix = f"{folder}/" if folder else ""
    root = directory.resolve()
    files = []
    card: str | None = None
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if any(part.startswith(".") for part in name.parts) or not path.is_file() or name.as_posix() in _LEFT_OUT:
            continue
        if not path.resolve().is_relative_to(root):
            raise SourceError(f"{path}: is a link out of {directory}; publish a directory that holds its own files")
        _refuse_tokens(path)
        source = (instead or {}).get(name.as_posix(), path)
        if name.as_posix() == CARD:
            card = _read_card(path, source)
            if not folder and (revision or "main") == "main":
                require_other_base(card, repo_id)
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        files.append(PlannedFile(prefix + name.as_posix(), source, size))
    if not files:
        raise SourceError(f"{directory}: holds no files to publish")
    return PushPlan(repo_id, revision or "main", prefix, tuple(files), card)


def _read_card(path: Path, source: Path | bytes) -> str:
    try:
        text = (source if isinstance(source, bytes) else source.read_bytes()).decode()
    except UnicodeDecodeError as error:
        raise HubError(f"{path}: byte {error.start:,} is no UTF-8; save it as UTF-8") from None
    front_matter(text, str(path))
    return text


def _refuse_tokens(path: Path) -> None:
    """A token that strayed into a card or a log must not become public."""
    if path.suffix.lower() in WEIGHTS:
        return
    with path.open("rb") as file:
        end = b""
        while piece := file.read(_CHUNK):
            text = (end + piece).decode("latin-1")
            if without_tokens(text) != text:
                raise HubError(f"{path}: holds a Hub token; remove it there, and revoke it if the file was ever shared")
            end = piece[-_OVERLAP:]
