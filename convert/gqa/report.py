"""The report's sections on rewritten attention: layer by layer, and what the cache holds."""

from __future__ import annotations

from collections.abc import Mapping

from llmconvert.report.section import Cell, Column, Plot, Section, Series
from llmconvert.report.steps import AttentionReport

__all__ = ["attention_sections"]


def attention_sections(report: AttentionReport) -> list[Section]:
    """Key-value heads before and after: per layer, and for the memory of a long context."""
    (before, after), (wide, narrow) = report.kv_heads, report.kv_bytes_per_token
    rows: list[tuple[Cell, ...]] = [
        (
            str(index),
            " ".join("+".join(map(str, group)) for group in layer.groups),
            layer.key_loss,
            layer.value_loss,
            layer.output_loss_before,
            layer.output_loss,
            layer.divergence_before,
            layer.divergence,
        )
        for index, layer in enumerate(report.layers)
    ]
    text = (
        f"{before} key-value heads became {after} ({report.method}); heads joined by + became one. Shares lost are "
        "squared errors: of logits and values by the merge in closed form; before and after the refit of the output "
        "projections, of what attention should add: the original's output, and what layers before have lost. The "
        "divergence is that of where heads look, in nats, before and after the refit of queries and keys."
    )
    if report.left_out:
        text += " Left out: " + "; ".join(report.left_out) + "."
    lost = [layer.output_loss for layer in report.layers]
    plot = None
    if any(value is not None for value in lost):
        indices = tuple(float(index) for index in range(len(lost)))
        before_refit = tuple(layer.output_loss_before for layer in report.layers)
        plot = Plot(
            caption="Share lost in every layer of what attention should add, on the calibration text.",
            x_label="layer",
            y_label="share of the output lost",
            series=(
                Series(label="before the refit", x=indices, y=before_refit),
                Series(label="after it", x=indices, y=tuple(lost)),
            ),
        )
    layers = Section(
        name="attention-layers",
        title="Merged attention, layer by layer",
        text=text,
        columns=(
            Column(heading="layer"),
            Column(heading="groups"),
            Column(heading="logits lost", unit="share"),
            Column(heading="values lost", unit="share"),
            Column(heading="output lost, merged", unit="share"),
            Column(heading="output lost, refitted", unit="share"),
            Column(heading="divergence, merged", unit="nats"),
            Column(heading="divergence, refitted", unit="nats"),
        ),
        rows=tuple(rows),
        plot=plot,
    )
    return [layers, _cache_section(report.contexts, wide, narrow)]


def _cache_section(contexts: Mapping[str, tuple[int, int]], wide: int, narrow: int) -> Section:
    rows: list[tuple[Cell, ...]] = [("KV cache per token, 16 bits", f"{wide:,} B", f"{narrow:,} B")]
    rows += [
        (f"longest context in {memory} weights", f"{old:,} tokens", f"{new:,} tokens")
        for memory, (old, new) in contexts.items()
    ]
    return Section(
        name="kv-cache",
        title="What fits in memory",
        text="Memory of a size, less the weights in the dtype named, over the bytes of keys and values that a token "
        "leaves: how many tokens fit, whatever the model was trained for. Activations and the runtime take their part.",
        columns=(Column(heading=""), Column(heading="before"), Column(heading="after")),
        rows=tuple(rows),
        shown=("card",),
    )
