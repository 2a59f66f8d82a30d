"""``llmconvert plan``: what a run will do and need, from headers alone."""

from __future__ import annotations

from pathlib import Path

import click

from llmconvert.cli.manners import Known, Manners, manners


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
    that would make it fit.

    \b
    Examples:
      llmconvert plan recipes/demo.yaml
      llmconvert plan hub-w4 --set model=org/name --no-publish
    """
    from llmconvert.recipes.loading import load_recipe

    loaded = load_recipe(recipe, overrides)
    from llmconvert.recipes.planning.planner import plan_recipe
    from llmconvert.recipes.planning.render import plan_lines

    made = plan_recipe(loaded, work_dir=work_dir, publish=not no_publish, fresh=fresh)
    if probe:
        from llmconvert.recipes.probe import probe_recipe

        made = probe_recipe(loaded, made, progress=manners.progress())
    manners.result(made.to_mapping(), *plan_lines(made))
    made.require_room()
