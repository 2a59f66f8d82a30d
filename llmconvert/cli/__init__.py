"""The command line: parse, call, print.

Each command is a module of its own and imports what it calls when called, so that ``--help`` answers at once.

Errors of this package end the program with one message on standard error and the exit code of their class
(:mod:`llmconvert.errors`); anything else is a bug and shows its traceback.
"""

from __future__ import annotations

import atexit
import difflib
import gc
import os
import traceback
from collections.abc import Sequence
from typing import IO, Any

import click

from llmconvert.cli.convert import convert
from llmconvert.cli.doctor import doctor
from llmconvert.cli.inspect import inspect
from llmconvert.cli.lists import formats, methods, recipes, schemes
from llmconvert.cli.manners import DEBUG
from llmconvert.cli.plan import plan
from llmconvert.cli.push import push
from llmconvert.cli.quantize import quantize
from llmconvert.cli.report import report
from llmconvert.cli.run import batch, run
from llmconvert.cli.validate import validate
from llmconvert.compute.ranks.launch import Launch
from llmconvert.errors import LlmconvertError, RunInterruptedError, UsageError
from llmconvert.machine import machine_errors
from llmconvert.version import __version__

__all__ = ["main"]

# What every command has, and people give before it.
_OF_COMMANDS = ("-q", "--quiet", "-v", "--verbose", "--json", "--debug", "--plan", "--set", "--work-dir")
# What several processes do together.
_TOGETHER = ("run", "quantize", "validate")
# What people type who know other tools, and what it is called here.
_CALLED = {
    "help": "--help",
    "version": "--version",
    "info": "inspect",
    "show": "inspect",
    "check": "doctor",
    "download": "convert",
    "fetch": "convert",
    "merge": "convert",
    "export": "quantize",
    "compress": "quantize",
    "eval": "validate",
    "evaluate": "validate",
    "measure": "validate",
    "test": "validate",
    "compare": "report",
    "publish": "push",
    "upload": "push",
}


class _Failure(click.ClickException):
    """An error of this package, as click shows and ends it."""

    def __init__(self, error: LlmconvertError) -> None:
        super().__init__(str(error))
        # Declared as a class attribute by click, and read from the instance.
        setattr(self, "exit_code", error.exit_code)  # noqa: B010

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.message}", file=file, err=file is None)


class _Main(click.Group):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            option = error.option_name
            if option not in _OF_COMMANDS:
                raise
            raise click.UsageError(f"{option} goes behind the command: llmconvert COMMAND … {option}", ctx) from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            launch = Launch.of(os.environ)
            with machine_errors():
                return super().invoke(ctx) if launch is None else self._invoke_together(ctx, launch)
        except LlmconvertError as error:
            if ctx.meta.get(DEBUG):
                click.echo(traceback.format_exc(), err=True)
            raise _Failure(error) from error
        except KeyboardInterrupt:
            raise _Failure(RunInterruptedError("stopped by SIGINT")) from None

    def _invoke_together(self, ctx: click.Context, launch: Launch) -> Any:
        """Run the command in one of several processes."""
        from llmconvert.compute.ranks.opening import opened

        with opened(launch) as ctx.obj:
            return super().invoke(ctx)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise click.UsageError(_no_command(args[0], list(self.commands)), ctx)
        name, command, rest = super().resolve_command(ctx, args)
        if ctx.obj is not None and name not in _TOGETHER:
            raise UsageError(
                f"{name}: {ctx.obj.count} processes were started (torchrun), and it is done by one; several do "
                f"{', '.join(_TOGETHER)}"
            )
        return name, command, rest


def _no_command(name: str, commands: Sequence[str]) -> str:
    """What to say of a command that is none: the nearest one, or all."""
    near = difflib.get_close_matches(name.lower(), [*commands, *_CALLED], n=1)
    if not near:
        return f"No such command {name!r}; there are {', '.join(commands)}."
    return f"No such command {name!r}. Did you mean 'llmconvert {_CALLED.get(near[0], near[0])}'?"


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", message="llmconvert %(version)s")
def main() -> None:
    """Take a language model to a smaller, measured and published one.

    MODEL is a Hub id (org/name or org/name@revision), a directory in Hugging Face layout, a .gguf file, or
    package:PKG/FILE, a file inside an installed Python package.

    \b
    Example:
      llmconvert run recipes/demo.yaml

    \b
    Exit codes: 0 done, 2 usage or recipe error, 3 quality gate failed,
    4 source or Hub error, 5 this machine's memory or disk, 6 interrupted
    (the same command continues), 1 a bug.
    """
    # Idle threads of torch's OpenMP spin for milliseconds before they sleep, on cores that compiled kernels could use.
    # The runtime reads this when torch is loaded, which is after this line.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Modules are a million objects that live as long as the process. By Python's own settings a quarter of a second is
    # spent on looking at them again and again while they are loaded, and half a second once more at the end.
    gc.set_threshold(10_000, 10, 10)
    atexit.register(gc.freeze)


for _command in (
    inspect,
    plan,
    run,
    batch,
    convert,
    quantize,
    validate,
    report,
    push,
    methods,
    schemes,
    formats,
    recipes,
    doctor,
):
    main.add_command(_command)
