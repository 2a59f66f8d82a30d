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
