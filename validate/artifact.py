"""Validation of a finished artifact: a list of measurements, made one after the other.

The artifact is opened again from disk: its files, not what was in memory when they were written. Original and artifact
are evaluated by the streaming engine side by side, block by block; the runtime loads one model at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch

from llmconvert.context import Context
from llmconvert.engine.memory import BASE_NBYTES, kept_of
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import CapacityError, LlmconvertError
from llmconvert.gguf.checkpoint import open_artifact
from llmconvert.memory import release_freed_memory
from llmconvert.needs import Needs
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.report.report import Check
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.directory import is_weight_file
from llmconvert.text.tokens import TokenWindows
from llmconvert.validate.measurement import Measurement, Planned, Subject, why_not_loadable
from llmconvert.validate.predictions.needs import comparing_needs

__all__ = ["ValidationPlan", "plan_validation", "validate_artifact"]


@dataclass(frozen=True, slots=True)
class ValidationPlan:
    """A validation that was settled from headers; :func:`plan_validation` makes one.

    Attributes:
        measurements: what to measure, in this order; each sees the checks of those before it.
        needs: what running it takes. Runtimes that load a model whole keep to the memory by themselves: one that does
            not fit is not measured, the check says so, and it counts for nothing here.
    """

    measurements: tuple[Measurement, ...]
    needs: Needs
    _artifact: Path
    _reference: Checkpoint | None
    _windows: TokenWindows | None
    _dtype: torch.dtype | None
    _seed: int
    _context: Context
    _kept: int

    def run(self) -> list[Check]:
        """Measure.

        Returns:
            All checks. Limits that are missed are failed checks; :func:`llmconvert.report.report.require_passed` is
            the gate.

        Raises:
            CheckpointError: files cannot be read.
            CalibrationError: the reference computes NaN or infinity. (The artifact doing so is a failed check.)
            UsageError: the reference has another vocabulary.
        """
        reference = self._reference
        with open_artifact(self._artifact) as stored:
            subject = Subject(
                artifact=self._artifact,
                stored=stored,
                dense=open_dense(stored, progress=self._context.progress),
                reference=reference,
                original=open_dense(reference, weights_only=True) if reference is not None else None,
                windows=self._windows,
                device=self._context.device,
                dtype=self._dtype,
                memory=self._context.memory,
                kept=self._kept,
                seed=self._seed,
                progress=self._context.progress,
                ranks=self._context.ranks,
            )
            for measurement in self.measurements:
                checks = measurement.measure(subject)
                subject = replace(subject, checks=(*subject.checks, *checks))
                release_freed_memory()
        return list(subject.checks)


def plan_validation(
    artifact: Path,
    measurements: Sequence[Measurement],
    *,
    reference: Checkpoint | None,
    windows: TokenWindows | None = None,
    context: Context | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    loadable: bool | None = None,
    stored: int | None = None,
    cached: bool | None = None,
    build: Callable[..., Skeleton] = Skeleton,
) -> ValidationPlan:
    """Settle what is measured on an artifact, against the original where there is one; nothing but headers is read.

    Args:
        artifact: directory in Hugging Face layout, quantized or not; or a GGUF file, or a directory with one.
        measurements: what to measure, in this order.
        reference: the original, as stored. Its continuations need it to be a directory on disk.
        windows: evaluation text; without it no perplexity, divergence and fidelity.
        context: device, memory and progress.
        dtype: what evaluation computes in; the checkpoints' own by default.
        seed: of the bootstrap, and of whatever else is drawn.
        loadable: whether the artifact will be a directory that transformers reads, where it is still to be made.
        stored: bytes of its weight files, likewise.
        cached: whether it will have scales for its key-value cache, likewise.
        build: builds a model on shapes; may give one that is kept for other plans.

    Raises:
        UnsupportedError: a measurement can't be made in this environment.
        CheckpointError: files cannot be read.
        CapacityError: not even a block of each model at a time fits the memory that may be used.
    """
    context = context or Context()
    measurements = [one for one in measurements if one.together or context.ranks.leads]
    for measurement in measurements:
        measurement.require()
    needs = Needs(memory=BASE_NBYTES)
    if loadable is None:
        loadable = not why_not_loadable(artifact)
    # Of an original the artifact needs no more; it may be still to be made.
    with open_artifact(artifact) if reference is None else nullcontext(reference) as model:
        dense = open_dense(model, weights_only=reference is not None)
        if windows is not None:
            lengths, artifacts = [windows.length] * windows.drawn, int(reference is not None)
            needs = comparing_needs(dense, lengths, artifacts, context, dtype, build)
        # Of what comparing takes; beside what other measurements take more would be resident than is stated of them.
        kept = kept_of(needs.memory, context.device)
        if cached is None:
            cached = bool(dense.quantized_cache) if reference is None else loadable and _quantizes_cache(artifact)
        if stored is None:
            stored = sum(file.stat().st_size for file in _weight_files(artifact)) or dense.nbytes
        planned = Planned(dense, windows, reference is not None, loadable, stored, cached, context, dtype, build)
        needs = reduce(Needs.then, (one.needs(planned) for one in measurements), needs)
    needed = needs.on(context.device)
    if context.memory is not None and needed > context.memory:
        raise CapacityError(
            f"evaluation needs about {needed / 1e6:,.0f} MB, {context.memory / 1e6:,.0f} MB may be used; allow that "
            "much (memory), or use shorter windows (validate.perplexity.window)"
        )
    return ValidationPlan(tuple(measurements), needs, artifact, reference, windows, dtype, seed, context, kept)


def _quantizes_cache(artifact: Path) -> bool:
    """Of an artifact on disk, whether it has scales for its key-value cache."""
    try:
        with open_artifact(artifact) as stored:
            return bool(open_dense(stored).quantized_cache)
    except LlmconvertError:  # not there yet, or broken, which is for the measurements to tell
        return False


def _weight_files(artifact: Path) -> list[Path]:
    """Of an artifact on disk; none of one that is still to be made."""
    if artifact.is_dir():
        return [path for path in artifact.iterdir() if is_weight_file(path.name)]
    return [artifact] if artifact.is_file() else []


def validate_artifact(
    artifact: Path,
    measurements: Sequence[Measurement],
    *,
    reference: Checkpoint | None,
    windows: TokenWindows | None = None,
    device: torch.device,
    memory: int | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> list[Check]:
    """Measure an artifact, against the original where there is one: :func:`plan_validation` and its run in one call.

    Args:
        artifact, measurements, reference, windows, dtype, seed: see :func:`plan_validation`.
        device, memory, progress: see :class:`~llmconvert.context.Context`.

    Raises:
        LlmconvertError: see :func:`plan_validation` and :meth:`ValidationPlan.run`.
    """
    context = Context(device, memory, progress=progress)
    return plan_validation(
        artifact, measurements, reference=reference, windows=windows, context=context, dtype=dtype, seed=seed
    ).run()
