"""Memory ladder: weights, KV cache and activations in float32, bfloat16, 8 and 4 bits, and which context fits where.

Computed figures are the weights, the cache of one sequence, the activations of reading it in one piece with flash
attention, and what an interpreter with its libraries takes. A model that flash can't run (soft-capping, ALiBi) writes
out its attention scores, which are counted then. Measured ones are the peak resident memory of a process that loads the
model with transformers and reads a prompt; it keeps 32 and 16 bits as they are, and unpacks fewer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llmconvert.convert.inspection import describe_model
from llmconvert.convert.kv_cache import CacheLayout, cache_layout
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.engine.memory import BASE_NBYTES
from llmconvert.memory import available_nbytes
from llmconvert.report.report import Check
from llmconvert.report.section import Cell, Column, Plot, Section, Series
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.validate.long_inputs.backends import best_backend
from llmconvert.validate.measurement import Measurement, Subject
from llmconvert.validate.render.display import format_bytes
from llmconvert.validate.runtimes.isolated import UnmeasuredError, run_isolated

__all__ = ["CARDS", "MemoryLadder", "MemoryNeed", "Rung", "memory_needs", "rungs_section"]

#: Memory sizes to fit into, in GB of 10⁹ bytes.
CARDS = (8, 16, 24, 48, 80)
# Numbers held per token while a block runs: residuals, norms in float32 and projections; gate, up and their product.
_RESIDUAL_WIDTHS, _MLP_WIDTHS = 8, 6
# Bytes of an attention score that is written out: itself, masked, its softmax in float32, and what that is rounded to.
_SCORE_NBYTES = 12
_TIMEOUT = 1800.0
_USABLE = 0.8
_SHOWN_CONTEXT = 8192


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Computed needs of one model in one weight format.

    Attributes:
        weights: dtype or scheme.
        kv_heads: per layer.
        weight_bytes: of all weights.
        itemsize: bytes of a number in the cache and in activations.
        layout: of the cache.
        token_bytes: of activations, per token that is read.
        pair_bytes: of the attention scores of all heads, per pair of tokens; 0 where flash attention makes none.
    """

    weights: str
    kv_heads: int
    weight_bytes: int
    itemsize: int
    layout: CacheLayout
    token_bytes: int
    pair_bytes: int = 0

    def running(self, context: int, batch: int = 1) -> int:
        """Bytes to read a prompt of ``context`` tokens and write on, interpreter included."""
        cache = self.layout.nbytes(context, batch, self.itemsize)
        activations = batch * context * (self.token_bytes + context * self.pair_bytes)
        return BASE_NBYTES + self.weight_bytes + cache + activations

    def longest(self, nbytes: int, limit: int = 1 << 24) -> int:
        """The longest context that fits ``nbytes``, ``limit`` at most; 0 if the weights alone don't."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            if self.running(middle) <= nbytes:
                low = middle
            else:
                high = middle - 1
        return low


def memory_needs(checkpoint: Checkpoint, kv_heads: int | None = None) -> list[MemoryNeed]:
    """One need per weight format, widest first.

    Args:
        checkpoint: dense.
        kv_heads: another number of key-value heads than its own, for what would be; weights are taken as they are.
    """
    summary = describe_model(checkpoint)
    model = Architecture.of(checkpoint.config)
    heads = kv_heads or model.kv_heads
    widths = _RESIDUAL_WIDTHS * model.hidden_size + _MLP_WIDTHS * model.inner_size
    needs = []
    for weights, nbytes in summary.weight_bytes.items():
        dtype = torch.float32 if weights == "float32" else torch.bfloat16
        layout = cache_layout(model, heads)
        written = best_backend(model.config, torch.device("cpu"), dtype) == "eager"
        pair = _SCORE_NBYTES * model.query_heads if written else 0
        needs.append(MemoryNeed(weights, heads, nbytes, dtype.itemsize, layout, widths * dtype.itemsize, pair))
    return needs


@dataclass(frozen=True, slots=True)
class Rung:
    """One step: its name, bytes of the weights, bytes of the cache of one sequence, perplexity if it was measured."""

    label: str
    weight_bytes: int
    cache_bytes: int
    perplexity: float | None


@dataclass(frozen=True, slots=True)
class MemoryLadder(Measurement):
    """The memory ladder as a measurement, computed and where it fits run.

    Attributes:
        contexts: tokens to read and keep.
        measured: dtypes to load and run for real, and
        measured_contexts: how far.
        memory: bytes that may be taken; 80 % of what is free by default.
    """

    contexts: tuple[int, ...] = (2048, 8192, 32768)
    measured: tuple[str, ...] = ("float32", "bfloat16")
    measured_contexts: tuple[int, ...] = (2048, 8192)
    memory: int | None = None

    def measure(self, subject: Subject) -> list[Check]:
        """One check, the artifact's need at the longest context, with the ladder, what fits, and what was measured."""
        needs = self._needs(subject)
        measured, reasons, broken = self._run(subject, [need for need in needs if need.weights in self.measured])
        rungs = _rungs(subject)
        sections = [
            rungs_section("memory-ladder", rungs, _SHOWN_CONTEXT),
            self._computed_section(needs),
            _fits_section(needs, describe_model(subject.dense).context),
        ]
        if measured or reasons:
            sections.append(_measured_section(measured, reasons))
        text = "computed from tensors and the cache's formula"
        return [
            Check(
                name="memory.cache_and_weights",
                label=f"Weights and cache at {_SHOWN_CONTEXT:,} tokens",
                ok=not broken,
                value=rungs[-1].weight_bytes + rungs[-1].cache_bytes,
                reference=rungs[1].weight_bytes + rungs[1].cache_bytes if len(rungs) > 2 else None,
                unit="bytes",
                detail={
                    "text": f"{text}; loading and running it could not be measured: {broken[0]}" if broken else text,
                    "rungs": [asdict(rung) for rung in rungs],
                    "measured": measured,
                    "not_measured": reasons,
                },
                sections=tuple(sections),
            )
        ]

    def _needs(self, subject: Subject) -> list[MemoryNeed]:
        """Of the original, then of the artifact if it has another cache; else of what it would be with one head."""
        needs = memory_needs(subject.dense)
        before = memory_needs(subject.original) if subject.original is not None else needs
        if not needs or not before:
            return [*before, *needs]
        if before[0].layout != needs[0].layout:
            return [*before, *needs]
        return needs if needs[0].kv_heads == 1 else [*needs, *memory_needs(subject.dense, 1)]

    def _run(self, subject: Subject, needs: Sequence[MemoryNeed]) -> tuple[list[dict[str, Any]], list[str], list[str]]:
        """Load the artifact in each dtype and read prompts, each in its own process.

        Returns:
            What was measured, why the rest was not, and of these reasons those that no limit explains.
        """
        model = Architecture.of(subject.dense.config)
        heads = model.kv_heads
        measured: list[dict[str, Any]] = []
        reasons: list[str] = []
        broken: list[str] = []
        wanted = [(need, context) for need in needs if need.kv_heads == heads for context in self.measured_contexts]
        with subject.progress.task("memory ladder", max(1, len(wanted))) as task:
            for need, context in wanted:
                dtype = getattr(torch, need.weights)
                try:
                    found = self._point(subject, need, context, best_backend(model.config, subject.device, dtype))
                    measured.append(
                        {"weights": need.weights, "tokens": context, "computed": need.running(context), **found}
                    )
                except UnmeasuredError as error:
                    reasons.append(f"{need.weights}, {context:,} tokens: {error}")
                    broken += reasons[-1:] if not error.by_limit else []
                task.advance(1, f"{need.weights}, {context:,} tokens")
        return measured, reasons, broken

    def _point(self, subject: Subject, need: MemoryNeed, context: int, backend: str) -> dict[str, Any]:
        summary = describe_model(subject.dense)
        if unloadable := subject.unloadable:
            raise UnmeasuredError(unloadable, by_limit=True)
        if summary.position_limit and context > summary.position_limit:
            raise UnmeasuredError(f"the model has learned {summary.position_limit:,} positions", by_limit=True)
        allowed = self.memory if self.memory is not None else subject.memory
        budget = allowed if allowed is not None else int(_USABLE * available_nbytes(subject.device))
        if need.running(context) > budget:
            needed = need.running(context)
            raise UnmeasuredError(f"needs about {needed:,} bytes, {budget:,} may be used", by_limit=True)
        found: dict[str, Any] = run_isolated(
            "llmconvert.validate.long_inputs.prefill:measure_prefill",
            {
                "directory": str(subject.artifact),
                "backend": backend,
                "length": context,
                "device": str(subject.device),
                "dtype": need.weights,
                "cache": True,
                "limit": budget if subject.device.type == "cpu" else None,
            },
            timeout=_TIMEOUT,
        )
        return found

    def _computed_section(self, needs: Sequence[MemoryNeed]) -> Section:
        rows: list[tuple[Cell, ...]] = []
        for need in needs:
            running = (float(need.running(context)) for context in self.contexts)
            rows.append((need.weights, float(need.kv_heads), float(BASE_NBYTES + need.weight_bytes), *running))
        attention = "flash attention"
        if any(need.pair_bytes for need in needs):
            attention = "eager attention, whose scores grow with the square of the length (flash can't run this model)"
        return Section(
            name="memory-computed",
            title="Memory to load and to run",
            text="Computed, none of it measured, before and after fewer key-value heads: weights, cache and "
            f"activations of one sequence read in one piece with {attention}, and "
            f"{format_bytes(BASE_NBYTES)} for the interpreter.",
            columns=(
                Column(heading="weights"),
                Column(heading="KV heads"),
                Column(heading="load", unit="bytes"),
                *(Column(heading=f"{context:,} tokens", unit="bytes") for context in self.contexts),
            ),
            rows=tuple(rows),
        )


