"""Quality on text: perplexity, KL divergence, top-1 agreement, and the drift of the hidden state block by block.

Original and artifact run side by side, block by block, in one pass of the streaming engine; neither is ever in memory
as a whole. A sweep lets all its variants run beside the original at once, before each is measured by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from llmconvert.compute.activations import ActivationRuntime
from llmconvert.compute.ranks.group import ALONE
from llmconvert.compute.saturation import Saturation, all_saturation
from llmconvert.engine.architecture.config import declared_number
from llmconvert.engine.divergence import BlockDivergence, blame_artifact
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import GateError
from llmconvert.memory import keeping_freed_memory
from llmconvert.quantize.formats.dense_view import served_by
from llmconvert.report.report import Check
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.text.tokenizer import load_tokenizer
from llmconvert.text.tokens import TokenWindows
from llmconvert.validate.measurement import Measurement, Subject
from llmconvert.validate.predictions.compared import Compared, compare_models
from llmconvert.validate.predictions.perplexity import Comparison, PerplexityResult, WorstToken, perplexity
from llmconvert.validate.predictions.saturated import saturated_inputs

__all__ = ["QualityCheck"]

# Above this share of text in common with the calibration text, a score flatters the artifact.
_NOTABLE_OVERLAP = 0.01
# Tokens shown before a prediction that changed.
_CONTEXT_TOKENS = 24


@dataclass(frozen=True, slots=True)
class QualityCheck(Measurement):
    """Perplexity and divergence as a measurement, with what an artifact must keep to pass; None allows anything.

    Attributes:
        max_increase: of the perplexity, relative to the original's: 0.05 for 5 %.
        max_kl: mean divergence per token, nats.
        min_top1: share of predictions with the same most likely token.
        overlap: share of the evaluation text found in the calibration text, to go on record; None if nobody looked.
        compared: both models on the subject's text, where a pass with other artifacts has compared them already.
        max_saturated: share of a linear's inputs that a fixed scale may cut off.
        activations: whose formulas inputs of 8 bits are quantized by.
    """

    max_increase: float | None = None
    max_kl: float | None = None
    min_top1: float | None = None
    overlap: float | None = None
    compared: Compared | None = None
    max_saturated: float | None = None
    activations: ActivationRuntime = "transformers"

    together: ClassVar[bool] = True

    def measure(self, subject: Subject) -> list[Check]:
        """Perplexity, and against an original divergence; nothing without a text.

        Where the artifact computes NaN or infinity, the perplexity fails and has no value.
        """
        text = subject.windows
        if text is None:
            return []
        if text.drawn < subject.ranks.count:  # too few to share
            if not subject.ranks.leads:
                return []
            subject = replace(subject, ranks=ALONE)
        about = _how_measured(text, self.overlap)
        if self.activations != "transformers" and subject.dense.quantized_inputs:
            about["activations"] = self.activations
            subject = replace(subject, dense=served_by(subject.dense, self.activations))
        try:
            with keeping_freed_memory(subject.kept):
                if subject.original is None:
                    return self._alone(subject, text, about)
                return self._compared(subject, subject.original, text, about)
        except GateError as error:
            return [Check(name="perplexity", ok=False, detail={**about, "text": str(error)})]

    def _alone(self, subject: Subject, text: TokenWindows, about: dict[str, Any]) -> list[Check]:
        # States that are not finite and tensors that are missing are the artifact's failure.
        own = [text.windows[number] for number in subject.ranks.share(text.drawn)]
        saturation: list[Saturation] = []

        def passed(skeleton: Skeleton) -> None:
            saturation.extend(all_saturation(skeleton.input_counts, subject.ranks))

        logits = _blaming(subject.logits(subject.dense, own, passed=passed))
        result = perplexity(logits, text.windows, scored=text.scored, seed=subject.seed, ranks=subject.ranks)
        detail = {**about, **self._warning(result.ppl, subject.dense), "tokens": result.tokens, **_interval(result)}
        alone = Check(name="perplexity", value=result.ppl, detail=detail)
        return [alone, *saturated_inputs(saturation, self.max_saturated, subject.progress)]

    def _compared(
        self, subject: Subject, original: Checkpoint, text: TokenWindows, about: dict[str, Any]
    ) -> list[Check]:
        found = self.compared or _compare(subject, original, text)
        comparison, blocks = found.comparison, found.blocks
        about = {**about, **self._warning(comparison.reference.ppl, original)}
        worst = _in_context(comparison.worst, text, subject.stored)
        return [
            self._perplexity(comparison, about),
            self._divergence(comparison),
            Check(name="kl_p99", value=comparison.kl_p99, unit="nats", detail={"worst": worst}),
            Check(name="kl_p999", value=comparison.kl_p999, unit="nats"),
            self._agreement(comparison),
            *_drift(blocks),
            *saturated_inputs(found.saturation, self.max_saturated, subject.progress),
        ]

    def _warning(self, perplexity: float, model: Checkpoint) -> dict[str, str]:
        """Why the numbers mean less than they seem to, under ``text``; empty if nothing speaks against them."""
        found: list[str] = []
        vocabulary = declared_number(model.config, "vocab_size")
        if vocabulary is not None and perplexity >= vocabulary:
            found.append(
                f"warning: a perplexity of {perplexity:,.0f} with {vocabulary:,} tokens is worse than guessing; "
                "does the tokenizer belong to this model, and the text to its language?"
            )
        if self.overlap is not None and self.overlap > _NOTABLE_OVERLAP:
            share = f"{100 * self.overlap:.1f} %"
            found.append(f"warning: {share} of this text was calibrated on, which flatters the artifact")
        return {"text": "; ".join(found)} if found else {}

    def _perplexity(self, comparison: Comparison, about: dict[str, Any]) -> Check:
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
        allowed = None if self.max_increase is None else before.ppl * (1 + self.max_increase)
        ok = allowed is None or after.ppl <= allowed
        if not ok:
            detail["text"] = (
                f"perplexity rose by {100 * comparison.increase:.1f} %, from {before.ppl:.2f} to {after.ppl:.2f}; "
                f"allowed are {100 * (self.max_increase or 0):g} %"
            )
        return Check(name="perplexity", value=after.ppl, reference=before.ppl, limit=allowed, ok=ok, detail=detail)

    def _divergence(self, comparison: Comparison) -> Check:
        mean = comparison.kl_mean
        ok = self.max_kl is None or mean <= self.max_kl
        text = f"KL divergence is {mean:.3g} nats per token on average, allowed are {self.max_kl or 0:g}"
        detail = {} if ok else {"text": text}
        return Check(name="kl_mean", value=mean, limit=self.max_kl, ok=ok, unit="nats", detail=detail)

    def _agreement(self, comparison: Comparison) -> Check:
        share = comparison.top1_agreement
        ok = self.min_top1 is None or share >= self.min_top1
        text = (
            f"{100 * share:.1f} % of the most likely next tokens are the original's, required are "
            f"{100 * (self.min_top1 or 0):g} %"
        )
        detail = {} if ok else {"text": text}
        return Check(name="top1_agreement", value=share, limit=self.min_top1, ok=ok, unit="share", detail=detail)


def _blaming(logits: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    with blame_artifact():
        yield from logits


def _compare(subject: Subject, original: Checkpoint, text: TokenWindows) -> Compared:
    (found,) = compare_models(
        original,
        [subject.dense],
        text,
        device=subject.device,
        dtype=subject.dtype,
        seed=subject.seed,
        progress=subject.progress,
        ranks=subject.ranks,
    )
    assert isinstance(found, Compared), "what is wrong with the only artifact is raised"
    return found


def _how_measured(windows: TokenWindows, overlap: float | None) -> dict[str, Any]:
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


def _in_context(worst: Sequence[WorstToken], windows: TokenWindows, stored: Checkpoint) -> list[dict[str, Any]]:
    """The predictions that changed most, with the text before them and the token that really came."""
    tokenizer = load_tokenizer(stored)
    found: list[dict[str, Any]] = []
    for token in worst:
        ids = windows.windows[token.window][0]
        before = ids[max(0, token.position + 1 - _CONTEXT_TOKENS) : token.position + 1]
        after = ids[token.position + 1 : token.position + 2]
        found.append({**asdict(token), "context": tokenizer.decode(before), "next": tokenizer.decode(after)})
    return found


def _interval(result: PerplexityResult, prefix: str = "") -> dict[str, Any]:
    return {f"{prefix}low": result.low, f"{prefix}high": result.high}


def _drift(blocks: tuple[BlockDivergence, ...]) -> list[Check]:
    """How far the hidden state drifts from block to block; nothing for models whose blocks don't correspond."""
    if not blocks:
        return []
    worst = max(blocks, key=lambda block: block.own)
    text = f"after the last block; by itself {worst.name} errs most, {100 * worst.own:.1f} %" if worst.own else ""
    detail = {"text": text, "blocks": [asdict(block) for block in blocks]}
    return [Check(name="block_divergence", value=blocks[-1].error, unit="relative", detail=detail)]
