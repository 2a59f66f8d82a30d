"""``llmconvert methods``, ``schemes``, ``formats``, ``recipes``: what there is, one line each, from the registries."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping

import click

from llmconvert.cli.manners import Known, Manners, manners
from llmconvert.cli.say import beside

__all__ = ["formats", "methods", "recipes", "schemes"]


@click.command(short_help="List quantization methods, or one with its options.")
@click.argument("name", metavar="[METHOD]", required=False, type=Known("method"))
@manners
def methods(name: str | None, manners: Manners) -> None:
    """List quantization methods, or show the options of one, with their defaults and meaning.

    \b
    Examples:
      llmconvert methods
      llmconvert methods gptq
    """
    from llmconvert.quantize.catalog.methods import (
        METHODS,
        about_method,
        method_settings,
        needs_calibration,
        require_method,
    )

    if name is None:
        listed = {method: about_method(method) for method in METHODS}
        manners.result(listed, *beside(listed.items()))
        return
    require_method(name)
    settings = method_settings(name)
    reads = "reads calibration text" if needs_calibration(name) else "needs no text"
    rows = {f"{one.name}: {one.kind} = {one.default}": one.about for one in settings}
    said = {one.name: {"type": one.kind, "default": one.default, "about": one.about} for one in settings}
    lines = [*textwrap.wrap(about_method(name), 80), reads, *(["", *_options(rows)] if rows else ["no options"])]
    about = {"name": name, "about": about_method(name), "calibrated": needs_calibration(name), "options": said}
    manners.result(about, *lines)


def _options(rows: Mapping[str, str]) -> Iterator[str]:
    for option, about in rows.items():
        yield option
        yield from textwrap.wrap(about, 76, initial_indent="    ", subsequent_indent="    ")


@click.command(short_help="List schemes: bits, groups and activations.")
@manners
def schemes(manners: Manners) -> None:
    """List the schemes that are usual, and the types of GGUF files; others follow the same grammar.

    w<bits>a<16|8>[-g<size>|-channel][-sym|-asym], for example w4a16-g128.

    \b
    Example:
      llmconvert schemes
    """
    from llmconvert.quantize.catalog.schemes import usual_schemes

    listed = usual_schemes()
    manners.result(listed, *beside(listed.items()))


@click.command(short_help="List formats on disk.")
@manners
def formats(manners: Manners) -> None:
    """List formats on disk, and what reads each of them in which schemes.

    \b
    Example:
      llmconvert formats
    """
    from llmconvert.quantize.catalog.formats import FORMATS, about_format
    from llmconvert.quantize.runtimes import runtimes_of

    listed = {name: about_format(name) for name in FORMATS}
    read = {name: {one.name: list(one.schemes) for one in runtimes_of(name)} for name in FORMATS}
    rows: list[tuple[str, str]] = []
    for name, runtimes in read.items():
        rows += [(name, listed[name]), *(("", f"{runtime}: {', '.join(found)}") for runtime, found in runtimes.items())]
    manners.result({name: {"about": listed[name], "read by": read[name]} for name in FORMATS}, *beside(rows))


@click.command(short_help="List shipped recipes, or print one.")
@click.argument("name", metavar="[RECIPE]", required=False, type=Known("recipe"))
@manners
def recipes(name: str | None, manners: Manners) -> None:
    """List the recipes that come with the package, or print one.

    \b
    Examples:
      llmconvert recipes
      llmconvert recipes hub-w4
    """
    from llmconvert.recipes.shipped import about_recipe, read_shipped, shipped_recipes

    if name is not None:
        text = read_shipped(name)
        manners.result({"name": name, "text": text}, text.rstrip("\n"))
        return
    listed = {found: about_recipe(found) for found in shipped_recipes()}
    manners.result(listed, *beside(listed.items()))
