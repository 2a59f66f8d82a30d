"""Sensitivity by Fisher information: the KL divergence that each scheme of each unit costs, on calibration text.

Quantizing a linear moves its weight by ``Δ`` and its outputs by ``Δ x_t``. With ``g_t`` from the way back through the
model (:mod:`llmconvert.engine.backward`), which say what errors of its outputs cost, that brings per token

    KL ≈ 1/2T Σ_windows (Σ_t g_tᵀ Δ x_t)² ≈ 1/2T Σ_windows Σ_r (Δ_r · G_r)²,   G = Σ_t g_t x_tᵀ

since the errors of different rows ``r`` are independent of each other, while those of different tokens are not: what
``Δ`` makes of the inputs' mean is the same for all of them, and later tokens gather it. ``Δ`` is what the method itself
does to the weight in that scheme, on some of its rows, which speak for the others by what errors of each would cost.

One way forward through the original model puts its states on a tape, one back does the rest; both go on at the block
where they were stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmconvert.engine.backward import Passage, graph_nbytes, sampled_nbytes, walk_back
from llmconvert.engine.discovery import BlockPlan
from llmconvert.engine.memory import choose_mode
from llmconvert.engine.sites import head_tensor
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.states import DiskStates, TapeStates, states_present
from llmconvert.engine.statistics import accumulate_hessian, hessian_nbytes
from llmconvert.engine.stream import Mode, Stream
from llmconvert.needs import Needs
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.methods.base import GgmlQuantizer, Method, Quantizer, Target
from llmconvert.quantize.methods.gptq import Gptq
from llmconvert.quantize.mixed_precision.encoding import Encoding
from llmconvert.quantize.mixed_precision.outer import OuterSubject, embedding_costs, head_costs
from llmconvert.quantize.mixed_precision.units import FusedUnit, embedding_tensor
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.solve.group_scales import block_scales_nbytes
from llmconvert.storage.journal import Journal
from llmconvert.storage.lock import locked

__all__ = ["Divergences", "Subject", "enough_windows", "measure_sensitivity", "sensitivity_needs"]

#: Unit → scheme → divergence per token, in nats.
Divergences = Mapping[FusedUnit, Mapping[Scheme, float]]

_JOURNAL = "journal.jsonl"
_GRADIENTS = "gradients"
# Rows of each linear that are quantized in every scheme.
_ROWS = 128
# Enough text for costs that are means over all of it, and Hessians that don't flatter: twice their columns.
_TOKENS = 8192
_TOKENS_PER_COLUMN = 2


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
    method: Method
    scale_dtype: torch.dtype
    windows: Sequence[torch.Tensor]

    @property
    def quantizer(self) -> Quantizer:
        """The method where it takes a Hessian or nothing; GPTQ in the place of those that see whole blocks or more."""
        if isinstance(self.method, GgmlQuantizer) and self.outer:
            return Encoding(self.method)
        simple = self.method.calibration in ("none", "inputs") and not self.method.original
        return self.method if simple and isinstance(self.method, Quantizer) else Gptq()

    @property
    def outer(self) -> tuple[FusedUnit, ...]:
        """Embedding and head, where they are up for choice."""
        return tuple(unit for unit in self.schemes if unit.outer is not None)

    @property
    def shape(self) -> tuple[list[int], int, torch.dtype]:
        """Tokens of each window, width and dtype of the hidden states."""
        return [window.shape[1] for window in self.windows], self.skeleton.hidden_size, self.skeleton.dtype


def enough_windows(windows: Sequence[torch.Tensor], units: Sequence[FusedUnit]) -> tuple[torch.Tensor, ...]:
    """As many of the first windows as it takes."""
    needed = max([_TOKENS, *(_TOKENS_PER_COLUMN * unit.columns for unit in units)])
    taken: list[torch.Tensor] = []
    for window in windows:
        if needed > 0:
            taken.append(window)
            needed -= window.shape[1]
    return tuple(taken)


def sensitivity_needs(subject: Subject, memory_budget: int | None) -> Needs:
    """What :func:`measure_sensitivity` takes: on disk the hidden states at every block, and two blocks' gradients.

    Raises:
        CapacityError: memory does not suffice.
    """
    lengths, hidden_size, dtype = subject.shape
    skeleton = subject.skeleton
    memory = choose_mode(skeleton, subject.blocks, lengths, _work_nbytes(subject), memory_budget, "replay")
    states = sum(lengths) * hidden_size * dtype.itemsize
    tape = (skeleton.block_count + 1 + 2) * states
    return memory.needs(skeleton.device, disk=tape, passing=tape)


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
    memory = choose_mode(subject.skeleton, subject.blocks, lengths, _work_nbytes(subject), memory_budget, "replay")
    with locked(work):
        work.mkdir(exist_ok=True)
        journal = _open(work, key)
        count = subject.skeleton.block_count
        forward, back = _done(journal, "taped"), _done(journal, "divergences")
        if back < count or (subject.outer and not _done(journal, "outer")):
            with ExitStack() as stack, progress.task("Measuring sensitivity", 2 * count) as task:
                tape = stack.enter_context(closing(TapeStates(work, *subject.shape)))
                if not _intact(subject, work, tape, forward, back):
                    journal, forward, back = _open(work, key, anew=True), 0, 0
                task.advance(forward + back)
                for entry in _forward(subject, tape, forward, memory.mode):
                    journal.append(entry)
                    task.advance()
                for entry in _back(stack, subject, tape, work, count - 1 - back):
                    journal.append(entry)
                    task.advance()
                if subject.outer:
                    journal.append({"outer": _outer(stack, subject, tape, work)})
            for path in work.glob("*.bin"):
                path.unlink()
        return _collect(subject, journal)


def _open(work: Path, key: str, *, anew: bool = False) -> Journal:
    """The journal of that key; whatever belongs to another one goes, or everything."""
    journal = Journal(work / _JOURNAL)
    if not anew and journal.entries and journal.entries[0].get("key") == key:
        return journal
    for path in work.iterdir():
        path.unlink()
    journal = Journal(work / _JOURNAL)
    journal.append({"key": key})
    return journal


def _intact(subject: Subject, work: Path, tape: TapeStates, forward: int, back: int) -> bool:
    """Whether what continuing takes is there: the tape so far, and the gradients that come to the next block."""
    count = subject.skeleton.block_count
    if forward and not all(tape.present(block) for block in range(min(forward + 1, count - back))):
        return False
    return not back or states_present(work, count - back, *subject.shape, name=_GRADIENTS)


def _done(journal: Journal, kind: str) -> int:
    return sum(kind in entry for entry in journal.entries)


def _forward(subject: Subject, tape: TapeStates, done: int, mode: Mode) -> Iterator[dict[str, Any]]:
    """An entry for each block from ``done`` on, when what leaves it is on the tape."""
    skeleton = subject.skeleton
    if done == skeleton.block_count:
        return
    stream = Stream(skeleton, subject.windows, subject.blocks, mode=mode, states=tape, start=done)
    try:
        for run in stream.blocks():
            tape.sync(run.plan.index)
            if run.plan.index > done:
                yield {"taped": run.plan.index - 1}
        yield {"taped": skeleton.block_count - 1}
    finally:
        stream.close()


def _back(stack: ExitStack, subject: Subject, tape: TapeStates, work: Path, begin: int) -> Iterator[dict[str, Any]]:
    """An entry for each block from ``begin`` down, with the divergences of its units' schemes."""
    if begin < 0:
        return
    gradients = stack.enter_context(closing(DiskStates(work, *subject.shape, name=_GRADIENTS)))
    units: dict[int, list[FusedUnit]] = {}
    for unit in subject.schemes:
        units.setdefault(unit.block, []).append(unit)
    walk = walk_back(subject.skeleton, subject.windows, subject.blocks, tape, gradients, pick=_rows, begin=begin)
    for index, seen in stack.enter_context(closing(walk)):
        gradients.sync(index)
        yield {"divergences": index, "units": [_of_unit(subject, unit, seen) for unit in units.get(index, ())]}


