"""The house rules that a machine can check: imports run one way between rooms at every level, and rooms stay small."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("llmconvert", "quantize", "convert", "validate", "recipes")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
# From the ground up: a module may import from its own room and from those before it.
ORDER = (
    *(
        "version",
        "printable",
        "errors",
        "machine",
        "phases",
        "device",
        "memory",
        "interrupt",
        "progress",
        "needs",
    ),
    *("hub", "storage", "report", "text", "compute", "context", "engine", "gguf", "training"),
    *("quantize", "convert", "validate", "recipes", "api", "cli", "__main__"),
)


def module_of(path: Path) -> tuple[str, ...]:
    """The dotted parts of a file's module, below ``llmconvert``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1:] if parts[0] == "llmconvert" else parts


def imports_of(path: Path) -> Iterator[tuple[str, ...]]:
    """What a file imports of this package, in dotted parts below ``llmconvert``."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *parts = name.split(".")
            if package == "llmconvert":
                yield tuple(parts)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way_between_rooms(path: Path) -> None:
    own = module_of(path)
    if own == ("__init__",):
        return  # the public face re-exports what lies below the command line
    for imported in imports_of(path):
        room = imported[0] if imported else own[0]
        assert ORDER.index(room) <= ORDER.index(own[0]), f"{path.relative_to(ROOT)} imports {'.'.join(imported)}"


def test_no_folder_holds_a_circle() -> None:
    """At every level, a folder's files and subfolders import each other one way."""
    children: dict[tuple[str, ...], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path in SOURCES:
        own = module_of(path)
        if own == ("__init__",):
            continue
        for imported in imports_of(path):
            common = next((i for i, (a, b) in enumerate(zip(own, imported, strict=False)) if a != b), None)
            if common is not None:
                children[own[:common]][own[common]].add(imported[common])
    for folder, graph in children.items():
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail(f"{'/'.join(folder) or 'llmconvert'}: a circle, {' ← '.join(error.args[1])}")


def test_folders_stay_small() -> None:
    for folder in {path.parent for path in SOURCES}:
        name = folder.relative_to(ROOT).as_posix()
        assert len(list(folder.glob("*.py"))) <= 15, f"{name} wants a subfolder that groups its files"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path: Path) -> None:
    assert path.stem != "utils"
    assert len(path.read_text().splitlines()) <= 400


def test_a_plan_loads_nothing_that_only_runs() -> None:
    """Importing takes more than half of a large plan; what only runs is imported where it is called."""
    files = {module_of(path): path for path in SOURCES}
    found: set[tuple[str, ...]] = set()
    libraries: set[str] = set()
    pending = [("recipes", "planning", "planner"), ("recipes", "compatibility"), ("quantize", "methods", "gptq")]
    while pending:
        module = pending.pop()
        if module in found or module not in files:
            continue
        found.add(module)
        for node in ast.parse(files[module].read_text()).body:  # what functions import is theirs
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                package, *parts = name.split(".")
                libraries.add(package)
                if package == "llmconvert":
                    pending.append(tuple(parts))
    assert "torch" in libraries and not libraries & {"numba", "llvmlite", "matplotlib"}
    rooms = {module[:2] for module in found}
    assert ("recipes", "stages") in rooms and not rooms & {
        ("convert", "gqa"),
        ("convert", "heal"),
        ("validate", "runtimes"),
    }
