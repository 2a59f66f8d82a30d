"""Provenance of a source: its base model, or the models it was made from, and its licence.

Only what is written down counts: a Hub id, a URL on the Hub in a GGUF file's metadata, the licence field of a card or
of that metadata. Names that merely look like a repository's are not turned into one.
GGUF keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#general-metadata.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from llmconvert.convert.source import Source
from llmconvert.errors import HubError, SourceError
from llmconvert.gguf.checkpoint import GgufCheckpoint
from llmconvert.hub.card import CARD, front_matter
from llmconvert.report.report import Report
from llmconvert.validate.render.card import inherited_metadata

__all__ = ["REPORT_FILE", "Provenance", "provenance", "unread_card"]

#: Where an artifact has what was measured about it.
REPORT_FILE = "llmconvert/report.json"

_HUB_URL = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)(?:\.git)?(?:/.*)?")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NOT_MODELS = ("datasets", "spaces", "docs", "papers", "collections")
# Where a GGUF file names the model that it holds; ``general.url`` and ``repo_url`` are of the file's own repository.
_SOURCE_KEYS = ("general.source.repo_url", "general.source.url", "general.source.huggingface.repository")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_MAX_PARENTS = 16


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a source comes from, as far as it says.

    Attributes:
        base_model: Hub id of the very model it holds.
        parents: Hub ids of the models which that one was made from.
        inherited: what it says for every artifact made from it: ``license``, ``license_name``, ``license_link``,
            ``language`` and ``tags``, those that there are.
    """

    base_model: str | None = None
    parents: tuple[str, ...] = ()
    inherited: Mapping[str, Any] = field(default_factory=dict)

    @property
    def license(self) -> str | None:
        """The licence, or several with commas between."""
        found = self.inherited.get("license")
        return ", ".join(found) if isinstance(found, list) else found


def provenance(source: Source) -> Provenance:
    """What ``source`` says about itself; nothing is read but metadata."""
    checkpoint = source.checkpoint
    if isinstance(checkpoint, GgufCheckpoint):
        return _of_gguf(checkpoint.general)
    readme = checkpoint.read_file(CARD) if CARD in checkpoint.files else None
    inherited = inherited_metadata(readme)
    if source.kind == "hub":
        return Provenance(source.origin, (), inherited)
    with suppress(SourceError):  # of an artifact that was made here
        made = Report.read(source.path / REPORT_FILE).model
        return Provenance(made.base_model, made.parents, inherited)
    with suppress(HubError):
        named = front_matter((readme or b"").decode(errors="replace"), CARD).get("base_model")
        ids = map(_hub_id, named if isinstance(named, list) else [named])
        return Provenance(None, tuple(dict.fromkeys(found for found in ids if found is not None)), inherited)
    return Provenance(None, (), inherited)


def unread_card(source: Source) -> str | None:
    """Why nothing can be taken over from the source's card; None if it can be read, or there is none."""
    files = source.checkpoint.files
    if CARD not in files:
        return None
    try:
        front_matter(source.checkpoint.read_file(CARD).decode(), f"{source.origin}: {CARD}")
    except (HubError, UnicodeDecodeError) as error:
        return f"{error}; its licence, languages and tags are not carried over"
    return None


def _of_gguf(general: Mapping[str, Any]) -> Provenance:
    named = [found for key in _SOURCE_KEYS if (found := _hub_id(general.get(key))) is not None]
    keys = (f"general.base_model.{index}.repo_url" for index in range(_MAX_PARENTS))
    parents = [found for key in keys if (found := _hub_id(general.get(key))) is not None]
    license_fields: dict[str, str] = {}
    identifier = general.get("general.license")
    if isinstance(identifier, str) and _LICENSE.fullmatch(identifier):
        license_fields["license"] = identifier
        for key in ("name", "link"):
            value = general.get(f"general.license.{key}")
            if isinstance(value, str) and value.isprintable():
                license_fields[f"license_{key}"] = value
    return Provenance(named[0] if named else None, tuple(dict.fromkeys(parents)), license_fields)


def _hub_id(value: object) -> str | None:
    """The repository that a URL on the Hub, or a bare id, names."""
    if not isinstance(value, str):
        return None
    match = _HUB_URL.fullmatch(value)
    found = match[1] if match is not None else value
    return found if _HUB_ID.fullmatch(found) and found.split("/")[0] not in _NOT_MODELS else None
