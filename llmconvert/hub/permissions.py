"""Permissions of a push, checked before the work: token, namespace, branches and tags, visibility, storage."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.file_download import is_xet_available  # type: ignore[attr-defined]
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from llmconvert.errors import HubError
from llmconvert.hub.retry import Backoff, retrying

__all__ = ["check_permissions", "require_ref", "require_visibility", "require_xet"]

# What git refuses in the name of a branch or a tag (git-check-ref-format): control characters, space, and these.
_REF_FORBIDDEN = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//")


def require_ref(repo_id: str, what: str, name: str) -> None:
    """Refuse what git would not take as the name of a branch or tag.

    Args:
        what: ``"branch"`` or ``"tag"``.

    Raises:
        HubError: with what is wrong.
    """
    found = _REF_FORBIDDEN.search(name)
    parts = name.split("/")
    if found is not None:
        reason = f"{found[0]!r} can't be in it"
    elif not name or name.startswith("/") or name.endswith(("/", ".")) or name == "@":
        reason = "it can't be empty, '@', begin with '/', or end with '/' or '.'"
    elif any(part.startswith(".") or part.endswith(".lock") for part in parts):
        reason = "no part of it can begin with '.' or end with '.lock'"
    elif name.startswith("-"):
        reason = "it can't begin with '-'"
    else:
        return
    raise HubError(f"{repo_id}: {what} {name!r} is no name that git takes: {reason}; choose another")


def check_permissions(api: HfApi, repo_id: str, *, private: bool | None, create_pr: bool, backoff: Backoff) -> None:
    """Refuse what the account or its token may not do, and a public repository that should be private.

    Raises:
        HubError: naming what is missing.
    """
    account = retrying(api.whoami, backoff)
    token = account.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        tokens = f"{huggingface_hub.constants.ENDPOINT}/settings/tokens"
        raise HubError(f"{repo_id}: the token may only read; set HF_TOKEN to one that may write, from {tokens}")
    try:
        info = retrying(lambda: api.model_info(repo_id), backoff)
    except RepositoryNotFoundError:
        _require_namespace(repo_id, account)
        _require_scope(repo_id, token, exists=False)
        return
    if not create_pr:  # anybody may propose a change
        _require_namespace(repo_id, account)
        _require_scope(repo_id, token, exists=True)
    require_visibility(repo_id, private, bool(info.private))
    require_xet(repo_id, backoff)


def _require_namespace(repo_id: str, account: Mapping[str, Any]) -> None:
    """The account's own name, or that of an organization it may write in."""
    namespace, name = repo_id.split("/")[0], str(account.get("name"))
    organizations = {str(entry.get("name")): entry for entry in account.get("orgs") or ()}
    if namespace == name:
        return
    if namespace not in organizations:
        known = ", ".join([name, *sorted(organizations)])
        raise HubError(f"{repo_id}: the token's account can't publish as {namespace!r}; it can as {known}")
    if organizations[namespace].get("roleInOrg") == "read":
        raise HubError(f"{repo_id}: {name} may only read in {namespace}; ask its administrators for the role 'write'")


def _require_scope(repo_id: str, token: Mapping[str, Any], *, exists: bool) -> None:
    """A fine-grained token says for which namespaces and repositories it may write."""
    if token.get("role") != "fineGrained":
        return
    scoped = (token.get("fineGrained") or {}).get("scoped") or ()
    writable = {
        str((entry.get("entity") or {}).get("name"))
        for entry in scoped
        if "repo.write" in (entry.get("permissions") or ())
    }
    namespace = repo_id.split("/")[0]
    if namespace in writable or (exists and repo_id in writable):
        return
    where = f"it may write in {', '.join(sorted(writable))}" if writable else "it may write nowhere"
    tokens = f"{huggingface_hub.constants.ENDPOINT}/settings/tokens"
    raise HubError(
        f"{repo_id}: the fine-grained token {token.get('displayName', '')!r} lacks write access to {namespace}'s "
        f"repositories ({where}); grant it at {tokens}, or set HF_TOKEN to another"
    )


def require_visibility(repo_id: str, wanted: bool | None, found: bool) -> None:
    """Refuse to publish into a public repository what should be private.

    Raises:
        HubError: saying what to change.
    """
    if wanted and not found:
        raise HubError(f"{repo_id}: is public, and this was to be private; make it private on the Hub first")


def require_xet(repo_id: str, backoff: Backoff) -> None:
    """Refuse a server without Xet while the client would upload by Xet alone: it knows no way back to LFS.

    Raises:
        HubError: saying how to upload by LFS.
    """
    if huggingface_hub.constants.HF_HUB_DISABLE_XET or not is_xet_available():
        return

    def request() -> None:
        url = f"{huggingface_hub.constants.ENDPOINT}/api/models/{repo_id}/xet-write-token/main"
        hf_raise_for_status(huggingface_hub.get_session().get(url, headers=build_hf_headers()))

    try:
        retrying(request, backoff)
    except HfHubHTTPError as error:
        # What else is wrong the upload itself will tell; a pull request, for example, has a token of another kind.
        if error.response.status_code == 404:
            raise HubError(
                f"{repo_id}: {huggingface_hub.constants.ENDPOINT} has no Xet storage, by which the installed client "
                "uploads; set HF_HUB_DISABLE_XET=1 to upload by LFS"
            ) from None
