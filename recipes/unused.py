"""Settings of a recipe that nothing would use: whatever was given is used, or refused by name.

A setting counts as given if it was said and differs from its default: the resolved recipe of an artifact, which has
every default written out, says no more than the one that it was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from llmconvert.gguf.ggml.mix import GgmlMix
from llmconvert.quantize.catalog.methods import METHODS, needs_calibration
from llmconvert.quantize.scheme import Scheme
from llmconvert.recipes.consistency import KeyPath
from llmconvert.recipes.schema.recipe import Recipe

__all__ = ["unused"]


@dataclass(frozen=True, slots=True)
class _Rule:
    """Settings that are used under a condition.

    Attributes:
        path: a key, or a section with every key in it.
        idle: why nothing uses it in a recipe; empty where something does.
        but: keys of the section that are used all the same.
    """

    path: tuple[str, ...]
    idle: Callable[[Recipe], str]
    but: tuple[str, ...] = ()


def unused(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Key path and reason of every setting that was given and that nothing would use."""
    for rule in _RULES:
        depth = len(rule.path)
        given = [path for path in _given(recipe, rule.path) if not set(path[depth : depth + 1]) & set(rule.but)]
        reason = rule.idle(recipe) if given else ""
        if reason:
            yield given[0], f"{'.'.join(given[0])}: {reason}; leave it out"


def _given(recipe: Recipe, path: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The keys at or below ``path`` that were said and differ from their defaults."""
    value: Any = recipe
    for depth, part in enumerate(path):
        if not isinstance(value, BaseModel):
            return []
        name = _field(value, part)
        field = type(value).model_fields[name]
        said = name in value.model_fields_set
        value = getattr(value, name)
        if not said or (depth == len(path) - 1 and not isinstance(value, BaseModel) and value == field.default):
            return []
    return list(_leaves(value, path))


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if not isinstance(value, BaseModel):
        if value is not None:
            yield path
        return
    for name, field in type(value).model_fields.items():
        own = getattr(value, name)
        if name in value.model_fields_set and own != field.default:
            yield from _leaves(own, (*path, field.alias or name))


def _field(model: BaseModel, key: str) -> str:
    return next(name for name, field in type(model).model_fields.items() if key in (name, field.alias))


def _calibration(recipe: Recipe) -> str:
    settings = recipe.quantize
    if recipe.attention is not None or (
        settings is not None and (settings.calibrates or settings.distil is not None or settings.method not in METHODS)
    ):
        return ""
    if settings is None:
        return "nothing here reads calibration text"
    reading = ", ".join(name for name in METHODS if needs_calibration(name))
    return f"{settings.method} reads no calibration text ({reading} do)"


def _healing(recipe: Recipe) -> str:
    heal = recipe.attention.heal if recipe.attention is not None else None
    return "there are no steps of healing" if heal is not None and heal.steps == 0 else ""


def _adapters(recipe: Recipe) -> str:
    heal = recipe.attention.heal if recipe.attention is not None else None
    return "is of adapters; set train to lora" if heal is not None and heal.train != "lora" else ""


def _distillation(recipe: Recipe) -> str:
    distil = recipe.quantize.distil if recipe.quantize is not None else None
    return "there are no steps of distillation" if distil is not None and distil.steps == 0 else ""


def _device(recipe: Recipe) -> str:
    computes = (recipe.attention, recipe.quantize, recipe.validation)
    return "" if any(part is not None for part in computes) else "a change of dtype computes on no device"


def _requantize(recipe: Recipe) -> str:
    return "" if recipe.quantize is not None else "nothing is quantized; a change of dtype reads what is"


def _hub(recipe: Recipe) -> str:
    local = recipe.publish is not None and recipe.publish.to.startswith("file:")
    return "is for the Hub, and publish.to is a directory" if local else ""


def _order(recipe: Recipe) -> str:
    calibrate = recipe.calibrate
    return (
        "windows in order are drawn without a seed" if calibrate is not None and calibrate.order == "sequential" else ""
    )


def _options(recipe: Recipe) -> str:
    """Options of methods go with codes that the method chooses; llama.cpp's types are encoded as llama.cpp does."""
    settings = recipe.quantize
    if settings is None or settings.method != "rtn" or "search" not in settings.options:
        return ""
    scheme = settings.scheme
    if isinstance(scheme, GgmlMix):
        return "search chooses the scales of groups; GGUF types are rounded as llama.cpp rounds them"
    fixed = f"search chooses the scales of groups; those of {scheme} follow from its largest weights"
    return fixed if scheme.number.absmax else ""


def _scheme(recipe: Recipe) -> str:
    settings = recipe.quantize
    if settings is None or settings.budget is None or settings.format == "gguf" or settings.scheme in _OF_BUDGETS:
        return ""
    return "a budget chooses bits and group sizes; say w4a16-asym for zero points, else nothing"


# What a scheme beside a budget can say: whether there are zero points.
_OF_BUDGETS = (Scheme.parse("w4a16"), Scheme.parse("w4a16-asym"))
_RULES = (
    _Rule(("calibrate",), _calibration),
    _Rule(("calibrate", "seed"), _order),
    _Rule(("attention", "heal"), _healing, but=("steps",)),
    _Rule(("attention", "heal", "rank"), _adapters),
    _Rule(("attention", "heal", "alpha"), _adapters),
    _Rule(("quantize", "distil"), _distillation, but=("steps",)),
    _Rule(("quantize", "options"), _options),
    _Rule(("quantize", "scheme"), _scheme),
    _Rule(("publish",), _hub, but=("to", "set")),
    _Rule(("device",), _device),
    _Rule(("requantize",), _requantize),
)
