"""The lines of ``docs/formats.md`` that open an artifact, which the tests run as they stand but for its place."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["ARTIFACT", "loading_snippets"]

#: What the page calls the artifact.
ARTIFACT = "out/artifact"
PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


def loading_snippets() -> dict[str, str]:
    """First comment line → code, of every block that opens an artifact."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return {block.partition("\n")[0].removeprefix("# "): block for block in blocks if f'"{ARTIFACT}"' in block}
