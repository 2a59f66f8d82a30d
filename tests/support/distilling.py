"""Quick distillation of a tiny quantized model, also in a process of its own that is killed."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from support.kills import die_when_replaced
from support.tiny_architectures import ids

from llmconvert.context import Context
from llmconvert.gguf.checkpoint import open_artifact
from llmconvert.quantize.distil.job import plan_distil
from llmconvert.quantize.distil.options import DistilOptions
from llmconvert.quantize.distil.student import Subject
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import parse_scheme
from llmconvert.report.steps import DistilReport
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint

__all__ = ["QUICK", "WINDOWS", "distil", "distil_until_killed", "quantized", "subject_of"]

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


def distil_until_killed(original: Path, artifact: Path, output: Path, state: Path, kill_at: int) -> None:
    """In a process of its own; ends by SIGKILL when the state is being replaced for the ``kill_at``-th time."""
    die_when_replaced(state, kill_at)
    distil(original, artifact, output, state=state)
