"""``llmconvert run`` and ``llmconvert batch``: recipes from start to end, one or many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llmconvert.cli.manners import Known, Manners, manners, plan_option

if TYPE_CHECKING:
    from llmconvert.compute.ranks.group import Ranks

C = TypeVar("C", bound=Callable[..., Any])


def _settings(command: C) -> C:
    """What both commands take."""
    decorators: list[Callable[[C], C]] = [
        click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...", type=Known("recipe")),
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting: quantize.scheme=w8a16."
        ),
        click.option(
            "--work-dir", type=click.Path(path_type=Path), help="Where finished stages are kept. [default: work]"
        ),
        click.option("--fresh", is_flag=True, help="Forget what earlier runs of the recipe did."),
        click.option(
            "--stream", is_flag=True, help="Work on Hub models while they download, by methods without calibration."
        ),
        click.option("--repair", is_flag=True, help="Give layers more bits if the gate fails, and measure again."),
        click.option("--no-publish", is_flag=True, help="Leave the artifact in the work directory."),
    ]
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


@click.command(short_help="Run a recipe from start to end.")
@_settings
@plan_option
@manners
def run(manners: Manners, **settings: Any) -> None:
    """Run recipes: files, or names of shipped recipes. Several are a batch of one job at a time, as batch runs them.

    A run that was stopped continues with the same command. Recipes share downloads and conversions; one that fails
    does not stop the others.

    With --stream, disk need is the artifact and two source shards; to measure it, the original is read from the Hub
    once more.

    \b
    Examples:
      llmconvert run recipes/demo.yaml
      llmconvert run demo --set quantize.scheme=w3a16-g64 \\
          --set publish.to=file:out/w3
      llmconvert run demo --set quantize.scheme=w4a16-g64,w3a16-g64 --no-publish
    """
    _run(manners, settings, engine="here" if len(settings["recipes"]) == 1 else "local")


@click.command(short_help="Run many recipes, here or on a Ray cluster.")
@_settings
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", help="Where jobs run. [default: local]")
@click.option("--jobs", "at_once", type=click.IntRange(1), default=1, help="Run together, at most. [default: 1]")
@click.option("--memory", metavar="SIZE", help="What all may use together: 48GB. [default: what is free]")
@click.option("--address", help="Of a Ray cluster. [default: one is started here]")
@click.option(
    "--logs", type=click.Path(path_type=Path), help="For a log per job and summary.json. [default: work/batch]"
)
@plan_option
@manners
def batch(manners: Manners, engine: str, memory: str | None, **settings: Any) -> None:
    """Run many recipes, each in a process of its own: one that fails neither stops nor blocks the others.

    Jobs start in order, as many at once as --jobs allows and as memory and disk take by their plans. The same command
    continues what is unfinished. Two that would be published to one place are refused before anything starts.

    \b
    Examples:
      llmconvert batch recipes/*.yaml
      llmconvert batch a.yaml b.yaml c.yaml --jobs 2 --memory 48GB
      llmconvert batch recipes/*.yaml --engine ray --address ray-head:6379 \\
          --work-dir /shared/work
    """
    _run(manners, settings, engine=engine, memory=memory)


def _run(manners: Manners, settings: dict[str, Any], *, engine: Any, memory: str | None = None) -> None:
    recipes, overrides = settings.pop("recipes"), settings.pop("overrides")
    stream, repair = settings.pop("stream"), settings.pop("repair")
    overrides = (*overrides, *(["stream=true"] if stream else []), *(["validate.repair=true"] if repair else []))
    publish = not settings.pop("no_publish")
    if settings.pop("plan"):
        from llmconvert.cli.plan import show_plans

        work_dir, fresh = settings["work_dir"], settings["fresh"]
        if manners.leads:
            show_plans(recipes, overrides, work_dir, fresh=fresh, publish=publish, manners=manners)
        return
    if len(recipes) == 1:  # a mistake in it is told before what computes is loaded
        from llmconvert.recipes.loading import load_recipe
        from llmconvert.recipes.sweep.expand import load_sweep

        if load_sweep(recipes[0], overrides) is None:
            load_recipe(recipes[0], overrides)
    from llmconvert.cli.summary import batch_values, print_batch
    from llmconvert.errors import LlmconvertError, UsageError
    from llmconvert.recipes.batch.run import run_batch
    from llmconvert.recipes.schema.quantities import parse_bytes

    try:
        usable = None if memory is None else parse_bytes(memory)
    except ValueError as error:
        raise UsageError(f"--memory: {error}") from error
    progress = manners.progress()
    if manners.ranks is not None:
        _run_together(manners.ranks, recipes, overrides, publish, manners, settings)
        return
    outcomes = run_batch(
        recipes, overrides=overrides, publish=publish, engine=engine, memory=usable, progress=progress, **settings
    )
    failed = [outcome for outcome in outcomes if outcome.exit_code]
    if manners.as_json:
        manners.result(batch_values(outcomes))
    if len(outcomes) == 1 and failed and isinstance(failed[0].failure, LlmconvertError):
        raise failed[0].failure
    if not manners.as_json:
        print_batch(outcomes)
    if failed:
        raise click.exceptions.Exit(failed[0].exit_code)


def _run_together(
    ranks: Ranks, recipes: Sequence[str], overrides: Sequence[str], publish: bool, manners: Manners, settings: Any
) -> None:
    """Run a recipe in several processes, of which this is one."""
    import time

    from llmconvert.cli.summary import batch_values, print_batch
    from llmconvert.errors import UsageError
    from llmconvert.recipes.batch.outcome import Outcome
    from llmconvert.recipes.loading import load_recipe
    from llmconvert.recipes.runner import run_recipe
    from llmconvert.recipes.sweep.expand import load_sweep

    if len(recipes) != 1 or load_sweep(recipes[0], overrides) is not None:
        raise UsageError(
            f"{ranks.count} processes run one recipe that is no sweep; run recipes and variants one after the other, "
            "or each by one process (batch --jobs)"
        )
    begin = time.perf_counter()
    recipe = load_recipe(recipes[0], overrides)
    result = run_recipe(recipe, publish=publish, progress=manners.progress(), ranks=ranks, **settings)
    outcomes = [Outcome(recipes[0], result, None, time.perf_counter() - begin)]
    if manners.as_json:
        manners.result(batch_values(outcomes))
    else:
        print_batch(outcomes)
