"""A short run of the fuzzer: everything that comes with a model is read, or refused in one line."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import strategies as st

from llmconvert.errors import CheckpointError

#: Inputs of each kind: as many as take a second or two.
EXECUTIONS = {"safetensors": 120, "pickle": 60, "index": 120, "config": 6, "chat template": 40, "tokenizer": 3}


@pytest.fixture(scope="module")
def fuzzer() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
        yield importlib.import_module("fuzz")


@pytest.mark.parametrize("name", EXECUTIONS)
def test_nothing_is_found(fuzzer: ModuleType, name: str) -> None:
    outcome = fuzzer.fuzz(fuzzer.TARGETS[name], seconds=500, seed=7, executions=EXECUTIONS[name])
    assert outcome.findings == {}
    assert outcome.executions == EXECUTIONS[name]
    assert outcome.refused > 0, "nothing was wrong with any of them"


def test_every_target_has_its_share(fuzzer: ModuleType) -> None:
    assert set(fuzzer.TARGETS) == set(EXECUTIONS)


def test_what_is_no_error_of_the_package_is_found(fuzzer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(given: int, directory: Path) -> None:
        if given % 3 == 0:
            raise KeyError(given)
        if given % 3 == 1:
            raise CheckpointError("two\nlines")
        while True:
            pass

    monkeypatch.setattr(fuzzer, "SLOWEST", 1)
    target: Any = fuzzer.Target(st.sampled_from([0, 1, 2]), run)
    found = list(fuzzer.fuzz(target, seconds=60, executions=8).findings)
    assert any(where.startswith("KeyError at test_fuzz.py") for where in found)
    assert any(where.startswith("a message of 9 characters") for where in found)
    assert any(where.startswith("_Slow at test_fuzz.py") for where in found)
