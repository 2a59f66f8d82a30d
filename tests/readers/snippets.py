"""README's snippets, which the tests run as they stand there but for the artifact's place."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["ARTIFACT", "loading_snippets"]

#: What README calls the artifact.
ARTIFACT = "out/artifact"
README = Path(__file__).parent.parent.parent / "README.md"


def loading_snippets() -> dict[str, str]:
    """First comment line → code, of every block of README that opens an artifact."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return {block.partition("\n")[0].removeprefix("# "): block for block in blocks if f'"{ARTIFACT}"' in block}
