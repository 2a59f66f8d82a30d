"""``llmconvert run``: recipes from start to end."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Run recipes from start to end.")
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting: quantize.scheme=w8a16.")
@click.option("--work-dir", type=click.Path(path_type=Path), help="Where finished stages are kept. [default: work]")
@click.option("--fresh", is_flag=True, help="Forget what earlier runs of the recipe did.")
@click.option("--stream", is_flag=True, help="Work on Hub models while they download, by methods without calibration.")
@click.option("--repair", is_flag=True, help="Give layers more bits if the gate fails, and measure again.")
@click.option("--no-publish", is_flag=True, help="Leave the artifact in the work directory.")
def run(
    recipes: tuple[str, ...],
    overrides: tuple[str, ...],
    work_dir: Path | None,
    fresh: bool,
    stream: bool,
    repair: bool,
    no_publish: bool,
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
    """
    from llmconvert.cli.summary import print_batch
    from llmconvert.errors import LlmconvertError
    from llmconvert.progress import console_progress
    from llmconvert.recipes.batch import run_batch

    outcomes = run_batch(
        recipes,
        overrides=(*overrides, *(["stream=true"] if stream else []), *(["validate.repair=true"] if repair else [])),
        work_dir=work_dir,
        fresh=fresh,
        publish=not no_publish,
        progress=console_progress(),
    )
    failed = [outcome for outcome in outcomes if outcome.failure is not None]
    if len(outcomes) == 1 and failed and isinstance(failed[0].failure, LlmconvertError):
        raise failed[0].failure
    print_batch(outcomes)
    if failed:
        raise click.exceptions.Exit(failed[0].exit_code)