def _of_unit(subject: Subject, unit: FusedUnit, seen: Mapping[str, Passage]) -> list[float]:
    """The divergence of each of a unit's schemes."""
    quantizer, skeleton = subject.quantizer, subject.skeleton
    first, modules = unit.linears[0], skeleton.linears[unit.block]
    hessian = None
    if quantizer.calibration == "inputs":
        hessian = accumulate_hessian(first, seen[first].inputs, unit.columns, skeleton.device)
    sites = (skeleton.sites[name] for name in unit.linears)
    parts = {site.name: site.value(modules[site.name])[_rows(site.rows)] for site in sites}
    targets = {
        (name, scheme): Target(f"{name} in {scheme}", part, scheme)
        for scheme in subject.schemes[unit]
        for name, part in parts.items()
    }
    solutions = quantizer.quantize(list(targets.values()), hessian, subject.scale_dtype)
    found = dict.fromkeys(subject.schemes[unit], 0.0)
    for name, part in parts.items():
        passage = seen[name]
        assert passage.squares is not None
        picked = float(passage.squares[_rows(len(passage.squares))].sum(dtype=torch.float64))
        share = float(passage.squares.sum(dtype=torch.float64)) / picked if picked > 0 else 0.0
        slopes = [
            gradient.float().T @ inputs.float()
            for gradient, inputs in zip(passage.gradients, passage.inputs, strict=True)
        ]
        for scheme in found:
            delta = solutions[targets[name, scheme].name].tensor.dequantize(torch.float32) - part.float()
            squares = sum(float((delta * slope).sum(1).square().sum(dtype=torch.float64)) for slope in slopes)
            found[scheme] += 0.5 * share * squares / sum(len(inputs) for inputs in passage.inputs)
    return list(found.values())


