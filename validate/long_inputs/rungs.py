"""The ladder as one picture: what every step from the original to the artifact leaves of weights, cache and quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmconvert.report.section import Column, Plot, Section, Series

__all__ = ["Rung", "rungs_section"]


@dataclass(frozen=True, slots=True)
class Rung:
    """One step: its name, bytes of the weights, bytes of the cache of one sequence, perplexity if it was measured."""

    label: str
    weight_bytes: int
    cache_bytes: int
    perplexity: float | None

    def to_mapping(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def rungs_section(name: str, rungs: Sequence[Rung], context: int) -> Section:
    """Table and picture. ``context`` is the number of tokens that the caches hold."""
    labels = tuple(rung.label for rung in rungs)

    def series(label: str, unit: str, values: Sequence[float | None]) -> Series:
        return Series(label=label, unit=unit, x=labels, y=tuple(values))

    return Section(
        name=name,
        title="Memory ladder",
        text="Weights are bytes of tensors; the cache is that of one sequence, in 32 bits for float32 and 16 for the "
        "rest. Both are computed, perplexity is measured where there is one.",
        columns=(
            Column(heading=""),
            Column(heading="weights", unit="bytes"),
            Column(heading=f"cache at {context:,} tokens", unit="bytes"),
            Column(heading="perplexity"),
        ),
        rows=tuple(
            (
                rung.label,
                float(rung.weight_bytes),
                float(rung.cache_bytes),
                None if rung.perplexity is None else f"{rung.perplexity:.2f}",
            )
            for rung in rungs
        ),
        plot=Plot(
            caption=f"Weights, KV cache of {context:,} tokens and perplexity, step by step.",
            kind="panels",
            x_label="",
            y_label="",
            series=(
                series("weights", "bytes", [float(rung.weight_bytes) for rung in rungs]),
                series("KV cache", "bytes", [float(rung.cache_bytes) for rung in rungs]),
                series("perplexity", "", [rung.perplexity for rung in rungs]),
            ),
        ),
        shown=("terminal", "card"),
    )
