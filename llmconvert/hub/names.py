"""Names on the Hub: of repositories, their folders, branches and tags; refused here before anybody is asked."""

from __future__ import annotations

import re

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported without __all__

from llmconvert.errors import HubError

__all__ = ["require_folder", "require_ref", "require_repository"]

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FOLDER = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What git refuses in the name of a branch or a tag (git-check-ref-format): control characters, space, and these.
_REF_FORBIDDEN = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//")


def require_repository(repo_id: str) -> None:
    """Refuse what can't be a repository ``user/name``.

    Raises:
        HubError: with what is wrong.
    """
    if _REPO_ID.fullmatch(repo_id) is None:
        raise HubError(f"{repo_id!r}: is no repository; expected user/name, of letters, digits, '-', '_' and '.'")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r}: is no repository: {str(error).splitlines()[0]}") from None


def require_folder(folder: str) -> None:
    """Refuse what can't be a folder of a repository.

    Raises:
        HubError: with what was expected.
    """
    if _FOLDER.fullmatch(folder) is None:
        raise HubError(f"{folder!r}: is no folder of a repository; expected a name of letters, digits, '-', '_', '.'")


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
    elif _COMMIT.fullmatch(name):
        reason = "it would be taken for a commit"
    else:
        return
    raise HubError(f"{repo_id}: {what} {name!r} is no name that git takes: {reason}; choose another")
