"""Making the one commit of a push: contents are uploaded first, and a lost answer is looked up before asking again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from llmconvert.errors import HubError
from llmconvert.hub.plan import PushPlan
from llmconvert.hub.repository import Content, Listing, list_repository, mismatch
from llmconvert.hub.retry import TRANSPORT_ERROR, Backoff, is_expired_link, retrying
from llmconvert.progress import Bytes, Progress

__all__ = ["Base", "Commit", "Committer", "MovedError"]

# Files from this size on are uploaded one by one, so that progress shows; the smaller ones go together.
_LARGE_BYTES = 10_000_000


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit that was made: its hash, what names it for readers, and its page."""

    sha: str
    reference: str
    url: str


@dataclass(frozen=True, slots=True)
class Base:
    """What a push builds on: the branch's commit with its files, and what is to be sent and removed there."""

    parent: str
    branch_exists: bool
    listing: Listing
    contents: dict[str, Content]
    removed: tuple[str, ...]

    @property
    def changed(self) -> dict[str, Content]:
        """What is not there already."""
        return {
            name: content
            for name, content in self.contents.items()
            if name not in self.listing or not content.equals(self.listing[name])
        }


class MovedError(HubError):
    """The branch got another commit meanwhile; ``head`` is that."""

    def __init__(self, repo_id: str, head: str) -> None:
        super().__init__(
            f"{repo_id}: the branch has moved meanwhile, to {head[:12]}, and was not overwritten; "
            "look at what came in, then run the same command again"
        )
        self.head = head


