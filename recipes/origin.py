"""What a recipe was read from, and so what errors call its settings: keys with lines, or a command's options."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmconvert.recipes.consistency import KeyPath

__all__ = ["Origin"]

_SETTING = re.compile(r"\[\[([\w.]+)(?:=([^\]]*))?\]\]")


@dataclass(frozen=True, slots=True)
class Origin:
    """What a recipe was read from.

    Attributes:
        where: a file, or a command.
        lines: of a file: key path → line.
        overrides: ``--set`` options, with the key path of each.
        options: of a command: key path → the option for it.
    """

    where: str
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    overrides: tuple[tuple[str, KeyPath], ...] = ()
    options: Mapping[KeyPath, str] = field(default_factory=dict)

    def problems(self, found: Iterable[tuple[KeyPath, str]], values: Mapping[str, Any]) -> list[str]:
        """One line for each key path with its explanation: where it stands in ``values``, and what is wrong."""
        return [f"{self._place(path, values)}: {self._worded(path, text)}" for path, text in found]

    def _place(self, path: KeyPath, values: Mapping[str, Any]) -> str:
        """Where that key is given in ``values``, or what is given where it is missing."""
        given = {key: option for key, option in self.options.items() if _has(values, key)}
        for depth in range(len(path), 0, -1):
            if path[:depth] in given:
                return f"{self.where} {given[path[:depth]]}"
        if path in self.options:
            beside = [option for key, option in given.items() if key[: len(path) - 1] == path[:-1]]
            if beside:
                return f"{self.where} {', '.join(beside)} without {self.options[path]}"
            return f"{self.where} {self.options[path]}"
        if below := [option for key, option in given.items() if key[: len(path)] == path]:
            return f"{self.where} {', '.join(below)}"
        for override, key in self.overrides:
            if key[: len(path)] == path:
                return f"{self.where}, --set {override}"
        for depth in range(len(path), 0, -1):
            if path[:depth] in self.lines:
                return f"{self.where}, line {self.lines[path[:depth]]}"
        return self.where

    def _worded(self, path: KeyPath, text: str) -> str:
        """An explanation in the words of who wrote the recipe: its keys, or the options of a command."""
        if not self.options:
            return _SETTING.sub(lambda match: _as_key(match[1], match[2]), text)
        named = {".".join(map(str, key)): option for key, option in self.options.items()}
        for depth in range(len(path), 0, -1):  # the place has named the option already
            if path[:depth] in self.options:
                text = text.removeprefix(f"{'.'.join(map(str, path))}: ")
                break
        text = _SETTING.sub(lambda match: _as_option(match[1], match[2], named), text)
        dotted = sorted((key for key in named if "." in key), key=len, reverse=True)
        return re.sub(rf"\b({'|'.join(map(re.escape, dotted))})\b(?!\.\w)", lambda match: named[match[1]], text)


def _as_key(key: str, value: str | None) -> str:
    """``calibrate: {dataset: pydoc-topics:train}``."""
    if value is None:
        return key
    *sections, last = key.split(".")
    said = f"{last}: {value}"
    for section in reversed(sections):
        said = f"{section}: {{{said}}}"
    return said


def _as_option(key: str, value: str | None, named: Mapping[str, str]) -> str:
    """``--calibration pydoc-topics:train``."""
    option = named.get(key)
    if option is None:
        return _as_key(key, value)
    return option if value in (None, "true") else f"{option} {value}"


def _has(values: Any, path: KeyPath) -> bool:
    for part in path:
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True
