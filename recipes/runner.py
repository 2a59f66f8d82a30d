"""Running a recipe: fetch, convert, calibrate, rewrite attention, heal, quantize, validate, write up, publish.

What there is to do is a list of stages (:mod:`llmconvert.recipes.stages.run`), each keyed by what determines its
output; this walks it in a work directory, so a run that was stopped or changed repeats only what it must. Text, formats
and the publishing target are checked before the long work begins.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.context import Context
from llmconvert.device import open_device
from llmconvert.errors import GateError, RecipeError
from llmconvert.interrupt import interruptible
from llmconvert.memory import release_freed_memory
from llmconvert.progress import SILENT, Progress
from llmconvert.recipes.planning.headers import UnknownWeightsError
from llmconvert.recipes.planning.plan import RunPlan
from llmconvert.recipes.planning.planner import foresee
from llmconvert.recipes.planning.render import plan_lines
from llmconvert.recipes.publishing import check_metadata, check_target, fill_target, publish_artifact
from llmconvert.recipes.ranks import agree, follow
from llmconvert.recipes.schema.recipe import PublishSettings, Recipe
from llmconvert.recipes.stages.artifact import REPORT_FILE, artifact_stage, front_matter_of
from llmconvert.recipes.stages.attention import require_mergeable
from llmconvert.recipes.stages.measurements import (
    Measured,
    require_accepted,
    require_loader,
    require_measurable,
    require_served,
)
from llmconvert.recipes.stages.opening import fetch_model, tell_of, work_on
from llmconvert.recipes.stages.repairing.rounds import repair
from llmconvert.recipes.stages.run import RunStages, require_texts, stages_of
from llmconvert.recipes.stages.stage import MODEL, Finished, Place, Stage, Work
from llmconvert.report.report import Check, Report, Step, require_passed
from llmconvert.report.section import Value
from llmconvert.report.steps import StepDetails
from llmconvert.storage.contents import Contents
from llmconvert.storage.stages import StageRun, StageStore
from llmconvert.validate.render.blame import blame

__all__ = ["RunResult", "Running", "perform", "run_recipe"]

D = TypeVar("D", bound=Value)


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run made.

    Attributes:
        artifact: the artifact's directory in the work directory.
        published: where it was published, or None.
    """

    recipe: Recipe
    report: Report
    artifact: Path
    published: str | None


def run_recipe(
    recipe: Recipe,
    *,
    work_dir: Path | str | None = None,
    store: StageStore | None = None,
    fresh: bool = False,
    publish: bool = True,
    progress: Progress = SILENT,
    ranks: Ranks = ALONE,
) -> RunResult:
    """Run a recipe, or what is left of it.

    Args:
        work_dir: where stages are kept; the recipe's own by default.
        store: an open work directory, to share among several recipes, instead.
        fresh: forget what earlier runs of this recipe did.
        publish: false leaves the artifact in the work directory.
        ranks: the processes that run it together; each gets the same result.

    Raises:
        GateError: the artifact misses a limit; it is kept and not published.
        RunInterruptedError: the process was asked to stop; the same call continues.
        LlmconvertError: anything else that is wrong with the recipe, its sources or this machine.
    """
    agree(ranks, "run", recipe, work_dir=work_dir, publish=publish)
    if not ranks.leads:
        with interruptible():
            follow(recipe, ranks)
            told = ranks.tell()
        return RunResult(recipe, Report.model_validate(told[0]), Path(told[1]), told[2])
    with interruptible(), ExitStack() as stack:
        if store is None:
            store = stack.enter_context(StageStore(Path(work_dir or recipe.work_dir), progress=progress))
        filled = fill_target(recipe)
        target = filled.publish if publish else None
        begun = store.begin(recipe.name, fresh=fresh)
        running = Running.begin(filled, target, begun, progress, planned=True, ranks=ranks)
        result = running.publish(running.finish())
        if not ranks.alone:
            ranks.tell()  # no one is needed any more
            said = result.report.model_dump(mode="json", by_alias=True)
            ranks.tell([said, str(result.artifact), result.published])
        return result


