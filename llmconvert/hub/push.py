"""Publishing a directory to the Hugging Face Hub as one commit, checked against the Hub's own listing.

Contents are uploaded first, where nobody sees them; a single commit then makes the whole artifact visible, whether
they went by LFS or by Xet. A reader finds the old state or the new one, never half of either. Repeating a push sends
only what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionNotFoundError

from llmconvert.errors import HubError
from llmconvert.hub.card import CARD, validate_card
from llmconvert.hub.collection import add_to_collection
from llmconvert.hub.commit import Base, Commit, Committer, MovedError
from llmconvert.hub.errors import hub_errors
from llmconvert.hub.permissions import check_permissions, require_visibility
from llmconvert.hub.plan import PushOptions, PushPlan, plan_push
from llmconvert.hub.repository import Content, hash_files, list_repository, mismatch, require_clear, survey
from llmconvert.hub.retry import Backoff, retrying
from llmconvert.hub.transfer import RemoteFile
from llmconvert.hub.variants import variants_card
from llmconvert.hub.verification import compare_bytes
from llmconvert.progress import SILENT, Progress
from llmconvert.version import __version__

__all__ = ["check_card", "check_push", "push_folder", "reaches_hub"]

# Of a list of files, how many are named.
_NAMED = 5
# How often a push that lost a race is built anew on what came in.
_REBASES = 5


def push_folder(
    directory: Path,
    repo_id: str,
    options: PushOptions | None = None,
    *,
    instead: Mapping[str, bytes] | None = None,
    progress: Progress = SILENT,
) -> str:
    """Publish every file of ``directory`` in one commit; create the repository or branch if need be.

    Files that an earlier push of the artifact sent and this one doesn't are removed in the same commit. Files of
    other origin are listed and kept, unless ``replace`` says otherwise; weights among them that a loader would take
    instead of the artifact's are refused.

    Args:
        directory: the artifact.
        repo_id: ``user/name``.
        options: how to publish.
        instead: name → what is sent in place of that file of the directory.
        progress: where to report, in bytes.

    Returns:
        The URL of the commit, or of the pull request.

    Raises:
        HubError: no token, refused, not reachable, the branch has moved meanwhile, or the Hub lists something else
            than was sent.
        SourceError: see :func:`~llmconvert.hub.plan_push`.
    """
    options = options or PushOptions()
    plan = plan_push(directory, repo_id, revision=options.revision, folder=options.folder, instead=instead)
    options.check(repo_id)
    _require_token(repo_id)
    with hub_errors(repo_id, options.revision):
        return _Push(plan, options, progress).run()


def check_push(repo_id: str, options: PushOptions) -> None:
    """Find out, before hours of work, whether a push would be refused at its end.

    Raises:
        HubError: no token, or one that the Hub rejects or that may not write there, a namespace of somebody else, a
            branch or tag that git refuses, no connection, a repository that is public and should be private, or a
            server without the storage that the client uploads to.
    """
    options.check(repo_id)
    _require_token(repo_id)
    with hub_errors(repo_id, options.revision):
        check_permissions(HfApi(), repo_id, options)


def check_card(repo_id: str, card: str) -> None:
    """Find out whether the Hub would take a card, of which the front matter alone may be known yet.

    Raises:
        HubError: with what it objects to.
    """
    with hub_errors(repo_id):
        validate_card(card, CARD, Backoff())


def reaches_hub() -> bool:
    """Whether there is a token, and the Hub may be asked."""
    return huggingface_hub.get_token() is not None and not huggingface_hub.constants.HF_HUB_OFFLINE


def _require_token(repo_id: str) -> None:
    if huggingface_hub.get_token() is None:
        raise HubError(
            f"{repo_id}: publishing needs a token with write permission; log in (hf auth login), or set HF_TOKEN"
        )


class _Push:
    """One push: its methods are the steps."""

    def __init__(self, plan: PushPlan, options: PushOptions, progress: Progress) -> None:
        self._plan = plan
        self._options = options
        self._progress = progress
        self._backoff = options.backoff
        self._api = HfApi()
        self._repo_id = plan.repo_id

    def run(self) -> str:
        plan, options = self._plan, self._options
        exists = check_permissions(self._api, self._repo_id, options)
        if plan.card is not None:  # before gigabytes are sent, not after
            for warning in validate_card(plan.card, f"{plan.folder}{CARD}", self._backoff):
                self._progress.log(f"{self._repo_id}: {plan.folder}{CARD}: {warning}")
        if not exists:
            create = partial(self._api.create_repo, self._repo_id, private=options.private, exist_ok=True)
            retrying(create, self._backoff)
        if options.gated is not None:
            self._gate(options.gated)
        contents = hash_files(plan)
        base = self._survey(contents)
        committer = Committer(
            self._api,
            plan,
            options.create_pr,
            options.message or _message(plan),
            self._head,
            self._backoff,
            self._progress,
        )
        for left in range(_REBASES, -1, -1):
            if not base.branch_exists:
                self._create_branch(base.parent)
            commit = committer.opened_before(base) if options.create_pr else None
            try:
                commit = commit or committer.publish(base)
                break
            except MovedError as moved:
                base = self._rebased(base, contents, moved, left)
        assert commit is not None
        self._verify(base.contents, base.removed, commit)
        if options.tag is not None:
            self._tag(options.tag, commit.sha)
        if options.collection is not None:
            url = add_to_collection(
                self._api, self._repo_id, options.collection, private=bool(options.private), backoff=self._backoff
            )
            self._progress.log(f"{self._repo_id}: listed in {url}")
        return commit.url

    def _gate(self, gated: Literal["auto", "manual"]) -> None:
        """Before anything lies in it."""
        if not retrying(lambda: self._api.model_info(self._repo_id), self._backoff).gated:
            retrying(lambda: self._api.update_repo_settings(self._repo_id, gated=gated), self._backoff)

    def _survey(self, files: Mapping[str, Content]) -> Base:
        """Look at what is there, and settle what to send and remove; refuses to harm what is not ours."""
        plan, options = self._plan, self._options
        parent, branch_exists = self._parent()
        listing = self._listing(parent)
        found = survey(listing, plan, files)
        if not options.replace:
            require_clear(plan, found, shared=branch_exists and not options.create_pr)
        removed = found.stale + (found.foreign if options.replace else ())
        self._say("removed" if options.replace else "kept", found.foreign)
        contents = dict(files)
        self._check_tag(contents, removed)
        if plan.folder and (card := variants_card(listing, plan, files, replace=options.replace)) is not None:
            contents[CARD] = Content.of(card)
        return Base(parent, branch_exists, listing, contents, removed)

    def _rebased(self, base: Base, files: Mapping[str, Content], moved: MovedError, left: int) -> Base:
        """The same push on top of the commit that came in, if that touched nothing of this artifact's."""
        now = self._listing(moved.head)
        changed = {name for name in {*now, *base.listing} if _differs(now.get(name), base.listing.get(name))}
        own = {*files, *base.removed}
        folder = self._plan.folder
        if not left or own & changed or (folder and any(name.startswith(folder) for name in changed)):
            raise moved
        self._progress.log(f"{self._repo_id}: another commit came in, {moved.head[:12]}; building on it")
        return self._survey(files)

    def _parent(self) -> tuple[str, bool]:
        """The commit to build on, and whether the branch exists; a new one will start at main's."""

        def head(revision: str) -> str:
            info = retrying(lambda: self._api.model_info(self._repo_id, revision=revision), self._backoff)
            require_visibility(self._repo_id, self._options.private, bool(info.private))
            return str(info.sha)

        try:
            return head(self._plan.revision), True
        except RevisionNotFoundError:
            return head("main"), False

    def _head(self) -> str:
        return self._parent()[0]

    def _create_branch(self, start: str) -> None:
        branch = self._plan.revision
        retrying(
            lambda: self._api.create_branch(self._repo_id, branch=branch, revision=start, exist_ok=True),
            self._backoff,
        )

    def _say(self, what: str, names: tuple[str, ...]) -> None:
        """List the files that are not the artifact's."""
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            hint = "; --replace removes what is not the artifact's" if what == "kept" else ""
            self._progress.log(f"{self._repo_id}: {what} {', '.join(names[:_NAMED])}{more}{hint}")

    def _listing(self, commit: str) -> dict[str, RemoteFile]:
        return list_repository(self._api, self._repo_id, commit, self._backoff)

    def _mismatch(self, contents: dict[str, Content], removed: tuple[str, ...], commit: str) -> str | None:
        return mismatch(self._listing(commit), contents, removed)

    def _verify(self, contents: dict[str, Content], removed: tuple[str, ...], commit: Commit) -> None:
        """Compare what the Hub lists with what lies on this disk, and what it serves if asked for."""
        listing = self._listing(commit.reference)
        wrong = mismatch(listing, contents, removed)
        if wrong is not None:
            raise HubError(
                f"{self._repo_id}: in commit {commit.sha}, {wrong}; did it change while it was sent? Push again"
            )
        if self._options.verify_download:
            files = {name: replace(listing[name], commit=commit.sha) for name in contents}
            compare_bytes(files, contents, backoff=self._backoff, progress=self._progress)

    def _tags(self) -> dict[str, str]:
        refs = retrying(lambda: self._api.list_repo_refs(self._repo_id), self._backoff)
        return {ref.name: ref.target_commit for ref in refs.tags}

    def _check_tag(self, contents: dict[str, Content], removed: tuple[str, ...]) -> None:
        """Refuse a tag that names something else, before anything is sent."""
        tag = self._options.tag
        existing = self._tags().get(tag) if tag is not None else None
        if existing is not None and self._mismatch(contents, removed, existing) is not None:
            raise HubError(f"{self._repo_id}: tag {tag!r} exists already, at {existing}; choose another")

    def _tag(self, tag: str, commit: str) -> None:
        if tag not in self._tags():
            retrying(
                lambda: self._api.create_tag(self._repo_id, tag=tag, revision=commit, exist_ok=True), self._backoff
            )


def _message(plan: PushPlan) -> str:
    """A title, and what a reviewer would want to know first."""
    return (
        f"Upload model\n\n{len(plan.files)} files, {plan.nbytes:,} bytes, pushed by llmconvert {__version__}. The card "
        "says what they are, and `llmconvert/report.json` what was measured of them."
    )


def _differs(now: RemoteFile | None, before: RemoteFile | None) -> bool:
    return now is None or before is None or now.digest != before.digest
