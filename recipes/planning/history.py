"""How long stages took on this machine, kept in the user's cache: what a plan says of time.

One line of JSON for each stage that was built, without names of models, files or people: the stage's kind, the work
there was, seconds. ``LLMCONVERT_HISTORY`` names another file, or none if it is empty.
"""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Seconds", "expected_seconds", "remember"]

_VARIABLE = "LLMCONVERT_HISTORY"
# Of how many times more or less work a time may be told from one that was measured, and how far off the others may be.
_ALIKE, _SPREAD = 1.5, 2.0
# Entries of a kind that are looked at: the last ones.
_RECENT = 5
_LONGEST = 1 << 22


@dataclass(frozen=True, slots=True)
class Seconds:
    """Time that something will take: ``least`` to ``most``, which are the same where as much work was timed before."""

    least: float
    most: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.least + other.least, self.most + other.most)

    def __str__(self) -> str:
        if self.least == self.most:
            return f"about {_words(self.most)}"
        return f"{_words(self.least)} to {_words(self.most)}"


def _words(seconds: float) -> str:
    if seconds < 1:
        return "a second"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 48 * 3600:
        return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} days"


def remember(kind: str, work: float, seconds: float) -> None:
    """Write down how long a stage took. A disk that does not take it is no reason to stop."""
    path = _path()
    if path is None or not kind or work <= 0:
        return
    line = json.dumps({"machine": _machine(), "kind": kind, "work": work, "seconds": round(seconds, 3)})
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _LONGEST:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            path.write_text("".join(lines[len(lines) // 2 :]), encoding="utf-8")
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def expected_seconds(kind: str, work: float) -> Seconds | None:
    """How long so much work of a kind will take here; None where nothing of the kind was ever timed."""
    known = [entry for entry in _entries(kind) if entry["machine"] == _machine()][-_RECENT:]
    if not known or work <= 0:
        return None
    alike = [entry for entry in known if 1 / _ALIKE <= work / entry["work"] <= _ALIKE]
    if alike:
        last = alike[-1]
        seconds = last["seconds"] * work / last["work"]
        return Seconds(seconds, seconds)
    rates = [entry["seconds"] / entry["work"] for entry in known]
    # Small jobs are mostly what all jobs do first, so time grows by less than the work.
    return Seconds(min(rates) * work / _SPREAD, max(rates) * work * _SPREAD)


def _entries(kind: str) -> list[dict[str, Any]]:
    """Those of a kind, in order; lines of others are not parsed."""
    path, word = _path(), json.dumps(kind)
    found: list[dict[str, Any]] = []
    with suppress(OSError, UnicodeDecodeError):
        for line in path.read_text(encoding="utf-8").splitlines() if path is not None else ():
            if word not in line:
                continue
            with suppress(ValueError, TypeError, KeyError):
                entry = json.loads(line)
                entry["work"], entry["seconds"] = float(entry["work"]), float(entry["seconds"])
                if entry["work"] > 0 and entry["kind"] == kind and "machine" in entry:
                    found.append(entry)
    return found


def _path() -> Path | None:
    named = os.environ.get(_VARIABLE)
    if named is not None:
        return Path(named) if named else None
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "llmconvert" / "history.jsonl"


def _machine() -> str:
    return f"{platform.node()} {platform.machine()} {os.cpu_count()} cores, {torch.get_num_threads()} threads"
