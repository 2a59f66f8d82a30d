"""``--calibration``: one text, or several datasets with their shares."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import click

__all__ = ["calibration_option"]

_WITH_SHARE = re.compile(r"(?P<name>.+)=(?P<share>\d+(?:\.\d+)?%|[01]?\.\d+)")


def calibration_option(text: str) -> Callable[[Any], Any]:
    """The option, with ``text`` as its help."""
    return click.option(
        "--calibration",
        multiple=True,
        callback=_mix,
        metavar="FILE|NAME[=SHARE]",
        help=f"{text}; several with shares (a=60%, b=40%) are mixed.",
    )


def _mix(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> str | dict[str, str] | None:
    """One name as it is; names with shares as a mapping."""
    found = [_WITH_SHARE.fullmatch(text) for text in values]
    if len(values) < 2 and not any(found):
        return values[0] if values else None
    mix: dict[str, str] = {}
    for text, match in zip(values, found, strict=True):
        if match is None:
            raise click.BadParameter(f"{text!r} has no share; say how much of the text it is, {text}=50%")
        if match["name"] in mix:
            raise click.BadParameter(f"{match['name']!r} is there twice; give it one share")
        mix[match["name"]] = match["share"]
    return mix
