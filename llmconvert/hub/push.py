"""Publishing a directory to the Hugging Face Hub as one commit, checked against the Hub's own listing.

Contents are uploaded first, where nobody sees them; a single commit then makes the whole artifact visible, whether
they went by LFS or by Xet. A reader finds the old state or the new one, never half of either. Repeating a push sends
only what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from llmconvert.errors import HubError
from llmconvert.hub.errors import hub_errors
from llmconvert.hub.plan import PushPlan, plan_push
from llmconvert.hub.repository import (
    Content,
    hash_files,
    list_repository,
    mismatch,
    require_clear,
    survey,
)
from llmconvert.hub.retry import TRANSPORT_ERROR, Backoff, retrying
from llmconvert.hub.transfer import RemoteFile
from llmconvert.hub.variants import ROOT_CARD, variants_card
from llmconvert.hub.verification import compare_bytes
from llmconvert.progress import SILENT, Progress

__all__ = ["PushOptions", "check_push", "push_folder"]

# Files from this size on are uploaded one by one, so that progress shows; the smaller ones go together.
_LARGE_BYTES = 10_000_000
# Of a list of files, how many are named.
_NAMED = 5


@dataclass(frozen=True, slots=True)
class PushOptions:
    """How to publish.

    Attributes:
        private: visibility of a new repository; True also refuses to publish into one that is public.
        revision: branch to commit to, made if need be; the main branch if None.
        folder: of the repository, for one of several variants; its root if None.
        create_pr: open a pull request instead of committing to the branch.
        tag: name to give the new commit.
        message: the commit's title.
        replace: remove the files that are there and don't belong to the artifact, in the same commit.
        verify_download: fetch what was published again and compare it byte for byte.
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
    backoff: Backoff = Backoff()  # noqa: RUF009 (frozen)

    def check(self, repo_id: str) -> None:
        """Refuse what contradicts itself.

        Raises:
            HubError: saying what to leave out.
        """
        if self.create_pr and (self.revision or "main") != "main":
            raise HubError(f"{repo_id}: a pull request goes to main, not to {self.revision!r}; leave one of them out")
        if self.create_pr and self.tag is not None:
            raise HubError(f"{repo_id}: a pull request can't be tagged; tag the commit when it is merged")
        if huggingface_hub.get_token() is None:
            raise HubError(f"{repo_id}: publishing needs a token; set HF_TOKEN to one with write permission")


@dataclass(frozen=True, slots=True)
class _Commit:
    """A commit that was made: its hash, what names it for readers, and its page."""

    sha: str
    reference: str
    url: str


def push_folder(
    directory: Path, repo_id: str, options: PushOptions | None = None, *, progress: Progress = SILENT
) -> str:
    """Publish every file of ``directory`` in one commit; create the repository or branch if need be.

    Files that an earlier push of the artifact sent and this one doesn't are removed in the same commit. Files of
    other origin are listed and kept, unless ``replace`` says otherwise; weights among them that a loader would take
    instead of the artifact's are refused.

    Args:
        directory: the artifact.
        repo_id: ``user/name``.
        options: how to publish.
        progress: where to report, in bytes.

    Returns:
        The URL of the commit, or of the pull request.

    Raises:
        HubError: no token, refused, not reachable, the branch has moved meanwhile, or the Hub lists something else
            than was sent.
        SourceError: see :func:`~llmconvert.hub.plan_push`.
    """
    options = options or PushOptions()
    plan = plan_push(directory, repo_id, revision=options.revision, folder=options.folder)
    options.check(repo_id)
    with hub_errors(repo_id, options.revision), _quiet():
        return _Push(plan, options, progress).run()


def check_push(repo_id: str, options: PushOptions) -> None:
    """Find out, before hours of work, whether a push would be refused at its end.

    Raises:
        HubError: no token, or one that the Hub rejects or that may only read, no connection, or a repository that is
            public and should be private.
    """
    options.check(repo_id)
    api = HfApi()
    with hub_errors(repo_id, options.revision):
        account = retrying(api.whoami, options.backoff)
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            tokens = f"{huggingface_hub.constants.ENDPOINT}/settings/tokens"
            raise HubError(f"{repo_id}: the token may only read; set HF_TOKEN to one that may write, from {tokens}")
        try:
            info = retrying(lambda: api.model_info(repo_id), options.backoff)
        except RepositoryNotFoundError:
            return
        _check_visibility(repo_id, options.private, bool(info.private))


