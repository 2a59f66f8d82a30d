"""Validation of a finished artifact: a list of measurements, made one after the other.

The artifact is opened again from disk: its files, not what was in memory when they were written. Original and artifact
are evaluated by the streaming engine side by side, block by block; the runtime loads one model at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from llmconvert.gguf.checkpoint import open_artifact
from llmconvert.memory import release_freed_memory
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.report.report import Check
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.text.tokens import TokenWindows
from llmconvert.validate.measurement import Measurement, Subject

__all__ = ["validate_artifact"]


def validate_artifact(
    artifact: Path,
    measurements: Sequence[Measurement],
    *,
    reference: Checkpoint | None,
    windows: TokenWindows | None = None,
    device: torch.device,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> list[Check]:
    """Measure an artifact, against the original where there is one.

    Args:
        artifact: directory in Hugging Face layout, quantized or not; or a GGUF file, or a directory with one.
        measurements: what to measure, in this order; each sees the checks of those before it.
        reference: the original, as stored. Its continuations need it to be a directory on disk.
        windows: evaluation text; without it no perplexity, divergence and fidelity.
        dtype: what evaluation computes in; the checkpoints' own by default.
        seed: of the bootstrap, and of whatever else is drawn.

    Returns:
        All checks. Limits that are missed are failed checks; :func:`llmconvert.report.report.require_passed` is the
        gate.

    Raises:
        CheckpointError: files cannot be read.
        CalibrationError: the reference computes NaN or infinity. (The artifact doing so is a failed check.)
        UsageError: the reference has another vocabulary.
    """
    with open_artifact(artifact) as stored:
        subject = Subject(
            artifact=artifact,
            stored=stored,
            dense=open_dense(stored),
            reference=reference,
            original=open_dense(reference) if reference is not None else None,
            windows=windows,
            device=device,
            dtype=dtype,
            seed=seed,
            progress=progress,
        )
        for measurement in measurements:
            checks = measurement.measure(subject)
            subject = replace(subject, checks=(*subject.checks, *checks))
            release_freed_memory()
    return list(subject.checks)
