"""The jobs of a batch, read before the first one starts; those that would write one output are refused together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmconvert.errors import LlmconvertError, UsageError
from llmconvert.recipes.loading import load_recipe
from llmconvert.recipes.publishing import fill_target
from llmconvert.recipes.schema.recipe import PublishSettings, Recipe
from llmconvert.recipes.sweep.expand import Sweep, load_sweep

__all__ = ["Job", "Settings", "load_job", "read_jobs"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for every job.

    Attributes:
        overrides: ``"a.b=value"`` each.
        work_dir: of all; each recipe's own by default.
        fresh: forget what earlier runs did.
        publish: false leaves artifacts in the work directory.
    """

    overrides: tuple[str, ...] = ()
    work_dir: Path | None = None
    fresh: bool = False
    publish: bool = True


@dataclass(frozen=True, slots=True)
class Job:
    """One recipe of a batch.

    Attributes:
        recipe: the file or name as given.
        loaded: what stands in it; why nothing can be read there.
        settings: of the batch.
    """

    recipe: str
    loaded: Recipe | Sweep | LlmconvertError
    settings: Settings

    @property
    def work_dir(self) -> Path:
        """Where its stages are kept; of one that can't be read, the batch's."""
        own = "work" if isinstance(self.loaded, LlmconvertError) else self.loaded.work_dir
        return Path(self.settings.work_dir or own).absolute()

    @property
    def recipes(self) -> list[Recipe]:
        """What it runs: its recipe, or those of its variants; none if it can't be read."""
        if isinstance(self.loaded, LlmconvertError):
            return []
        if isinstance(self.loaded, Recipe):
            return [self.loaded]
        return [variant.recipe for variant in self.loaded.variants if variant.recipe is not None]

    def to_values(self, **more: Any) -> dict[str, Any]:
        """As JSON values, for a process of its own; see :func:`load_job`."""
        return {
            "recipe": str(Path(self.recipe).absolute()) if Path(self.recipe).exists() else self.recipe,
            "overrides": list(self.settings.overrides),
            "work_dir": str(self.work_dir),
            "fresh": self.settings.fresh,
            "publish": self.settings.publish,
            "memory": None,
            **more,
        }


def read_jobs(recipes: Sequence[str], settings: Settings) -> list[Job]:
    """All recipes, in order.

    Raises:
        UsageError: two of them would be published to one place, or are sweeps that would write one page; nothing was
            started.
    """
    jobs = [load_job(recipe, settings) for recipe in recipes]
    _require_own_pages(jobs)
    if settings.publish:
        _require_apart(jobs)
    return jobs


def load_job(recipe: str, settings: Settings) -> Job:
    """One recipe; what is wrong with it is kept for when its turn comes."""
    try:
        found = load_sweep(recipe, settings.overrides) or load_recipe(recipe, settings.overrides)
    except LlmconvertError as error:
        return Job(recipe, error, settings)
    return Job(recipe, found, settings)


def _require_own_pages(jobs: Sequence[Job]) -> None:
    taken: dict[tuple[Path, str], str] = {}
    for job in jobs:
        if not isinstance(job.loaded, Sweep):
            continue
        other = taken.setdefault((job.work_dir, job.loaded.name), job.recipe)
        if other is not job.recipe:
            raise UsageError(
                f"{other} and {job.recipe} are both sweeps of the name {job.loaded.name!r} and would write one page in "
                f"{job.work_dir}; give them different names (name) or work directories; nothing was started"
            )


def _require_apart(jobs: Sequence[Job]) -> None:
    taken: dict[tuple[str, str, str], str] = {}
    for job in jobs:
        for place in _places(job.recipes):
            other = taken.setdefault(place, job.recipe)
            if other is not job.recipe:
                raise UsageError(
                    f"{other} and {job.recipe} would both be published to {place[0]}; give them different targets "
                    "(publish.to), for example with {name} in it, or run one of them by itself; nothing was started"
                )


def _places(recipes: Sequence[Recipe]) -> set[tuple[str, str, str]]:
    """Where recipes publish: target, revision and folder."""
    found: set[tuple[str, str, str]] = set()
    for recipe in recipes:
        try:
            target = fill_target(recipe).publish
        except LlmconvertError:
            continue  # its own run says so
        if target is not None:
            found.add(_place(target))
    return found


def _place(target: PublishSettings) -> tuple[str, str, str]:
    to = target.to
    if to.startswith("file:"):
        to = f"file:{Path(to.removeprefix('file:')).absolute().resolve()}"
    return to, target.revision or "main", target.folder or ""