def _check_visibility(repo_id: str, wanted: bool | None, found: bool) -> None:
    if wanted and not found:
        raise HubError(f"{repo_id}: is public, and this was to be private; make it private on the Hub first")


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
        if plan.card is not None:
            # Before gigabytes are sent, not after.
            retrying(lambda: ModelCard(plan.card or "").validate(repo_type="model"), self._backoff)
        retrying(lambda: self._api.create_repo(self._repo_id, private=options.private, exist_ok=True), self._backoff)
        parent, branch_exists = self._parent()
        listing = list_repository(self._api, self._repo_id, parent, self._backoff)
        contents = hash_files(plan)
        found = survey(listing, plan, contents)
        removed = found.stale + (found.foreign if options.replace else ())
        if not options.replace:
            require_clear(plan, found)
        self._say("removed" if options.replace else "kept", found.foreign)
        self._check_tag(contents, removed)
        if plan.folder and (card := variants_card(listing, plan, contents)) is not None:
            contents[ROOT_CARD] = Content.of(card)
        if not branch_exists:
            self._create_branch(parent)
        commit = self._opened_before(contents, removed) if options.create_pr else None
        commit = commit or self._publish(contents, removed, parent)
        self._verify(contents, removed, commit)
        if options.tag is not None:
            self._tag(options.tag, commit.sha)
        return commit.url

    def _parent(self) -> tuple[str, bool]:
        """The commit to build on, and whether the branch exists; a new one will start at main's."""

        def head(revision: str) -> str:
            info = retrying(lambda: self._api.model_info(self._repo_id, revision=revision), self._backoff)
            _check_visibility(self._repo_id, self._options.private, bool(info.private))
            return str(info.sha)

        try:
            return head(self._plan.revision), True
        except RevisionNotFoundError:
            return head("main"), False

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

    def _publish(self, contents: dict[str, Content], removed: tuple[str, ...], parent: str) -> _Commit:
        additions = [_addition(name, content) for name, content in contents.items()]
        with self._progress.task(f"uploading to {self._repo_id}", sum(c.size for c in contents.values())) as task:
            for batch in _batches(additions):
                self._api.preupload_lfs_files(
                    self._repo_id,
                    batch,
                    revision=self._plan.revision,
                    create_pr=self._options.create_pr,
                    free_memory=False,
                )
                task.advance(sum(addition.upload_info.size for addition in batch))
        return self._commit(additions, contents, removed, parent)

    def _commit(
        self,
        additions: list[CommitOperationAdd],
        contents: dict[str, Content],
        removed: tuple[str, ...],
        parent: str,
    ) -> _Commit:
        """Make the commit, once: when an answer is lost, look whether it was made before asking again."""
        before = self._pull_requests() if self._options.create_pr else {}
        deletions = [CommitOperationDelete(name, is_folder=False) for name in removed]
        attempt = 0
        while True:
            attempt += 1
            try:
                made = self._api.create_commit(
                    self._repo_id,
                    [*additions, *deletions],
                    commit_message=self._options.message or "Upload model",
                    revision=self._plan.revision,
                    create_pr=self._options.create_pr,
                    parent_commit=parent,
                )
            except TRANSPORT_ERROR as error:
                moved = isinstance(error, HfHubHTTPError) and error.response.status_code == 412
                seconds = self._backoff.seconds(attempt, error)
                if seconds is None and not moved:
                    raise
                time.sleep(seconds or 0)
                landed = self._landed(contents, removed, parent, before)
                if landed is not None:
                    return landed
                if moved:
                    raise
            else:
                return _Commit(made.oid, made.pr_revision or made.oid, str(made.pr_url or made.commit_url))

    def _landed(
        self, contents: dict[str, Content], removed: tuple[str, ...], parent: str, before: dict[str, str]
    ) -> _Commit | None:
        """The commit whose answer was lost, if it was made.

        Raises:
            HubError: the branch holds another commit than the one it had and the one it should have.
        """
        if self._options.create_pr:
            new = {reference: sha for reference, sha in self._pull_requests().items() if reference not in before}
            return self._with_contents(new, contents, removed)
        head, _ = self._parent()
        if head == parent:
            return None
        if self._mismatch(contents, removed, head) is None:
            return _Commit(head, head, f"{huggingface_hub.constants.ENDPOINT}/{self._repo_id}/commit/{head}")
        raise HubError(
            f"{self._repo_id}: the branch has moved meanwhile, to {head[:12]}, and was not overwritten; "
            "look at what came in, then run the same command again"
        )

    def _opened_before(self, contents: dict[str, Content], removed: tuple[str, ...]) -> _Commit | None:
        """The open pull request that holds just this, if a push that was killed had got so far."""

        def request() -> list[str]:
            found = self._api.get_repo_discussions(
                self._repo_id, discussion_type="pull_request", discussion_status="open"
            )
            return [f"refs/pr/{discussion.num}" for discussion in found]

        still_open = retrying(request, self._backoff)
        heads = {reference: sha for reference, sha in self._pull_requests().items() if reference in still_open}
        return self._with_contents(heads, contents, removed)

    def _with_contents(
        self, heads: dict[str, str], contents: dict[str, Content], removed: tuple[str, ...]
    ) -> _Commit | None:
        """The first of these pull requests (reference → commit) that is as this push is to be."""
        for reference, sha in heads.items():
            if self._mismatch(contents, removed, sha) is None:
                number = reference.rsplit("/", 1)[1]
                page = f"{huggingface_hub.constants.ENDPOINT}/{self._repo_id}/discussions/{number}"
                return _Commit(sha, reference, page)
        return None

    def _pull_requests(self) -> dict[str, str]:
        """Reference → commit of every pull request."""
        refs = retrying(
            lambda: self._api.list_repo_refs(self._repo_id, include_pull_requests=True), self._backoff
        ).pull_requests
        return {ref.ref: ref.target_commit for ref in refs or ()}

    def _listing(self, commit: str) -> dict[str, RemoteFile]:
        return list_repository(self._api, self._repo_id, commit, self._backoff)

    def _mismatch(self, contents: dict[str, Content], removed: tuple[str, ...], commit: str) -> str | None:
        return mismatch(self._listing(commit), contents, removed)

    def _verify(self, contents: dict[str, Content], removed: tuple[str, ...], commit: _Commit) -> None:
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


def _addition(name: str, content: Content) -> CommitOperationAdd:
    addition = CommitOperationAdd(name, content.source)
    addition.upload_info.sha256 = bytes.fromhex(content.sha256)  # known already; spares the client another pass
    return addition


def _batches(additions: list[CommitOperationAdd]) -> Iterator[list[CommitOperationAdd]]:
    small = [addition for addition in additions if addition.upload_info.size < _LARGE_BYTES]
    if small:
        yield small
    for addition in additions:
        if addition.upload_info.size >= _LARGE_BYTES:
            yield [addition]


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
