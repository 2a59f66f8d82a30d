"""A recipe with lists of values for some of its keys, as the recipes that these stand for.

::

    matrix:
      quantize.method: [gptq, gptaq]
      quantize.scheme: [w4a16-g64, w3a16-g64]
      exclude:
        - {quantize.method: gptaq, quantize.scheme: w3a16-g64}
    pick: smallest within 2%

Every combination that ``exclude`` does not name is a variant, a whole recipe of its own. ``--set quantize.scheme=a,b``
is a list as well, where the key takes no such text itself.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmconvert.errors import RecipeError
from llmconvert.recipes.loading import assign, load_values, make_recipe, read_override
from llmconvert.recipes.schema.recipe import Recipe
from llmconvert.recipes.sweep.pick import Pick

__all__ = ["Sweep", "Variant", "load_sweep", "make_sweep", "require_places"]

#: Variants of one sweep; more are refused.
_MOST = 256
_NOT_IN_A_NAME = re.compile(r"[^\w.-]+")


@dataclass(frozen=True, slots=True)
class Variant:
    """One combination.

    Attributes:
        name: of the variant: the recipe's, and the values that tell it from the others.
        settings: key path → value, of the keys that have lists.
        recipe: with these values; None where they make none, and ``problem`` says why.
        problem: what is wrong with the combination.
        unread: settings that nothing would use in it, and why.
    """

    name: str
    settings: Mapping[str, Any]
    recipe: Recipe | None
    problem: RecipeError | None = None
    unread: Mapping[Any, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sweep:
    """A recipe's variants.

    Attributes:
        name: of the recipe.
        variants: in the order of the lists, the last key's values changing first.
        pick: which of them is published; all that pass, if None.
    """

    name: str
    variants: tuple[Variant, ...]
    pick: Pick | None = None

    @property
    def work_dir(self) -> str:
        """Where the recipe keeps its stages."""
        return next(variant.recipe.work_dir for variant in self.variants if variant.recipe is not None)

    def require_measured(self) -> None:
        """Refuse, before the work, a rule by a number that no variant will have.

        Raises:
            RecipeError: see :meth:`llmconvert.recipes.sweep.pick.Pick.require_measured`.
        """
        if self.pick is not None:
            self.pick.require_measured([variant.recipe for variant in self.variants if variant.recipe is not None])


def load_sweep(source: str | Path, overrides: Sequence[str] = ()) -> Sweep | None:
    """The variants of a recipe file, or of a shipped recipe; None if it is one recipe.

    Args:
        source, overrides: see :func:`llmconvert.load_recipe`.

    Raises:
        RecipeError: the file is none; a key of the matrix is unknown or has no list; no combination is left; or all
            of them are wrong for one reason.
    """
    plain, lists = [], {}
    for override in overrides:
        path, value = read_override(override)
        if isinstance(value, str) and "," in value and not _taken_whole(source, overrides, override):
            _, values = read_override(f"{override.partition('=')[0]}=[{value}]")
            lists[".".join(map(str, path))] = values
        else:
            plain.append(override)
    values = load_values(source, plain)
    if not lists and "matrix" not in values and "pick" not in values and _schemes(values) is None:
        return None
    return make_sweep(values, str(source), lists)


def make_sweep(values: Mapping[str, Any], where: str = "recipe", lists: Mapping[str, Sequence[Any]] = {}) -> Sweep:
    """The variants that plain values describe; ``lists`` are more keys of the matrix.

    Raises:
        RecipeError: see :func:`load_sweep`.
    """
    base = dict(values)
    schemes = _schemes(base)
    if schemes is not None:
        base["quantize"] = {key: value for key, value in base["quantize"].items() if key != "schemes"}
        lists = {"quantize.scheme": schemes, **lists}
    axes, excluded = _axes(base.pop("matrix", {}), where, lists)
    pick = _pick(base.pop("pick", None), where)
    count = math.prod(len(axis) for axis in axes.values())
    if count > _MOST:
        raise RecipeError(f"{where}: matrix: makes {count:,} variants; at most {_MOST} are run, so leave some out")
    variants: list[Variant] = []
    for combination in itertools.product(*axes.values()):
        settings = dict(zip(axes, combination, strict=True))
        if any(all(settings.get(key) == value for key, value in one.items()) for one in excluded):
            continue
        variants.append(_variant(base, settings, _name(base, axes, settings), where))
    if not variants:
        raise RecipeError(f"{where}: matrix: exclude leaves no variant")
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"{where}: matrix: two variants would be called {name}; give every value once")
    if all(variant.recipe is None for variant in variants):
        raise variants[0].problem or RecipeError(f"{where}: no variant can be made")
    made = [variant for variant in variants if variant.recipe is not None]
    idle = [text for path, text in made[0].unread.items() if all(path in variant.unread for variant in made)]
    if idle:
        raise RecipeError("\n".join(f"{where}: {text}" for text in idle))
    return Sweep(str(base.get("name", "recipe")), tuple(variants), pick)


def _schemes(values: Mapping[str, Any]) -> Any:
    """``quantize.schemes``, which is short for a matrix of ``quantize.scheme``; None without."""
    quantize = values.get("quantize")
    return quantize.get("schemes") if isinstance(quantize, Mapping) else None


def _axes(
    matrix: Any, where: str, lists: Mapping[str, Sequence[Any]]
) -> tuple[dict[str, Sequence[Any]], Sequence[Mapping[str, Any]]]:
    """The keys with their values, and the combinations to leave out."""
    if not isinstance(matrix, Mapping):
        raise RecipeError(f"{where}: matrix: expected keys with lists, for example quantize.scheme: [w4a16-g64, w8a16]")
    excluded = matrix.get("exclude") or []
    axes = {str(key): value for key, value in matrix.items() if key != "exclude"} | dict(lists)
    for key, value in axes.items():
        if not isinstance(value, list) or not value:
            raise RecipeError(f"{where}: matrix.{key}: expected a list of values, found {value!r}")
    if not isinstance(excluded, list) or not all(isinstance(one, Mapping) and one for one in excluded):
        raise RecipeError(f"{where}: matrix.exclude: expected a list of combinations, each keys with one value")
    for one in excluded:
        for key, value in one.items():
            if key not in axes or value not in axes[key]:
                raise RecipeError(f"{where}: matrix.exclude: {key}: {value!r} is no value of the matrix")
    if not axes:
        raise RecipeError(f"{where}: there is nothing to choose from: give matrix, keys with lists of values")
    return axes, excluded


def _pick(text: Any, where: str) -> Pick | None:
    if text is None:
        return None
    try:
        return Pick.parse(str(text))
    except ValueError as error:
        raise RecipeError(f"{where}: pick: {error}") from error


def _variant(base: Mapping[str, Any], settings: Mapping[str, Any], name: str, where: str) -> Variant:
    values = copy.deepcopy(dict(base))
    try:
        for key, value in settings.items():
            assign(values, tuple(int(part) if part.isdecimal() else part for part in key.split(".")), value)
        unread: dict[Any, str] = {}
        recipe = make_recipe({**values, "name": name}, f"{where}, variant {name}", unread=unread)
        return Variant(name, settings, recipe, unread=unread)
    except RecipeError as error:
        return Variant(name, settings, None, error)


def _name(base: Mapping[str, Any], axes: Mapping[str, Sequence[Any]], settings: Mapping[str, Any]) -> str:
    words = [_word(value) for key, value in settings.items() if len(axes[key]) > 1]
    return "-".join([str(base.get("name", "recipe")), *words])


def _word(value: Any) -> str:
    """A value as a part of a name."""
    if isinstance(value, Mapping | list):
        return "-".join(_word(leaf) for leaf in _leaves(value)) or "none"
    return _NOT_IN_A_NAME.sub("-", "none" if value is None else str(value)).strip("-")


def _leaves(value: Any) -> Iterator[Any]:
    parts = value.values() if isinstance(value, Mapping) else value
    for part in parts:
        yield from _leaves(part) if isinstance(part, Mapping | list) else (part,)


def _taken_whole(source: str | Path, overrides: Sequence[str], override: str) -> bool:
    """Whether a setting's key takes its text with commas as it is."""
    others = [other for other in overrides if other != override and "," not in other]
    values = load_values(source, [*others, override])
    matrix = values.pop("matrix", None)
    values.pop("pick", None)
    if isinstance(matrix, Mapping):  # keys that have lists may be missing without
        for key, axis in matrix.items():
            if key != "exclude" and isinstance(axis, list) and axis and str(key) != override.partition("=")[0]:
                assign(values, tuple(str(key).split(".")), axis[0])
    try:
        make_recipe(values)
    except RecipeError as error:  # what is wrong with other keys is told later
        key = override.partition("=")[0].strip()
        return not any(f": {key}: " in line for line in str(error).splitlines())
    return True


def _one_place(sweep: Sweep) -> bool:
    return any(v.recipe is not None and v.recipe.publish is not None and v.recipe.publish.set for v in sweep.variants)


def require_places(sweep: Sweep) -> None:
    """Refuse variants that would take each other's place where they are published.

    Raises:
        RecipeError: naming two of them.
    """
    from llmconvert.recipes.publishing import fill_target

    if sweep.pick is not None or _one_place(sweep):
        return  # one of them goes there, or all together
    places: dict[tuple[str, ...], str] = {}
    for variant in sweep.variants:
        if variant.recipe is None or variant.recipe.publish is None:
            continue
        target = fill_target(variant.recipe).publish
        assert target is not None
        place = (target.to, target.revision or "", target.folder or "")
        if place in places:
            raise RecipeError(
                f"{sweep.name}: publish: {places[place]} and {variant.name} would both be published to {target.to}; "
                "tell them apart, for example with {name} in publish.to or publish.folder, or pick one of them"
            )
        places[place] = variant.name
