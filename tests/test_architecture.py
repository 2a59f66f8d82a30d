"""The house rules that a machine can check: the direction of imports and the size of files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module may import from its own layer and from those before it.
LAYERS = ["errors", "progress", "hub", "core", "engine", "quantize", "convert", "validate", "recipes", "cli"]
FOLDERS = ("llmconvert", "quantize", "convert", "validate", "recipes")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def layer_of(parts: tuple[str, ...]) -> str:
    """The layer of a module given by its dotted parts below ``llmconvert``."""
    return parts[0] if parts and parts[0] in LAYERS else "core"


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    relative = path.relative_to(ROOT).with_suffix("").parts
    own = layer_of(relative[1:] if relative[0] == "llmconvert" else relative)
    if relative == ("llmconvert", "__init__"):
        own = "recipes"  # the public face: re-exports what lies below the command line
    for name in imports_of(path):
        parts = tuple(name.split("."))
        if parts[0] == "llmconvert" and len(parts) > 1:
            imported = layer_of(parts[1:])
            assert LAYERS.index(imported) <= LAYERS.index(own), f"{'/'.join(relative)} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path: Path) -> None:
    assert path.stem != "utils"
    assert len(path.read_text().splitlines()) <= 400
