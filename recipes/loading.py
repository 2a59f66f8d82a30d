"""Reading recipes: YAML to :class:`Recipe`, with errors that say where, what, and what was probably meant."""

from __future__ import annotations

import difflib
import os
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from llmconvert.errors import RecipeError, one_line
from llmconvert.recipes.consistency import KeyPath, contradictions
from llmconvert.recipes.origin import Origin
from llmconvert.recipes.schema.recipe import Recipe
from llmconvert.recipes.schema.section import Section
from llmconvert.recipes.shipped import shipped_recipes
from llmconvert.recipes.unused import unused
from llmconvert.text.files import local_path, read_text

__all__ = ["assign", "load_recipe", "load_values", "make_recipe", "parse_recipe", "read_override"]

# Parts of what the YAML parser says, and what is said instead.
_IN_WORDS = (
    ("'\\t'", "a tab; YAML is indented with spaces"),
    ("another document", "a second document begins (---); a recipe is one, and several files are a batch"),
    ("could not determine a constructor", "a tag (!…) names a type of its own; write the value itself"),
    ("escape", "a backslash in double quotes begins an escape; put a path in single quotes"),
    ("for merging", "a merge key (<<) takes a section by its anchor, or several: <<: *name"),
    ("undefined alias", "an alias (*name) stands for what an anchor (&name) before it marks, and there is none"),
)
# Bytes of a recipe, and keys that YAML's merging may add to one; those that people write are a hundredth of both.
_LONGEST = 1 << 20
_MOST_MERGED = 10_000
# What keys with a form of their own expect.
_FORMS: Mapping[str | int, str] = {
    "name": "letters, digits, dots, _ and - alone",
    "base_model": "a Hub id, org/name",
    "folder": "the path of a folder, of letters, digits, dots, _ and -",
}
# Characters of a value that an error shows.
_LONGEST_VALUE = 100
# What pydantic puts into paths where a value may be of several kinds.
_BRANCH = re.compile(r"(function-|constrained-|tuple\[)")


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a shipped recipe by its name.

    Args:
        source: a path, or one of :func:`~llmconvert.recipes.shipped.shipped_recipes` if no such file exists.
        overrides: ``"a.b=value"`` each, applied in order; the value is read as YAML, ``null`` removes a section,
            and a number in the path (``quantize.overrides.0.scheme``) is a place in a list.

    Raises:
        RecipeError: the file does not exist or is no YAML mapping, or a key or value is wrong.
    """
    path = _find(source)
    return parse_recipe(_text_of(path), str(source), overrides=overrides, name=path.stem)


def _find(source: str | Path) -> Path:
    path, name = local_path(source), str(source)
    if os.path.exists(path):  # of names that no file can have, false
        if (path / "config.json").exists() or path.suffix == ".gguf":
            raise RecipeError(
                f"recipe {name}: is a model; a recipe names it (model: {name}), or a command of its own takes it, "
                f"llmconvert quantize {name} --plan for one"
            )
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    close = [f"the shipped recipe {found}" for found in difflib.get_close_matches(path.stem, shipped, n=1)]
    close += _beside(path)
    hint = f"; did you mean {close[-1]}?" if close else ""
    raise RecipeError(f"recipe {name}: no such file, and no shipped recipe; shipped are {', '.join(shipped)}{hint}")


def _beside(path: Path) -> list[str]:
    """The recipe file in the same folder whose name comes nearest to that of one which isn't there."""
    try:
        names = [found.name for found in path.parent.iterdir() if found.suffix in (".yaml", ".yml")]
    except (OSError, ValueError):
        return []
    return [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, names, n=1)]


def parse_recipe(text: str, where: str, *, overrides: Sequence[str] = (), name: str = "recipe") -> Recipe:
    """The recipe that YAML ``text`` describes; ``where`` names it in errors, ``name`` is used if it has none.

    Raises:
        RecipeError: one line per problem, each with the key's path, its line, and the nearest valid key.
    """
    values, lines, problems = _read_values(text, where, overrides)
    settings = tuple((override, read_override(override)[0]) for override in overrides)
    return _validated({"name": name, **values}, Origin(where, lines, settings), problems)


