"""English prose that every Python installation carries: the topics of its built-in ``help()``.

``pydoc_data.topics`` holds some 450 kB of the language reference as plain text. Many topics repeat others (the topic
"compound" contains "try", "with" and "for"), so a split by topic name alone would put the same paragraphs on both
sides. Topics that share a paragraph are therefore kept together, and those that only repeat others are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from llmconvert.errors import DatasetError

__all__ = ["SPLITS", "split_topics", "topics_text"]

#: Split name → its share of the text.
SPLITS: Mapping[str, float] = {"train": 0.6, "test": 0.4}

# Shorter paragraphs (headings, "See also") recur without being the same text.
_PARAGRAPH_CHARS = 60
# A topic with at least this share of its paragraphs in larger topics adds nothing.
_COVERED = 0.9


@lru_cache(maxsize=len(SPLITS))
def topics_text(split: str) -> str:
    """The text of one split, topics in alphabetical order with an empty line between them.

    The text follows the running Python's documentation, so it differs slightly between Python versions.

    Raises:
        DatasetError: this Python was packaged without ``pydoc_data``.
        KeyError: no such split.
    """
    if split not in SPLITS:
        raise KeyError(split)
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DatasetError(
            "pydoc-topics: this Python was installed without the standard library's pydoc_data; "
            "install it in full, or give a text file as dataset"
        ) from None
    return "\n\n".join(topics[name].strip() for name in split_topics(topics)[split])


def split_topics(topics: Mapping[str, str]) -> dict[str, list[str]]:
    """Divide topics among :data:`SPLITS` so that no long paragraph occurs on both sides.

    Groups of related topics go, largest first, to the split furthest below its share: the same text always gives the
    same splits, without a seed.
    """
    paragraphs = {name: _paragraphs(text) for name, text in topics.items()}
    groups = [_without_repetitions(group, paragraphs) for group in _related(paragraphs)]
    sizes = {id(group): sum(len(topics[name]) for name in group) for group in groups}
    total = sum(sizes.values())
    chosen: dict[str, list[str]] = {split: [] for split in SPLITS}
    filled = dict.fromkeys(SPLITS, 0)
    for group in sorted(groups, key=lambda group: (-sizes[id(group)], group)):
        split = max(SPLITS, key=lambda split: SPLITS[split] * total - filled[split])
        chosen[split].extend(group)
        filled[split] += sizes[id(group)]
    return {split: sorted(names) for split, names in chosen.items()}


def _paragraphs(text: str) -> set[str]:
    parts = (re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n", text))
    return {part for part in parts if len(part) >= _PARAGRAPH_CHARS}


def _related(paragraphs: Mapping[str, set[str]]) -> list[list[str]]:
    """Connected components of topics under "shares a paragraph"."""
    parent = {name: name for name in paragraphs}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    first_seen: dict[str, str] = {}
    for name in sorted(paragraphs):
        for paragraph in paragraphs[name]:
            parent[root(name)] = root(first_seen.setdefault(paragraph, name))
    components: dict[str, list[str]] = {}
    for name in sorted(paragraphs):
        components.setdefault(root(name), []).append(name)
    return list(components.values())


def _without_repetitions(group: list[str], paragraphs: Mapping[str, set[str]]) -> list[str]:
    kept: list[str] = []
    seen: set[str] = set()
    for name in sorted(group, key=lambda name: (-sum(map(len, paragraphs[name])), name)):
        chars = sum(map(len, paragraphs[name]))
        repeated = sum(map(len, paragraphs[name] & seen))
        if not kept or repeated < _COVERED * chars:
            kept.append(name)
            seen |= paragraphs[name]
    return sorted(kept)
