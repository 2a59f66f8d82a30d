"""What many recipes will do and need together: on this machine, and as a queue on several that are like it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmconvert.errors import LlmconvertError
from llmconvert.recipes.batch.jobs import Job
from llmconvert.recipes.planning.history import Seconds
from llmconvert.recipes.planning.plan import RunPlan, StepPlan
from llmconvert.recipes.planning.planner import plan_run
from llmconvert.recipes.planning.render import folded, gigabytes, plan_lines, row
from llmconvert.recipes.planning.shared import SharedWork
from llmconvert.recipes.plans.sweep import SweepPlan, plan_sweep, sweep_lines
from llmconvert.recipes.sweep.expand import Sweep
from llmconvert.recipes.sweep.result import by_reason

__all__ = ["BatchPlan", "batch_lines", "plan_jobs"]

#: Numbers of machines that a time is said for.
_MACHINES = (1, 4, 8)
# Recipes whose whole plans are shown; of more, a line each.
_WHOLE = 3


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """A batch as it will be.

    Attributes:
        plans: of the recipes that can be run, by the file or name as given.
        problems: why the others can't, by the same.
        work_dirs: where each of ``plans`` keeps its stages; those in one share them.
    """

    plans: Mapping[str, RunPlan | SweepPlan]
    problems: Mapping[str, LlmconvertError]
    work_dirs: Mapping[str, Path]

    @property
    def jobs(self) -> Mapping[str, RunPlan]:
        """Each recipe as one run, without what an earlier one of the batch leaves in the same work directory."""
        there: set[tuple[Path, str]] = set()
        found = {}
        for name, plan in self.plans.items():
            whole = plan.whole if isinstance(plan, SweepPlan) else plan
            steps = []
            for step in whole.steps:
                same = (self.work_dirs[name], step.key)
                steps.append(replace(step, reused=True) if step.key and same in there else step)
                if step.key:
                    there.add(same)
            found[name] = replace(whole, steps=tuple(steps))
        return found

    @property
    def whole(self) -> RunPlan:
        """All jobs as one run, one after the other."""
        jobs = list(self.jobs.values())
        steps = tuple(step for job in jobs for step in job.steps if not step.reused)
        return replace(jobs[0], name="batch", makes="", steps=steps)

    @property
    def untimed(self) -> int:
        """Jobs with a step that nothing like was ever timed here."""
        return sum(bool(_todo(job)) and job.seconds is None for job in self.jobs.values())

    def seconds(self, machines: int) -> Seconds | None:
        """Of all jobs, each on the machine that is free first, in order; None where a job's time is not known."""
        todo = [job for job in self.jobs.values() if _todo(job)]
        times = [time for job in todo if (time := job.seconds) is not None]
        if len(times) < len(todo):
            return None
        least, most = (_makespan([side(time) for time in times], machines) for side in _SIDES)
        return Seconds(least, most)

    def require_room(self) -> None:
        """Refuse a batch that can't fit this machine, one job after the other.

        Raises:
            CapacityError: see :meth:`~llmconvert.recipes.planning.plan.RunPlan.require_room`.
        """
        if self.plans:
            self.whole.require_room()

    def to_mapping(self) -> dict[str, Any]:
        """As JSON values."""
        found: dict[str, Any] = {"recipes": {name: plan.to_mapping() for name, plan in self.plans.items()}}
        found["left_out"] = {name: str(problem) for name, problem in self.problems.items()}
        if self.plans:
            whole = self.whole.to_mapping()
            found |= {key: whole[key] for key in ("needs", "memory_free", "device_memory_free")}
        times = {count: self.seconds(count) for count in _MACHINES}
        found["seconds_on_machines"] = {
            str(count): None if time is None else [round(time.least, 1), round(time.most, 1)]
            for count, time in times.items()
        }
        return found


def plan_jobs(jobs: Sequence[Job]) -> BatchPlan:
    """What a batch of jobs would do; one that can't be run is left out with its reason, as it would fail alone."""
    plans: dict[str, RunPlan | SweepPlan] = {}
    problems: dict[str, LlmconvertError] = {}
    work_dirs: dict[str, Path] = {}
    with SharedWork() as shared:
        for job in jobs:
            settings = job.settings
            try:
                if isinstance(job.loaded, LlmconvertError):
                    raise job.loaded
                options: dict[str, Any] = {"publish": settings.publish, "fresh": settings.fresh, "shared": shared}
                if isinstance(job.loaded, Sweep):
                    plans[job.recipe] = plan_sweep(job.loaded, work_dir=job.work_dir, **options)
                else:
                    plans[job.recipe] = plan_run(job.loaded, job.work_dir, **options)
                work_dirs[job.recipe] = job.work_dir
            except LlmconvertError as error:
                problems[job.recipe] = error.with_traceback(None)  # whose frames hold the model
    return BatchPlan(plans, problems, work_dirs)


def batch_lines(plan: BatchPlan) -> Iterator[str]:
    """Each recipe's plan, of many a line each; and what all of them need, on several machines; in 80 columns."""
    jobs = plan.jobs
    if len(jobs) <= _WHOLE:
        for one in plan.plans.values():
            yield from sweep_lines(one) if isinstance(one, SweepPlan) else plan_lines(one)
            yield ""
    yield f"batch: {len(jobs) + len(plan.problems):,} recipes"
    if len(jobs) > _WHOLE:
        yield row("", "memory", "disk", "time") + "recipe"
        for name, job in jobs.items():
            yield _line(job) + name
    for line in by_reason({name: str(problem) for name, problem in plan.problems.items()}):
        yield from folded(f"left out: {line}")
    if not jobs:
        return
    whole = plan.whole
    needs = whole.needs
    yield row("in all", gigabytes(needs.memory), gigabytes(needs.disk)).rstrip()
    download = gigabytes(needs.download) if needs.download else "nothing"
    yield f"{gigabytes(whole.memory)} of memory may be used; {download} to download"
    if plan.untimed:
        several = plan.untimed > 1
        yield from folded(
            f"time: not known of {plan.untimed:,} recipe{'s' if several else ''}; "
            f"nothing like {'them' if several else 'it'} was timed on this machine yet"
        )
        return
    times = {count: plan.seconds(count) for count in _MACHINES}
    said = ", ".join(f"{time} on {count}" for count, time in times.items() if time is not None)
    yield from folded(f"time on machines like this one: {said}")


def _line(job: RunPlan) -> str:
    if not _todo(job):
        return row("", "there", "", "")
    needs, seconds = job.needs, job.seconds
    memory = max(needs.memory, needs.device_memory)
    return row("", gigabytes(memory), gigabytes(needs.disk), str(seconds) if seconds is not None else "not known")


def _todo(job: RunPlan) -> list[StepPlan]:
    return [step for step in job.steps if not step.reused]


_SIDES: tuple[Callable[[Seconds], float], ...] = (lambda time: time.least, lambda time: time.most)


def _makespan(seconds: Sequence[float], machines: int) -> float:
    """When the last of jobs is done that each start, in order, where a machine is free first."""
    free = [0.0] * machines
    for one in seconds:
        heapq.heapreplace(free, free[0] + one)
    return max(free)
