"""Perplexity after every step that changed the weights (GQA, healing, quantization): what each of them cost.

Losses of steps add up in nats: the logarithm of perplexity is the mean loss per token, and each step's share is the
difference to the step before it. A step that repairs, healing, has a negative one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmconvert.report.report import Check
from llmconvert.report.section import Column, Section
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.validate.measurement import Measurement, Subject
from llmconvert.validate.predictions.perplexity import perplexity

__all__ = ["StepLossesCheck"]


@dataclass(frozen=True, slots=True)
class StepLossesCheck(Measurement):
    """Perplexity after every step as a measurement.

    Attributes:
        between: directories of the dense models between original and artifact, by step, in order.
        last: the step that made the artifact.
    """

    between: Mapping[str, Path]
    last: str

    def measure(self, subject: Subject) -> list[Check]:
        """A check with the perplexity after every step, of which those of original and artifact are known by now.

        None where there are no steps between, or no perplexity.

        Raises:
            CalibrationError: a model between computes NaN or infinity.
        """
        found, windows = subject.check("perplexity"), subject.windows
        if found is None or found.value is None or not found.reference or windows is None or not self.between:
            return []
        scores = {"original": found.reference}
        for step, directory in self.between.items():
            with SafetensorsCheckpoint(directory) as checkpoint:
                logits = subject.logits(checkpoint, windows.windows)
                scores[step] = perplexity(logits, windows.windows, scored=windows.scored).ppl
        return [_check({**scores, self.last: found.value})]


def _check(scores: Mapping[str, float]) -> Check:
    """Perplexity by step, the original's first."""
    before = scores["original"]
    rows: list[tuple[float | str | None, ...]] = []
    for step, score in scores.items():
        rows.append((step, score, math.log(score / before) if step != "original" else None))
        before = score
    worst = max(rows[1:], key=lambda row: float(row[2] or 0))
    return Check(
        name="perplexity.steps",
        detail={
            "text": f"{worst[0]} costs most, {float(worst[2] or 0):.3f} nats per token",
            "steps": [{"name": step, "perplexity": score} for step, score in scores.items()],
        },
        sections=(
            Section(
                name="steps-of-quality",
                title="What each step cost",
                text="Perplexity after each step, on the text of the evaluation, and what the step added to the "
                "loss per token, in nats; these add up.",
                columns=(
                    Column(heading="step"),
                    Column(heading="perplexity"),
                    Column(heading="added", unit="nats"),
                ),
                rows=tuple(rows),
                shown=("terminal", "card"),
            ),
        ),
    )
