"""The recipe reference of the documentation: every section and key, from the pydantic schema alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from llmconvert.recipes.schema.recipe import Recipe

__all__ = ["markdown_reference"]

_ROLE = re.compile(r":\w+:`~?([\w.]+)`")
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_WORDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true` or `false`"}
# No reader needs to be told that a seed has 63 bits, or that there are no windows of 17 million tokens.
_LARGE = 1 << 20


def markdown_reference() -> str:
    """Markdown of all sections in the order in which a recipe names them: what each is, its keys, types, defaults."""
    schema = Recipe.model_json_schema(by_alias=True)
    return "\n\n".join(_section(path, node, schema["$defs"]) for path, node in _sections((), schema, schema["$defs"]))


def _sections(path: tuple[str, ...], node: Mapping[str, Any], defs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield ".".join(path), node
    for key, value in node["properties"].items():
        name, many = _reference(value)
        if name:
            yield from _sections((*path, f"{key}[]" if many else key), defs[name], defs)


def _reference(value: Mapping[str, Any]) -> tuple[str, bool]:
    """The definition that a key's values follow, and whether it is a list of them; empty if it is no section."""
    for choice in value.get("anyOf", [value]):
        many = "items" in choice
        target = (choice["items"] if many else choice).get("$ref", "")
        if target:
            return target.rpartition("/")[2], many
    return "", False


def _section(path: str, node: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    heading = f"### `{path}`" if path else "### The recipe"
    lines = [heading, "", _prose(node["description"]), "", "| key | value | default |", "|---|---|---|"]
    for key, value in node["properties"].items():
        own = f"{path}.{key}" if path else key
        lines.append(f"| `{key}` | {_value(own, value)} | {_default(key, value, node)} |")
    return "\n".join(lines)


def _value(path: str, value: Mapping[str, Any]) -> str:
    name, many = _reference(value)
    if not name:
        return _type(value)
    described = f"a list of sections, [`{path}[]`](#{_anchor(path)})" if many else f"[a section](#{_anchor(path)})"
    plain = [
        choice for choice in value.get("anyOf", ()) if "type" in choice and choice["type"] not in ("null", "array")
    ]
    if many and plain:
        return f"{_type(plain[0])}, or {described}"
    return f"{described}, or `true` for its defaults" if not many and _takes_true(path) else described


def _anchor(path: str) -> str:
    """As GitHub and the site make one of the heading."""
    return re.sub(r"[^\w-]", "", path.lower())


def _takes_true(path: str) -> bool:
    """Whether the schema itself accepts ``true`` in a section's place."""
    model: Any = Recipe
    *parents, key = path.split(".")
    for part in parents:
        model = _field_model(model, part)
    field = _field(model, key)
    if not field.metadata:
        return False
    annotation: Any = Annotated[field.annotation, *field.metadata]
    try:
        TypeAdapter(annotation).validate_python(True)
    except ValidationError:
        return False
    return True


def _field(model: Any, key: str) -> Any:
    return next(field for name, field in model.model_fields.items() if key in (name, field.alias))


def _field_model(model: Any, key: str) -> Any:
    annotation = _field(model, key).annotation
    return next(one for one in (annotation, *getattr(annotation, "__args__", ())) if hasattr(one, "model_fields"))


def _type(value: Mapping[str, Any]) -> str:
    if "description" in value:  # types that describe themselves
        return str(value["description"])
    if "anyOf" in value:
        return " or ".join(_type(choice) for choice in value["anyOf"] if choice.get("type") != "null")
    if "enum" in value or "const" in value:
        choices = value.get("enum", [value.get("const")])
        return " or ".join(f"`{choice}`" for choice in choices)
    if value.get("type") == "array":
        return f"a list: {_type(value['items'])}"
    if value.get("type") == "object":
        return f"keys with values: {_type(value['additionalProperties'])}"
    words = _WORDS[value["type"]]
    bounds = [f"{sign} {value[key]}" for key, sign in _BOUNDS.items() if key in value and value[key] < _LARGE]
    return ", ".join([words, *bounds])


def _default(key: str, value: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    if key in node.get("required", ()):
        return "**required**"
    default = value.get("default")
    # A section that is there by default has the defaults of its keys.
    if default is None or default in ([], {}) or _reference(value)[0]:
        return ""
    shown = json.dumps(default, ensure_ascii=False).strip('"') if not isinstance(default, str) else default
    return f"`{shown}`"


def _prose(docstring: str) -> str:
    text = _ROLE.sub(lambda match: f"`{match[1].rpartition('.')[2]}`", docstring.replace("``", "`"))
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