class Committer:
    """Uploads and commits.

    Args:
        api: the client.
        plan: what is published, and where.
        create_pr: open a pull request instead of committing to the branch.
        message: the commit's title, and after its first line a description.
        head: gives the branch's commit as it is now.
        backoff: how to repeat failed requests.
        progress: where to report, in bytes.
    """

    def __init__(
        self,
        api: HfApi,
        plan: PushPlan,
        create_pr: bool,
        message: str,
        head: Callable[[], str],
        backoff: Backoff,
        progress: Progress,
    ) -> None:
        self._api = api
        self._plan = plan
        self._create_pr = create_pr
        self._message = message
        self._head = head
        self._backoff = backoff
        self._progress = progress
        self._repo_id = plan.repo_id

    def publish(self, base: Base) -> Commit:
        """Upload what differs from the base and commit it; where nothing does, the base is the commit.

        Raises:
            MovedError: the branch got another commit meanwhile.
            HubError: the repository's ``.gitignore`` leaves a file out.
        """
        additions = [_addition(name, content) for name, content in base.changed.items()]
        if not additions and not base.removed:
            self._progress.log(f"{self._repo_id}: holds all of it already; nothing was sent")
            return self._of(base.parent)
        size = sum(content.size for content in base.changed.values())
        with self._progress.task(f"uploading to {self._repo_id}", Bytes(size)) as task:
            for batch in _batches(additions):
                self._upload(batch)
                task.advance(sum(addition.upload_info.size for addition in batch))
        ignored = [addition.path_in_repo for addition in additions if addition._should_ignore]
        if ignored:
            raise HubError(
                f"{self._repo_id}: a .gitignore there leaves out {ignored[0]}, which the artifact needs; mend it there"
            )
        return self._commit(additions, base.contents, base.removed, base.parent)

    def _of(self, commit: str) -> Commit:
        return Commit(commit, commit, f"{huggingface_hub.constants.ENDPOINT}/{self._repo_id}/commit/{commit}")

    def _upload(self, batch: list[CommitOperationAdd]) -> None:
        """Send contents that the Hub lacks; a link to its storage that expired meanwhile is asked for anew."""
        attempt = 0
        while True:
            attempt += 1
            try:
                self._api.preupload_lfs_files(
                    self._repo_id,
                    batch,
                    revision=self._plan.revision,
                    create_pr=self._create_pr,
                    free_memory=False,
                )
                return
            except (RuntimeError, TRANSPORT_ERROR) as caught:
                error = caught.__cause__ if isinstance(caught, RuntimeError) else caught
                if attempt >= self._backoff.tries or not (isinstance(error, Exception) and is_expired_link(error)):
                    raise

    def _commit(
        self,
        additions: list[CommitOperationAdd],
        contents: dict[str, Content],
        removed: tuple[str, ...],
        parent: str,
    ) -> Commit:
        """Make the commit, once: when an answer is lost, look whether it was made before asking again."""
        before = self._pull_requests() if self._create_pr else {}
        title, _, description = self._message.strip().partition("\n")
        deletions = [CommitOperationDelete(name, is_folder=False) for name in removed]
        attempt = 0
        while True:
            attempt += 1
            try:
                made = self._api.create_commit(
                    self._repo_id,
                    [*additions, *deletions],
                    commit_message=title,
                    commit_description=description.strip(),
                    revision=self._plan.revision,
                    create_pr=self._create_pr,
                    parent_commit=parent,
                )
            except TRANSPORT_ERROR as error:
                status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
                seconds = self._backoff.seconds(attempt, error)
                if status == 409 and attempt < self._backoff.tries:  # another commit is being made just now
                    seconds = self._backoff.first_seconds
                if seconds is None and status not in (409, 412):
                    raise
                time.sleep(seconds or 0)
                landed = self._landed(contents, removed, parent, before)
                if landed is not None:
                    return landed
                if seconds is None or status == 412:
                    raise
            else:
                return Commit(made.oid, made.pr_revision or made.oid, str(made.pr_url or made.commit_url))

    def _landed(
        self, contents: dict[str, Content], removed: tuple[str, ...], parent: str, before: dict[str, str]
    ) -> Commit | None:
        """The commit whose answer was lost, if it was made.

        Raises:
            MovedError: the branch holds another commit than the one it had and the one it should have.
        """
        if self._create_pr:
            new = {reference: sha for reference, sha in self._pull_requests().items() if reference not in before}
            return self._with_contents(new, contents, removed)
        head = self._head()
        if head == parent:
            return None
        if self._mismatch(contents, removed, head) is None:
            return self._of(head)
        raise MovedError(self._repo_id, head)

    def opened_before(self, base: Base) -> Commit | None:
        """The open pull request that holds just this, if a push that was killed had got so far."""

        def request() -> list[str]:
            found = self._api.get_repo_discussions(
                self._repo_id, discussion_type="pull_request", discussion_status="open"
            )
            return [f"refs/pr/{discussion.num}" for discussion in found]

        still_open = retrying(request, self._backoff)
        heads = {reference: sha for reference, sha in self._pull_requests().items() if reference in still_open}
        return self._with_contents(heads, base.contents, base.removed)

    def _with_contents(
        self, heads: dict[str, str], contents: dict[str, Content], removed: tuple[str, ...]
    ) -> Commit | None:
        """The first of these pull requests (reference → commit) that is as this push is to be."""
        for reference, sha in heads.items():
            if self._mismatch(contents, removed, sha) is None:
                number = reference.rsplit("/", 1)[1]
                page = f"{huggingface_hub.constants.ENDPOINT}/{self._repo_id}/discussions/{number}"
                return Commit(sha, reference, page)
        return None

    def _pull_requests(self) -> dict[str, str]:
        """Reference → commit of every pull request."""
        refs = retrying(
            lambda: self._api.list_repo_refs(self._repo_id, include_pull_requests=True), self._backoff
        ).pull_requests
        return {ref.ref: ref.target_commit for ref in refs or ()}

    def _mismatch(self, contents: dict[str, Content], removed: tuple[str, ...], commit: str) -> str | None:
        return mismatch(list_repository(self._api, self._repo_id, commit, self._backoff), contents, removed)


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
