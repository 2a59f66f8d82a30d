"""A request to the loopback Hub: whose it is, what that may see and write, and the answer."""

from __future__ import annotations

import json

from support.hub_server_state import EXPIRED_TOKEN, READ_TOKEN, WRITE_TOKEN, Blob, HubState, RefusalError, Repo
from support.hub_server_xet import XetStore


class Access:
    """A request and its answer. What HTTP there is about it lies in the subclass that takes it."""

    state: HubState
    xet: XetStore
    body: bytes
    query: dict[str, str]
    authorization: str | None
    byte_range: str
    #: Content, status and headers of the answer, sent when the operation is over.
    response: tuple[bytes, int, dict[str, str]]

    def answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.response = content, status, headers or {}

    def answer_json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.answer(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _role(self) -> str | None:
        if self.authorization is None:
            return None
        if self.authorization == f"Bearer {EXPIRED_TOKEN}":
            raise RefusalError(401, 'User Access Token "laptop" is expired')
        roles = {f"Bearer {WRITE_TOKEN}": "write", f"Bearer {READ_TOKEN}": "read"}
        if self.authorization not in roles:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return roles[self.authorization]

    def _require_writable(self, repo_id: str) -> None:
        """The account's own namespace or its organization's, and a token whose scope reaches there."""
        namespace, account = repo_id.split("/")[0], self.state.account
        own = {"me", *(org["name"] for org in account.get("orgs", []) if org.get("roleInOrg") != "read")}
        if namespace not in own:
            raise RefusalError(403, f"Forbidden: you don't have the rights to write under {namespace}")
        token = account.get("token", {})
        if token.get("role") == "fineGrained":
            scopes = token["fineGrained"]["scoped"]
            writable = {scope["entity"]["name"] for scope in scopes if "repo.write" in scope["permissions"]}
            if not writable & {namespace, repo_id}:
                raise RefusalError(403, "Forbidden: the token's scope does not reach this repository")

    def _repo(self, repo_id: str, *, write: bool = False, content: bool = False, proposal: bool = False) -> Repo:
        role = self._role()
        repo = self.state.repos.get(repo_id)
        if repo is None or (repo.private and role is None):
            raise RefusalError(401 if role is None else 404, "Repository not found", "RepoNotFound")
        if content and repo.gated and role != "write":  # the terms were accepted by the account of that token
            raise RefusalError(403 if role else 401, "Access to model is restricted", "GatedRepo")
        if write and role != "write":
            raise RefusalError(403 if role else 401, "Forbidden: this token cannot write")
        if write and not proposal and self.query.get("create_pr") != "1":  # anybody may propose a change
            self._require_writable(repo_id)
        return repo

    def _tree(self, repo_id: str, revision: str, **access: bool) -> tuple[Repo, str, dict[str, Blob]]:
        repo = self._repo(repo_id, **access)
        sha = repo.resolve(revision)
        if sha is None:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, sha, repo.commits[sha]
