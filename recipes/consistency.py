"""Settings of a recipe that are each valid and cannot be meant together; torch is not loaded to tell.

In explanations, ``[[key]]`` and ``[[key=value]]`` are settings: a recipe's reader sees keys, a command's its options.
"""

from __future__ import annotations

from collections.abc import Iterator

from llmconvert.errors import DatasetError, UnsupportedError
from llmconvert.gguf.ggml.mix import FLOATS, GgmlMix
from llmconvert.quantize.catalog.formats import require_format
from llmconvert.quantize.catalog.methods import METHODS, check_options, needs_calibration
from llmconvert.quantize.scheme import Scheme
from llmconvert.recipes.schema.recipe import QuantizeSettings, Recipe
from llmconvert.text.shares import MixedSource, windows_by_share

__all__ = ["KeyPath", "contradictions", "repair_refusal"]

#: Where a setting stands: ``("quantize", "overrides", 0, "scheme")``.
KeyPath = tuple[str | int, ...]


def contradictions(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Key path and explanation of every contradiction."""
    yield from _quantization(recipe)
    yield from _streaming(recipe)
    yield from _same_text(recipe)
    yield from _same_lessons(recipe)
    yield from _shares(recipe)
    yield from _too_few_tokens(recipe)
    yield from _gaps(recipe)
    yield from _limits_without_text(recipe)
    yield from _repair_of_nothing(recipe)
    yield from _unmeasured(recipe)


def _reader_of_text(settings: QuantizeSettings) -> tuple[str, str]:
    """The key whose value makes a quantization read calibration text, and what that is."""
    if settings.budget is not None or needs_calibration(settings.method):
        return "method", settings.method if settings.budget is None else "a budget"
    if settings.fixes_inputs:
        return "scheme", "a scheme whose scales for inputs are fixed beforehand"
    return "kv_cache", "a cache with scales of its own"


def _quantization(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    settings = recipe.quantize
    if settings is None:
        return
    try:
        check_options(settings.method, ())
    except UnsupportedError as error:
        yield ("quantize", "method"), f"quantize.method: {error}"
    else:
        if settings.calibrates and recipe.calibrate is None:
            key, who = _reader_of_text(settings)
            yield (
                ("quantize", key),
                f"quantize.{key}: {who} needs calibration text; give it, for example "
                "[[calibrate.dataset=pydoc-topics:train]]",
            )
        if not settings.calibrates:
            for key in ("experts", "min_tokens_per_expert"):
                if getattr(settings, key) is not None:
                    yield (
                        ("quantize", key),
                        f"quantize.{key}: {settings.method} sees no calibration text, so nothing comes to experts; "
                        "leave it out, or take a method that does, for example [[quantize.method=gptq]]",
                    )
        try:
            check_options(settings.method, settings.options)
        except UnsupportedError as error:
            yield ("quantize", "options"), f"quantize.options: {error}"
    try:
        require_format(settings.format)
    except UnsupportedError as error:
        yield ("quantize", "format"), f"quantize.format: {error}"
    budget, gguf = settings.budget, settings.format == "gguf"
    if settings.split_max_size is not None and not gguf:
        yield ("quantize", "split_max_size"), "quantize.split_max_size: is for format: gguf; leave it out"
    if budget is not None:
        for key in ("bits", "group_sizes") if gguf else ("types",):
            if key in budget.model_fields_set:
                yield (
                    ("quantize", "budget", key),
                    f"quantize.budget.{key}: with format {settings.format} a budget chooses "
                    f"{'types' if gguf else 'bits and group sizes'}; leave it out",
                )
    if budget is not None and not (_is_mix(settings.scheme) if gguf else _chooses(settings.scheme)):
        yield (
            ("quantize", "scheme"),
            f"quantize.scheme: found {settings.scheme}; a budget of GGUF chooses among its types: leave it out"
            if gguf
            else f"quantize.scheme: found {settings.scheme}; a budget chooses among integer weights with 16-bit "
            "activations: leave it out, or say w4a16-asym for zero points; schemes of other kinds are named in "
            "budget.bits",
        )


def _is_mix(scheme: object) -> bool:
    return isinstance(scheme, GgmlMix) and scheme.base not in FLOATS


def _chooses(scheme: object) -> bool:
    """Whether a budget can give layers other bits and groups in the place of this scheme's."""
    return isinstance(scheme, Scheme) and scheme.adjustable


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
    elif settings is not None and settings.kv_cache is not None:
        yield ("stream",), "stream: a cache's scales need the whole model; leave out stream (--stream), or kv_cache"
    elif settings is not None and settings.fixes_inputs:
        yield (
            ("stream",),
            f"stream: {settings.scheme} fixes by calibration text how inputs are quantized, which needs the whole "
            "model; leave out stream (--stream), or take fp8-dynamic, nvfp4a16 or mxfp4",
        )
    elif settings is not None and settings.rotate is not None:
        yield ("stream",), "stream: rotations need the whole model; leave out stream (--stream), or quantize.rotate"
    elif settings is not None and settings.distil is not None:
        yield ("stream",), "stream: distillation needs the whole model; leave out stream (--stream), or quantize.distil"
    elif settings is not None and settings.budget is not None:
        yield ("stream",), "stream: a budget measures the whole model; leave out stream (--stream), or the budget"
    if recipe.adapter is not None:
        yield ("stream",), "stream: an adapter is merged into a model that is there; leave out stream (--stream)"
    if recipe.attention is not None:
        yield ("stream",), "stream: heads are merged in the whole model; leave out stream (--stream), or attention"


def _same_text(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    perplexity = recipe.validation.perplexity if recipe.validation is not None else None
    if recipe.calibrate is None or perplexity is None or perplexity.dataset not in recipe.calibrate.names:
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


def _same_lessons(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    perplexity = recipe.validation.perplexity if recipe.validation is not None else None
    distil = recipe.quantize.distil if recipe.quantize is not None else None
    if distil is not None and perplexity is not None and distil.dataset == perplexity.dataset:
        yield (
            ("quantize", "distil", "dataset"),
            f"quantize.distil.dataset: found {distil.dataset!r}, which validate.perplexity.dataset uses as well; a "
            "score on the text that was learned from flatters the result; name another split or another dataset",
        )


def _too_few_tokens(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """More tokens for each expert than the text can have, of which its router sends it a part."""
    wanted = recipe.quantize.min_tokens_per_expert if recipe.quantize is not None else None
    if wanted is None or recipe.calibrate is None:
        return
    samples, length = recipe.calibrate.samples, recipe.calibrate.length
    if wanted > samples * length:
        yield (
            ("quantize", "min_tokens_per_expert"),
            f"quantize.min_tokens_per_expert: found {wanted:,}, and the calibration text has {samples:,} × {length:,} "
            f"= {samples * length:,} tokens in all; draw more (calibrate.samples, calibrate.length), or ask for fewer",
        )


def _shares(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    calibrate = recipe.calibrate
    if calibrate is None or isinstance(calibrate.dataset, str):
        return
    twice = [name for index, name in enumerate(calibrate.names) if name in calibrate.names[:index]]
    if twice:
        yield ("calibrate", "dataset"), f"calibrate.dataset: {twice[0]} is there twice; give it one share"
        return
    try:
        windows_by_share(
            [MixedSource(source.name, source.share, source.template) for source in calibrate.dataset], calibrate.samples
        )
    except DatasetError as error:
        yield ("calibrate", "dataset"), f"calibrate.dataset: {error}"


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
    for key in ("max_kl", "min_top1", "max_saturated"):
        value = getattr(settings, key)
        if value is not None:
            yield (
                ("validate", key),
                (
                    f"validate.{key}: is measured on text; name one, for example "
                    "[[validate.perplexity.dataset=pydoc-topics:test]]"
                ),
            )


def _unmeasured(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """To the Hub goes what was measured, unless the recipe says that it doesn't have to be."""
    target = recipe.publish
    if target is None or target.to.startswith("file:") or target.unmeasured or recipe.predictions_measured:
        return
    yield (
        ("publish", "to"),
        "publish.to: nothing in validate tells how well the artifact predicts; add a measurement, for example "
        "validate.perplexity: {dataset: pydoc-topics:test}, or say publish.unmeasured: true "
        f"({target.to} is a Hub repository; a directory is file:{target.to})",
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
    elif recipe.quantize.rotate is not None:
        yield ("validate", "repair"), repair_refusal("a rotation")
    elif recipe.quantize.distil is not None:
        yield ("validate", "repair"), repair_refusal("distillation")
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


def repair_refusal(what: str) -> str:
    """Why an artifact of a method that changes more than its linears is not repaired."""
    return (
        f"validate.repair: {what} changes norms along with the linears, so no linear can be quantized anew by itself; "
        "leave one of them out"
    )
