"""What commands print, line by line; tables are :mod:`llmconvert.cli.summary`'s."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

import click

from llmconvert.printable import printable

__all__ = ["beside", "say"]

_COLUMNS = 80


def beside(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Lines of names with what is said of each; what is longer than 80 columns goes on under itself."""
    listed = list(rows)
    width = max((len(name) for name, _ in listed), default=0) + 2
    for name, text in listed:
        first, *more = textwrap.wrap(text, _COLUMNS - width, break_long_words=False, break_on_hyphens=False) or [""]
        yield f"{name:<{width}}{first}".rstrip()
        yield from (f"{'':<{width}}{line}" for line in more)


def say(text: str, *, err: bool = False) -> None:
    """A line on standard output, or on standard error, that commands no terminal."""
    click.echo(printable(text), err=err)
