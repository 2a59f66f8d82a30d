"""Whether a recipe's method, scheme and format go together: what their classes say, which loads torch.

Names and settings of a recipe by themselves are :mod:`llmconvert.recipes.consistency`'s, and checked before.
"""

from __future__ import annotations

from collections.abc import Iterator

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.ggml.mix import FLOATS
from llmconvert.quantize.distil.requirements import require_learnable
from llmconvert.quantize.formats.base import Feature, FileFormat, Format, load_format
from llmconvert.quantize.matrix import check_format, check_method
from llmconvert.quantize.methods.base import ScalingQuantizer, load_method
from llmconvert.quantize.mixed_precision.budget import usual_types
from llmconvert.quantize.passes.original import can_share
from llmconvert.quantize.scheme import Scheme, SchemeOrMix
from llmconvert.recipes.consistency import KeyPath, repair_refusal
from llmconvert.recipes.schema.named import OptionalScheme, engine_scheme
from llmconvert.recipes.schema.recipe import QuantizeSettings, Recipe

__all__ = ["incompatibilities"]


def incompatibilities(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Key path and explanation of everything in a consistent recipe that does not go together."""
    settings = recipe.quantize
    if settings is None:
        return
    try:
        method = load_method(settings.method, settings.options)
    except UnsupportedError as error:
        yield ("quantize", "options"), f"quantize.options: {error}"
        return
    layout = load_format(settings.format)
    yield from _lacking(recipe, settings, layout)
    schemes: list[tuple[KeyPath, SchemeOrMix]] = []
    if settings.budget is None:
        schemes.append((("quantize", "scheme"), settings.scheme))
    given: list[tuple[KeyPath, OptionalScheme | None]] = [
        (("quantize", "overrides", index, "scheme"), override.scheme)
        for index, override in enumerate(settings.overrides)
    ]
    given += [(("quantize", word), getattr(settings, word)) for word in ("head", "embedding")]
    schemes += [(path, found) for path, wanted in given if (found := engine_scheme(wanted)) is not None]
    for path, scheme in schemes:
        try:
            check_method(method, scheme)
            check_format(layout, scheme)
            if settings.distil is not None and path[1] in ("scheme", "overrides"):
                _require_lesson(scheme, moving=settings.distil.code_rate > 0)
        except UnsupportedError as error:
            yield path, f"{'.'.join(map(str, path))}: {error}"
    yield from _unlearned_choices(settings, layout)
    repaired = recipe.validation is not None and recipe.validation.repair is not None
    if repaired and isinstance(method, ScalingQuantizer) and not isinstance(layout, FileFormat):
        yield ("validate", "repair"), repair_refusal(settings.method)
    calibrate = recipe.calibrate
    if calibrate is not None and calibrate.statistics == "original" and not can_share(method):
        yield (
            ("calibrate", "statistics"),
            f"calibrate.statistics: {settings.method} needs more than moments of the original's activations; leave it "
            "out",
        )
    if calibrate is not None and calibrate.statistics == "original" and settings.kv_cache is not None:
        yield (
            ("calibrate", "statistics"),
            "calibrate.statistics: a cache's scales (quantize.kv_cache) are taken sequentially; leave one of them out",
        )
    yield from _asymmetric_mixture(recipe)
    yield from _outside(recipe, settings, layout)


def _require_lesson(scheme: SchemeOrMix, *, moving: bool) -> None:
    """Refuse a scheme of which nothing is learned; of a mix the type of most matrices counts.

    Raises:
        UnsupportedError: naming it.
    """
    if isinstance(scheme, Scheme):
        require_learnable("its weight", scheme, moving=moving)
    elif scheme.base in FLOATS:
        raise UnsupportedError(f"distillation: {scheme} stores floats, which have no scales to learn; leave distil out")
    else:
        require_learnable("most of the weights", Scheme.of_block(scheme.base), moving=moving)


def _unlearned_choices(settings: QuantizeSettings, layout: Format) -> Iterator[tuple[KeyPath, str]]:
    """What a budget may choose, and distillation cannot learn: known before anything is chosen."""
    if settings.budget is None or settings.distil is None:
        return
    word, budget = "bits", settings.budget
    choices = [option for option in budget.bits if isinstance(option, Scheme)]
    if isinstance(layout, FileFormat):
        every = {*usual_types(256), *usual_types(32)} if budget.types is None else {kind.name for kind in budget.types}
        word, choices = "types", [Scheme.of_block(kind) for kind in sorted(every.difference(FLOATS))]
    for scheme in choices:
        try:
            require_learnable("what the budget may choose", scheme, moving=settings.distil.code_rate > 0)
        except UnsupportedError as error:
            yield ("quantize", "budget"), f"quantize.budget: {error}, or name quantize.budget.{word} without it"
            return


def _outside(recipe: Recipe, settings: QuantizeSettings, layout: Format) -> Iterator[tuple[KeyPath, str]]:
    """What does not go with an embedding or a head that is quantized because a recipe says so."""
    word = next((word for word in ("head", "embedding") if getattr(settings, word) not in (None, "none")), None)
    if word is None or layout.outer != "asked":
        return
    if recipe.stream:
        yield (
            ("stream",),
            f"stream: quantize.{word} lies outside the blocks, which a download is quantized by; "
            + ("leave out one of them (--stream)"),
        )
    if recipe.validation is not None and recipe.validation.repair is not None:
        yield ("validate", "repair"), f"validate.repair: it was never tried with quantize.{word}; leave out one of them"


def _lacking(recipe: Recipe, settings: QuantizeSettings, layout: Format) -> Iterator[tuple[KeyPath, str]]:
    """What is asked for and does not go with the format."""
    checks = recipe.validation
    asked: tuple[tuple[Feature, KeyPath, object], ...] = (
        ("outer", ("quantize", "head"), settings.head),
        ("outer", ("quantize", "embedding"), settings.embedding),
        ("budget", ("quantize", "budget"), settings.budget),
        ("rotations", ("quantize", "rotate"), settings.rotate),
        ("streaming", ("stream",), recipe.stream),
        ("distillation", ("quantize", "distil"), settings.distil),
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


def _asymmetric_mixture(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Linears with zero points in several schemes, where the runtime that validation asks can't load them."""
    settings, checks = recipe.quantize, recipe.validation
    if settings is None or checks is None:
        return
    lacking = load_format(settings.format).lacks.get("mixed zero points")
    if lacking is None:
        return
    schemes = {settings.scheme, *(override.scheme for override in settings.overrides)}
    mixed = len(schemes) > 1 or settings.budget is not None or checks.repair is not None
    if mixed and any(isinstance(scheme, Scheme) and not scheme.symmetric for scheme in schemes):
        yield (
            ("quantize", "scheme"),
            f"quantize.scheme: {lacking} (a budget, overrides and repair make such), so the artifact could not pass; "
            "take a symmetric scheme, or one for all linears, or leave out validate for another runtime",
        )
