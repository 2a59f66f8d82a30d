"""Loading by transformers: what is wrong with a model is told from what the machine does."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmconvert.errors import MachineError, UnsupportedError
from llmconvert.validate.runtimes.transformers import runtime

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("unknown quantizer"), UnsupportedError),
        (OSError("no weights in this directory"), UnsupportedError),
        (OSError(errno.EIO, "Input/output error"), MachineError),
        (RuntimeError("can't allocate memory: you tried to allocate 8 bytes"), MachineError),
    ],
    ids=repr,
)
def test_only_the_models_own_faults_say_that_it_cannot_be_loaded(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[Exception]
) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    with pytest.raises(expected, match="load it"), runtime(tiny_llama, device=CPU):
        pass


def test_only_what_fails_twice_is_the_models_fault(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk's error is taken for a file that is not there, and shows as anything."""
    true_load, calls = transformers.AutoTokenizer.from_pretrained, []

    def load(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError("Repo id must be in the form 'repo_name' or 'namespace/repo_name'")
        return true_load(*arguments, **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    with runtime(tiny_llama, device=CPU) as loaded:
        assert not loaded.problems and len(calls) == 2
