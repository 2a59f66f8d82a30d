"""What each step of a run did to the quality: perplexity after every one that changed the weights.

Losses of steps add up in nats: the logarithm of perplexity is the mean loss per token, and each step's share is the
difference to the step before it. A step that repairs, healing, has a negative one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from llmconvert.engine.stream import stream_logits
from llmconvert.progress import SILENT, Progress
from llmconvert.report.report import Check
from llmconvert.report.section import Column, Section
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.text.tokens import TokenWindows
from llmconvert.validate.predictions.perplexity import perplexity

__all__ = ["step_losses"]


def step_losses(
    checks: Sequence[Check],
    models: Mapping[str, Path],
    last: str,
    windows: TokenWindows | None,
    *,
    device: torch.device,
    progress: Progress = SILENT,
) -> list[Check]:
    """A check with the perplexity after every step; none where there are no steps between, or no perplexity.

    Args:
        checks: those of the finished artifact, its perplexity and the original's among them.
        models: directories of the dense models between, by step, in order.
        last: the step that made the artifact.
        windows: the evaluation text.

    Raises:
        GateError: a model between computes NaN or infinity.
    """
    found = next((check for check in checks if check.name == "perplexity"), None)
    if found is None or found.value is None or not found.reference or windows is None or not models:
        return []
    scores = {"original": found.reference}
    for step, directory in models.items():
        with SafetensorsCheckpoint(directory) as checkpoint:
            logits = stream_logits(checkpoint, windows.windows, device=device, progress=progress)
            scores[step] = perplexity(logits, windows.windows, scored=windows.scored).ppl
    scores[last] = found.value
    rows: list[tuple[float | str | None, ...]] = []
    before = found.reference
    for step, score in scores.items():
        rows.append((step, score, math.log(score / before) if step != "original" else None))
        before = score
    worst = max(rows[1:], key=lambda row: float(row[2] or 0))
    return [
        Check(
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
    ]
