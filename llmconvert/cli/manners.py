"""What every command understands: how much it says and in which form, and whether errors show their traceback."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from click.shell_completion import CompletionItem

from llmconvert.cli.say import say
from llmconvert.convert.dtype_names import ALIASES, NAMES

if TYPE_CHECKING:
    from llmconvert.compute.ranks.group import Ranks

__all__ = ["DEBUG", "DtypeName", "Known", "Manners", "calibration_option", "manners", "manners_but_json", "plan_option"]

C = TypeVar("C", bound=Callable[..., Any])
#: Under which key of click's context it says that errors show their traceback.
DEBUG = "llmconvert.debug"
# What is asked of a dtype and is a scheme's.
_FEW_BITS = re.compile(r"(?i)^(u?int|fp|float|nf|e\dm\d|q|w)?[2-8](_|bit|a\d|$)|gptq|awq|gguf")
_WITH_SHARE = re.compile(r"(?P<name>.+)=(?P<share>\d+(?:\.\d+)?%|[01]?\.\d+)")


@dataclass(frozen=True, slots=True)
class Manners:
    """How a command talks.

    Attributes:
        quiet: nothing but the result.
        verbose: a line for each piece of work, and what libraries log.
        as_json: the result as JSON, where the command has that option.
        ranks: the processes that run the command together; None of one that is alone.
    """

    quiet: bool = False
    verbose: bool = False
    as_json: bool = False
    ranks: Ranks | None = None

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and talks."""
        return self.ranks is None or self.ranks.leads

    def progress(self) -> Any:
        """Where long work is shown."""
        import sys

        from llmconvert.progress import SILENT, LineProgress, console_progress

        if not self.leads:
            return SILENT
        if self.verbose:
            logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
            return LineProgress(sys.stderr, interval=0)
        return SILENT if self.quiet else console_progress()

    def result(self, value: Any, *lines: str) -> None:
        """Print a result: ``value`` as JSON where that was asked for, the lines otherwise."""
        if self.as_json:
            say(json.dumps(value, indent=2, ensure_ascii=False))
            return
        for line in lines:
            say(line)


def manners(command: C) -> C:
    """Give a command ``-q``, ``-v``, ``--json`` and ``--debug``; it gets them as the argument ``manners``."""
    return _polite(command, as_json=True)


def manners_but_json(command: C) -> C:
    """The same of a command whose own ``--json`` does more."""
    return _polite(command, as_json=False)


def _polite(command: C, *, as_json: bool) -> C:
    @functools.wraps(command)
    def polite(*args: Any, quiet: bool, verbose: bool, debug: bool, **options: Any) -> Any:
        click.get_current_context().meta[DEBUG] = debug
        if quiet and verbose:
            raise click.UsageError("-q and -v exclude each other")
        wanted = options.pop("json_result", False)
        return command(*args, manners=Manners(quiet, verbose, wanted, click.get_current_context().obj), **options)

    decorators = [
        click.option("-q", "--quiet", is_flag=True, help="Say nothing but the result."),
        click.option("-v", "--verbose", is_flag=True, help="A line for each piece of work, and what libraries log."),
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
    ]
    if as_json:
        decorators.insert(2, click.option("--json", "json_result", is_flag=True, help="Print the result as JSON."))
    decorated: Any = polite
    for decorate in reversed(decorators):
        decorated = decorate(decorated)
    return cast(C, decorated)


class DtypeName(click.Choice[str]):
    """A dtype by its name, or by what people call it: ``bf16``, ``fp16``."""

    name = "dtype"

    def __init__(self) -> None:
        super().__init__(NAMES)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        wanted = ALIASES.get(str(value).lower(), value)
        if isinstance(wanted, str) and wanted not in NAMES and _FEW_BITS.search(wanted):
            self.fail(
                f"{value!r} is nothing that weights are converted to: {', '.join(NAMES)} are. Fewer bits are what "
                "quantize makes: llmconvert quantize MODEL OUTPUT --scheme w4a16-g128 (llmconvert schemes lists more)",
                param,
                ctx,
            )
        return super().convert(wanted, param, ctx)


class Known(click.ParamType[str]):
    """A name of a registry, which the shell completes; whether it is one is for the recipe to say.

    Args:
        kind: ``method``, ``format``, ``scheme`` or ``recipe``.
    """

    def __init__(self, kind: str) -> None:
        self.name = kind

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "TEXT"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Names that begin so; of recipes files too."""
        found = [CompletionItem(name) for name in _names(self.name) if name.startswith(incomplete)]
        return [*found, CompletionItem(incomplete, type="file")] if self.name == "recipe" else found


def _names(kind: str) -> Iterable[str]:
    from llmconvert.quantize.catalog.formats import FORMATS
    from llmconvert.quantize.catalog.methods import METHODS
    from llmconvert.quantize.catalog.schemes import usual_schemes
    from llmconvert.recipes.shipped import shipped_recipes

    known = {"method": lambda: METHODS, "format": lambda: FORMATS, "scheme": usual_schemes, "recipe": shipped_recipes}
    return known[kind]()


def plan_option(command: C) -> C:
    """Give a command ``--plan``; it gets it as the argument ``plan``."""
    return click.option("--plan", is_flag=True, help="Show what it will do, make and need, and end.")(command)


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
