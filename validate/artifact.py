"""Everything measured about a finished artifact, as one list of checks.

The artifact is opened again from disk: its files, not what was in memory when they were written. Original and artifact
are evaluated by the streaming engine side by side, block by block; the runtime loads one model at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from llmconvert.gguf.checkpoint import GgufCheckpoint, open_artifact
from llmconvert.memory import release_freed_memory
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.report.report import Check
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint
from llmconvert.storage.writer import write_side_files
from llmconvert.text.tokens import TokenWindows
from llmconvert.validate.generation.behaviour import GenerationOptions, Probe, runtime_checks
from llmconvert.validate.inventory import bits_per_weight, measure_sizes, take_inventory
from llmconvert.validate.measurement import Measurement, Subject
from llmconvert.validate.predictions.quality import Limits, Scorer, how_measured
from llmconvert.validate.runtimes.vllm import vllm_checks
from llmconvert.validate.vocabulary import check_vocabularies

__all__ = ["GenerationOptions", "Limits", "validate_artifact"]


def validate_artifact(
    artifact: Path,
    *,
    reference: Checkpoint | None,
    windows: TokenWindows | None = None,
    generation: GenerationOptions | None = None,
    limits: Limits | None = None,
    device: torch.device,
    dtype: torch.dtype | None = None,
    overlap: float | None = None,
    seed: int = 0,
    measurements: Sequence[Measurement] = (),
    progress: Progress = SILENT,
) -> list[Check]:
    """Measure an artifact directory, against the original where there is one.

    Args:
        artifact: directory in Hugging Face layout, quantized or not; or a GGUF file, or a directory with one.
        reference: the original. Its continuations need it to be a directory on disk.
        windows: evaluation text; without it no perplexity, divergence and fidelity.
        generation: greedy continuations, with the pace of the runtime.
        limits: what must be kept; see :func:`llmconvert.report.report.require_passed` for the gate itself.
        dtype: what evaluation computes in; the checkpoints' own by default.
        overlap: share of the evaluation text found in the calibration text, to go on record.
        seed: of the bootstrap.
        measurements: what else to measure, in this order.

    Raises:
        CheckpointError: files cannot be read.
        CalibrationError: the reference computes NaN or infinity. (The artifact doing so is a failed check.)
        UsageError: the reference has another vocabulary.
    """
    limits = limits or Limits()
    if reference is not None:
        check_vocabularies(artifact, reference)
    with open_artifact(artifact) as stored, _tokenizer_home(artifact, stored) as home:
        dense = open_dense(stored)
        original = open_dense(reference) if reference is not None else None
        checks = _size_checks(artifact, stored, reference, original, limits)
        if original is not None:
            checks.append(_inventory_check(original, stored, dense, progress))
            release_freed_memory()
        probe: Probe | None = None
        if windows is not None:
            scorer = Scorer(windows, device, dtype, seed, progress)
            quality, finite = scorer.checks(dense, original, limits, how_measured(windows, overlap), home)
            checks += quality
            release_freed_memory()
            probe = scorer.probe(dense) if finite else None
        # transformers is not the runtime of a GGUF file.
        if (probe is not None or generation is not None) and not isinstance(stored, GgufCheckpoint):
            checks += runtime_checks(
                artifact,
                dense,
                reference,
                original,
                probe=probe,
                generation=generation,
                device=device,
                dtype=dtype,
                progress=progress,
            )
        if probe is not None:
            checks += vllm_checks(artifact, probe.window, probe.logits, progress=progress)
        subject = Subject(
            artifact, stored, dense, reference, original, windows, device, dtype, seed=seed, progress=progress
        )
        for measurement in measurements:
            checks += measurement.measure(replace(subject, checks=tuple(checks)))
            release_freed_memory()
    return checks


@contextmanager
def _tokenizer_home(artifact: Path, stored: Checkpoint) -> Iterator[Path]:
    """A directory with the artifact's tokenizer files, which are inside a GGUF file."""
    if not isinstance(stored, GgufCheckpoint):
        yield artifact
        return
    with TemporaryDirectory() as directory:
        write_side_files(Path(directory), stored.files)
        yield Path(directory)


def _size_checks(
    artifact: Path, stored: Checkpoint, reference: Checkpoint | None, original: Checkpoint | None, limits: Limits
) -> list[Check]:
    size = measure_sizes(artifact).weights
    before: int | None = None
    if isinstance(reference, SafetensorsCheckpoint):
        before = measure_sizes(reference.directory).weights
    elif reference is not None:
        before = reference.nbytes
    ok = limits.max_bytes is None or size <= limits.max_bytes
    text = "" if ok else f"the weights take {size:,} bytes, allowed are {limits.max_bytes:,}"
    checks = [
        Check(
            name="size_bytes",
            value=size,
            reference=before,
            limit=limits.max_bytes,
            ok=ok,
            unit="bytes",
            detail={"text": text} if text else {},
        )
    ]
    if original is not None and reference is not None:
        bits = bits_per_weight(original, stored)
        checks.append(
            Check(name="bits_per_weight", value=bits, reference=bits_per_weight(original, reference), unit="bits")
        )
    return checks


def _inventory_check(source: Checkpoint, stored: Checkpoint, dense: Checkpoint, progress: Progress) -> Check:
    inventory = take_inventory(source, stored, dense, progress=progress)
    counts = ", ".join(f"{count} {status}" for status, count in sorted(inventory.counts.items()))
    problems = inventory.problems
    moved = "; norms are changed, so weights are in other coordinates, and no errors of theirs are given"
    text = counts + moved * inventory.moved
    if problems:
        text = f"{len(problems)} tensors are wrong, first: {problems[0]}" if len(problems) > 1 else problems[0]
    return Check(
        name="inventory",
        value=len(problems),
        limit=0,
        ok=not problems,
        unit="tensors",
        detail={
            "text": text,
            "counts": inventory.counts,
            "problems": list(problems),
            "tensors": [asdict(record) for record in inventory.tensors],
        },
    )
