"""The pages of the repository, the fenced blocks on them, and their commands at a size that a tiny model takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PAGES", "ROOT", "TASKS", "Block", "blocks", "commands", "prose", "smaller"]

ROOT = Path(__file__).parents[2]
#: Pages by task, whose blocks belong together: tests/docs/test_tasks.py runs each from beginning to end.
TASKS = sorted((ROOT / "docs" / "tasks").glob("*.md"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *TASKS,
    *sorted((ROOT / "bench" / "results").glob("*.md")),
]
# What the pages ask for is made smaller, so that a stand-in answers in seconds.
_SMALLER = {
    "--samples": "4",
    "--length": "64",
    "--window": "64",
    "--stride": "32",
    "--heal-steps": "2",
    "--distil-steps": "2",
    "--preset": "fast",
}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, its text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(language: str) -> Iterator[Block]:
    """All blocks of a language, page by page."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            if match[1] == language:
                yield Block(page, text.count("\n", 0, match.start()) + 1, language, match[2])


def commands(block: Block) -> list[list[str]]:
    """The words of each ``$`` line, without comments; a line that ends in a backslash goes on."""
    text = block.text.replace("\\\n", " ")
    return [shlex.split(line[2:], comments=True) for line in text.splitlines() if line.startswith("$ ")]


def smaller(words: list[str]) -> list[str]:
    """The same command with less text, shorter windows, fewer steps."""
    return [_SMALLER.get(before, word) for before, word in zip(["", *words], words, strict=False)]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))
