"""What a class says of itself in its source, read without importing what it needs.

Methods and formats are classes in files that import torch, which takes seconds. Their names, settings and first
sentences are asked for by lists, by ``--help`` and by the refusal of a misspelt option, which shall not wait for it.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Declaration", "Setting", "declaration_of"]

_ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`")
_ENTRY = re.compile(r" {4}(\w+(?:, \w+)*): (.*)")


@dataclass(frozen=True, slots=True)
class Setting:
    """A field of a dataclass.

    Attributes:
        name: of the field.
        kind: its annotation as it is written.
        default: as it is written.
        about: what the class's docstring says of it; empty if it says nothing.
    """

    name: str
    kind: str
    default: str
    about: str


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a class's source says.

    Attributes:
        title: the first line of its module.
        about: the first sentence of its own docstring.
        settings: its fields, if it is a dataclass.
        constants: class variables whose values are literals.
    """

    title: str
    about: str
    settings: tuple[Setting, ...]
    constants: Mapping[str, object]


@cache
def declaration_of(target: str) -> Declaration:
    """What ``package.module:Class`` says of itself; nothing is imported but the packages that it lies in.

    Raises:
        LookupError: there is no such module or class.
    """
    module, _, name = target.partition(":")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise LookupError(f"{module}: no such module")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    found = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if found is None:
        raise LookupError(f"{module}: no class {name}")
    documented = ast.get_docstring(found) or ""
    settings = tuple(_settings(found, dict(_entries(documented))))
    title = (ast.get_docstring(tree) or "").partition("\n")[0]
    return Declaration(_plain(title), _plain(documented.partition("\n")[0]), settings, dict(_constants(found)))


def _settings(found: ast.ClassDef, about: Mapping[str, str]) -> Iterator[Setting]:
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not _is_constant(node):
            name, default = node.target.id, ast.unparse(node.value) if node.value is not None else ""
            yield Setting(name, ast.unparse(node.annotation), default, about.get(name, ""))


def _is_constant(node: ast.AnnAssign) -> bool:
    return ast.unparse(node.annotation).startswith("ClassVar")


def _constants(found: ast.ClassDef) -> Iterator[tuple[str, object]]:
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_constant(node) and node.value:
            try:
                yield node.target.id, ast.literal_eval(node.value)
            except ValueError:  # made of names, which only an import resolves
                continue


def _entries(docstring: str) -> Iterator[tuple[str, str]]:
    """What stands under ``Attributes:``, by name, each in one line."""
    names: tuple[str, ...] = ()
    words: list[str] = []
    for line in docstring.partition("Attributes:\n")[2].splitlines():
        if (match := _ENTRY.fullmatch(line)) is not None:
            yield from ((name, _plain(" ".join(words))) for name in names)
            names, words = tuple(match[1].split(", ")), [match[2]]
        elif line.startswith(" " * 8):
            words.append(line.strip())
        else:
            break
    yield from ((name, _plain(" ".join(words))) for name in names)


def _plain(text: str) -> str:
    """Prose without the marks that documentation is made with."""
    return _ROLE.sub(lambda match: match[1], text).replace("``", "")
