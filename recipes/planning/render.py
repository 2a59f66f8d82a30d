"""A plan as lines of text that fit 80 columns."""

from __future__ import annotations

from collections.abc import Iterator

from llmconvert.recipes.planning.plan import RunPlan, StepPlan

__all__ = ["plan_lines"]

_WIDTHS = (17, 9, 9, 14)


def plan_lines(plan: RunPlan) -> Iterator[str]:
    """What it begins with and makes, a line for each step, and all of it against what there is."""
    yield f"plan: {plan.model} → {plan.makes}" if plan.makes else f"plan: {plan.model}"
    yield f"{plan.parameters / 1e6:,.0f}M parameters in {plan.blocks} blocks"
    yield _row("step", "memory", "disk", "time") + "makes"
    for step in plan.steps:
        yield from _step(step)
    needs, device = plan.needs, plan.device_memory
    todo = [step for step in plan.steps if not step.reused]
    if not todo:
        yield "nothing is left to do"
        return
    seconds = plan.seconds
    yield _row("in all", _size(needs.memory), _size(needs.disk), str(seconds) if seconds is not None else "not known")
    free = f"{_size(plan.memory)} of memory may be used"
    if device is not None:
        free += f"; {_size(needs.device_memory)} of {_size(device)} on the device"
    yield f"{free}; {_size(needs.download) if needs.download else 'nothing'} to download"
    if plan.readers:
        yield plan.readers
    if any(step.seconds is None for step in todo):
        yield "time: nothing like it was timed on this machine yet; --probe times two blocks"


def _step(step: StepPlan) -> Iterator[str]:
    if step.reused:
        yield f"{step.name:<{_WIDTHS[0]}}there already"
        return
    time = str(step.seconds) if step.seconds is not None else ""
    memory = step.needs.memory or step.needs.device_memory
    row = _row(step.name, _size(memory) if memory else "", _size(step.needs.disk) if step.needs.disk else "", time)
    yield (row + _makes(step)).rstrip()
    for note in step.notes:
        yield f"  {note}"


def _makes(step: StepPlan) -> str:
    files = step.files or {}
    if not files:
        return ""
    size = f"{step.nbytes:,} bytes" if step.least is None else f"{step.least:,} to {step.nbytes:,} bytes"
    return f"{size} in {len(files)} files" if len(files) > 1 else size


def _row(*cells: str) -> str:
    """Names to the left, numbers to the right; a cell that is longer pushes nothing but the end."""
    name, *numbers = cells
    row = f"{name:<{_WIDTHS[0]}}" + "".join(
        f"{cell:>{width}}" for cell, width in zip(numbers, _WIDTHS[1:], strict=False)
    )
    return f"{row}  "


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 10e9 else f"{nbytes / 1e6:,.0f} MB"
