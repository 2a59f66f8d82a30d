"""Running a sweep: its variants share all that is the same for them, and one pass quantizes as many as it can.

Stages of equal inputs are one stage anyway: downloads, conversion, attention, texts. Beyond that, variants whose method
needs no more than moments of the original model are quantized in one pass over the calibration text
(:mod:`llmconvert.quantize.passes.original`), unless they say ``calibrate.statistics: sequential``; and all that are
measured on one text are compared with the original in one pass of it (:mod:`llmconvert.recipes.sweep.comparing`). A
variant that cannot be is left out with its reason, and the others run. Stopped anywhere, the same call continues.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from llmconvert.errors import LlmconvertError, RunInterruptedError
from llmconvert.interrupt import interruptible
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.methods.base import load_method
from llmconvert.quantize.passes.original import can_share
from llmconvert.recipes.publishing import check_target, fill_target, publish_artifact
from llmconvert.recipes.runner import Running, RunResult
from llmconvert.recipes.schema.recipe import PublishSettings, Recipe
from llmconvert.recipes.stages.provenance import REPORT_FILE
from llmconvert.recipes.stages.quantization import QUANTIZE
from llmconvert.recipes.sweep.bundle import MadeVariant, SetTargets, set_targets, write_apart, write_set
from llmconvert.recipes.sweep.comparing import compare_variants
from llmconvert.recipes.sweep.expand import Sweep, require_places
from llmconvert.recipes.sweep.page import write_page
from llmconvert.recipes.sweep.result import SweepResult, is_refusal
from llmconvert.recipes.sweep.together import quantize_variants
from llmconvert.report.report import Report
from llmconvert.storage.stages import StageStore

__all__ = ["run_sweep", "with_statistics"]

T = TypeVar("T")


def run_sweep(
    sweep: Sweep,
    *,
    work_dir: Path | str | None = None,
    store: StageStore | None = None,
    fresh: bool = False,
    publish: bool = True,
    progress: Progress = SILENT,
) -> SweepResult:
    """Make every variant that can be made, compare them, and publish what the sweep says.

    Args:
        work_dir: where stages are kept; the recipe's own by default.
        store: an open work directory instead.
        fresh: forget what earlier runs of these variants did.
        publish: false leaves all artifacts in the work directory.

    Raises:
        RecipeError: two variants would be published to one place, or one is to be picked by what none measures.
        RunInterruptedError: the process was asked to stop; the same call continues.
    """
    sweep.require_measured()
    targets = set_targets(sweep) if publish else None
    together = targets.together if targets is not None else None
    if publish:
        require_places(sweep)
    with interruptible(), ExitStack() as stack:
        if store is None:
            store = stack.enter_context(StageStore(Path(work_dir or sweep.work_dir), progress=progress))
        if together is not None:
            check_target(together, sweep.name, store.hashes)
        return _Job(sweep, store, fresh, publish and together is None, progress, targets).run()


@dataclass(slots=True)
class _Job:
    """A sweep under way."""

    sweep: Sweep
    store: StageStore
    fresh: bool
    publish: bool
    progress: Progress
    targets: SetTargets | None = None
    running: dict[str, Running] = field(default_factory=dict)
    results: dict[str, RunResult] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> SweepResult:
        for variant in self.sweep.variants:
            self.seconds[variant.name] = 0.0
            if variant.recipe is None:
                self._fail(variant.name, variant.problem or LlmconvertError("no recipe"))
                continue
            begun = self._attempt(variant.name, partial(self._begin, variant.recipe))
            if begun is not None:
                self.running[variant.name] = begun
        for name, running in list(self.running.items()):
            self._attempt(name, partial(_advance, running))
        waiting = {name: one for name, one in self.running.items() if name not in self.failures and _shares(one)}
        for name, error in quantize_variants(waiting, self.progress).items():
            self._fail(name, error)
        for number, (name, running) in enumerate(self.running.items(), 1):
            if name not in self.failures:
                self.progress.log(f"[{number}/{len(self.running)}] {name}")
                self._attempt(name, running.make)
        compare_variants({name: one for name, one in self.running.items() if name not in self.failures}, self.progress)
        for name, running in self.running.items():
            result = self._attempt(name, running.finish) if name not in self.failures else None
            if result is not None:
                self.results[name] = result
        reports = {
            name: Report.read(running.artifact / REPORT_FILE)
            for name, running in self.running.items()
            if running.artifact is not None
        }
        picked = None
        if self.sweep.pick is not None:
            picked = self.sweep.pick.choose({name: reports[name] for name in self.results})
            taken = f"{picked} is taken" if picked is not None else "no variant is"
            self.progress.log(f"{self.sweep.name}: pick: {self.sweep.pick.text}: {taken}")
        apart = self.targets.apart if self.targets is not None else {}
        if apart and self.results:
            self._publish_apart(apart)
        elif self.publish:
            for name in list(self.results) if self.sweep.pick is None else [picked] if picked is not None else []:
                published = self._attempt(name, partial(self.running[name].publish, self.results[name]))
                if published is not None:
                    self.results[name] = published
        if self.targets is not None and self.targets.together is not None and self.results:
            self._publish_set(self.targets.together)
        made = SweepResult(self.sweep, self.results, self.failures, reports, self.seconds, picked, None)
        if len(reports) > 1:
            artifacts = {name: self.running[name].artifact or self.store.work_dir for name in reports}
            made = replace(made, page=write_page(made, self.store.work_dir, artifacts))
            self.progress.log(f"{self.sweep.name}: compared in {made.page}")
        return made

    def _publish_set(self, target: PublishSettings) -> None:
        """Put all that was made into one repository."""
        folder, made, hashes = self._set_folder, self._made(), self.store.hashes
        contents = write_set(self.sweep, folder, made, hashes)
        where = publish_artifact(folder, contents, target, self.sweep.name, hashes, progress=self.progress)
        self.progress.log(f"{self.sweep.name}: {len(made)} variants are in {where}")
        self.results = {name: replace(result, published=where) for name, result in self.results.items()}

    def _publish_apart(self, targets: Mapping[str, PublishSettings]) -> None:
        """Put each where it goes, with a card that compares all."""
        folder, hashes = self._set_folder, self.store.hashes
        contents = write_apart(self.sweep, folder, self._made(), targets, hashes)
        for name, files in contents.items():
            publish = partial(publish_artifact, folder / name, files, targets[name], name, hashes)
            where = self._attempt(name, partial(publish, progress=self.progress))
            if where is not None:
                self.results[name] = replace(self.results[name], published=where)

    @property
    def _set_folder(self) -> Path:
        return self.store.work_dir / "sweeps" / self.sweep.name / "set"

    def _made(self) -> dict[str, MadeVariant]:
        return {
            name: MadeVariant(result.artifact, self.running[name].contents, result.report)
            for name, result in self.results.items()
        }

    def _begin(self, recipe: Recipe) -> Running:
        filled = fill_target(with_statistics(recipe))
        target = filled.publish if self.publish else None
        if target is not None and target.set:  # what is checked for one is the same
            target = target.model_copy(update={"set": False})
        publisher = self.sweep.name if self.sweep.pick is not None else None
        stages = self.store.begin(recipe.name, fresh=self.fresh)
        return Running.begin(filled, target, stages, self.progress, publisher)

    def _attempt(self, name: str, action: Callable[[], T]) -> T | None:
        """What an action of a variant gives; None if it fails, which the others don't mind."""
        begin = time.perf_counter()
        try:
            return action()
        except RunInterruptedError:
            raise
        except LlmconvertError as error:
            self._fail(name, error)
        except Exception as error:
            self.progress.log(traceback.format_exc())
            self._fail(name, error)
        finally:
            self.seconds[name] += time.perf_counter() - begin
        return None

    def _fail(self, name: str, error: Exception) -> None:
        self.failures[name] = error
        self.progress.log(f"{name}: {'left out' if is_refusal(error) else 'failed'}: {error}")


def _advance(running: Running) -> None:
    """Do what comes before the model is quantized."""
    while (stage := running.next_stage) is not None and stage.name != QUANTIZE:
        running.advance()


def _shares(running: Running) -> bool:
    """Whether the variant is quantized from the original's moments, and so with others."""
    calibrate = running.recipe.calibrate
    return running.next_stage is not None and calibrate is not None and calibrate.statistics == "original"


def with_statistics(recipe: Recipe) -> Recipe:
    """The recipe with the original's statistics, where its method can do with them and it doesn't want others."""
    settings, calibrate = recipe.quantize, recipe.calibrate
    if settings is None or calibrate is None:
        return recipe
    asked = "statistics" in calibrate.model_fields_set
    able = can_share(load_method(settings.method, settings.options)) and settings.kv_cache is None
    statistics = "original" if able and (not asked or calibrate.statistics == "original") else "sequential"
    return recipe.model_copy(update={"calibrate": calibrate.model_copy(update={"statistics": statistics})})
