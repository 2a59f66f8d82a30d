"""Model cards as the Hub reads them: YAML front matter, then text.

Cards that are written here carry a mark with the hash of what they say, so that one which nobody has touched since can
be told from one that somebody has.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, Literal

import huggingface_hub
import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]  # no __all__

from llmconvert.errors import HubError
from llmconvert.hub.retry import Backoff, retrying

__all__ = ["CARD", "front_matter", "mark_card", "parts_of_card", "require_other_base", "state_of_card", "validate_card"]

#: Where the Hub looks for a repository's card.
CARD = "README.md"
_MARK = r"<!-- llmconvert: {}(?:, sha256 ([0-9a-f]{{64}}))? -->\n"


def front_matter(text: str, origin: str) -> dict[str, Any]:
    """The metadata that a card begins with, as ``huggingface_hub`` finds it; empty without any.

    Args:
        origin: names the card in errors.

    Raises:
        HubError: it is no YAML, no mapping, or holds evaluation results that the Hub can't read.
    """
    found = REGEX_YAML_BLOCK.search(text.lstrip("\N{BOM}"))
    if found is None:
        return {}
    try:
        fields = yaml.safe_load(found[2]) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + found[1].count(chr(10)) + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0] or type(error).__name__
        raise HubError(f"{origin}{line}: the front matter is no YAML: {reason}; mend it, or quote the value") from None
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise HubError(
            f"{origin}: the front matter is no mapping of names to values; expected lines such as license: mit"
        )
    try:
        ModelCardData(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise HubError(f"{origin}: the front matter can't be read by the Hub: {reason}; mend it") from None
    return fields


def require_other_base(text: str, repo_id: str) -> None:
    """Refuse a card whose base model is the very place that it would be published to, the root of the main branch.

    Raises:
        HubError: naming what would be replaced.
    """
    named = front_matter(text, CARD).get("base_model")
    if repo_id.lower() in (str(name).lower() for name in (named if isinstance(named, list) else [named])):
        raise HubError(
            f"{repo_id}: is what the card names as base_model; the original's files would be replaced there. Name "
            "another repository, or a branch or a folder, which leave the original where it is"
        )


def validate_card(text: str, origin: str, backoff: Backoff) -> tuple[str, ...]:
    """Ask the Hub whether it would take a card.

    Returns:
        What it warns of.

    Raises:
        HubError: with what it objects to.
    """

    def request() -> dict[str, Any]:
        response = huggingface_hub.get_session().post(
            f"{huggingface_hub.constants.ENDPOINT}/api/validate-yaml",
            json={"content": text, "repoType": "model"},
            headers=build_hf_headers(),
        )
        if response.status_code != 400:
            hf_raise_for_status(response)
        return {"status": response.status_code, **response.json()}

    answer = retrying(request, backoff)
    if answer["status"] == 400:
        objections = "; ".join(_messages(answer.get("errors"))) or "no reason given"
        raise HubError(f"{origin}: the Hub refuses its front matter: {objections}")
    return _messages(answer.get("warnings"))


def _messages(entries: Any) -> tuple[str, ...]:
    return tuple(" ".join(str(entry.get("message")).split()) for entry in entries or ())


def mark_card(front: str, text: str, what: str) -> str:
    """A card of front matter (which may be empty) and text, with the mark of its kind between them."""
    return f"{front}<!-- llmconvert: {what}, sha256 {_digest(front, text)} -->\n{text}"


def parts_of_card(card: str) -> tuple[str, str]:
    """Front matter and text of a card, without the mark between them if it was written here."""
    mark = re.search(_MARK.format("[^,>]*"), card)
    if mark is not None:
        return card[: mark.start()], card[mark.end() :]
    front = REGEX_YAML_BLOCK.search(card)
    return (card[: front.end()], card[front.end() :]) if front is not None else ("", card)


def state_of_card(card: str, what: str) -> Literal["ours", "edited", "foreign"]:
    """Whether a card is of this kind and as it was written, was edited since, or was written by somebody else."""
    mark = re.search(_MARK.format(re.escape(what)), card)
    if mark is None:
        return "foreign"
    return "ours" if mark[1] == _digest(card[: mark.start()], card[mark.end() :]) else "edited"


def _digest(front: str, text: str) -> str:
    return hashlib.sha256((front + text).encode()).hexdigest()
