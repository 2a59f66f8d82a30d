"""What commands print, line by line; tables are :mod:`llmconvert.cli.summary`'s."""

from __future__ import annotations

import click

from llmconvert.printable import printable

__all__ = ["say"]


def say(text: str, *, err: bool = False) -> None:
    """A line on standard output, or on standard error, that commands no terminal."""
    click.echo(printable(text), err=err)
