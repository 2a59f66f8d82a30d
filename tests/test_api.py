"""The public Python API: complete, lazy, without side effects."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import llmconvert


@pytest.mark.parametrize("name", sorted(set(llmconvert.__all__) - {"__version__"}))
def test_every_public_name_is_what_its_module_exports(name: str) -> None:
    module = importlib.import_module(f"llmconvert.{llmconvert._MODULES[name]}")
    assert getattr(llmconvert, name) is getattr(module, name)
    assert name in module.__all__


def test_the_list_is_complete() -> None:
    assert set(llmconvert.__all__) == {*llmconvert._MODULES, "__version__"} == set(dir(llmconvert))
    assert not hasattr(llmconvert, "no_such_name")


def test_importing_loads_nothing_heavy_and_prints_nothing() -> None:
    code = (
        "import sys, llmconvert, llmconvert.cli; "
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'huggingface_hub', 'pydantic', 'yaml', 'rich'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