def _fits_section(needs: Sequence[MemoryNeed], context: int | None) -> Section:
    allowed = f" The config allows {context:,}; more is what memory would hold." if context else ""
    return Section(
        name="memory-fits",
        title="The longest context that fits",
        text=f"Computed, tokens of one sequence; 0: the weights don't fit.{allowed}",
        columns=(
            Column(heading="weights"),
            Column(heading="KV heads"),
            *(Column(heading=f"{size} GB", unit="tokens") for size in CARDS),
        ),
        rows=tuple(
            (need.weights, float(need.kv_heads), *(float(need.longest(size * 10**9)) for size in CARDS))
            for need in needs
        ),
        shown=("terminal",),
    )


def _measured_section(measured: Sequence[Mapping[str, Any]], reasons: Sequence[str]) -> Section:
    methods = sorted({str(found["method"]) for found in measured})
    return Section(
        name="memory-measured",
        title="Memory, measured",
        text=f"A process of its own per row: {', '.join(methods) or 'nothing could be run'}. "
        "transformers unpacks weights of fewer bits, so only these formats show in its memory."
        + "".join(f" Not run: {reason}." for reason in reasons),
        columns=(
            Column(heading="weights"),
            Column(heading="tokens", unit="tokens"),
            Column(heading="loaded", unit="bytes"),
            Column(heading="cache", unit="bytes"),
            Column(heading="peak", unit="bytes"),
            Column(heading="computed", unit="bytes"),
        ),
        rows=tuple(
            (
                str(found["weights"]),
                float(found["tokens"]),
                float(found["loaded_bytes"]),
                float(found["cache_bytes"]),
                float(found["peak_bytes"]),
                float(found["computed"]),
            )
            for found in measured
        ),
        shown=("terminal",),
    )


def _rungs(subject: Subject) -> list[Rung]:
    """float32, the original as it is, and the artifact, with the perplexities that were measured before."""
    perplexity = subject.check("perplexity")
    found = []
    base = subject.original if subject.original is not None else subject.dense
    wide = memory_needs(base)[0]
    found.append(Rung("float32", wide.weight_bytes, wide.layout.nbytes(_SHOWN_CONTEXT, 1, 4), None))
    if subject.reference is not None:
        layout = cache_layout(Architecture.of(subject.reference.config))
        before = perplexity.reference if perplexity is not None else None
        found.append(Rung("original", subject.reference.nbytes, layout.nbytes(_SHOWN_CONTEXT), before))
    layout = cache_layout(Architecture.of(subject.stored.config))
    after = perplexity.value if perplexity is not None else None
    found.append(Rung("artifact", subject.stored.nbytes, layout.nbytes(_SHOWN_CONTEXT), after))
    return found


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
