"""What every scheme of every unit costs in divergence of the predictions, measured on calibration text.

Quantizing a linear moves its weight by ``Δ`` and its output by ``Δ x``. With ``H = E[x xᵀ]`` of its inputs and ``s``
the cost of an error in each component of its output (:mod:`llmconvert.engine.backward`), the divergence that this
brings is

    KL ≈ ½ Σ_r s_r (Δ H Δᵀ)_rr

per token. ``Δ`` is what the method itself does to the weight in that scheme, on some of its rows: rows are rounded
independently, so that their mean speaks for all. One way forward through the original model, with Hessians, gives the
errors; one back gives the costs. Both go on at the block where they were stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmconvert.engine.backward import output_costs
from llmconvert.engine.discovery import BlockPlan
from llmconvert.engine.memory import choose_mode
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.states import DiskStates, TapeStates, states_present
from llmconvert.engine.statistics import Hessian, accumulate_hessian, hessian_nbytes
from llmconvert.engine.stream import BlockRun, Stream
from llmconvert.journal import Journal
from llmconvert.lock import LOCK_NAME, DirectoryLock
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.base import Quantizer, Target
from llmconvert.quantize.gptq import Gptq
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.units import FusedUnit

__all__ = ["Divergences", "Subject", "enough_windows", "measure_sensitivity"]

#: Unit → scheme → divergence per token, in nats.
Divergences = Mapping[FusedUnit, Mapping[Scheme, float]]

_JOURNAL = "journal.jsonl"
_GRADIENTS = "gradients"
# Rows of each linear that are quantized in every scheme.
_ROWS = 128
# Enough text for costs that are means over all of it, and Hessians that don't flatter: twice their columns.
_TOKENS = 8192
_TOKENS_PER_COLUMN = 2
# What a forward pass with gradients keeps, as a multiple of what one without has alive at most.
_GRAPH = 3


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured.

    Attributes:
        skeleton: the original model.
        blocks: what a forward pass does.
        schemes: the units in question, and what each could have.
        method: what will quantize them.
        scale_dtype: what scales are chosen in.
        windows: calibration text, ``[1, length]`` each.
    """

    skeleton: Skeleton
    blocks: Sequence[BlockPlan]
    schemes: Mapping[FusedUnit, Sequence[Scheme]]
    method: Quantizer
    scale_dtype: torch.dtype
    windows: Sequence[torch.Tensor]

    @property
    def quantizer(self) -> Quantizer:
        """The method where it takes a Hessian or nothing; GPTQ in the place of those that see whole blocks or more."""
        simple = self.method.calibration in ("none", "inputs") and not self.method.original
        return self.method if simple else Gptq()

    @property
    def shape(self) -> tuple[list[int], int, torch.dtype]:
        """Tokens of each window, width and dtype of the hidden states."""
        width = self.skeleton.model.config.get_text_config().hidden_size
        return [window.shape[1] for window in self.windows], width, self.skeleton.dtype


def enough_windows(windows: Sequence[torch.Tensor], units: Sequence[FusedUnit]) -> tuple[torch.Tensor, ...]:
    """As many of the first windows as it takes."""
    needed = max([_TOKENS, *(_TOKENS_PER_COLUMN * unit.columns for unit in units)])
    taken: list[torch.Tensor] = []
    for window in windows:
        if needed > 0:
            taken.append(window)
            needed -= window.shape[1]
    return tuple(taken)


def measure_sensitivity(
    subject: Subject, work: Path, key: str, *, memory_budget: int | None = None, progress: Progress = SILENT
) -> Divergences:
    """Measure, or go on where an earlier call was stopped.

    Args:
        subject: what.
        work: a directory for what an interrupted call leaves; of a finished one it keeps the result.
        key: identifies the subject; what was left under another key is thrown away.
        memory_budget: bytes the process may use; what is free by default.
        progress: one unit per block, forwards and backwards.

    Raises:
        CalibrationError: activations, statistics or gradients are unusable.
        CapacityError: memory or disk does not suffice.
        OutputError: another process works there.
    """
    lengths, _, _ = subject.shape
    memory = choose_mode(subject.skeleton, subject.blocks, lengths, _work_nbytes(subject), memory_budget)
    lock = DirectoryLock(work)
    try:
        journal = _open(work, key)
        count = subject.skeleton.block_count
        forward, backward = _done(journal, "errors"), _done(journal, "costs")
        if backward < count:
            with ExitStack() as stack, progress.task("Measuring sensitivity", 2 * count) as task:
                tape = stack.enter_context(closing(TapeStates(work, *subject.shape)))
                if not _intact(subject, work, tape, forward, backward):
                    journal, forward, backward = _open(work, key, anew=True), 0, 0
                task.advance(forward + backward)
                for entry in _forward(stack, subject, tape, forward, memory.mode):
                    journal.append(entry)
                    task.advance()
                for entry in _backward(stack, subject, tape, work, count - 1 - backward):
                    journal.append(entry)
                    task.advance()
            for path in work.glob("*.bin"):
                path.unlink()
        return _divergences(subject, journal)
    finally:
        lock.release()


def _open(work: Path, key: str, *, anew: bool = False) -> Journal:
    """The journal of that key; whatever belongs to another one goes, or everything."""
    journal = Journal(work / _JOURNAL)
    if not anew and journal.entries and journal.entries[0].get("key") == key:
        return journal
    for path in work.iterdir():
        if path.name != LOCK_NAME:
            path.unlink()
    journal = Journal(work / _JOURNAL)
    journal.append({"key": key})
    return journal


