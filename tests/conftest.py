"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# `python -m` and `python -c` put the working directory before what is installed: in the checkout that is the folder
# llmconvert/, which lacks what lies beside it. Neither the tests nor the processes that they start look there.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).parent.parent]
os.environ["PYTHONSAFEPATH"] = "1"
# How long tests take is no use to plans.
os.environ["LLMCONVERT_HISTORY"] = ""

from support.tiny_architectures import tiny_model
from support.tiny_mixtures import tiny_mixture
from support.tiny_models import tiny_llama_dir

# Tests run side by side: how long an example takes says nothing.
settings.register_profile("side by side", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("side by side")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny float32 Llama with its tokenizer, shared by the whole run: read it, don't change it."""
    return tiny_llama_dir(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny(name, dtype)``: the directory of a tiny model of that architecture, made once; only read it."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def directory(name: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = tiny_model(tmp_path_factory.mktemp("tiny") / name, name, dtype=dtype)
        return made[name, dtype]

    return directory


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``mixture(kind)``: the directory of a tiny mixture of experts of that family, made once; only read it."""
    made: dict[str, Path] = {}

    def directory(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny_mixture(tmp_path_factory.mktemp("mixture") / kind, kind)
        return made[kind]

    return directory


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees a token of the user who runs it."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
