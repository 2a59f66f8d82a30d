"""Several recipes and sweeps one after the other, sharing downloads and stages; one that fails doesn't stop others."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from llmconvert.errors import LlmconvertError, RunInterruptedError
from llmconvert.progress import SILENT, Progress
from llmconvert.recipes.loading import load_recipe
from llmconvert.recipes.runner import RunResult, run_recipe
from llmconvert.recipes.schema.recipe import Recipe
from llmconvert.recipes.sweep.expand import Sweep, load_sweep
from llmconvert.recipes.sweep.job import SweepResult, run_sweep
from llmconvert.storage.stages import StageStore

__all__ = ["Outcome", "run_batch"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one recipe ended.

    Attributes:
        recipe: the file or name as given.
        result: what was made; None if it failed.
        failure: why it failed; None if it didn't.
        seconds: wall-clock time.
        sweep: what the variants of one recipe made together; None of a recipe by itself.
    """

    recipe: str
    result: RunResult | None
    failure: Exception | None
    seconds: float
    sweep: SweepResult | None = None

    @property
    def exit_code(self) -> int:
        """0, or what the failure ends a program with."""
        return 0 if self.failure is None else getattr(self.failure, "exit_code", 1)

    @property
    def error(self) -> str:
        """The failure in words; empty without one."""
        if self.failure is None or isinstance(self.failure, LlmconvertError):
            return str(self.failure or "")
        return f"{type(self.failure).__name__}: {self.failure}"


def run_batch(
    recipes: Sequence[str],
    *,
    overrides: Sequence[str] = (),
    work_dir: Path | str | None = None,
    fresh: bool = False,
    publish: bool = True,
    progress: Progress = SILENT,
) -> list[Outcome]:
    """Run recipes in order. All are read before the first one starts; those with mistakes are reported and skipped.

    Args:
        recipes: files or names of shipped recipes.
        overrides: ``"a.b=value"`` for every recipe.
        work_dir: for all of them; each recipe's own by default.
        fresh: forget what earlier runs of these recipes did. What one recipe of the batch builds serves the others.
        publish: false leaves artifacts in the work directory.

    Raises:
        RunInterruptedError: the process was asked to stop. The same call continues; finished recipes are reused.
    """
    read = [(name, _attempt_load(name, overrides)) for name in recipes]
    outcomes: list[Outcome] = []
    with ExitStack() as stack:
        stores: dict[Path, StageStore] = {}
        for number, (name, loaded) in enumerate(read, 1):
            if len(recipes) > 1:
                progress.log(f"[{number}/{len(recipes)}] {name}")
            begin = time.perf_counter()
            result: RunResult | None = None
            failure: Exception | None = None
            try:
                if isinstance(loaded, LlmconvertError):
                    raise loaded
                directory = Path(work_dir or loaded.work_dir).absolute()
                if directory not in stores:
                    stores[directory] = stack.enter_context(StageStore(directory, progress=progress))
                store = stores[directory]
                if isinstance(loaded, Sweep):
                    swept = run_sweep(loaded, store=store, fresh=fresh, publish=publish, progress=progress)
                    outcomes += _variants(name, swept)
                    continue
                result = run_recipe(loaded, store=store, fresh=fresh, publish=publish, progress=progress)
            except RunInterruptedError:
                raise
            except LlmconvertError as error:
                failure = error
            except Exception as error:
                progress.log(traceback.format_exc())
                failure = error
            outcome = Outcome(name, result, failure, time.perf_counter() - begin)
            if failure is not None and len(recipes) > 1:
                progress.log(f"{name}: {outcome.error}")
            outcomes.append(outcome)
    return outcomes


def _variants(recipe: str, swept: SweepResult) -> list[Outcome]:
    """How each variant of a sweep ended."""
    names = [variant.name for variant in swept.sweep.variants]
    return [
        Outcome(f"{recipe}: {name}", swept.results.get(name), swept.failures.get(name), swept.seconds[name], swept)
        for name in names
    ]


def _attempt_load(name: str, overrides: Sequence[str]) -> Recipe | Sweep | LlmconvertError:
    try:
        return load_sweep(name, overrides) or load_recipe(name, overrides)
    except LlmconvertError as error:
        return error
