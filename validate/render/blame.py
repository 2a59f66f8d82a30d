"""Blame for a missed gate: the blocks and linears with the largest errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from llmconvert.report.report import Report
from llmconvert.report.steps import QuantizeReport

__all__ = ["blame"]

_QUALITY = ("perplexity", "kl_", "top1_", "generation.", "block_divergence")
_NAMED = 3


def blame(report: Report) -> str:
    """A sentence on the worst layers if a quality check failed; empty otherwise, or where nothing is known.

    Blocks are those that err most when they are entered with the original's hidden state. Linears are those with the
    largest error of their output on the calibration text; without that, those whose weights changed most.
    """
    if not any(check.name.startswith(_QUALITY) for check in report.failed):
        return ""
    blocks = report.check("block_divergence")
    own = _largest(blocks.detail.get("blocks", ()) if blocks else (), "own", "name")
    sentences = [f"the blocks that err most by themselves are {own}"] if own else []
    # What a repair quantized anew counts as it is now.
    errors = {
        linear.name: linear.error
        for step in report.steps
        if isinstance(step.details, QuantizeReport)
        for linear in step.details.linears
        if linear.error is not None
    }
    outputs = [{"name": name, "error": math.sqrt(error)} for name, error in errors.items()]
    inventory = report.check("inventory")
    weights = inventory.detail.get("tensors", ()) if inventory else ()
    if worst := _largest(outputs, "error", "name"):
        sentences.append(f"the largest errors of a linear's output are those of {worst}")
    elif worst := _largest(weights, "error", "name"):
        sentences.append(f"the weights that changed most are {worst}")
    return "; ".join(sentences)


def _largest(records: Iterable[Mapping[str, Any]], value: str, name: str) -> str:
    found = sorted((record for record in records if record.get(value)), key=lambda record: -record[value])
    return ", ".join(f"{record[name]} ({100 * record[value]:.1f} %)" for record in found[:_NAMED])
