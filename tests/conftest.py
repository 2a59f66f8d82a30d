"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny_llama_dir


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny float32 Llama with its tokenizer, shared by the whole run: read it, don't change it."""
    return tiny_llama_dir(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees a token of the user who runs it."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
