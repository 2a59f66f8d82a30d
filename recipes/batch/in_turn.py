"""Jobs one after the other in this process, sharing downloads and stages; one that fails doesn't stop others."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from llmconvert.errors import LlmconvertError, RunInterruptedError
from llmconvert.progress import Progress
from llmconvert.recipes.batch.jobs import Job
from llmconvert.recipes.batch.outcome import Outcome, outcomes_of_sweep
from llmconvert.recipes.runner import RunResult, run_recipe
from llmconvert.recipes.sweep.expand import Sweep
from llmconvert.recipes.sweep.job import run_sweep
from llmconvert.storage.stages import StageStore

__all__ = ["run_in_turn", "run_job"]


def run_in_turn(jobs: Sequence[Job], progress: Progress) -> list[Outcome]:
    """Run jobs in order; those with mistakes are reported and skipped.

    Raises:
        RunInterruptedError: the process was asked to stop. The same call continues; finished recipes are reused.
    """
    outcomes: list[Outcome] = []
    with ExitStack() as stack:
        stores: dict[Path, StageStore] = {}
        for number, job in enumerate(jobs, 1):
            if len(jobs) > 1:
                progress.log(f"[{number}/{len(jobs)}] {job.recipe}")
            if job.work_dir not in stores and not isinstance(job.loaded, LlmconvertError):
                stores[job.work_dir] = stack.enter_context(StageStore(job.work_dir, progress=progress))
            ended = run_job(job, stores.get(job.work_dir), progress)
            if ended[0].failure is not None and ended[0].sweep is None and len(jobs) > 1:
                progress.log(f"{job.recipe}: {ended[0].error}")
            outcomes += ended
    return outcomes


def run_job(job: Job, store: StageStore | None, progress: Progress) -> list[Outcome]:
    """Run one job in an open work directory: its outcome, or that of each of its variants.

    Raises:
        RunInterruptedError: the process was asked to stop.
    """
    begin = time.perf_counter()
    result: RunResult | None = None
    failure: Exception | None = None
    fresh, publish = job.settings.fresh, job.settings.publish
    try:
        if isinstance(job.loaded, LlmconvertError):
            raise job.loaded
        if isinstance(job.loaded, Sweep):
            swept = run_sweep(job.loaded, store=store, fresh=fresh, publish=publish, progress=progress)
            return outcomes_of_sweep(job.recipe, swept)
        result = run_recipe(job.loaded, store=store, fresh=fresh, publish=publish, progress=progress)
    except RunInterruptedError:
        raise
    except LlmconvertError as error:
        failure = error
    except Exception as error:
        progress.log(traceback.format_exc())
        failure = error
    return [Outcome(job.recipe, result, failure, time.perf_counter() - begin)]
