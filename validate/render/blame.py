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
    outputs = [{"name": name, "error": math.sqrt(error)} for name, error in _errors(report).items()]
    inventory = report.check("inventory")
    weights = inventory.detail.get("tensors", ()) if inventory else ()
    if worst := _largest(outputs, "error", "name"):
        sentences.append(f"the largest errors of a linear's output are those of {worst}")
    elif worst := _largest(weights, "error", "name"):
        sentences.append(f"the weights that changed most are {worst}")
    return "; ".join(sentences)


def _errors(report: Report) -> dict[str, float]:
    """Squared errors of linears as they are now: a repair quantizes some anew or leaves them dense, a file whole."""
    errors: dict[str, float] = {}
    for step in report.steps:
        if isinstance(step.details, QuantizeReport):
            if step.details.file is not None:
                errors.clear()
            for linear in step.details.linears:
                errors.pop(linear.name, None)
                if linear.error is not None:
                    errors[linear.name] = linear.error
    return errors


def _largest(records: Iterable[Mapping[str, Any]], value: str, name: str) -> str:
    found = sorted((record for record in records if record.get(value)), key=lambda record: -record[value])
    return ", ".join(f"{record[name]} ({100 * record[value]:.1f} %)" for record in found[:_NAMED])
