"""Everything measured about a finished artifact, as one list of checks.

The artifact is opened again from disk: its files, not what was in memory when they were written. Original and artifact
are evaluated by the streaming engine side by side, block by block; the runtime loads one model at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmconvert.checkpoint import Checkpoint, SafetensorsCheckpoint
from llmconvert.engine.stream import stream_logits
from llmconvert.engine.tokens import TokenWindows
from llmconvert.errors import CalibrationError, GateError
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.reader import open_dense
from llmconvert.validate.behaviour import GenerationOptions, Probe, runtime_checks
from llmconvert.validate.inventory import bits_per_weight, measure_sizes, take_inventory
from llmconvert.validate.perplexity import Comparison, PerplexityResult, WorstToken, compare_logits, perplexity
from llmconvert.validate.report import Check

__all__ = ["GenerationOptions", "Limits", "validate_artifact"]

# Tokens of the first window that the runtime's logits are compared on.
_FIDELITY_TOKENS = 256
# Tokens shown before a prediction that changed.
_CONTEXT_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Limits:
    """What an artifact must keep to pass; None allows anything.

    Attributes:
        max_increase: of the perplexity, relative to the original's: 0.05 for 5 %.
        max_kl: mean divergence per token, nats.
        min_top1: share of predictions with the same most likely token.
        max_bytes: of the weight files.
    """

    max_increase: float | None = None
    max_kl: float | None = None
    min_top1: float | None = None
    max_bytes: int | None = None


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
    progress: Progress = SILENT,
) -> list[Check]:
    """Measure an artifact directory, against the original where there is one.

    Args:
        artifact: directory in Hugging Face layout, quantized or not.
        reference: the original. Its continuations need it to be a directory on disk.
        windows: evaluation text; without it no perplexity, divergence and fidelity.
        generation: greedy continuations, with the pace of the runtime.
        limits: what must be kept; see :func:`llmconvert.validate.report.require_passed` for the gate itself.
        dtype: what evaluation computes in; the checkpoints' own by default.
        overlap: share of the evaluation text found in the calibration text, to go on record.
        seed: of the bootstrap.

    Raises:
        CheckpointError: files cannot be read.
        CalibrationError: the reference computes NaN or infinity. (The artifact doing so is a failed check.)
        UsageError: the reference has another vocabulary.
    """
    limits = limits or Limits()
    with SafetensorsCheckpoint(artifact) as stored:
        dense = open_dense(stored)
        original = open_dense(reference) if reference is not None else None
        checks = _size_checks(artifact, stored, reference, original, limits)
        if original is not None:
            checks.append(_inventory_check(original, stored, dense, progress))
        probe: Probe | None = None
        if windows is not None:
            scorer = _Scorer(windows, device, dtype, seed, progress)
            quality, finite = scorer.checks(dense, original, limits, _about(windows, overlap), artifact)
            checks += quality
            probe = scorer.probe(dense) if finite else None
        if probe is not None or generation is not None:
            checks += runtime_checks(
                artifact,
                dense,
                reference,
                probe=probe,
                generation=generation,
                device=device,
                dtype=dtype,
                progress=progress,
            )
    return checks


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
    text = f"{len(problems)} tensors are wrong, first: {problems[0]}" if problems else counts
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


def _about(windows: TokenWindows, overlap: float | None) -> dict[str, Any]:
    """How quality was measured, as it goes on record; of a local file the name alone, reports get published."""
    about: dict[str, Any] = {
        "dataset": Path(windows.dataset).name if windows.dataset.startswith("/") else windows.dataset,
        "windows": windows.drawn,
        "windows_requested": windows.requested,
        "window": windows.length,
        "stride": windows.length,
        "digest": windows.digest,
    }
    return about if overlap is None else {**about, "overlap": overlap}


@dataclass(frozen=True)
class _Scorer:
    """The evaluation text, and how to compute on it."""

    windows: TokenWindows
    device: torch.device
    dtype: torch.dtype | None
    seed: int
    progress: Progress

    def logits(self, checkpoint: Checkpoint) -> Iterator[torch.Tensor]:
        return stream_logits(
            checkpoint, self.windows.windows, device=self.device, dtype=self.dtype, progress=self.progress
        )

    def artifact_logits(self, dense: Checkpoint) -> Iterator[torch.Tensor]:
        """As :meth:`logits`; a state that is not finite is the artifact's failure, not the input's."""
        try:
            yield from self.logits(dense)
        except CalibrationError as error:
            raise GateError(f"the artifact computes no usable numbers: {error}") from error

    def probe(self, dense: Checkpoint) -> Probe:
        """Our reader's logits for the beginning of the first window."""
        window = self.windows.windows[0][:, :_FIDELITY_TOKENS]
        (logits,) = stream_logits(dense, [window], device=self.device, dtype=self.dtype)
        return Probe(window, logits)

    def checks(
        self,
        dense: Checkpoint,
        original: Checkpoint | None,
        limits: Limits,
        about: dict[str, Any],
        artifact: Path,
    ) -> tuple[list[Check], bool]:
        """Perplexity, and against an original divergence; and whether the artifact computes finite numbers at all."""
        windows = self.windows.windows
        try:
            if original is None:
                result = perplexity(self.artifact_logits(dense), windows, seed=self.seed)
                return [_perplexity_check(result, about)], True
            comparison = compare_logits(self.logits(original), self.artifact_logits(dense), windows, seed=self.seed)
        except GateError as error:
            return [Check(name="perplexity", ok=False, detail={**about, "text": str(error)})], False
        worst = _in_context(comparison.worst, self.windows, artifact)
        return _comparison_checks(comparison, about, limits, worst), True