@dataclass(slots=True)
class Running:
    """A run under way: what it was checked for, and the stages that are left.

    Attributes:
        recipe: with every placeholder filled.
        target: where the artifact is published; None to leave it.
        publisher: who publishes there.
        stages: of the work directory.
        work: what was made so far.
        todo: all stages up to the artifact's model.
        progress: where long work is shown.
        plan: of it; None where it was not planned.
    """

    recipe: Recipe
    target: PublishSettings | None
    publisher: str
    stages: StageRun
    work: Work
    todo: RunStages
    progress: Progress
    plan: RunPlan | None = None
    _done: int = 0
    _made: Finished[StepDetails] | None = None

    @classmethod
    def begin(
        cls,
        recipe: Recipe,
        target: PublishSettings | None,
        stages: StageRun,
        progress: Progress,
        publisher: str | None = None,
        *,
        planned: bool = False,
        ranks: Ranks = ALONE,
    ) -> Running:
        """Check everything that can be told before the long work, and fetch the model.

        Args:
            publisher: who may replace what is published there, if it isn't the recipe: a sweep that picks one of many.
            planned: say what the run will do and need, refuse what can't fit before the first byte is fetched, and keep
                how long its steps take.
            ranks: the processes that run it together; this is the first.

        Raises:
            LlmconvertError: see :func:`run_recipe`.
        """
        if target is not None and target.set:
            raise RecipeError("publish.set: is for the variants of a sweep (matrix, quantize.schemes); leave it out")
        device = open_device(recipe.device, None if ranks.alone else ranks.local_rank)
        context = Context(device, recipe.memory, progress=progress)
        require_measurable(recipe.measured)
        require_loader(recipe)
        left_out = require_served(recipe)
        require_texts(recipe)
        if target is not None:
            check_target(target, publisher or recipe.name, stages.store.hashes)
        todo = stages_of(recipe)
        plan = _foresee(recipe, target, stages, progress, ranks) if planned else None
        for note in left_out if plan is None else ():  # a plan has said it
            progress.log(note)
        source, fetched = fetch_model(recipe, progress)
        work = work_on(recipe, source, context, ranks)
        work.steps.append(fetched)
        with work.view.open() as dense:
            if recipe.attention is not None:
                require_mergeable(dense, recipe.attention)
            require_accepted(recipe.measured, dense)
        tell_of(recipe, source, progress)
        if target is not None:
            with work.original.open() as original:
                check_metadata(target, front_matter_of(recipe, source, original))
        return cls(recipe, target, publisher or recipe.name, stages, work, todo, progress, plan)

    @property
    def next_stage(self) -> Stage[Any] | None:
        """The stage that :meth:`advance` does; None if the artifact's model is there."""
        return self.todo.making[self._done] if self._done < len(self.todo.making) else None

    def advance(self) -> None:
        """Do the next stage."""
        stage = self.next_stage
        assert stage is not None
        perform(self.stages, self.work, stage)
        self._done += 1

    def make(self) -> None:
        """Do the stages that are left up to the artifact's model, which is then still to be measured."""
        while self.next_stage is not None:
            self.advance()

    def finish(self) -> RunResult:
        """Do what is left; nothing is published.

        Raises:
            GateError: the artifact misses a limit; it is kept.
            LlmconvertError: see :func:`run_recipe`.
        """
        self.make()
        self._made = _write_up(self.stages, self.work, self.todo)
        if self.plan is not None:
            self.plan.remember(self.work.steps)
        report = Report.read(self._made.model / REPORT_FILE)
        try:
            require_passed(report.checks, blame(report))
        except GateError as error:
            raise GateError(f"{error}; the artifact is in {self._made.model}") from error
        return RunResult(self.recipe, report, self._made.model, None)

    @property
    def artifact(self) -> Path | None:
        """Where the artifact is, whatever was measured on it; None before :meth:`finish`."""
        return self._made.model if self._made is not None else None

    @property
    def contents(self) -> Contents:
        """Of the artifact's files as they were written, after :meth:`finish`."""
        assert self._made is not None
        return self._made.contents.below(MODEL)

    def publish(self, result: RunResult) -> RunResult:
        """Publish what :meth:`finish` has made, where the recipe says so.

        Raises:
            LlmconvertError: see :func:`run_recipe`.
        """
        if self.target is None:
            return result
        contents, hashes = self.contents, self.stages.store.hashes
        who, progress = self.publisher, self.progress
        begin = time.perf_counter()
        where = publish_artifact(result.artifact, contents, self.target, who, hashes, progress=progress)
        if self.plan is not None:
            self.plan.remember([Step(name="publish", seconds=time.perf_counter() - begin)])
        return replace(result, published=where)


def _foresee(
    recipe: Recipe, target: PublishSettings | None, stages: StageRun, progress: Progress, ranks: Ranks
) -> RunPlan | None:
    """Say what the run will do and need, and refuse what can't fit, before the first byte is fetched.

    Returns:
        the plan; None where nothing is known of the weights before they are fetched.
    """
    try:
        plan = foresee(recipe, target, stages.store.work_dir, fresh=stages.fresh, ranks=ranks)
    except UnknownWeightsError:
        return None
    for line in plan_lines(plan) if plan.todo else ():
        progress.log(line)
    plan.require_room()
    return plan


def _write_up(stages: StageRun, work: Work, todo: RunStages) -> Finished[StepDetails]:
    """Measure what was made, repair it if the recipe says so, and assemble the artifact; gives its stage."""
    measuring = todo.measuring(todo.model)
    settings = work.recipe.validation
    model = todo.model
    more: Sequence[Check] = ()
    measured: Finished[Measured] | None = None
    if measuring is not None:
        measured = perform(stages, work, measuring)
        if settings is not None and settings.repair is not None:
            model, measured, more = repair(work, todo, settings.repair, measured, partial(perform, stages, work))
    checks = measured.details.checks if measured is not None else ()
    last = artifact_stage(model, measured.name if measured is not None else None, checks, more)
    return perform(stages, work, last)


def perform(stages: StageRun, work: Work, stage: Stage[D]) -> Finished[D]:
    """Run a stage in a work directory, or take it over if it is there; the work knows of it afterwards.

    Raises:
        LlmconvertError: whatever its builder raises.
    """

    def build(directory: Path) -> dict[str, object]:
        return work.build(stage, Place.stage(directory)).model_dump(mode="json", by_alias=True)

    found = stages.run(stage.name, stage.inputs(work), build, resumable=stage.resumable)
    done = Finished(stage.name, found.key, found.path, stage.read(found.details), found.contents)
    work.finished[stage.name] = done
    stage.finish(work)
    if not stage.reported:
        return done
    release_freed_memory()
    details = done.details if isinstance(done.details, StepDetails) else StepDetails()
    work.steps.append(
        Step(
            name=stage.name,
            seconds=found.seconds,
            peak_rss_bytes=found.peak_rss_bytes,
            peak_rss_method=found.peak_rss_method,
            reused=found.reused,
            resumed=found.resumed,
            sections=details.sections,
            details=details.model_copy(update={"sections": ()}) if isinstance(done.details, StepDetails) else None,
        )
    )
    return done
