"""The quantize stages of a sweep's variants in one pass; each is left as if its builder had been stopped at its end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from llmconvert.errors import CapacityError, LlmconvertError, RunInterruptedError
from llmconvert.memory import PeakMemory, release_freed_memory
from llmconvert.progress import Progress
from llmconvert.quantize.passes.run import quantize_together
from llmconvert.recipes.runner import Running
from llmconvert.recipes.stages.artifact import model_stem
from llmconvert.recipes.stages.quantization import Planned, keep_report, plan_stage, text_of
from llmconvert.recipes.stages.stage import Place
from llmconvert.recipes.stages.windows import CALIBRATION
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.stages import Begun

__all__ = ["quantize_variants"]


def quantize_variants(running: Mapping[str, Running], progress: Progress) -> dict[str, LlmconvertError]:
    """Quantize runs that stand before their quantize stage, those of one model and one text in one pass.

    Returns:
        why some can't be, by name.

    Raises:
        RunInterruptedError: the process was asked to stop.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, one in running.items():
        stage, settings = one.next_stage, one.recipe.quantize
        assert stage is not None and settings is not None
        work = one.work
        same = (work.key(stage.after["model"]), work.key(CALIBRATION), settings.rotate, work.context.device)
        groups.setdefault((*same, work.context.memory), []).append(name)
    failures: dict[str, LlmconvertError] = {}
    for names in groups.values():
        if len(names) > 1:
            failures |= _in_one_pass({name: running[name] for name in names}, progress)
    return failures


def _in_one_pass(running: Mapping[str, Running], progress: Progress) -> dict[str, LlmconvertError]:
    with ExitStack() as stack:
        directories = _begin(running, stack)
        if len(directories) < 2:
            return {}  # what is left is its own stage's
        first = next(iter(running.values()))
        assert first.next_stage is not None
        source = stack.enter_context(first.work.open(first.next_stage.after["model"]))
        planned, failures = _plan(running, directories, source)
        if len(planned) < 2:
            return failures
        progress.log(f"{', '.join(planned)}: quantized in one pass, from the original's activations")
        begin = time.perf_counter()
        try:
            with PeakMemory() as memory:
                results = quantize_together([one.plan for one in planned.values()])
        except CapacityError as error:
            progress.log(f"one pass for all of them is too much ({error}); one at a time")
            return failures
        except RunInterruptedError:
            raise
        except LlmconvertError as error:
            return failures | dict.fromkeys(planned, error)
        cost = Begun((time.perf_counter() - begin) / len(planned), memory.nbytes)
        for (name, one), result in zip(planned.items(), results, strict=True):
            keep_report(one.place, one.report(result))
            run, stage = running[name], running[name].next_stage
            assert stage is not None
            run.stages.begun(stage.name, stage.inputs(run.work), cost)
        release_freed_memory()
        return failures


def _begin(running: Mapping[str, Running], stack: ExitStack) -> dict[str, Path]:
    """The directories of the stages that are still to be built, by variant; of variants that share one, by the first.

    Their locks are taken in one order, so that two sweeps never wait for each other.
    """
    stages: dict[Path, tuple[str, Running, Mapping[str, Any]]] = {}
    for name, one in running.items():
        assert one.next_stage is not None
        inputs = one.next_stage.inputs(one.work)
        stages.setdefault(one.stages.place_of(one.next_stage.name, inputs), (name, one, inputs))
    found = {}
    for _, (name, one, inputs) in sorted(stages.items()):
        assert one.next_stage is not None
        directory = stack.enter_context(one.stages.beginning(one.next_stage.name, inputs))
        if directory is not None and not Place.stage(directory).model.exists():
            found[name] = directory
    return {name: found[name] for name in running if name in found}


def _plan(
    running: Mapping[str, Running], directories: Mapping[str, Path], source: Checkpoint
) -> tuple[dict[str, Planned], dict[str, LlmconvertError]]:
    planned: dict[str, Planned] = {}
    failures: dict[str, LlmconvertError] = {}
    for name, directory in directories.items():
        one = running[name]
        assert one.next_stage is not None and one.recipe.quantize is not None
        try:
            planned[name] = plan_stage(
                source,
                Place.stage(directory),
                one.recipe.quantize,
                name=model_stem(one.work.source.origin),
                text=text_of(one.recipe),
                windows=one.work.windows(CALIBRATION),
                context=one.work.context_of(one.next_stage.after["model"]),
                statistics="original",
            )
        except RunInterruptedError:
            raise
        except LlmconvertError as error:
            failures[name] = error
    return planned, failures