def load_values(source: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a recipe file says, as plain values with a name, before any of them is checked; see :func:`load_recipe`.

    Raises:
        RecipeError: the file does not exist or is no YAML mapping, or a key is given twice.
    """
    path = _find(source)
    values, _, problems = _read_values(_text_of(path), str(source), overrides)
    if problems:
        raise RecipeError("\n".join(problems))
    return {"name": path.stem, **values}


def _text_of(path: Path) -> str:
    try:
        return read_text(path, _LONGEST)
    except ValueError as error:
        raise RecipeError(f"recipe {path}: {error}") from error


def _read_values(
    text: str, where: str, overrides: Sequence[str]
) -> tuple[dict[str, Any], dict[KeyPath, int], list[str]]:
    """The plain values of a recipe, the lines of its keys, and what is wrong with these."""
    node, values = _read_yaml(text, where)
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: expected keys and values (model: …), found {_describe(values)}")
    lines: dict[KeyPath, int] = {}
    problems = [f"{where}, line {line}: key {_dotted(path)} is given twice" for path, line in _keys(node, lines, set())]
    for override in overrides:
        key = read_override(override)
        assign(values, *key)
        lines = {path: line for path, line in lines.items() if path[: len(key[0])] != key[0]}
    return values, lines, problems


def _read_yaml(text: str, where: str) -> tuple[yaml.Node | None, Any]:
    """The nodes of a YAML text, and the value it stands for.

    Raises:
        RecipeError: it is no YAML; is nested too deep; or merges its sections into each other without end.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if _merged(node, {}) > _MOST_MERGED:
            raise RecipeError(
                f"{where}: not a recipe: merge keys (<<) would make more than {_MOST_MERGED:,} keys of it"
            )
        return node, yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        said = " ".join(str(getattr(error, "problem", None) or error).split())
        reason = next((words for part, words in _IN_WORDS if part in said), said)
        raise RecipeError(f"{where}{line}: not YAML: {reason}") from error
    except RecursionError as error:
        raise RecipeError(f"{where}: not YAML that can be read: it is nested too deep") from error
    except (ValueError, TypeError, OverflowError) as error:  # dates that no calendar has, numbers of 5,000 digits
        raise RecipeError(f"{where}: not YAML that can be read: {one_line(error)}") from error


def _merged(node: Any, known: dict[int, int]) -> int:
    """How many keys a node's merge keys bring in, counted without merging anything."""
    if id(node) in known or not isinstance(node, yaml.CollectionNode):
        return known.get(id(node), 0)
    known[id(node)] = 0  # what merges itself is refused by the loader
    total = 0
    for part in node.value:
        key, value = part if isinstance(part, tuple) else (None, part)
        inside = _merged(value, known)
        total = max(total, inside)
        if key is not None and key.tag == "tag:yaml.org,2002:merge":
            sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
            total += sum(_merged(source, known) + len(getattr(source, "value", ())) for source in sources)
    known[id(node)] = total
    return total


def make_recipe(
    values: Mapping[str, Any],
    where: str = "recipe",
    *,
    options: Mapping[KeyPath, str] | None = None,
    unread: dict[KeyPath, str] | None = None,
) -> Recipe:
    """The recipe that plain values describe.

    Args:
        where: what they come from, for errors.
        options: key path → the command's option for it, given or not.
        unread: is given the settings that nothing would use, with the reasons; without it they are problems.

    Raises:
        RecipeError: one line per problem, each with the key's path, and the option where there is one.
    """
    return _validated(dict(values), Origin(where, options=options or {}), [], unread)


def _validated(
    values: dict[str, Any], origin: Origin, problems: list[str], unread: dict[KeyPath, str] | None = None
) -> Recipe:
    found: Iterable[tuple[KeyPath, str]]
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        found = _problems(error)
    else:
        idle = dict(unused(recipe))
        if unread is not None:
            unread.update(idle)
        found = (*contradictions(recipe), *(idle.items() if unread is None else ()))
    problems += origin.problems(found, values)
    if not problems and recipe.quantize is not None:
        # What classes of methods and formats say of each other: torch is loaded for it, and for nothing before.
        from llmconvert.recipes.compatibility import incompatibilities

        problems += origin.problems(incompatibilities(recipe), values)
    if not problems:
        return recipe
    raise RecipeError("\n".join(problems))


def read_override(text: str) -> tuple[KeyPath, Any]:
    """``"a.b=value"`` as key path and value.

    Raises:
        RecipeError: no ``=``, an empty key, or a value that is not YAML.
    """
    key, separator, said = text.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise RecipeError(f"--set {text}: expected key=value, for example quantize.scheme=w4a16-g64")
    _, value = _read_yaml(said, f"--set {text}")
    return tuple(int(part) if re.fullmatch(r"\d{1,9}", part, re.ASCII) else part for part in parts), value


def assign(values: dict[str, Any], path: KeyPath, value: Any) -> None:
    """Set a key in plain values, with the sections that it lies in.

    Raises:
        RecipeError: a part of the path is a value, or no place in a list.
    """
    target: Any = values
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(target, list) and isinstance(part, int) and part < len(target):
            pass
        elif isinstance(target, dict) and isinstance(part, str):
            if not last and not isinstance(target.get(part), (dict, list)):
                if target.get(part) not in (None, True):
                    raise RecipeError(f"--set {_dotted(path)}: {_dotted(path[: depth + 1])} is a value, not a section")
                target[part] = {}
        else:
            found = f"a list of {len(target)}" if isinstance(target, list) else "no list"
            raise RecipeError(
                f"--set {_dotted(path)}: {_dotted(path[:depth]) or 'the recipe'} is {found}, found {part}"
            )
        if last:
            target[part] = value
        else:
            target = target[part]


def _keys(node: Any, lines: dict[KeyPath, int], seen: set[int], path: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    """Fill ``lines`` with the line of every key, and yield keys that are given twice."""
    if id(node) in seen:  # an alias; expanding them all could take forever
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            own = (*path, str(key.value))
            if own in lines:
                yield own, key.start_mark.line + 1
            lines[own] = key.start_mark.line + 1
            yield from _keys(value, lines, seen, own)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            own = (*path, index)
            lines[own] = value.start_mark.line + 1
            yield from _keys(value, lines, seen, own)


def _problems(error: ValidationError) -> Iterator[tuple[KeyPath, str]]:
    errors = list(_of_one_branch(error.errors(include_url=False)))
    suggested: set[KeyPath] = set()
    for item in errors:
        if item["type"] == "extra_forbidden":
            path: KeyPath = tuple(item["loc"])
            close = difflib.get_close_matches(str(path[-1]), _valid_keys(path[:-1]), n=1)
            suggested.update((*path[:-1], key) for key in close)
            yield path, f"unknown key {_dotted(path)}; {_suggestion(path, close)}"
    for item in errors:
        path = tuple(item["loc"])
        if item["type"] == "missing" and path not in suggested:
            named = "; name one, for example model: org/name" if path == ("model",) else ""
            yield path, f"[[{_dotted(path)}]] is missing{named}"
        elif item["type"] not in ("missing", "extra_forbidden"):
            reason = item["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
            if item["type"] == "string_pattern_mismatch":
                reason = f"expected {_FORMS.get(path[-1], 'another form')}"
            if item["type"] in ("model_type", "model_attributes_type", "dict_type", "mapping_type"):
                reason = f"should be a section{_example(path, item['input'])}"
            # What is not understood has been quoted by who did not understand it.
            found = "" if f"{item['input']!r} is not understood" in reason else f"found {_describe(item['input'])}: "
            yield path, f"{_dotted(path)}: {found}{reason}"


def _of_one_branch(errors: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Errors of what may be a name or a list: those of the one that was given, without its branch in their paths."""
    for item in errors:
        path = tuple(part for part in item["loc"] if not _BRANCH.match(str(part)))
        if len(path) < len(item["loc"]):
            if item["type"] == "tuple_type" or (item["type"] == "string_type" and _is_list(item["input"])):
                continue
            if item["type"] == "string_type" and _BRANCH.match(str(item["loc"][-1])):
                item = {**item, "msg": "expected a name, or a list of sections: [{name: …, share: 60%}, …]"}
        yield {**item, "loc": path}


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def _example(path: KeyPath, value: Any) -> str:
    """A value where a section should be, said as the section: ``, for example quantize: {method: rtn, …}``."""
    model: type[BaseModel] | None = Recipe
    for part in path:
        if model is not None and isinstance(part, str):
            model = dict(_sections(model)).get(part)
    understood = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    if model is None or not issubclass(model, Section) or not understood:
        keys = _valid_keys(path)
        return f", with keys of its own{': ' if keys else ''}{', '.join(keys)}"
    said = ", ".join(f"{key}: {_short(meant)}" for key, meant in model.meant_by(value).items())
    return f", for example {path[-1]}: {{{said}}}" if isinstance(path[-1], str) else f", for example {{{said}}}"


def _short(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _suggestion(path: KeyPath, close: Sequence[str]) -> str:
    if close:
        return f"did you mean {_dotted((*path[:-1], close[0]))}?"
    elsewhere = [_dotted(known) for known in _all_keys(Recipe) if known[-1] == path[-1]]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"valid here are {', '.join(_valid_keys(path[:-1]))}"


def _sections(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel] | None]]:
    """The keys of a section, and the model of those that are sections themselves."""
    for name, about in model.model_fields.items():
        yield about.alias or name, next(_models_in(about.annotation), None)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


def _valid_keys(path: KeyPath) -> list[str]:
    model: type[BaseModel] | None = Recipe
    for part in path:
        if model is not None and isinstance(part, str):
            model = dict(_sections(model)).get(part)
    return [key for key, _ in _sections(model)] if model is not None else []


def _all_keys(model: type[BaseModel], prefix: KeyPath = ()) -> Iterator[KeyPath]:
    for key, section in _sections(model):
        yield (*prefix, key)
        if section is not None:
            yield from _all_keys(section, (*prefix, key))


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def _describe(value: object) -> str:
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, (list, tuple)):
        return "a list"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = repr(value)
    except ValueError:  # a number of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"
