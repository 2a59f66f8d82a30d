"""Perplexity by position in the window, up to the trained length and beyond it.

Rotary positions reach no further than training did unless they are scaled; ALiBi (Press et al. 2021, arXiv 2108.12409)
was made to; learned positions end with their table. The curve shows what holds for a given model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmconvert.convert.inspection import ModelSummary, describe_model
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.errors import DatasetError
from llmconvert.machine import of_machine
from llmconvert.memory import available_nbytes
from llmconvert.report.report import Check
from llmconvert.report.section import Column, Plot, Section, Series
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.text.tokens import TokenWindows
from llmconvert.validate.long_inputs.backends import activate, best_backend
from llmconvert.validate.long_inputs.windows import SHORTEST, longest_windows
from llmconvert.validate.measurement import Measurement, Subject
from llmconvert.validate.runtimes.isolated import UnmeasuredError, limit_memory, run_isolated
from llmconvert.validate.runtimes.transformers import runtime

__all__ = ["PositionCurve", "PositionsCheck", "score_positions"]

_NAME, _LABEL = "positions.perplexity", "Perplexity at the end of the trained length"
_BINS = 16
_USABLE = 0.8
_TIMEOUT = 3600.0
# Rows of logits that are widened to float32 at a time.
_ROWS = 256


@dataclass(frozen=True, slots=True)
class PositionCurve:
    """Perplexity of the predictions ``edges[i]`` up to ``edges[i + 1]`` of a window, over ``windows`` windows."""

    edges: tuple[int, ...]
    perplexities: tuple[float, ...]
    windows: int

    def between(self, start: int, stop: int) -> float | None:
        """Perplexity of all bins inside ``start:stop``; None if there is none."""
        inside = [
            (math.log(value), high - low)
            for low, high, value in zip(self.edges, self.edges[1:], self.perplexities, strict=False)
            if start <= low and high <= stop
        ]
        total = sum(count for _, count in inside)
        return math.exp(sum(nll * count for nll, count in inside) / total) if total else None


def score_positions(
    directory: str, windows: Sequence[Sequence[int]], *, device: str, limit: int | None = None
) -> list[float]:
    """Mean negative log-likelihood at each position, in nats, ``[L - 1]``. Runs in a process of its own."""
    where = torch.device(device)
    with runtime(Path(directory), device=where) as loaded:
        limit_memory(limit)
        model = loaded.model
        total = torch.zeros(len(windows[0]) - 1, dtype=torch.float64)
        with torch.inference_mode(), activate(model, best_backend(model.config, where, model.dtype)):
            for window in windows:
                ids = torch.tensor([window], device=where)
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
                for start in range(0, len(window) - 1, _ROWS):
                    rows = logits[start : start + _ROWS].float()
                    nll = torch.nn.functional.cross_entropy(
                        rows, ids[0, start + 1 : start + 1 + len(rows)], reduction="none"
                    )
                    total[start : start + len(rows)] += nll.double().cpu()
                del logits
    return list((total / len(windows)).tolist())


@dataclass(frozen=True, slots=True)
class PositionsCheck(Measurement):
    """Perplexity by position as a measurement.

    Attributes:
        dataset: text.
        window: tokens per window; twice the trained length by default.
        windows: how many.
        memory: bytes that may be taken beyond the loaded model; 80 % of what is free by default.
    """

    dataset: str
    window: int | None = None
    windows: int = 4
    memory: int | None = None

    def measure(self, subject: Subject) -> list[Check]:
        """One check with the curve, of the original too if it is a directory that reads the same tokens."""
        summary = describe_model(subject.stored)
        if unloadable := subject.unloadable:
            return [_unmeasured(unloadable, summary)]
        trained = Architecture.of(subject.stored.config).trained_length
        notes: list[str] = []
        length = self._length(subject, summary, trained, notes)
        try:
            windows = longest_windows(subject, self.dataset, self.windows, length, notes.append)
            curves = {"artifact": self._curve(subject.artifact, windows, subject)}
        except (UnmeasuredError, DatasetError) as error:
            if of_machine(error):
                raise
            return [_unmeasured(str(error), summary)]
        if isinstance(subject.reference, SafetensorsCheckpoint):
            try:
                curves["original"] = self._curve(subject.reference.directory, windows, subject)
            except UnmeasuredError as error:
                notes.append(f"the original: {error}")
        return [_report(curves, summary, trained, windows, notes)]

    def _length(self, subject: Subject, summary: ModelSummary, trained: int | None, notes: list[str]) -> int:
        length = self.window or 2 * (trained or 2048)
        limit = summary.position_limit
        if limit is not None and length > limit:
            notes.append(f"beyond {limit:,} tokens there are no learned positions")
            length = limit
        # The logits of all positions, and a copy where the model scales them.
        itemsize = max((info.dtype.itemsize for info in subject.dense.infos.values()), default=4)
        budget = self._budget(subject)
        while length > SHORTEST and 2 * length * summary.vocabulary * itemsize > budget:
            needed = 2 * length * summary.vocabulary * itemsize
            notes.append(f"{length:,} tokens need {needed:,} bytes for their logits, {budget:,} may be used")
            length //= 2
        return length

    def _budget(self, subject: Subject) -> int:
        allowed = self.memory if self.memory is not None else subject.memory
        if allowed is not None:
            return allowed
        return int(_USABLE * available_nbytes(subject.device))

    def _curve(self, directory: Path, windows: TokenWindows, subject: Subject) -> PositionCurve:
        arguments = {
            "directory": str(directory),
            "windows": [window[0].tolist() for window in windows.windows],
            "device": str(subject.device),
            "limit": self._budget(subject) if subject.device.type == "cpu" else None,
        }
        with subject.progress.task("perplexity by position", 1) as task:
            nlls = run_isolated(f"{__name__}:score_positions", arguments, timeout=_TIMEOUT)
            task.advance(1)
        return _bins(nlls, windows.drawn)


def _bins(nlls: Sequence[float], windows: int) -> PositionCurve:
    size = len(nlls) + 1
    edges = sorted({size * index // _BINS for index in range(_BINS)} | {len(nlls)})
    means = [sum(nlls[low:high]) / (high - low) for low, high in itertools.pairwise(edges)]
    return PositionCurve(tuple(edges), tuple(math.exp(min(mean, 700.0)) for mean in means), windows)


def _report(
    curves: dict[str, PositionCurve],
    summary: ModelSummary,
    trained: int | None,
    windows: TokenWindows,
    notes: list[str],
) -> Check:
    found = curves["artifact"]
    inside = trained if trained is not None and trained <= windows.length else windows.length
    half = inside // 2
    within = found.between(half, inside) or found.between(0, inside)
    beyond = found.between(inside - 1, windows.length)
    text = f"{summary.positions}; perplexity {within:.2f} in the second half of {inside:,} tokens" if within else ""
    if beyond is not None and within is not None:
        text += f", {beyond:,.2f} from there to {windows.length:,}"
    detail: dict[str, Any] = {
        "text": "; ".join((text, *notes)),
        "positions": summary.positions,
        "trained": trained,
        "window": windows.length,
        "windows": windows.drawn,
        "dataset": Path(windows.dataset).name if windows.dataset.startswith("/") else windows.dataset,
        "beyond": beyond,
        "curves": {name: {"edges": curve.edges, "perplexities": curve.perplexities} for name, curve in curves.items()},
    }
    section = Section(
        name="positions",
        title="Perplexity by position in the window",
        text=f"Positions: {summary.positions}. "
        + (f"Trained on inputs of {trained:,} tokens, as far as the config says. " if trained else "")
        + f"{windows.drawn} windows of {windows.length:,} tokens. "
        + " ".join(f"Note: {note}." for note in notes),
        columns=(Column(heading="from token"), Column(heading="to"), *(Column(heading=name) for name in curves)),
        rows=tuple(
            (float(low), float(high), *(f"{curve.perplexities[index]:,.2f}" for curve in curves.values()))
            for index, (low, high) in enumerate(zip(found.edges, found.edges[1:], strict=False))
        ),
        plot=Plot(
            caption="Perplexity of predictions by their position"
            + (f"; the model was trained up to {trained:,}." if trained else "."),
            x_label="position, tokens",
            y_label="perplexity",
            y_scale="log",
            series=tuple(
                Series(label=name, x=tuple(map(float, curve.edges[1:])), y=curve.perplexities)
                for name, curve in curves.items()
            ),
        ),
        shown=("terminal",),
    )
    original = curves.get("original")
    reference = None
    if original is not None:
        reference = original.between(half, inside) or original.between(0, inside)
    return Check(name=_NAME, label=_LABEL, value=within, reference=reference, detail=detail, sections=(section,))


def _unmeasured(why: str, summary: ModelSummary) -> Check:
    return Check.unmeasured(_NAME, why, asked=True, label=_LABEL, detail={"positions": summary.positions})
