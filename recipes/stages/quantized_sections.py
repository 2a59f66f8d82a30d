"""What a report says of a quantization beside its numbers: types of tensors, coarse scales, where it can be served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmconvert.quantize.passes.results import LayerResult, coarse_layers, coarse_remark
from llmconvert.report.section import Column, Section

__all__ = ["coarse_section", "serving_section", "types_section"]


def types_section(types: Mapping[str, int], notes: Sequence[str]) -> tuple[Section, ...]:
    """How many tensors of a file have each type; none where files don't say it."""
    if not types:
        return ()
    text = " ".join(f"{note[:1].upper()}{note[1:]}." for note in notes)
    rows = tuple((kind, count) for kind, count in sorted(types.items(), key=lambda item: -item[1]))
    columns = (Column(heading="type"), Column(heading="tensors"))
    return (
        Section(
            name="types", title="Types of tensors", text=text, columns=columns, rows=rows, shown=("terminal", "card")
        ),
    )


def serving_section(facts: Sequence[str]) -> tuple[Section, ...]:
    """Where the artifact can be served; nothing where nothing is known of it."""
    text = " ".join(f"{fact[:1].upper()}{fact[1:]}." for fact in facts)
    return (Section(name="serving", title="Serving", text=text, shown=("terminal", "card")),) if text else ()


def coarse_section(layers: Sequence[LayerResult]) -> tuple[Section, ...]:
    """Linears whose one float32 scale leaves most of them few digits; nothing where there are none."""
    coarse = coarse_layers(layers)
    if not coarse:
        return ()
    rows = tuple((layer.name, layer.scheme, layer.coarse) for layer in coarse)
    columns = (Column(heading="linear"), Column(heading="scheme"), Column(heading="of it coarse", unit="share"))
    remark = coarse_remark(layers)
    text = f"{remark[:1].upper()}{remark[1:]}."
    return (
        Section(
            name="coarse", title="Coarse scales", text=text, columns=columns, rows=rows, shown=("terminal", "card")
        ),
    )
