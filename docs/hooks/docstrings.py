"""Docstrings as the site shows them: roles and literals of reStructuredText as Markdown, joint entries apart."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`")
_JOINT = re.compile(r"^    (\w+)((?:, \w+)+): (.*(?:\n {5,}.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """For mkdocstrings, which reads Google's sections and Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    """``:func:`~package.name``` is code, ``::`` before an example a colon, and ``a, b: text`` an entry for each."""
    text = _ROLE.sub(r"`\1`", docstring).replace("``", "`")
    text = re.sub(r"::(?=\n\n)", ":", text)
    return _JOINT.sub(_apart, text)


def _apart(match: re.Match[str]) -> str:
    first, others, text = match[1], re.findall(r"\w+", match[2]), match[3]
    return "\n".join([f"    {first}: {text}", *(f"    {name}: see `{first}`." for name in others)])
