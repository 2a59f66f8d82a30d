"""``llmconvert plan``: what a run will do and need, from headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmconvert.cli.manners import Known, Manners, manners

if TYPE_CHECKING:
    from llmconvert.recipes.planning.plan import RunPlan


@click.command(short_help="Show what a run will do and need.")
@click.argument("recipe", metavar="RECIPE", type=Known("recipe"))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting: quantize.scheme=w8a16.")
@click.option("--work-dir", type=click.Path(path_type=Path), help="Where finished stages are kept. [default: work]")
@click.option("--fresh", is_flag=True, help="Reckon with no finished stage.")
@click.option("--no-publish", is_flag=True, help="Leave out publishing, and don't ask the target.")
@click.option("--probe", is_flag=True, help="Time the recipe on one block and on two of them first.")
@manners
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    work_dir: Path | None,
    fresh: bool,
    no_publish: bool,
    probe: bool,
    manners: Manners,
) -> None:
    """Show what running RECIPE will do, reuse, make and need: from headers alone, nothing is fetched or written.

    Sizes of files are exact, or bounds where a budget is still to choose. Times are those of earlier runs on this
    machine, scaled; a range where these were of another size. What can't fit ends with exit code 5, and the setting
    that would make it fit. Of a sweep, what its variants share is counted once.

    \b
    Examples:
      llmconvert plan recipes/demo.yaml
      llmconvert plan hub-w4 --set model=org/name --no-publish
    """
    if probe:
        from llmconvert.recipes.loading import load_recipe

        loaded = load_recipe(recipe, overrides)
        from llmconvert.recipes.planning.planner import plan_recipe
        from llmconvert.recipes.probe import probe_recipe

        made = plan_recipe(loaded, work_dir=work_dir, publish=not no_publish, fresh=fresh)
        show_plan(probe_recipe(loaded, made, progress=manners.progress()), manners, probe=True)
        return
    show_plans([recipe], overrides, work_dir, fresh=fresh, publish=not no_publish, manners=manners)


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
    """Print the plan of every recipe and sweep, as if each ran by itself.

    Raises:
        RecipeError: one of them is wrong.
        CapacityError: this machine has no room for one.
    """
    from llmconvert.recipes.loading import load_recipe
    from llmconvert.recipes.sweep.expand import load_sweep

    loaded = [load_sweep(name, overrides) or load_recipe(name, overrides) for name in recipes]
    from llmconvert.recipes.planning.planner import plan_recipe
    from llmconvert.recipes.planning.render import plan_lines
    from llmconvert.recipes.plans.sweep import SweepPlan, plan_sweep, sweep_lines
    from llmconvert.recipes.sweep.expand import Sweep

    plans: list[RunPlan | SweepPlan] = []
    lines: list[str] = []
    for one in loaded:
        if isinstance(one, Sweep):
            swept = plan_sweep(one, work_dir=work_dir, publish=publish, fresh=fresh)
            plans.append(swept)
            found = sweep_lines(swept)
        else:
            made = plan_recipe(one, work_dir=work_dir, publish=publish, fresh=fresh)
            plans.append(made)
            found = plan_lines(made)
        lines += ["", *found] if lines else found
    values = [plan.to_mapping() for plan in plans]
    manners.result(values[0] if len(values) == 1 else values, *lines)
    for plan in plans:
        plan.require_room()
