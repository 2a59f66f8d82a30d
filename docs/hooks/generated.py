"""Write the generated parts of the pages: what lies between ``<!-- name -->`` and ``<!-- /name -->``.

    python docs/hooks/generated.py

``tests/docs/test_generated.py`` holds that pages have what this writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from commands import markdown_commands

from llmconvert.quantize.matrix import markdown_matrix
from llmconvert.quantize.runtimes import markdown_table, recorded_runs
from llmconvert.recipes.schema.reference import markdown_reference

ROOT = Path(__file__).parents[2]
#: Page and name of a part → what makes it.
PARTS: Mapping[tuple[str, str], Callable[[], str]] = {
    ("README.md", "runtimes"): lambda: markdown_table(recorded_runs()),
    ("docs/commands.md", "commands"): markdown_commands,
    ("docs/methods.md", "matrix"): markdown_matrix,
    ("docs/recipe.md", "recipe"): markdown_reference,
}


def filled(page: str, name: str, content: str) -> str:
    """A page's text with that part replaced.

    Raises:
        ValueError: the page has no such part.
    """
    text, count = re.subn(
        rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)",
        lambda _: content + "\n",
        (ROOT / page).read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(f"{page}: expected one part {name}, found {count}")
    return text


def main() -> None:
    """Write all parts."""
    for (page, name), make in PARTS.items():
        (ROOT / page).write_text(filled(page, name, make()), encoding="utf-8")


if __name__ == "__main__":
    main()
