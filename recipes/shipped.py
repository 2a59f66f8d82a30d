"""The recipes that come with the package: names, texts, and what each begins with saying."""

from __future__ import annotations

import difflib
import re
from importlib import resources
from pathlib import Path

from llmconvert.errors import RecipeError

__all__ = ["about_recipe", "read_shipped", "shipped_recipes"]

# Of a sentence, or where its details begin.
_END = re.compile(r"[.:;](?= )|\.$")


def shipped_recipes() -> dict[str, Path]:
    """Name → file of the recipes that come with the package."""
    folder = Path(str(resources.files("llmconvert.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_shipped(name: str) -> str:
    """The text of a shipped recipe.

    Raises:
        RecipeError: there is none of that name.
    """
    shipped = shipped_recipes()
    if name not in shipped:
        close = difflib.get_close_matches(name, shipped, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise RecipeError(f"no shipped recipe is called {name!r}; shipped are {', '.join(shipped)}{hint}")
    return shipped[name].read_text(encoding="utf-8")


def about_recipe(name: str) -> str:
    """A shipped recipe in one line: the first sentence of its first comment."""
    lines = []
    for line in read_shipped(name).splitlines():
        if not line.startswith("# "):
            break
        lines.append(line.removeprefix("# "))
    text = " ".join(lines)
    return text[: found.start()] if (found := _END.search(text)) else text
