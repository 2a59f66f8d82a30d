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


@click.command(short_help="List schemes (bits, groups, activations), or say what one is.")
@click.argument("name", metavar="[SCHEME]", required=False, type=Known("scheme"))
@manners
def schemes(name: str | None, manners: Manners) -> None:
    """List the schemes that are usual, and the types of GGUF files; others follow the same grammar. Of one, say what it
    is.

    w<bits>a<16|8>[-g<size>|-channel][-sym|-asym], for example w4a16-g128.

    \b
    Examples:
      llmconvert schemes
      llmconvert schemes w3a16-g48
    """
    from llmconvert.quantize.catalog.schemes import about_scheme, usual_schemes
    from llmconvert.quantize.scheme import parse_scheme

    if name is None:
        listed = usual_schemes()
    else:
        scheme = parse_scheme(name)
        listed = {str(scheme): about_scheme(scheme)}
    manners.result(listed, *beside(listed.items()))


@click.command(short_help="List formats on disk, or one of them.")
@click.argument("name", metavar="[FORMAT]", required=False, type=Known("format"))
@manners
def formats(name: str | None, manners: Manners) -> None:
    """List formats on disk, or one of them, and what reads each in which schemes.

    \b
    Examples:
      llmconvert formats
      llmconvert formats gguf
    """
    from llmconvert.quantize.catalog.formats import FORMATS, about_format, require_format
    from llmconvert.quantize.runtimes import runtimes_of

    if name is not None:
        require_format(name)
    listed = {one: about_format(one) for one in (FORMATS if name is None else [name])}
    read = {one: {runtime.name: list(runtime.schemes) for runtime in runtimes_of(one)} for one in listed}
    rows: list[tuple[str, str]] = []
    for one, runtimes in read.items():
        rows += [(one, listed[one]), *(("", f"{runtime}: {', '.join(found)}") for runtime, found in runtimes.items())]
    manners.result({one: {"about": listed[one], "read by": read[one]} for one in listed}, *beside(rows))


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
