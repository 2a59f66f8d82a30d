"""``llmconvert plan``: what a run will do and need, from headers alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmconvert.cli.manners import Known, Manners, manners

if TYPE_CHECKING:
    from llmconvert.recipes.planning.plan import RunPlan


@click.command(short_help="Show what a run will do and need.")
@click.argument("recipes", metavar="RECIPE...", nargs=-1, required=True, type=Known("recipe"))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting: quantize.scheme=w8a16.")
@click.option("--work-dir", type=click.Path(path_type=Path), help="Where finished stages are kept. [default: work]")
@click.option("--fresh", is_flag=True, help="Reckon with no finished stage.")
@click.option("--no-publish", is_flag=True, help="Leave out publishing, and don't ask the target.")
@click.option("--probe", is_flag=True, help="Time the recipe on one block and on two of them first.")
@manners
def plan(
    recipes: tuple[str, ...],
    overrides: tuple[str, ...],
    work_dir: Path | None,
    fresh: bool,
    no_publish: bool,
    probe: bool,
    manners: Manners,
) -> None:
    """Show what running recipes will do, reuse, make and need: from headers alone, nothing is fetched or written.

    Sizes of files are exact, or bounds where a budget is still to choose. Times are those of earlier runs on this
    machine, scaled; a range where these were of another size. What can't fit ends with exit code 5, and the setting
    that would make it fit. What variants of a sweep share, or several recipes, is counted once.

    \b
    Examples:
      llmconvert plan recipes/demo.yaml
      llmconvert plan hub-w4 --set model=org/name --no-publish
    """
    if probe and len(recipes) > 1:
        raise click.UsageError("--probe times one recipe; name one")
    if probe:
        from llmconvert.recipes.loading import load_recipe

        loaded = load_recipe(recipes[0], overrides)
        from llmconvert.recipes.planning.planner import plan_recipe
        from llmconvert.recipes.probe import probe_recipe

        made = plan_recipe(loaded, work_dir=work_dir, publish=not no_publish, fresh=fresh)
        show_plan(probe_recipe(loaded, made, progress=manners.progress()), manners, probe=True)
        return
    show_plans(recipes, overrides, work_dir, fresh=fresh, publish=not no_publish, manners=manners)


def show_plan(plan: RunPlan, manners: Manners, *, probe: bool = False) -> None:
    """Print a plan, and end as a run would where it can't fit.

    Args:
        probe: whether its time can be probed for.

    Raises:
        CapacityError: this machine has no room for it.
    """
    from llmconvert.recipes.planning.render import plan_lines

    manners.result(plan.to_mapping(), *plan_lines(plan, probe=probe))
    plan.require_room()


def show_plans(
    recipes: Sequence[str],
    overrides: Sequence[str],
    work_dir: Path | None,
    *,
    fresh: bool,
    publish: bool,
    manners: Manners,
) -> None:
    """Print the plan of a recipe or a sweep, or of several and of all of them together.

    Of several, one that can't be run is told and the others are planned, as they would run.

    Raises:
        RecipeError: the only one is wrong.
        CapacityError: this machine has no room for one of them, or for what all leave on its disk.
    """
    from llmconvert.recipes.loading import load_recipe
    from llmconvert.recipes.sweep.expand import load_sweep

    if len(recipes) > 1:
        with _uncollected():
            from llmconvert.recipes.batch.jobs import Settings, read_jobs
            from llmconvert.recipes.plans.batch import batch_lines, plan_jobs

        batch = plan_jobs(read_jobs(recipes, Settings(tuple(overrides), work_dir, fresh, publish)))
        manners.result(batch.to_mapping(), *batch_lines(batch))
        batch.require_room()
        if batch.problems:
            raise click.exceptions.Exit(next(iter(batch.problems.values())).exit_code)
        return
    with _uncollected():
        (loaded,) = (load_sweep(name, overrides) or load_recipe(name, overrides) for name in recipes)
        from llmconvert.compute.ranks.group import ALONE
        from llmconvert.recipes.planning.planner import plan_recipe
        from llmconvert.recipes.sweep.expand import Sweep

    if isinstance(loaded, Sweep):
        from llmconvert.recipes.plans.sweep import plan_sweep, sweep_lines

        swept = plan_sweep(loaded, work_dir=work_dir, publish=publish, fresh=fresh)
        manners.result(swept.to_mapping(), *sweep_lines(swept))
        swept.require_room()
    else:
        with _uncollected():  # one plan, and the command ends
            made = plan_recipe(loaded, work_dir=work_dir, publish=publish, fresh=fresh, ranks=manners.ranks or ALONE)
        show_plan(made, manners, probe=True)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Look for no reference cycles inside the block, and later not among what it has made.

    Importing torch and transformers makes millions of objects that stay; looking through them again and again takes a
    third of the time of a plan.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()
