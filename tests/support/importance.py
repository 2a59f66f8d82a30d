"""The importance matrix of a model, as a job measures it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from llmconvert.engine.discovery import discover
from llmconvert.engine.memory import MemoryEstimate
from llmconvert.engine.skeleton import Skeleton
from llmconvert.phases import Phases
from llmconvert.quantize.methods.base import InputSquares
from llmconvert.quantize.methods.imatrix import Imatrix
from llmconvert.quantize.plan import plan_encoding
from llmconvert.quantize.steps import CalibratedSteps
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["collect_importance"]


def collect_importance(source: Checkpoint, windows: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Checkpoint name of every linear's weight → float32 ``[columns]``, the mean squares of its inputs."""
    skeleton = Skeleton(source, torch.device("cpu"), products="fast")
    blocks = discover(skeleton, max(window.shape[1] for window in windows))
    plan = plan_encoding(skeleton)
    steps = CalibratedSteps(
        skeleton,
        Imatrix(),
        plan,
        skeleton.dtype,
        Phases(),
        blocks,
        tuple(windows),
        memory=MemoryEstimate("lockstep", {}),
    )
    importance: dict[str, torch.Tensor] = {}
    with TemporaryDirectory() as work:
        for step in steps.run(Path(work), 0):
            for name, found in step.solve():
                assert isinstance(found, InputSquares)
                importance[plan.sites[name].tensor] = found.mean
    return importance
