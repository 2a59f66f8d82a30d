"""What users install: every package and every file beside the code, under the names that imports use."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {folder: name for name, folder in SETTINGS["tool"]["setuptools"]["package-dir"].items()}
# Where the name of a package is not that of its import.
IMPORTS = {"yaml": "pyyaml"}
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def shipped() -> Iterator[tuple[Path, Path]]:
    """The files of the package: in this checkout, and as they are installed."""
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path, Path(*package.split(".")) / path.relative_to(ROOT / folder)


def test_every_folder_with_code_is_a_package() -> None:
    found = {".".join(name.parent.parts) for path, name in shipped() if path.suffix == ".py"}
    assert found == set(SETTINGS["tool"]["setuptools"]["packages"])


def test_a_wheel_holds_every_file(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-c", BUILD, "dist"], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {name.as_posix() for _, name in shipped()}
    assert {"llmconvert/py.typed", "llmconvert/recipes/demo.yaml", "llmconvert/quantize/runtimes.json"} <= names


def test_the_image_is_built_from_what_there_is() -> None:
    """No daemon runs here: `make lint` has hadolint read the file, and what it copies is looked for."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY ") and "--from=" not in line]
    named = {name for names in copied for name in names}
    assert all((ROOT / name).exists() for name in named)
    assert set(FOLDERS) | {"pyproject.toml", "README.md", "LICENSE", "constraints.txt"} == named
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE), "the image asks for it by that"


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_the_oldest_versions_that_are_tested_are_the_oldest_that_are_allowed(name: str) -> None:
    oldest = dict(line.split("==") for line in (ROOT / ".github" / "oldest.txt").read_text().splitlines()[1:])
    (allowed,) = (
        Requirement(text).specifier for text in SETTINGS["project"]["dependencies"] if Requirement(text).name == name
    )
    assert str(allowed) == f">={oldest[name].removesuffix('.0')}"


def test_the_versions_that_are_pinned_are_allowed() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    pinned = {canonical(name): version for name, version in (line.split("==") for line in lines)}
    project = SETTINGS["project"]
    for text in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[canonical(requirement.name)]), text


def imported() -> set[str]:
    """The packages of others that the code imports, by the name of the import."""
    found: set[str] = set()
    for path, _ in shipped():
        for node in ast.walk(ast.parse(path.read_text())) if path.suffix == ".py" else ():
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {"llmconvert"}


def test_what_the_code_imports_is_declared() -> None:
    project = SETTINGS["project"]
    extras = (project["optional-dependencies"][name] for name in ("datasets", "bnb", "gptq", "lm-eval", "ray"))
    declared = {canonical(Requirement(text).name) for part in (project["dependencies"], *extras) for text in part}
    # torch's CUDA builds bring Triton; runtimes that serve live in environments of their own.
    assert {canonical(IMPORTS.get(name, name)) for name in imported()} <= declared | {
        *("triton", "vllm", "mlx", "mlx-lm", "xllamacpp")
    }


def test_every_dependency_has_its_reason() -> None:
    page = (ROOT / "docs" / "dependencies.md").read_text()
    named = {canonical(name.strip()) for row in re.findall(r"^\| ([^|]+) \|", page, re.M) for name in row.split(",")}
    project = SETTINGS["project"]
    for part in (project["dependencies"], *project["optional-dependencies"].values()):
        for text in part:
            assert canonical(Requirement(text).name) in named, text


def canonical(name: str) -> str:
    return name.lower().replace("_", "-")
