"""Permissions of a push, checked before the work: token, namespace, branches and tags, visibility, storage."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.file_download import is_xet_available  # type: ignore[attr-defined]  # no __all__, no re-export
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]  # no __all__

from llmconvert.errors import HubError
from llmconvert.hub.collection import check_collection
from llmconvert.hub.plan import PushOptions
from llmconvert.hub.retry import retrying

__all__ = ["check_permissions", "require_visibility"]


def check_permissions(api: HfApi, repo_id: str, options: PushOptions) -> bool:
    """Refuse what the account or its token may not do, a public repository that should be private, branches and tags
    that can't be made there, and a server without the storage that the client uploads to.

    Returns:
        Whether the repository exists.

    Raises:
        HubError: naming what is missing.
    """
    if options.collection is not None:
        check_collection(api, repo_id, options.collection, options.backoff)
    account = retrying(api.whoami, options.backoff)
    token = account.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        tokens = f"{huggingface_hub.constants.ENDPOINT}/settings/tokens"
        raise HubError(f"{repo_id}: the token may only read; set HF_TOKEN to one that may write, from {tokens}")
    try:
        info = retrying(lambda: api.model_info(repo_id), options.backoff)
    except RepositoryNotFoundError:
        _require_namespace(repo_id, account)
        _require_scope(repo_id, token, options, exists=False)
        _require_refs(repo_id, options, ["main"], [])
        _require_xet(repo_id, options)
        return False
    if info.id != repo_id:
        raise HubError(f"{repo_id}: is called {info.id} now; publish there, so that cards and lists name what there is")
    if not options.create_pr:  # anybody may propose a change
        _require_namespace(repo_id, account)
        _require_scope(repo_id, token, options, exists=True)
    require_visibility(repo_id, options.private, bool(info.private))
    if options.gated is not None and not info.gated and not is_new(info):
        raise HubError(f"{repo_id}: is open to all, and this was to be gated; gate it in its settings on the Hub first")
    if options.tag is not None or (options.revision or "main") != "main":
        refs = retrying(lambda: api.list_repo_refs(repo_id), options.backoff)
        _require_refs(repo_id, options, [ref.name for ref in refs.branches], [ref.name for ref in refs.tags])
    _require_xet(repo_id, options)
    return True


def _require_refs(repo_id: str, options: PushOptions, branches: Collection[str], tags: Collection[str]) -> None:
    """What git can't have beside the branches and tags that there are."""
    revision = options.revision or "main"
    if revision in tags and revision not in branches:
        raise HubError(f"{repo_id}: {revision!r} is a tag there, which no commit goes to; name a branch")
    for what, name, present in (("branch", revision, branches), ("tag", options.tag, tags)):
        # git keeps a name as a file, and what comes before a slash as a folder.
        for other in present if name is not None and name not in present else ():
            if other.startswith(f"{name}/") or f"{name}/".startswith(f"{other}/"):
                raise HubError(f"{repo_id}: git can't have {what} {name!r} beside {other!r}; choose another")


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


def _require_scope(repo_id: str, token: Mapping[str, Any], options: PushOptions, *, exists: bool) -> None:
    """A fine-grained token says for which namespaces and repositories it may write."""
    if token.get("role") != "fineGrained":
        return
    scoped = (token.get("fineGrained") or {}).get("scoped") or ()

    def allowed(permission: str) -> set[str]:
        entries = (entry for entry in scoped if permission in (entry.get("permissions") or ()))
        return {str((entry.get("entity") or {}).get("name")) for entry in entries}

    namespace, writable = repo_id.split("/")[0], allowed("repo.write")
    tokens = f"{huggingface_hub.constants.ENDPOINT}/settings/tokens"
    name = f"the fine-grained token {token.get('displayName', '')!r}"
    if namespace not in writable and not (exists and repo_id in writable):
        where = f"it may write in {', '.join(sorted(writable))}" if writable else "it may write nowhere"
        raise HubError(
            f"{repo_id}: {name} lacks write access to {namespace}'s repositories ({where}); grant it at {tokens}, or "
            "set HF_TOKEN to another"
        )
    if options.collection is not None and namespace not in allowed("collection.write"):
        raise HubError(
            f"{repo_id}: {name} lacks write access to {namespace}'s collections; grant it at {tokens}, or leave out "
            "the collection"
        )


def is_new(info: ModelInfo) -> bool:
    """Whether nobody has put anything into a repository yet: one that a push had made, and got no further."""
    return all(file.rfilename == ".gitattributes" for file in info.siblings or ())


def require_visibility(repo_id: str, wanted: bool | None, found: bool) -> None:
    """Refuse to publish into a public repository what should be private.

    Raises:
        HubError: saying what to change.
    """
    if wanted and not found:
        raise HubError(f"{repo_id}: is public, and this was to be private; make it private on the Hub first")


def _require_xet(repo_id: str, options: PushOptions) -> None:
    """Refuse a server without Xet while the client would upload by Xet alone: it knows no way back to LFS."""
    if huggingface_hub.constants.HF_HUB_DISABLE_XET or not is_xet_available():
        return

    def request() -> None:
        url = f"{huggingface_hub.constants.ENDPOINT}/api/models/{repo_id}/xet-write-token/main"
        hf_raise_for_status(huggingface_hub.get_session().get(url, headers=build_hf_headers()))

    try:
        retrying(request, options.backoff)
    except RepositoryNotFoundError:  # not made yet; who has no Xet doesn't get as far as to miss it
        return
    except HfHubHTTPError as error:
        # What else is wrong the upload itself will tell; a pull request, for example, has a token of another kind.
        if error.response.status_code == 404:
            raise HubError(
                f"{repo_id}: {huggingface_hub.constants.ENDPOINT} has no Xet storage, by which the installed client "
                "uploads; set HF_HUB_DISABLE_XET=1 to upload by LFS"
            ) from None
