"""A plan as lines of text that fit 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from llmconvert.recipes.planning.plan import RunPlan, StepPlan

__all__ = ["folded", "gigabytes", "makes", "plan_lines", "row"]

_COLUMNS = 80
_WIDTHS = (16, 9, 10, 16)
# Share of the disk above which it is said that it will be free again.
_NOTABLE = 0.05


def plan_lines(plan: RunPlan, *, probe: bool = True) -> Iterator[str]:
    """What it begins with and makes, a line for each step, and all of it against what there is.

    Args:
        probe: whether its time can be probed for.
    """
    yield f"plan: {plan.model} → {plan.makes}" if plan.makes else f"plan: {plan.model}"
    yield f"{plan.parameters / 1e6:,.0f}M parameters in {plan.blocks} blocks"
    if plan.processes > 1:
        yield f"{plan.processes} processes share calibration and evaluation; memory is of each"
    yield row("step", "memory", "disk", "time") + "makes"
    for step in plan.steps:
        yield from _step(step)
    needs, device = plan.needs, plan.device_memory
    todo = [step for step in plan.steps if not step.reused]
    if not todo:
        yield "nothing is left to do"
        return
    seconds = plan.seconds
    yield row(
        "in all", gigabytes(needs.memory), gigabytes(needs.disk), str(seconds) if seconds is not None else "not known"
    )
    free = f"{gigabytes(plan.memory)} of memory may be used"
    if device is not None:
        free += f"; {gigabytes(needs.device_memory)} of {gigabytes(device)} on the device"
    yield f"{free}; {gigabytes(needs.download) if needs.download else 'nothing'} to download"
    if needs.passing > _NOTABLE * needs.disk:
        yield f"{gigabytes(needs.left)} of the disk stay taken; the rest is free again at the end"
    if plan.readers:
        yield from folded(plan.readers)
    if any(step.seconds is None for step in todo):
        yield f"time: nothing like it was timed on this machine yet{'; --probe times two blocks' if probe else ''}"


def _step(step: StepPlan) -> Iterator[str]:
    if step.reused:
        yield f"{step.name:<{_WIDTHS[0]}}there already"
        return
    time = str(step.seconds) if step.seconds is not None else ""
    memory = step.needs.memory or step.needs.device_memory
    disk = step.needs.disk
    cells = (gigabytes(memory) if memory else "", gigabytes(disk) if disk else "", time)
    line, made = row(step.name, *cells), makes(step)
    beside = len(line) + len(made) <= _COLUMNS
    yield (line + made).rstrip() if beside else line.rstrip()
    notes = list(step.notes)
    if count := len(step.files or {}):
        notes.insert(0, f"{step.tensors:,} tensors in {f'{count} files' if count > 1 else 'one file'}")
    if not beside:
        notes.insert(0, made)
    for note in notes:
        yield from folded(note, "  ")


def folded(text: str, indent: str = "") -> list[str]:
    """A sentence in lines of 80 columns; those behind the first are indented by two more."""
    lines: list[str] = []
    for line in text.splitlines():
        begins = f"{indent}  " if lines else indent
        lines += textwrap.wrap(
            line,
            _COLUMNS,
            initial_indent=begins,
            subsequent_indent=f"{indent}  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def makes(step: StepPlan) -> str:
    """Bytes of the weight files that a step makes, in words; empty where it makes none."""
    if not step.files:
        return ""
    return f"{step.nbytes:,} bytes" if step.least is None else f"{step.least:,} to {step.nbytes:,} bytes"


def row(*cells: str) -> str:
    """Cells of the table: names to the left, numbers to the right; a cell that is longer pushes nothing but the end."""
    name, *numbers = cells
    right = "".join(f" {cell:>{width - 1}}" for cell, width in zip(numbers, _WIDTHS[1:], strict=False))
    return f"{name:<{_WIDTHS[0]}}{right}  "


def gigabytes(nbytes: int) -> str:
    """``1,234 MB``, or ``12.3 GB`` of what is larger."""
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 10e9 else f"{nbytes / 1e6:,.0f} MB"
