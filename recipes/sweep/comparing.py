"""The variants of a sweep against their original in one pass of it, before each of them is measured by itself.

Alone, a variant's stage that measures runs original and artifact side by side. Here the original runs once beside all
variants that are still to be measured, and what comes of each lies in its stage's directory when that is built. What a
variant's report says is the same either way.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmconvert.engine.memory import kept_of
from llmconvert.errors import LlmconvertError, RunInterruptedError
from llmconvert.gguf.checkpoint import open_artifact
from llmconvert.memory import PeakMemory, available_nbytes, keeping_freed_memory, release_freed_memory
from llmconvert.progress import Progress
from llmconvert.quantize.formats.dense_view import open_dense, served_by
from llmconvert.recipes.runner import Running
from llmconvert.recipes.stages.measurements import COMPARED_FILE, Measured
from llmconvert.recipes.stages.stage import Stage
from llmconvert.recipes.stages.windows import EVALUATION_TEXT
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.stages import Begun
from llmconvert.validate.predictions.compared import Compared, compare_models
from llmconvert.validate.predictions.needs import comparing_needs

__all__ = ["compare_variants"]

# Of the memory that is free.
_USABLE = 0.8


@dataclass(frozen=True, slots=True)
class _Variant:
    """A run whose model is made and not yet measured."""

    running: Running
    stage: Stage[Measured]
    inputs: Mapping[str, Any]

    @property
    def place(self) -> Path:
        return self.running.stages.place_of(self.stage.name, self.inputs)

    def opened(self, stack: ExitStack) -> Checkpoint:
        """What it made, as its recipe has its inputs quantized."""
        todo = self.running.todo
        settings, model = todo.recipe.measured, self.running.work.finished[todo.model].model
        dense = open_dense(stack.enter_context(open_artifact(model)))
        return dense if settings is None else served_by(dense, settings.activations)

    def begun(self, cost: Begun) -> None:
        self.running.stages.begun(self.stage.name, self.inputs, cost)


def compare_variants(running: Mapping[str, Running], progress: Progress) -> None:
    """Compare runs whose models are made with their original, those of one original and one text in one pass.

    What can't be compared here is left to the stage of its own, which says what is wrong.

    Raises:
        RunInterruptedError: the process was asked to stop.
    """
    groups: dict[tuple[object, ...], dict[str, _Variant]] = {}
    for name, one in running.items():
        stage, work = one.todo.measuring(one.todo.model), one.work
        if stage is None or EVALUATION_TEXT not in work.texts:
            continue
        same = (work.original.key, work.key(EVALUATION_TEXT), work.context.device, work.context.memory)
        groups.setdefault(same, {})[name] = _Variant(one, stage, stage.inputs(work))
    for variants in groups.values():
        if len(variants) > 1:
            with ExitStack() as stack:
                waiting = _begin(variants, stack)
                for names, kept in _portions(waiting, variants):
                    with keeping_freed_memory(kept):
                        _in_one_pass({name: variants[name] for name in names}, waiting, progress)


def _begin(variants: Mapping[str, _Variant], stack: ExitStack) -> dict[str, Path]:
    """The directories of the stages that are still to be compared, by variant; of some that share one, by the first.

    Their locks are taken in one order, so that two sweeps never wait for each other.
    """
    by_place: dict[Path, str] = {}
    for name, one in variants.items():
        by_place.setdefault(one.place, name)
    found = {}
    for _, name in sorted(by_place.items()):
        one = variants[name]
        directory = stack.enter_context(one.running.stages.beginning(one.stage.name, one.inputs))
        if directory is None:
            continue
        if (directory / COMPARED_FILE).exists():  # by a call that was stopped after it
            one.begun(Begun())
        else:
            found[name] = directory
    return {name: found[name] for name in variants if name in found}


def _portions(waiting: Mapping[str, Path], variants: Mapping[str, _Variant]) -> Iterator[tuple[Sequence[str], int]]:
    """Names of as many variants as the memory takes beside each other, and two at least, in turn.

    With each the bytes of the process up to which it keeps what it frees meanwhile.
    """
    names = list(waiting)
    if len(names) < 2:
        return
    work = variants[names[0]].running.work
    context, windows = work.context, work.texts[EVALUATION_TEXT]
    usable = context.memory or int(_USABLE * available_nbytes(context.device))
    with work.original.open() as original:
        dense = open_dense(original, weights_only=True)
        for count in range(len(names), 1, -1):
            needs = comparing_needs(dense, [windows.length] * windows.drawn, count, context)
            if needs.on(context.device) <= usable:
                break
        else:
            return  # each by itself, or not at all
    portions = -(-len(names) // count)
    for number in range(portions):
        portion = names[len(names) * number // portions : len(names) * (number + 1) // portions]
        if len(portion) > 1:
            yield portion, kept_of(needs.memory, context.device)


def _in_one_pass(variants: Mapping[str, _Variant], directories: Mapping[str, Path], progress: Progress) -> None:
    work = next(iter(variants.values())).running.work
    context = work.context
    progress.log(f"{', '.join(variants)}: compared with the original in one pass of it")
    begin = time.perf_counter()
    try:
        with ExitStack() as stack, PeakMemory() as memory:
            original = stack.enter_context(work.original.open())
            found = compare_models(
                open_dense(original, weights_only=True),
                [one.opened(stack) for one in variants.values()],
                work.texts[EVALUATION_TEXT],
                device=context.device,
                progress=progress,
            )
    except RunInterruptedError:
        raise
    except LlmconvertError as error:
        progress.log(f"not in one pass ({error}); each by itself")
        return
    cost = Begun((time.perf_counter() - begin) / len(variants), memory.nbytes)
    for (name, one), compared in zip(variants.items(), found, strict=True):
        if isinstance(compared, Compared):
            compared.write(directories[name] / COMPARED_FILE)
            one.begun(cost)
    release_freed_memory()
