"""Tokens per expert, as the report has them: every count, and a table of the layers in few words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from llmconvert.quantize.passes.run import LayerResult
from llmconvert.report.section import Cell, Column, Section
from llmconvert.report.steps import ExpertsReport

__all__ = ["expert_counts", "expert_sections"]

# So many of a layer's experts are named.
_NAMED = 8


def expert_counts(layers: Iterable[LayerResult]) -> tuple[ExpertsReport, ...]:
    """What the results of a quantization say of experts; nothing where no text was counted."""
    counts: dict[str, dict[int, tuple[int, int]]] = {}
    for layer in layers:
        if layer.expert is not None and layer.tokens is not None:
            name, _, number = layer.expert.rpartition(".")
            # The first of an expert's matrices takes what comes to the layer.
            counts.setdefault(name, {}).setdefault(int(number), (layer.tokens, layer.shape[1]))
    return tuple(
        ExpertsReport(
            layer=name,
            tokens=tuple(found[number][0] for number in sorted(found)),
            columns=next(iter(found.values()))[1],
        )
        for name, found in counts.items()
    )


def expert_sections(experts: Sequence[ExpertsReport]) -> tuple[Section, ...]:
    """The table of these counts; none without experts."""
    if not experts:
        return ()
    starved = sum(len(layer.starved) for layer in experts)
    every = [tokens for layer in experts for tokens in layer.tokens]
    words = (
        f"How many tokens of the calibration text the routers sent to each of {len(every):,} experts: {min(every):,} "
        f"at least, {max(every):,} at most. "
    )
    if starved:
        words += (
            f"{starved:,} got fewer than their inputs have columns, and are named; what is known of them leans on the "
            "other tokens of their layer. More text (samples, length) helps them."
        )
    else:
        words += "All got more than their inputs have columns."
    rows: list[tuple[Cell, ...]] = [
        (layer.layer, len(layer.tokens), min(layer.tokens), median(layer.tokens), max(layer.tokens), _named(layer))
        for layer in experts
    ]
    columns = ("layer", "experts", "fewest", "median", "most", "starved experts, by tokens")
    return (
        Section(
            name="experts",
            title="Tokens per expert",
            text=words,
            columns=tuple(Column(heading=heading) for heading in columns),
            rows=tuple(rows),
            shown=("card",),
        ),
    )


def _named(layer: ExpertsReport) -> str:
    """The starved ones, those with the fewest tokens first: ``3 (0), 11 (17)``."""
    starved = sorted(layer.starved, key=lambda number: layer.tokens[number])
    named = ", ".join(f"{number} ({layer.tokens[number]:,})" for number in starved[:_NAMED])
    return named + (f" and {len(starved) - _NAMED} more" if len(starved) > _NAMED else "")