def _in_context(worst: Sequence[WorstToken], windows: TokenWindows, artifact: Path) -> list[dict[str, Any]]:
    """The predictions that changed most, with the text before them and the token that really came."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(artifact, local_files_only=True, trust_remote_code=False)
    found: list[dict[str, Any]] = []
    for token in worst:
        ids = windows.windows[token.window][0]
        before = ids[max(0, token.position + 1 - _CONTEXT_TOKENS) : token.position + 1]
        after = ids[token.position + 1 : token.position + 2]
        found.append({**asdict(token), "context": tokenizer.decode(before), "next": tokenizer.decode(after)})
    return found


def _interval(result: PerplexityResult, prefix: str = "") -> dict[str, Any]:
    return {f"{prefix}low": result.low, f"{prefix}high": result.high}


def _perplexity_check(result: PerplexityResult, about: dict[str, Any]) -> Check:
    return Check(name="perplexity", value=result.ppl, detail={**about, "tokens": result.tokens, **_interval(result)})


def _comparison_checks(
    comparison: Comparison, about: dict[str, Any], limits: Limits, worst: list[dict[str, Any]]
) -> list[Check]:
    before, after = comparison.reference, comparison.artifact
    detail = {
        **about,
        "tokens": after.tokens,
        **_interval(after),
        **_interval(before, "reference_"),
        "increase": comparison.increase,
        "increase_low": comparison.increase_low,
        "increase_high": comparison.increase_high,
    }
    allowed = None if limits.max_increase is None else before.ppl * (1 + limits.max_increase)
    ok = allowed is None or after.ppl <= allowed
    if not ok:
        detail["text"] = (
            f"perplexity rose by {100 * comparison.increase:.1f} %, from {before.ppl:.2f} to {after.ppl:.2f}; "
            f"allowed are {100 * (limits.max_increase or 0):g} %"
        )
    kl_ok = limits.max_kl is None or comparison.kl_mean <= limits.max_kl
    top1_ok = limits.min_top1 is None or comparison.top1_agreement >= limits.min_top1
    return [
        Check(name="perplexity", value=after.ppl, reference=before.ppl, limit=allowed, ok=ok, detail=detail),
        Check(name="kl_mean", value=comparison.kl_mean, limit=limits.max_kl, ok=kl_ok, unit="nats"),
        Check(
            name="kl_p99",
            value=comparison.kl_p99,
            unit="nats",
            detail={"worst": worst},
        ),
        Check(name="top1_agreement", value=comparison.top1_agreement, limit=limits.min_top1, ok=top1_ok, unit="share"),
    ]
