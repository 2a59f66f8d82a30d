"""``llmconvert validate``: an artifact measured against its original."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from llmconvert.cli.manners import Manners, manners_but_json, plan_option
from llmconvert.cli.say import say


def _names(context: click.Context, parameter: click.Parameter, text: str | None) -> list[str]:
    return [name.strip() for name in text.split(",")] if text is not None else []


def _numbers(context: click.Context, parameter: click.Parameter, text: str | None) -> list[int]:
    try:
        return [int(part.replace("_", "")) for part in text.split(",")] if text is not None else []
    except ValueError:
        raise click.BadParameter(f"{text!r} is not numbers of tokens with commas between") from None


class _OfOneModel(click.Command):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            if not error.message.startswith("Got unexpected extra argument"):
                raise
            raise click.UsageError(f"{error.message}; the original is named by --reference", ctx) from error


@click.command(cls=_OfOneModel, short_help="Measure MODEL against its original.")
@click.argument("model")
@click.option("--reference", metavar="MODEL", help="The original, to compare with.")
@click.option("--text", metavar="FILE|NAME", help="Text to measure perplexity on, pydoc-topics:test for example.")
@click.option("--window", type=int, help="Tokens per window. [default: 2048]")
@click.option("--stride", type=int, help="Tokens between windows' beginnings; fewer than --window make them overlap.")
@click.option("--max-windows", type=int, help="Use only the first windows of the text.")
@click.option("--max-increase", metavar="SHARE", help="Fail if perplexity rises by more than this, 5% for example.")
@click.option("--max-kl", type=float, help="Fail if the predictions diverge by more nats per token on average.")
@click.option("--min-top1", metavar="SHARE", help="Fail if fewer predictions agree, 90% for example.")
@click.option("--max-saturated", metavar="SHARE", help="Fail if static scales cut off more of a linear's inputs.")
@click.option(
    "--activations",
    type=click.Choice(["transformers", "vllm"]),
    help="Whose formulas inputs of linears are quantized by. [default: transformers]",
)
@click.option("--max-bytes", metavar="SIZE", help="Fail if the weight files are larger, 4GB for example.")
@click.option("--html", "html_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the page here.")
@click.option("--generation", is_flag=True, help="Generate greedily, and compare with the original's text.")
@click.option("--min-agreement", metavar="SHARE", help="The same, and fail if fewer of its tokens agree.")
@click.option("--tasks", metavar="NAMES", callback=_names, help="Benchmarks of lm-eval: arc_easy,hellaswag.")
@click.option("--task-samples", type=int, help="Use only so many samples of each benchmark.")
@click.option(
    "--attention",
    metavar="NAMES",
    callback=_names,
    help="Compare attention backends: eager,math,flash,flash_attention_2.",
)
@click.option(
    "--attention-lengths",
    metavar="TOKENS",
    callback=_numbers,
    help="Prompt lengths for that, 512,2048,8192 for example.",
)
@click.option("--positions", is_flag=True, help="Perplexity by position, up to the trained length and beyond.")
@click.option("--positions-window", type=int, help="Tokens per window for that; twice the trained length by default.")
@click.option("--memory", is_flag=True, help="The KV cache and the memory ladder, computed and measured.")
@click.option(
    "--serve",
    metavar="NAMES",
    callback=_names,
    help="Load time, memory and speed in runtimes, by commas: transformers, llama.cpp, vllm, mlx=/path/to/python.",
)
@click.option("--card", is_flag=True, help="Write report, page and model card into MODEL, as a run does.")
@click.option("--device", help="cpu, cuda, cuda:N or auto. [default: cpu]")
@click.option(
    "--json",
    "json_file",
    is_flag=False,
    flag_value="-",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="Write the report here; without a file, print it.",
)
@plan_option
@manners_but_json
def validate(
    model: str, json_file: Path | None, html_file: Path | None, plan: bool, manners: Manners, **options: Any
) -> None:
    """Measure MODEL, a directory, against the original it was made from.

    \b
    Examples:
      llmconvert validate out/w4 --reference org/name \\
          --text pydoc-topics:test --window 512 --max-windows 16
      llmconvert validate out/w4 --reference org/name \\
          --text pydoc-topics:test --card
    """
    from llmconvert.recipes.options import validate_recipe

    # What is wrong with the options themselves is told before all else.
    recipe = validate_recipe(options | {"model": model})
    if plan:
        from llmconvert.cli.plan import show_plan
        from llmconvert.recipes.plans.commands import plan_measuring

        shown = replace(manners, as_json=str(json_file) == "-")
        if manners.leads:
            show_plan(plan_measuring(recipe, options["reference"], manners.ranks), shown)
        return
    from llmconvert.api import validate_model
    from llmconvert.cli.summary import print_report
    from llmconvert.report.report import require_passed
    from llmconvert.storage.writer import check_output_file, write_file
    from llmconvert.validate.render.blame import blame
    from llmconvert.validate.render.html import render_html

    printed, json_file = str(json_file) == "-", None if str(json_file) == "-" else json_file
    if not manners.leads:
        json_file = html_file = None
    if json_file is not None and json_file.absolute().parent.parent == Path(model).absolute():
        json_file.parent.mkdir(exist_ok=True)  # the artifact's own folder for what was measured
    for file in (json_file, html_file):
        if file is not None:
            check_output_file(file)
    report = validate_model(model, progress=manners.progress(), ranks=manners.ranks, **options)
    if json_file is not None:
        report.write(json_file)
    if html_file is not None:
        write_file(html_file, render_html(report).encode())
    if printed:
        say(report.to_json())
    else:
        print_report(report)
    require_passed(report.checks, blame(report))
