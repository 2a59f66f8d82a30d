"""``llmconvert run``: recipes from start to end."""

from __future__ import annotations

from pathlib import Path

import click

from llmconvert.cli.manners import Known, Manners, manners, plan_option


@click.command(short_help="Run recipes from start to end.")
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...", type=Known("recipe"))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting: quantize.scheme=w8a16.")
@click.option("--work-dir", type=click.Path(path_type=Path), help="Where finished stages are kept. [default: work]")
@click.option("--fresh", is_flag=True, help="Forget what earlier runs of the recipe did.")
@click.option("--stream", is_flag=True, help="Work on Hub models while they download, by methods without calibration.")
@click.option("--repair", is_flag=True, help="Give layers more bits if the gate fails, and measure again.")
@click.option("--no-publish", is_flag=True, help="Leave the artifact in the work directory.")
@plan_option
@manners
def run(
    recipes: tuple[str, ...],
    overrides: tuple[str, ...],
    work_dir: Path | None,
    fresh: bool,
    stream: bool,
    repair: bool,
    no_publish: bool,
    plan: bool,
    manners: Manners,
) -> None:
    """Run recipes one after the other: files, or names of shipped recipes.

    A run that was stopped continues with the same command. Recipes share downloads and conversions; one that fails
    does not stop the others.

    With --stream, disk need is the artifact and two source shards; to measure it, the original is read from the Hub
    once more.

    \b
    Examples:
      llmconvert run recipes/demo.yaml
      llmconvert run demo --set quantize.scheme=w3a16-g64 --set publish.to=file:out/w3
      llmconvert run a.yaml b.yaml more/*.yaml
      llmconvert run demo --set quantize.scheme=w4a16-g64,w3a16-g64 --no-publish
    """
    settings = (*overrides, *(["stream=true"] if stream else []), *(["validate.repair=true"] if repair else []))
    if plan:
        from llmconvert.cli.plan import show_plans

        show_plans(recipes, settings, work_dir, fresh=fresh, publish=not no_publish, manners=manners)
        return
    from llmconvert.recipes.loading import load_recipe
    from llmconvert.recipes.sweep.expand import load_sweep

    if len(recipes) == 1 and load_sweep(recipes[0], settings) is None:
        load_recipe(recipes[0], settings)  # a mistake in it is told before what computes is loaded
    from llmconvert.cli.summary import batch_values, print_batch
    from llmconvert.errors import LlmconvertError
    from llmconvert.recipes.batch import run_batch

    outcomes = run_batch(
        recipes,
        overrides=settings,
        work_dir=work_dir,
        fresh=fresh,
        publish=not no_publish,
        progress=manners.progress(),
    )
    failed = [outcome for outcome in outcomes if outcome.failure is not None]
    if manners.as_json:
        manners.result(batch_values(outcomes))
    if len(outcomes) == 1 and failed and isinstance(failed[0].failure, LlmconvertError):
        raise failed[0].failure
    if not manners.as_json:
        print_batch(outcomes)
    if failed:
        raise click.exceptions.Exit(failed[0].exit_code)