def _intact(subject: Subject, work: Path, tape: TapeStates, forward: int, backward: int) -> bool:
    """Whether what continuing takes is there: the tape so far, and the gradients that come to the next block."""
    count = subject.skeleton.block_count
    if forward and not all(tape.present(block) for block in range(min(forward + 1, count))):
        return False
    return not backward or states_present(work, count - backward, *subject.shape, name=_GRADIENTS)


def _done(journal: Journal, kind: str) -> int:
    return sum(kind in entry for entry in journal.entries)


def _forward(stack: ExitStack, subject: Subject, tape: TapeStates, done: int, mode: Any) -> Iterator[dict[str, Any]]:
    """An entry for each block from ``done`` on, when its errors are known and what leaves it is on the tape."""
    skeleton = subject.skeleton
    if done == skeleton.block_count:
        return
    units: dict[int, list[FusedUnit]] = {}
    for unit in subject.schemes:
        units.setdefault(unit.block, []).append(unit)
    stream = Stream(skeleton, subject.windows, subject.blocks, mode=mode, states=tape, start=done)
    try:
        entry: dict[str, Any] = {}
        for run in stream.blocks():
            if entry:
                tape.sync(run.plan.index)
                yield entry
            elif not done:
                tape.sync(0)
            found: dict[str, Any] = {}
            for unit in units.get(run.plan.index, ()):
                found |= _errors(subject, unit, run)
            entry = {"errors": run.plan.index, "linears": found}
        yield entry
    finally:
        stream.close()


def _errors(subject: Subject, unit: FusedUnit, run: BlockRun) -> dict[str, Any]:
    """Linear → scheme → squared output error per token of some rows."""
    device = subject.skeleton.device
    hessian = accumulate_hessian(unit.linears[0], run.inputs(unit.linears[0]), unit.columns, device)
    parts = {name: run.module(name).weight.data[_rows(run.module(name).out_features)] for name in unit.linears}
    targets = {
        (name, scheme): Target(f"{name} in {scheme}", part, scheme)
        for scheme in subject.schemes[unit]
        for name, part in parts.items()
    }
    quantizer = subject.quantizer
    given = Hessian(hessian.matrix.clone(), hessian.tokens) if quantizer.calibration == "inputs" else None
    solutions = quantizer.quantize(list(targets.values()), given, subject.scale_dtype)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in unit.linears}
    for (name, scheme), target in targets.items():
        delta = solutions[target.name].tensor.dequantize(torch.float32) - target.weight.float()
        losses = (delta @ hessian.matrix).mul_(delta).sum(1).clamp_(min=0)
        found[name][str(scheme)] = _short(losses)
    return found


def _backward(stack: ExitStack, subject: Subject, tape: TapeStates, work: Path, begin: int) -> Iterator[dict[str, Any]]:
    """An entry for each block from ``begin`` down, when the costs of its outputs are known."""
    if begin < 0:
        return
    gradients = stack.enter_context(closing(DiskStates(work, *subject.shape, name=_GRADIENTS)))
    costs = output_costs(subject.skeleton, subject.windows, subject.blocks, tape, gradients, begin=begin)
    for index, by_linear in stack.enter_context(closing(costs)):
        gradients.sync(index)
        found = {
            name: {"total": float(cost.sum(dtype=torch.float64)), "rows": _short(cost[_rows(len(cost))])}
            for name, cost in by_linear.items()
        }
        yield {"costs": index, "linears": found}


def _divergences(subject: Subject, journal: Journal) -> Divergences:
    """Errors weighed by costs; of each linear's rows those that were measured speak for the rest, by cost."""
    errors: dict[str, Any] = {}
    costs: dict[str, Any] = {}
    for entry in journal.entries:
        (errors if "errors" in entry else costs).update(entry.get("linears", {}))
    found: dict[FusedUnit, dict[Scheme, float]] = {}
    for unit, schemes in subject.schemes.items():
        found[unit] = dict.fromkeys(schemes, 0.0)
        for name in unit.linears:
            rows = torch.tensor(costs[name]["rows"], dtype=torch.float64)
            share = costs[name]["total"] / float(rows.sum()) if float(rows.sum()) > 0 else 0.0
            for scheme in schemes:
                losses = torch.tensor(errors[name][str(scheme)], dtype=torch.float64)
                found[unit][scheme] += 0.5 * share * float(rows @ losses)
    return found


def _rows(count: int) -> slice:
    """Which of a linear's rows are measured: evenly spread."""
    return slice(None, None, max(1, count // _ROWS))


def _short(values: torch.Tensor) -> list[float]:
    """As JSON, five digits each."""
    return [float(f"{value:.5g}") for value in values.tolist()]


def _work_nbytes(subject: Subject) -> int:
    """What the more demanding of the two ways needs beside model and activations: a unit's statistics and solutions,
    or a window's graph and its logits, their gradients and a piece of them in float32."""
    skeleton = subject.skeleton
    forward = [0]
    for unit, schemes in subject.schemes.items():
        rows = sum(min(2 * _ROWS, height) for height, _ in unit.shapes)
        solving = 8 * unit.columns**2 + subject.quantizer.nbytes(rows * len(schemes), unit.columns)
        forward.append(max(hessian_nbytes(unit.columns, skeleton.dtype), solving))
    longest = max(window.shape[1] for window in subject.windows)
    vocabulary = skeleton.model.config.get_text_config().vocab_size
    head = skeleton.outer_nbytes(head=True) - skeleton.outer_nbytes(head=False)
    graph = _GRAPH * max(plan.peak_nbytes for plan in subject.blocks)
    backward = head + graph + longest * vocabulary * (2 * skeleton.dtype.itemsize + 4)
    return max(*forward, backward)
