"""Publishing a directory to the Hugging Face Hub as one commit, checked against the Hub's own listing.

Weights are uploaded first, where nobody sees them; a single commit then makes the whole artifact visible. A reader
finds the old state or the new one, never half of either. Repeating a push sends only what is missing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from llmconvert.errors import HubError, SourceError
from llmconvert.hub.errors import hub_errors
from llmconvert.progress import SILENT, Progress

__all__ = ["PlannedFile", "PushPlan", "plan_push", "push_folder"]

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Files from this size on are uploaded one by one, so that progress shows; the smaller ones go together.
_LARGE_BYTES = 10_000_000
# What an artifact's own folder in the repository is called; files of an earlier version of it are removed.
_OWN_FOLDER = "llmconvert/"
# What a loader would take for weights, or for the list of them.
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".safetensors.index.json", ".bin.index.json")


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file to publish: its path in the repository, where it lies, and its size in bytes."""

    name: str
    path: Path
    size: int


@dataclass(frozen=True, slots=True)
class PushPlan:
    """What a push would send."""

    repo_id: str
    revision: str
    files: tuple[PlannedFile, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)


def plan_push(directory: Path, repo_id: str, *, revision: str | None = None) -> PushPlan:
    """List what :func:`push_folder` would send, without a token and without the network.

    Hidden files and folders are left out.

    Raises:
        SourceError: the directory is missing or empty, or a link in it leads out of it.
        HubError: ``repo_id`` can't be a repository's name.
    """
    if not directory.is_dir():
        raise SourceError(f"{directory}: no such directory; name the artifact's directory")
    if _REPO_ID.fullmatch(repo_id) is None:
        raise HubError(f"{repo_id!r}: is no repository; expected user/name, of letters, digits, '-', '_' and '.'")
    root = directory.resolve()
    files = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if any(part.startswith(".") for part in name.parts) or not path.is_file():
            continue
        if not path.resolve().is_relative_to(root):
            raise SourceError(f"{path}: is a link out of {directory}; publish a directory that holds its own files")
        files.append(PlannedFile(name.as_posix(), path, path.stat().st_size))
    if not files:
        raise SourceError(f"{directory}: holds no files to publish")
    return PushPlan(repo_id, revision or "main", tuple(files))


def push_folder(
    directory: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    message: str | None = None,
    progress: Progress = SILENT,
) -> str:
    """Publish every file of ``directory`` in one commit; create the repository or branch if need be.

    Weight files in the repository's root and files in its ``llmconvert/`` folder that are not part of this artifact
    are removed in the same commit: stale shards beside new ones would make a model that loads wrongly. Everything
    else that is there stays.

    Args:
        directory: the artifact.
        repo_id: ``user/name``.
        private: visibility of a new repository; True also refuses to publish into one that is public.
        revision: branch to commit to; the main branch if None.
        create_pr: open a pull request instead of committing to the branch.
        tag: name to give the new commit.
        message: the commit's title.
        progress: where to report, in bytes.

    Returns:
        The URL of the commit, or of the pull request.

    Raises:
        HubError: no token, refused, not reachable, or the Hub lists something else than was sent.
        SourceError: see :func:`plan_push`.
    """
    plan = plan_push(directory, repo_id, revision=revision)
    if create_pr and plan.revision != "main":
        raise HubError(f"{repo_id}: a pull request goes to main, not to {plan.revision!r}; leave one of them out")
    if create_pr and tag is not None:
        raise HubError(f"{repo_id}: a pull request can't be tagged; tag the commit when it is merged")
    if huggingface_hub.get_token() is None:
        raise HubError(f"{repo_id}: publishing needs a token; set HF_TOKEN to one with write permission")
    api = HfApi()
    with hub_errors(repo_id, revision), _quiet():
        _check_card(plan)
        parent = _prepare(api, plan, private)
        additions = [CommitOperationAdd(file.name, file.path) for file in plan.files]
        with progress.task(f"uploading to {repo_id}", plan.nbytes) as task:
            for batch in _batches(additions):
                api.preupload_lfs_files(repo_id, batch, revision=plan.revision, create_pr=create_pr, free_memory=False)
                task.advance(sum(addition.upload_info.size for addition in batch))
        commit = api.create_commit(
            repo_id,
            [*additions, *_removals(api, plan, parent)],
            commit_message=message or "Upload model",
            revision=plan.revision,
            create_pr=create_pr,
            parent_commit=parent,
        )
        _verify(api, plan, commit.pr_revision or commit.oid)
        if tag is not None:
            _tag(api, repo_id, tag, commit.oid)
    return str(commit.pr_url or commit.commit_url)


def _check_card(plan: PushPlan) -> None:
    """Have the Hub check the model card's metadata before gigabytes are sent, not after."""
    for file in plan.files:
        if file.name == "README.md":
            ModelCard(file.path.read_text(encoding="utf-8")).validate(repo_type="model")


def _prepare(api: HfApi, plan: PushPlan, private: bool | None) -> str:
    """Make sure that repository and branch exist; returns the branch's commit."""
    api.create_repo(plan.repo_id, private=private, exist_ok=True)
    try:
        info = api.model_info(plan.repo_id, revision=plan.revision)
    except RevisionNotFoundError:
        api.create_branch(plan.repo_id, branch=plan.revision, exist_ok=True)
        info = api.model_info(plan.repo_id, revision=plan.revision)
    if private and not info.private:
        raise HubError(f"{plan.repo_id}: is public, and this was to be private; make it private on the Hub first")
    return str(info.sha)


def _batches(additions: list[CommitOperationAdd]) -> Iterator[list[CommitOperationAdd]]:
    small = [addition for addition in additions if addition.upload_info.size < _LARGE_BYTES]
    if small:
        yield small
    for addition in additions:
        if addition.upload_info.size >= _LARGE_BYTES:
            yield [addition]


def _removals(api: HfApi, plan: PushPlan, parent: str) -> list[CommitOperationDelete]:
    names = {file.name for file in plan.files}
    stale = [
        name
        for name in _listing(api, plan.repo_id, parent)
        if name not in names and (name.startswith(_OWN_FOLDER) or ("/" not in name and name.endswith(_WEIGHTS)))
    ]
    return [CommitOperationDelete(name, is_folder=False) for name in stale]


def _listing(api: HfApi, repo_id: str, revision: str) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _verify(api: HfApi, plan: PushPlan, commit: str) -> None:
    """Compare what the Hub lists at ``commit`` with what lies on this disk: size and hash of every file."""
    listing = _listing(api, plan.repo_id, commit)
    for file in plan.files:
        entry = listing.get(file.name)
        if entry is None:
            raise HubError(f"{plan.repo_id}: {file.name} is missing from commit {commit}; push again")
        if entry.lfs is not None:
            found, expected = entry.lfs.sha256, _sha256(file.path)
        else:
            found, expected = entry.blob_id, _git_blob_id(file.path)
        if (entry.size, found) != (file.size, expected):
            raise HubError(
                f"{plan.repo_id}: {file.name} in commit {commit} has {entry.size:,} bytes and hash {found}, "
                f"expected {file.size:,} bytes and {expected}; did it change while it was sent? Push again"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_blob_id(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _tag(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    existing = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    if existing.get(tag, commit) != commit:
        raise HubError(f"{repo_id}: published, but tag {tag!r} exists already, at {existing[tag]}; choose another")
    if tag not in existing:
        api.create_tag(repo_id, tag=tag, revision=commit)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the client's own progress bars, which would be drawn over ours."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
