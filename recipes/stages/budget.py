"""``quantize.budget`` in a recipe: schemes by layer for a mean number of bits, and what the report says of them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmconvert.progress import Progress
from llmconvert.quantize.mixed_precision.budget import Budget, Choice
from llmconvert.quantize.mixed_precision.job import Allocation, choose_schemes
from llmconvert.quantize.scheme import Scheme
from llmconvert.recipes.schema.recipe import BudgetSettings
from llmconvert.report.section import Column, Section
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["allocation_details", "choose_within", "forget_sensitivity"]


def choose_within(settings: BudgetSettings, source: Checkpoint, output: Path, about: Mapping[str, Any]) -> Allocation:
    """Choose schemes for quantizing ``source`` to ``output``; what was measured stays beside it until it is forgotten.

    Args:
        about: the other arguments of :func:`llmconvert.quantize.job.quantize_checkpoint`.
    """
    budget = Budget(settings.bits_per_weight, settings.bits, settings.group_sizes)
    allocation = choose_schemes(source, _work(output), budget, **about)
    progress: Progress = about["progress"]
    progress.log(f"budget: {_words(settings, allocation)}")
    return allocation


def forget_sensitivity(output: Path) -> None:
    """Remove what :func:`choose_within` left beside ``output``."""
    shutil.rmtree(_work(output), ignore_errors=True)


def allocation_details(settings: BudgetSettings, allocation: Allocation) -> Mapping[str, Any]:
    """What was chosen, as JSON values and as a section of the report."""
    units = [
        {
            "linears": list(choice.unit.linears),
            "scheme": str(choice.scheme),
            "bytes": choice.nbytes,
            "divergence": choice.divergence,
        }
        for choice in allocation.choices
    ]
    uniform = allocation.uniform
    details = {
        "bits_per_weight": allocation.bits_per_weight,
        "asked": settings.bits_per_weight,
        "divergence": allocation.divergence,
        "uniform": {"scheme": str(uniform[0]), "divergence": uniform[1]} if uniform is not None else None,
        "tokens": allocation.tokens,
        "units": units,
    }
    return {"budget": details, "sections": [_section(settings, allocation).model_dump(mode="json")]}


def _work(output: Path) -> Path:
    path = output.absolute()
    return path.with_name(f".{path.name}.sensitivity")


def _words(settings: BudgetSettings, allocation: Allocation) -> str:
    counts = ", ".join(f"{len(choices)} × {scheme}" for scheme, choices in _by_scheme(allocation).items())
    text = (
        f"{allocation.bits_per_weight:.3f} of {settings.bits_per_weight:g} bits per weight: {counts}; "
        f"expected divergence {allocation.divergence:.4f} nats per token"
    )
    if allocation.uniform is not None:
        scheme, divergence = allocation.uniform
        text += f", {divergence:.4f} with {scheme} everywhere"
    return text


def _by_scheme(allocation: Allocation) -> dict[Scheme, list[Choice]]:
    found: dict[Scheme, list[Choice]] = {}
    for choice in allocation.choices:
        found.setdefault(choice.scheme, []).append(choice)
    return dict(sorted(found.items(), key=lambda item: (item[0].bits, -(item[0].group_size or 0))))


def _section(settings: BudgetSettings, allocation: Allocation) -> Section:
    rows = [
        (
            str(scheme),
            len(choices),
            ", ".join(_short_names(choices)),
            sum(choice.nbytes for choice in choices),
            sum(choice.divergence for choice in choices),
        )
        for scheme, choices in _by_scheme(allocation).items()
    ]
    return Section(
        name="budget",
        title="Bits by layer",
        text=f"Chosen by measured sensitivity on {allocation.tokens:,} tokens of calibration text: "
        f"{_words(settings, allocation)}. Layers that runtimes fuse have one scheme.",
        columns=(
            Column(heading="scheme"),
            Column(heading="units"),
            Column(heading="layers"),
            Column(heading="size", unit="bytes"),
            Column(heading="expected divergence"),
        ),
        rows=tuple(rows),
        shown=("card",),
    )


def _short_names(choices: list[Choice]) -> list[str]:
    """Units by the last parts of their linears' names, and their blocks: ``gate_proj+up_proj 0 3–5``."""
    blocks: dict[str, list[int]] = {}
    for choice in choices:
        kind = "+".join(name.rpartition(".")[2] for name in choice.unit.linears)
        blocks.setdefault(kind, []).append(choice.unit.block)
    return [f"{kind} {_ranges(numbers)}" for kind, numbers in blocks.items()]


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return " ".join(str(first) if first == last else f"{first}–{last}" for first, last in parts)
