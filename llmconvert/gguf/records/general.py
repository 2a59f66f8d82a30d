"""What a GGUF file says of its model beside settings: ``general.*``, from the model's card.

The keys are those of the GGUF specification: licence, languages, tags, the models that it was made from, and how large
it is (``general.size_label``, ``135M``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import gguf

from llmconvert.errors import CheckpointError, HubError
from llmconvert.hub.card import CARD, front_matter
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["general_metadata"]

_HUB = "https://huggingface.co"


def general_metadata(source: Checkpoint, shapes: Iterable[int], experts: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """``general.*`` but for name, type and architecture.

    Args:
        source: with its card among its files, if it has one. One that cannot be read tells nothing.
        shapes: how many numbers each tensor of the file has.
        experts: how many a layer has, and how many numbers of the file are theirs; zeros without any.
    """
    total, (count, inside) = sum(shapes), experts
    shared = total - inside
    found: dict[str, Any] = {
        "general.size_label": gguf.size_label(total, shared, inside // count if count else 0, count)
    }
    card = _card(source)
    for key, name in (("license", "license"), ("license_name", "license.name"), ("license_link", "license.link")):
        if isinstance(card.get(key), str):
            found[f"general.{name}"] = card[key]
    for name, listed in (("tags", _texts(card.get("tags"))), ("languages", _languages(card.get("language")))):
        if listed:
            found[f"general.{name}"] = listed
    return {
        **found,
        **_origins("base_model", _texts(card.get("base_model"))),
        **_origins("dataset", _texts(card.get("datasets"))),
    }


def _card(source: Checkpoint) -> Mapping[str, Any]:
    if CARD not in source.files:
        return {}
    try:
        return front_matter(source.read_file(CARD).decode(errors="replace"), CARD)
    except (HubError, CheckpointError):
        return {}


def _texts(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text]


def _languages(value: object) -> list[str]:
    """Codes of languages; YAML reads Norwegian's, unless it is quoted, as a boolean."""
    values = value if isinstance(value, list) else [value]
    return _texts(["no" if one is False else one for one in values])


def _origins(kind: str, ids: list[str]) -> dict[str, Any]:
    """Models or datasets by their Hub ids: how many, and of each its name, who made it, and where it is."""
    if not ids:
        return {}
    found: dict[str, Any] = {f"general.{kind}.count": len(ids)}
    for number, repo_id in enumerate(ids):
        place = f"general.{kind}.{number}"
        owner, _, name = repo_id.rpartition("/")
        found[f"{place}.name"] = (name or repo_id).replace("-", " ")
        if owner:
            found[f"{place}.organization"] = owner.replace("-", " ")
            found[f"{place}.repo_url"] = f"{_HUB}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
    return found
