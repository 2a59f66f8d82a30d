"""Settings of a recipe that are each valid and cannot be meant together."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from llmconvert.errors import UnsupportedError
from llmconvert.quantize.base import METHODS, needs_calibration
from llmconvert.quantize.formats.base import FORMATS, load_format
from llmconvert.quantize.scheme import Scheme
from llmconvert.recipes.recipe import Recipe

__all__ = ["KeyPath", "contradictions"]

#: Where a setting stands: ``("quantize", "overrides", 0, "scheme")``.
KeyPath = tuple[str | int, ...]


def contradictions(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Key path and explanation of every contradiction."""
    yield from _quantization(recipe)
    yield from _streaming(recipe)
    yield from _same_text(recipe)
    yield from _limits_without_text(recipe)


def _quantization(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    settings = recipe.quantize
    if settings is None:
        return
    if settings.method not in METHODS:
        yield ("quantize", "method"), f"quantize.method: {_unknown(settings.method, METHODS)}"
    elif needs_calibration(settings.method) and recipe.calibrate is None:
        yield (
            ("quantize", "method"),
            f"quantize.method: {settings.method} needs calibration text; add a calibrate section, for example "
            "calibrate: {dataset: pydoc-topics:train}",
        )
    if settings.format not in FORMATS:
        yield ("quantize", "format"), f"quantize.format: {_unknown(settings.format, FORMATS)}"
        return
    format_ = load_format(settings.format)
    schemes: list[tuple[KeyPath, Scheme]] = [(("quantize", "scheme"), settings.scheme)]
    for index, override in enumerate(settings.overrides):
        if override.scheme != "none":
            schemes.append((("quantize", "overrides", index, "scheme"), override.scheme))
    for path, scheme in schemes:
        try:
            format_.check(scheme)
        except UnsupportedError as error:
            yield path, f"{'.'.join(map(str, path))}: {error}"


def _streaming(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    if not recipe.stream:
        return
    settings = recipe.quantize
    if settings is not None and settings.method in METHODS and needs_calibration(settings.method):
        yield (
            ("stream",),
            f"stream: {settings.method} needs the activations of the whole model; leave out stream (--stream), or "
            f"take a method without calibration: {', '.join(name for name in METHODS if not needs_calibration(name))}",
        )
    if recipe.attention is not None:
        yield ("stream",), "stream: heads are merged in the whole model; leave out stream (--stream), or attention"


def _unknown(value: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(value, list(known), n=1)
    return f"found {value!r}, known are {', '.join(known)}" + (f"; did you mean {close[0]}?" if close else "")


def _same_text(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    perplexity = recipe.validation.perplexity if recipe.validation is not None else None
    if recipe.calibrate is None or perplexity is None or recipe.calibrate.dataset != perplexity.dataset:
        return
    other = (
        "pydoc-topics:train and pydoc-topics:test are disjoint"
        if perplexity.dataset.startswith("pydoc-topics")
        else "name another split or another dataset for one of them"
    )
    yield (
        ("validate", "perplexity", "dataset"),
        f"validate.perplexity.dataset: found {perplexity.dataset!r}, which calibrate.dataset uses as well; a score on "
        f"the calibration text flatters the result; {other}",
    )


def _limits_without_text(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    settings = recipe.validation
    if settings is None or settings.perplexity is not None:
        return
    for key, value in (("max_kl", settings.max_kl), ("min_top1", settings.min_top1)):
        if value is not None:
            yield ("validate", key), f"validate.{key} is measured on the text of validate.perplexity, which is missing"