def _outer(stack: ExitStack, subject: Subject, tape: TapeStates, work: Path) -> list[list[float]]:
    """The divergence of each type of embedding and head; one tensor that is both costs what both do."""
    skeleton = subject.skeleton
    gradients = stack.enter_context(closing(DiskStates(work, *subject.shape, name=_GRADIENTS)))
    measured = OuterSubject(skeleton, subject.blocks, subject.windows, tape, subject.method)
    head, embedding = head_tensor(skeleton.outer), embedding_tensor(skeleton)
    found: list[list[float]] = []
    for unit in subject.outer:
        schemes = subject.schemes[unit]
        costs = [0.0] * len(schemes)
        if unit.outer == "embedding" and embedding is not None:
            costs = embedding_costs(measured, embedding, schemes, gradients)
        if head is not None and (unit.outer == "head" or head == embedding):
            costs = [ours + more for ours, more in zip(costs, head_costs(measured, head, schemes), strict=True)]
        found.append(costs)
    return found


def _collect(subject: Subject, journal: Journal) -> Divergences:
    """What the journal says, by unit and scheme."""
    by_block: dict[int, list[FusedUnit]] = {}
    for unit in (unit for unit in subject.schemes if unit.outer is None):
        by_block.setdefault(unit.block, []).append(unit)
    found: dict[FusedUnit, dict[Scheme, float]] = {}
    for entry in journal.entries:
        for unit, values in zip(subject.outer, entry.get("outer", ()), strict="outer" in entry):
            found[unit] = dict(zip(subject.schemes[unit], values, strict=True))
        for unit, values in zip(by_block.get(entry.get("divergences", -1), ()), entry.get("units", ()), strict=True):
            found[unit] = dict(zip(subject.schemes[unit], values, strict=True))
    return found


def _rows(count: int) -> slice:
    """Which of a linear's rows are measured: evenly spread."""
    return slice(None, None, max(1, count // _ROWS))


def _work_nbytes(subject: Subject) -> int:
    """Bytes beside the model and the activations of a window: the head; a window's graph, its logits, their gradients
    and a piece of them in float32, or a unit's statistics and solutions; and what went through a block."""
    skeleton = subject.skeleton
    tokens = sum(window.shape[1] for window in subject.windows)
    solving, kept = [0], [0]
    for unit, schemes in subject.schemes.items():
        if unit.outer is not None:
            continue
        rows = sum(min(2 * _ROWS, height) for height, _ in unit.shapes)
        slopes = 4 * rows * unit.columns * len(subject.windows)
        matrix = 4 * unit.columns**2 + subject.quantizer.nbytes(rows * len(schemes), unit.columns)
        matrix += 2 * sum(block_scales_nbytes(scheme, rows, unit.columns) for scheme in schemes)
        solving.append(slopes + max(hessian_nbytes(unit.columns, skeleton.dtype), matrix))
    for block in subject.blocks:
        ordinary = (stop for stop in block.stops if skeleton.sites[stop.linears[0]].kind == "linear")
        stops = (stop.columns + 2 * _ROWS * len(stop.linears) for stop in ordinary)
        kept.append(tokens * skeleton.dtype.itemsize * sum(stops))
    longest = max(window.shape[1] for window in subject.windows)
    head = skeleton.outer_nbytes(head=True) - skeleton.outer_nbytes(head=False)
    graph = graph_nbytes(subject.blocks)
    logits = sampled_nbytes(longest, skeleton.architecture.vocab_size, skeleton.dtype)
    return head + max(kept) + max(*solving, graph + logits + _outer_nbytes(subject))


def _outer_nbytes(subject: Subject) -> int:
    """Bytes of the whole tensor that rows of head and embedding are taken from."""
    infos = subject.skeleton.checkpoint.infos
    tensors = (head_tensor(subject.skeleton.outer), embedding_tensor(subject.skeleton))
    return max(infos[name].nbytes for name in tensors if name is not None) if subject.outer else 0
