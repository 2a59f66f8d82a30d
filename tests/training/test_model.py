"""Resident models of a training: heads are multiplied by as they are, however many positions are asked for."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_architectures import ids
from support.tiny_models import tiny_llama_dir
from torch.utils._python_dispatch import TorchDispatchMode

from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.training.loop import _share_of_rate
from llmconvert.training.model import ResidentModel
from llmconvert.training.options import TrainingOptions


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("positions", [slice(None), slice(3, 9), slice(1, None, 2)], ids=str)
def test_no_head_is_copied_for_some_positions(positions: slice, tmp_path: Path) -> None:
    with SafetensorsCheckpoint(tiny_llama_dir(tmp_path / "model")) as checkpoint, torch.no_grad():
        model = ResidentModel(checkpoint, torch.device("cpu"), torch.bfloat16)
        hidden, _ = model.decode(ids((24,), seed=3)[0])
        whole = model.logits(hidden)
        with Operations() as operations:
            found = model.logits(hidden[:, positions])
    torch.testing.assert_close(found, whole[:, positions])
    assert operations.seen["mm"] == 1 and not operations.seen["bmm"], operations.seen


def test_the_rate_is_transformers_schedule() -> None:
    from transformers import get_cosine_schedule_with_warmup

    options = TrainingOptions(steps=37, warmup=0.2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 7, options.steps + 1)
    for step in range(options.steps + 1):
        assert math.isclose(_share_of_rate(options, step), optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
