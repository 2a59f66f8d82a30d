"""The page of commands, from the command line's own help."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click

from llmconvert.cli import main

__all__ = ["markdown_commands"]


def markdown_commands() -> str:
    """Every command with its help, its examples and its options."""
    context = click.Context(main, info_name="llmconvert")
    return "\n\n".join(_command(name, command, context) for name, command in main.commands.items())


def _command(name: str, command: click.Command, parent: click.Context) -> str:
    context = click.Context(command, info_name=name, parent=parent)
    usage = " ".join(command.collect_usage_pieces(context))
    return "\n\n".join([f"## `{name}`", f"`llmconvert {name} {usage}`", *_help(command), _options(command, context)])


def _help(command: click.Command) -> Iterator[str]:
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        text = paragraph.removeprefix("\b\n")
        if text.startswith("Example"):
            # A line further in goes on from the one before it.
            lines = re.sub(r"\\\n\s+", "", text).splitlines()[1:]
            yield "\n".join(["```console", *(f"$ {line.strip()}" for line in lines), "```"])
        else:
            yield " ".join(text.split())


def _options(command: click.Command, context: click.Context) -> str:
    lines = ["| option | | default |", "|---|---|---|"]
    for parameter in command.get_params(context):
        if not isinstance(parameter, click.Option) or "--help" in parameter.opts:
            continue
        names = " / ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))
        value = "" if parameter.is_flag else f" `{parameter.make_metavar(context)}`".replace("|", "\\|")
        default = f"`{parameter.default}`" if parameter.show_default and parameter.default is not None else ""
        if parameter.secondary_opts and default:
            default = f"`{(parameter.opts if parameter.default else parameter.secondary_opts)[0]}`"
        lines.append(f"| {names}{value} | {parameter.help or ''} | {default} |")
    return "\n".join(lines)
