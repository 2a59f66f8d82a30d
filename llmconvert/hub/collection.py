"""Collections on the Hub: a page that lists a set of repositories, here the variants of a model."""

from __future__ import annotations

import re

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from llmconvert.errors import HubError
from llmconvert.hub.retry import Backoff, retrying

__all__ = ["add_to_collection", "check_collection", "require_title"]

# What the address of a collection ends with: its owner, its title in lower case, and an id.
_SLUG = re.compile(r"[\w.-]+/[\w-]+-[0-9a-f]{24}")
_LONGEST_TITLE = 60


def require_title(repo_id: str, name: str) -> None:
    """Refuse what is neither the address of a collection nor a title that the Hub would take.

    Raises:
        HubError: with what was expected.
    """
    if _SLUG.fullmatch(name) is None and not (name.strip() and len(name) <= _LONGEST_TITLE and name.isprintable()):
        raise HubError(
            f"{repo_id}: {name!r} can't be a collection's title; expected 1 to {_LONGEST_TITLE} characters in a line, "
            "or the address of one that exists, user/title-0123456789abcdef01234567"
        )


def check_collection(api: HfApi, repo_id: str, name: str, backoff: Backoff) -> None:
    """Refuse the address of a collection that isn't there; what is named by its title is made if need be.

    Raises:
        HubError: saying which.
    """
    if _SLUG.fullmatch(name) is None:
        return
    try:
        retrying(lambda: api.get_collection(name), backoff)
    except HfHubHTTPError as error:
        if error.response.status_code != 404:
            raise
        raise HubError(f"{repo_id}: there is no collection {name}; name its title to have it made") from None


def add_to_collection(api: HfApi, repo_id: str, name: str, *, private: bool, backoff: Backoff) -> str:
    """List a repository in a collection, once, however often it is called.

    Args:
        name: the collection's address, or its title; one of the repository's owner with that title is made if need be.
        private: what a new collection becomes.
    """

    def collection() -> str:
        if _SLUG.fullmatch(name) is not None:
            return name
        made = api.create_collection(name, namespace=repo_id.split("/")[0], private=private, exists_ok=True)
        return str(made.slug)

    slug = retrying(collection, backoff)
    found = retrying(lambda: api.add_collection_item(slug, repo_id, "model", exists_ok=True), backoff)
    return str(found.url)
