"""Models for the tests of this folder."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama


@pytest.fixture(scope="session")
def tiny_llama_model() -> torch.nn.Module:
    """A resident tiny Llama in float32: read it, don't change it."""
    return tiny_llama()
