"""Quick distillation of a tiny quantized model, also in a process of its own that is killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from support.kills import die_when_replaced
from support.tiny_architectures import ids
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from llmconvert.context import Context
from llmconvert.gguf.checkpoint import open_artifact
from llmconvert.quantize.distil.job import plan_distil
from llmconvert.quantize.distil.options import DistilOptions
from llmconvert.quantize.distil.student import Subject
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import parse_scheme
from llmconvert.report.steps import DistilReport
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint
from llmconvert.training.loop import Training

__all__ = [
    "QUICK",
    "WINDOWS",
    "distil",
    "distil_until_killed",
    "held_out_divergence",
    "interrupted_at",
    "quantized",
    "subject_of",
]

WINDOWS = ids((32,) * 36, seed=3)
QUICK = DistilOptions(steps=8, learning_rate=2e-2, code_rate=0.15, held_out=4, evaluate_every=4, save_every=2)


def quantized(original: Path, output: Path, scheme: str = "w3a16-g32", format: str = "compressed-tensors") -> Path:
    """``original`` rounded to nearest."""
    with SafetensorsCheckpoint(original) as source:
        quantize_checkpoint(source, output, method="rtn", scheme=parse_scheme(scheme), format=format)
    return output


def subject_of(original: Checkpoint, artifact: Checkpoint, options: DistilOptions) -> Subject:
    """What a plan of both would distil."""
    with TemporaryDirectory() as scratch:
        return plan_distil(original, artifact, Path(scratch) / "out", options, windows=WINDOWS)._subject


def distil(original: Path, artifact: Path, output: Path, options: DistilOptions = QUICK, **more: Any) -> DistilReport:
    settings: dict[str, Any] = {"windows": WINDOWS, "context": Context(), **more}
    with SafetensorsCheckpoint(original) as teacher, open_artifact(artifact) as student:
        return plan_distil(teacher, student, output, options, **settings).run()


@contextmanager
def interrupted_at(number: int) -> Iterator[None]:
    """A training in here is interrupted when it begins that step."""
    step = Training._step

    def stop(training: Training, current: int) -> object:
        if current == number:
            raise KeyboardInterrupt
        return step(training, current)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Training, "_step", stop)
        yield


def held_out_divergence(teacher: PreTrainedModel, student: PreTrainedModel) -> float:
    """Of transformers' models on the windows that are held out; nats per token."""
    parts = []
    with torch.no_grad():
        for window in WINDOWS[-QUICK.held_out :]:
            found, wanted = (model(window).logits[0].log_softmax(-1) for model in (student, teacher))
            parts.append(float(kl_div(found, wanted, log_target=True, reduction="sum")) / window.shape[1])
    return sum(parts) / len(parts)


def distil_until_killed(original: Path, artifact: Path, output: Path, state: Path, kill_at: int) -> None:
    """In a process of its own; ends by SIGKILL when the state is being replaced for the ``kill_at``-th time."""
    die_when_replaced(state, kill_at)
    distil(original, artifact, output, state=state)
