"""``quantize.budget`` in a recipe: schemes by layer for a mean number of bits, and what the report says of them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmconvert.context import Context
from llmconvert.quantize.mixed_precision.budget import Choice
from llmconvert.quantize.plan import Override, QuantizeRequest
from llmconvert.quantize.scheme import Scheme
from llmconvert.recipes.forecast import engine_budget
from llmconvert.recipes.schema.named import engine_scheme
from llmconvert.recipes.schema.recipe import BudgetSettings, QuantizeSettings
from llmconvert.report.section import Column, Section
from llmconvert.report.steps import BudgetReport, StepDetails, UniformReport, UnitReport
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.validate.render.display import format_runs

if TYPE_CHECKING:
    from llmconvert.quantize.mixed_precision.job import Allocation

__all__ = ["ChosenReport", "choose_within", "chosen_report", "forget_sensitivity", "layer_overrides"]


# Settings that are also what overrides call these tensors.
_OUTER = ("head", "embedding")
# What the number is, and is not: of what a gate measures it is less.
_EXPECTED = (
    "The expected divergence is to choose by: a second-order estimate on the calibration text, which the codes are "
    "chosen on too, of each unit alone in the original model, added up. What is measured of all of them together on "
    "other text (kl_mean) is more, 1.6 times as much in one table."
)


class ChosenReport(StepDetails):
    """What a budget has to report of a quantization."""

    budget: BudgetReport


def choose_within(
    settings: QuantizeSettings,
    budget: BudgetSettings,
    source: Checkpoint,
    output: Path,
    windows: Sequence[torch.Tensor],
    context: Context,
) -> Allocation:
    """Choose schemes for quantizing ``source`` to ``output``; what was measured stays beside it until it is forgotten.

    Raises:
        LlmconvertError: see :func:`llmconvert.quantize.mixed_precision.job.plan_choice`.
    """
    from llmconvert.quantize.mixed_precision.job import plan_choice

    overrides = tuple(layer_overrides(settings))
    allocation = plan_choice(
        source,
        _work(output),
        engine_budget(budget),
        QuantizeRequest(settings.method, settings.scheme, settings.format, overrides, settings.options),
        windows=windows,
        context=context,
    ).run()
    context.progress.log(f"budget: {_words(budget, allocation)}")
    return allocation


def layer_overrides(settings: QuantizeSettings) -> list[Override]:
    """The section's overrides as the engine takes them, those of head and embedding first."""
    outer = [
        Override(word, engine_scheme(wanted)) for word in _OUTER if (wanted := getattr(settings, word)) is not None
    ]
    return outer + [Override(override.match, engine_scheme(override.scheme)) for override in settings.overrides]


def forget_sensitivity(output: Path) -> None:
    """Remove what :func:`choose_within` left beside ``output``."""
    shutil.rmtree(_work(output), ignore_errors=True)


def chosen_report(settings: BudgetSettings, allocation: Allocation) -> ChosenReport:
    """What was chosen, and a section of the report on it."""
    uniform = allocation.uniform
    budget = BudgetReport(
        bits_per_weight=allocation.bits_per_weight,
        asked=settings.bits_per_weight,
        max_bytes=settings.max_bytes,
        divergence=allocation.divergence,
        uniform=UniformReport(scheme=str(uniform[0]), divergence=uniform[1]) if uniform is not None else None,
        tokens=allocation.tokens,
        units=tuple(
            UnitReport(
                linears=choice.unit.linears,
                scheme=str(choice.scheme),
                bytes=choice.nbytes,
                divergence=choice.divergence,
            )
            for choice in allocation.choices
        ),
    )
    return ChosenReport(budget=budget, sections=(_section(settings, allocation),))


def _work(output: Path) -> Path:
    path = output.absolute()
    return path.with_name(f".{path.name}.sensitivity")


def _words(settings: BudgetSettings, allocation: Allocation) -> str:
    counts = ", ".join(f"{len(choices)} × {scheme}" for scheme, choices in _by_scheme(allocation).items())
    asked = f" of {settings.bits_per_weight:g}" if settings.bits_per_weight is not None else ""
    text = (
        f"{allocation.bits_per_weight:.3f}{asked} bits per weight: {counts}; "
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
    return dict(sorted(found.items(), key=lambda item: (item[0].bits, -(item[0].group_size or 0), str(item[0]))))


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
        f"{_words(settings, allocation)}. {_apart(allocation)} {_EXPECTED}",
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


def _apart(allocation: Allocation) -> str:
    gguf = any(choice.scheme.block is not None for choice in allocation.choices)
    return "Each tensor has a type of its own." if gguf else "Layers that runtimes fuse have one scheme."


def _short_names(choices: list[Choice]) -> list[str]:
    """Units by the last parts of their linears' names, and their blocks: ``gate_proj+up_proj 0 3–5``."""
    blocks: dict[str, list[int]] = {}
    for choice in choices:
        kind = "+".join(name.rpartition(".")[2] for name in choice.unit.linears)
        blocks.setdefault(kind, []).append(choice.unit.block)
    outer = {choice.unit.outer for choice in choices}
    return [kind if kind in outer else f"{kind} {' '.join(format_runs(n))}" for kind, n in blocks.items()]
