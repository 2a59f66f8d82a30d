"""Settings of a recipe that are each valid and cannot be meant together."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from llmconvert.errors import UnsupportedError
from llmconvert.quantize.formats.base import FORMATS, Feature, Format, load_format
from llmconvert.quantize.matrix import check_format, check_method
from llmconvert.quantize.methods.base import METHODS, Method, ScalingQuantizer, load_method, needs_calibration
from llmconvert.quantize.scheme import Scheme, SchemeOrMix
from llmconvert.recipes.schema.recipe import QuantizeSettings, Recipe

__all__ = ["KeyPath", "contradictions"]

#: Where a setting stands: ``("quantize", "overrides", 0, "scheme")``.
KeyPath = tuple[str | int, ...]


def contradictions(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Key path and explanation of every contradiction."""
    yield from _quantization(recipe)
    yield from _streaming(recipe)
    yield from _same_text(recipe)
    yield from _gaps(recipe)
    yield from _limits_without_text(recipe)
    yield from _repair_of_nothing(recipe)
    yield from _asymmetric_mixture(recipe)
    yield from _unmeasured(recipe)


def _quantization(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    settings = recipe.quantize
    if settings is None:
        return
    if settings.method not in METHODS:
        yield ("quantize", "method"), f"quantize.method: {_unknown(settings.method, METHODS)}"
    elif settings.calibrates and recipe.calibrate is None:
        yield (
            ("quantize", "method"),
            f"quantize.method: {_who(settings)} needs calibration text; add a calibrate section, for example "
            "calibrate: {dataset: pydoc-topics:train}",
        )
    else:
        try:
            load_method(settings.method, settings.options)
        except UnsupportedError as error:
            yield ("quantize", "options"), f"quantize.options: {error}"
    if settings.format not in FORMATS:
        yield ("quantize", "format"), f"quantize.format: {_unknown(settings.format, FORMATS)}"
        return
    format_, method = load_format(settings.format), _method(settings)
    yield from _lacking(recipe, settings, format_)
    if settings.budget is not None and not _chooses(settings.scheme):
        yield (
            ("quantize", "scheme"),
            f"quantize.scheme: found {settings.scheme}; a budget chooses among integer weights with 16-bit "
            "activations: leave it out, or say w4a16-asym for zero points",
        )
    schemes: list[tuple[KeyPath, SchemeOrMix]] = []
    if settings.budget is None:
        schemes.append((("quantize", "scheme"), settings.scheme))
    for index, override in enumerate(settings.overrides):
        if override.scheme != "none":
            schemes.append((("quantize", "overrides", index, "scheme"), override.scheme))
    for path, scheme in schemes:
        try:
            if method is not None:
                check_method(method, scheme)
            check_format(format_, scheme)
        except UnsupportedError as error:
            yield path, f"{'.'.join(map(str, path))}: {error}"


def _method(settings: QuantizeSettings) -> Method | None:
    """The method; None if there is none of that name and those options, which is told elsewhere."""
    try:
        return load_method(settings.method, settings.options)
    except UnsupportedError:
        return None


def _who(settings: QuantizeSettings) -> str:
    return settings.method if settings.budget is None else "a budget"


def _chooses(scheme: object) -> bool:
    """Whether a budget can give layers other bits and groups in the place of this scheme's."""
    return isinstance(scheme, Scheme) and scheme.adjustable


def _lacking(recipe: Recipe, settings: QuantizeSettings, layout: Format) -> Iterator[tuple[KeyPath, str]]:
    """What is asked for and does not go with the format."""
    checks = recipe.validation
    asked: tuple[tuple[Feature, KeyPath, object], ...] = (
        ("overrides", ("quantize", "overrides"), settings.overrides),
        ("budget", ("quantize", "budget"), settings.budget),
        ("rotations", ("quantize", "rotate"), settings.rotate),
        ("streaming", ("stream",), recipe.stream),
        ("generation", ("validate", "generation"), checks and checks.generation),
        ("generation", ("validate", "attention"), checks and checks.attention),
        ("generation", ("validate", "positions"), checks and checks.positions),
        ("generation", ("validate", "decoding"), checks and checks.decoding),
        ("repair", ("validate", "repair"), checks and checks.repair),
    )
    for feature, path, value in asked:
        if value and feature in layout.lacks:
            what = "stream (--stream)" if feature == "streaming" else "it"
            yield path, f"{'.'.join(map(str, path))}: {layout.lacks[feature]}; leave {what} out"


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
    elif settings is not None and settings.rotate is not None:
        yield ("stream",), "stream: rotations need the whole model; leave out stream (--stream), or quantize.rotate"
    elif settings is not None and settings.budget is not None:
        yield ("stream",), "stream: a budget measures the whole model; leave out stream (--stream), or the budget"
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


def _gaps(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    perplexity = recipe.validation.perplexity if recipe.validation is not None else None
    if perplexity is not None and perplexity.stride is not None and perplexity.stride > perplexity.window:
        yield (
            ("validate", "perplexity", "stride"),
            f"validate.perplexity.stride: found {perplexity.stride:,}, which leaves text out between windows of "
            f"{perplexity.window:,} tokens; give at most as many",
        )


def _limits_without_text(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    settings = recipe.validation
    if settings is None or settings.perplexity is not None:
        return
    for key, value in (("max_kl", settings.max_kl), ("min_top1", settings.min_top1)):
        if value is not None:
            yield ("validate", key), f"validate.{key} is measured on the text of validate.perplexity, which is missing"


def _asymmetric_mixture(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Linears with zero points in several schemes, where the runtime that validation asks can't load them."""
    settings, checks = recipe.quantize, recipe.validation
    if settings is None or checks is None or settings.format not in FORMATS:
        return
    lacking = load_format(settings.format).lacks.get("mixed zero points")
    if lacking is None:
        return
    schemes = {settings.scheme, *(override.scheme for override in settings.overrides)} - {"none"}
    mixed = len(schemes) > 1 or settings.budget is not None or checks.repair is not None
    if mixed and any(isinstance(scheme, Scheme) and not scheme.symmetric for scheme in schemes):
        yield (
            ("quantize", "scheme"),
            f"quantize.scheme: {lacking} (a budget, overrides and repair make such), so the artifact could not pass; "
            "take a symmetric scheme, or one for all linears, or leave out validate for another runtime",
        )


def _unmeasured(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """To the Hub goes what was measured, unless the recipe says that it doesn't have to be."""
    target = recipe.publish
    if target is None or target.to.startswith("file:") or target.unmeasured or recipe.predictions_measured:
        return
    yield (
        ("publish", "to"),
        "publish.to: nothing in validate tells how well the artifact predicts; add a measurement, for example "
        "validate.perplexity: {dataset: pydoc-topics:test}, or say publish.unmeasured: true",
    )


def _repair_of_nothing(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    settings = recipe.validation
    if settings is None or settings.repair is None:
        return
    perplexity, generation = settings.perplexity, settings.generation
    limits = (
        perplexity.max_increase if perplexity is not None else None,
        generation.min_agreement if generation is not None else None,
        settings.max_kl,
        settings.min_top1,
    )
    if recipe.quantize is None:
        yield ("validate", "repair"), "validate.repair: nothing is quantized, so there are no bits to add"
    elif _moves_scales(recipe.quantize.method) or recipe.quantize.rotate is not None:
        what = "a rotation" if recipe.quantize.rotate is not None else recipe.quantize.method
        yield (
            ("validate", "repair"),
            f"validate.repair: {what} changes norms along with the linears, so no linear can be "
            "quantized anew by itself; leave one of them out",
        )
    elif recipe.stream:
        yield (
            ("validate", "repair"),
            "validate.repair: needs the original's weights again, which stream does not keep; leave one of them out",
        )
    elif all(limit is None for limit in limits):
        yield (
            ("validate", "repair"),
            "validate.repair: there is no limit on quality that could be missed; add one, for example "
            "validate.perplexity.max_increase: 5%",
        )


def _moves_scales(method: str) -> bool:
    return method in METHODS and isinstance(load_method(method, {}), ScalingQuantizer)
