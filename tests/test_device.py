"""Devices by name, and what is said where there is none."""

from __future__ import annotations

import pytest
import torch

from llmconvert.device import open_device
from llmconvert.errors import UsageError


def test_the_cpu_is_always_there() -> None:
    assert open_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("built", "count", "name", "problem"),
    [
        (False, 0, "cuda", "is built without CUDA"),
        (True, 0, "cuda", "found 0 CUDA devices; check the driver"),
        (True, 2, "cuda:2", r"found 2 CUDA devices; name one of cuda:0 … cuda:1"),
        (True, 1, "cuda", ""),
        (True, 2, "cuda:1", ""),
    ],
)
def test_a_gpu_that_is_not_there(
    built: bool, count: int, name: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if problem:
        with pytest.raises(UsageError, match=f"{name}.*{problem}"):
            open_device(name)
    else:
        assert open_device(name) == torch.device(name)
