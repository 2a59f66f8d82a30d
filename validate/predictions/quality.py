"""Quality on text: perplexity, divergence of the predictions, and the block that adds most to it.

Original and artifact run side by side, block by block, in one pass of the streaming engine; neither is ever in memory
as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmconvert.engine.architecture.config import declared_number
from llmconvert.engine.divergence import BlockDivergence, SideBySide, blame_artifact
from llmconvert.engine.stream import stream_logits
from llmconvert.errors import GateError
from llmconvert.progress import Progress
from llmconvert.report.report import Check
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.text.tokens import TokenWindows
from llmconvert.validate.generation.behaviour import Probe
from llmconvert.validate.predictions.perplexity import (
    Comparison,
    PerplexityResult,
    WorstToken,
    compare_logits,
    perplexity,
)

__all__ = ["Limits", "Scorer", "how_measured"]

# Tokens of the first window that the runtime's logits are compared on.
_FIDELITY_TOKENS = 256
# Above this share of text in common with the calibration text, a score flatters the artifact.
_NOTABLE_OVERLAP = 0.01
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


def how_measured(windows: TokenWindows, overlap: float | None) -> dict[str, Any]:
    """How quality was measured, as it goes on record; of a local file the name alone, reports get published."""
    about: dict[str, Any] = {
        "dataset": Path(windows.dataset).name if windows.dataset.startswith("/") else windows.dataset,
        "windows": windows.drawn,
        "windows_requested": windows.requested,
        "window": windows.length,
        "stride": windows.stride,
        "digest": windows.digest,
    }
    return about if overlap is None else {**about, "overlap": overlap}


@dataclass(frozen=True)
class Scorer:
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
        """As :meth:`logits`; states that are not finite and tensors that are missing are the artifact's failure."""
        with blame_artifact():
            yield from self.logits(dense)

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
                logits = self.artifact_logits(dense)
                result = perplexity(logits, windows, scored=self.windows.scored, seed=self.seed)
                about = {**about, **_warning(result.ppl, dense, about.get("overlap"))}
                return [_perplexity_check(result, about)], True
            comparison, blocks = self._compare(original, dense)
        except GateError as error:
            return [Check(name="perplexity", ok=False, detail={**about, "text": str(error)})], False
        about = {**about, **_warning(comparison.reference.ppl, original, about.get("overlap"))}
        worst = _in_context(comparison.worst, self.windows, artifact)
        return _comparison_checks(comparison, about, limits, worst) + _block_check(blocks), True

    def _compare(self, original: Checkpoint, dense: Checkpoint) -> tuple[Comparison, tuple[BlockDivergence, ...]]:
        windows = self.windows.windows
        with SideBySide(
            original, dense, windows, device=self.device, dtype=self.dtype, progress=self.progress
        ) as models:
            comparison = compare_logits(models.logits(), windows, scored=self.windows.scored, seed=self.seed)
            return comparison, models.divergences


def _warning(perplexity: float, model: Checkpoint, overlap: float | None) -> dict[str, str]:
    """Why the numbers mean less than they seem to, under ``text``; empty if nothing speaks against them."""
    found: list[str] = []
    vocabulary = declared_number(model.config, "vocab_size")
    if vocabulary is not None and perplexity >= vocabulary:
        found.append(
            f"warning: a perplexity of {perplexity:,.0f} with {vocabulary:,} tokens is worse than guessing; "
            "does the tokenizer belong to this model, and the text to its language?"
        )
    if overlap is not None and overlap > _NOTABLE_OVERLAP:
        found.append(f"warning: {100 * overlap:.1f} % of this text was calibrated on, which flatters the artifact")
    return {"text": "; ".join(found)} if found else {}


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
    kl_text = f"KL divergence is {comparison.kl_mean:.3g} nats per token on average, allowed are {limits.max_kl or 0:g}"
    top1_ok = limits.min_top1 is None or comparison.top1_agreement >= limits.min_top1
    top1_text = (
        f"{100 * comparison.top1_agreement:.1f} % of the most likely next tokens are the original's, required are "
        f"{100 * (limits.min_top1 or 0):g} %"
    )
    return [
        Check(name="perplexity", value=after.ppl, reference=before.ppl, limit=allowed, ok=ok, detail=detail),
        Check(
            name="kl_mean",
            value=comparison.kl_mean,
            limit=limits.max_kl,
            ok=kl_ok,
            unit="nats",
            detail={} if kl_ok else {"text": kl_text},
        ),
        Check(
            name="kl_p99",
            value=comparison.kl_p99,
            unit="nats",
            detail={"worst": worst},
        ),
        Check(
            name="top1_agreement",
            value=comparison.top1_agreement,
            limit=limits.min_top1,
            ok=top1_ok,
            unit="share",
            detail={} if top1_ok else {"text": top1_text},
        ),
    ]


def _block_check(blocks: tuple[BlockDivergence, ...]) -> list[Check]:
    """How far the hidden state drifts from block to block; nothing for models whose blocks don't correspond."""
    if not blocks:
        return []
    worst = max(blocks, key=lambda block: block.own)
    text = f"after the last block; by itself {worst.name} errs most, {100 * worst.own:.1f} %" if worst.own else ""
    detail = {"text": text, "blocks": [asdict(block) for block in blocks]}
    return [Check(name="block_divergence", value=blocks[-1].error, unit="relative", detail=detail)]
