"""``llmconvert validate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command(short_help="Measure MODEL against its original.")
@click.argument("model")
@click.option("--reference", metavar="MODEL", help="The original, to compare with.")
@click.option("--text", metavar="FILE|NAME", help="Text to measure perplexity on, pydoc-topics:test for example.")
@click.option("--window", type=int, default=2048, show_default=True, help="Tokens per window.")
@click.option("--stride", type=int, help="Tokens between windows' beginnings; fewer than --window make them overlap.")
@click.option("--max-windows", type=int, help="Use only the first windows of the text.")
@click.option("--max-increase", metavar="SHARE", help="Fail if perplexity rises by more than this, 5% for example.")
@click.option("--max-kl", type=float, help="Fail if the predictions diverge by more nats per token on average.")
@click.option("--min-top1", metavar="SHARE", help="Fail if fewer predictions agree, 90% for example.")
@click.option("--max-bytes", metavar="SIZE", help="Fail if the weight files are larger, 4GB for example.")
@click.option("--html", "html_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the page here.")
@click.option("--generation", is_flag=True, help="Generate greedily, and compare with the original's text.")
@click.option("--min-agreement", metavar="SHARE", help="The same, and fail if fewer of its tokens agree.")
@click.option("--tasks", metavar="NAMES", help="Benchmarks of lm-eval: arc_easy,hellaswag.")
@click.option("--task-samples", type=int, help="Use only so many samples of each benchmark.")
@click.option("--attention", metavar="NAMES", help="Compare attention backends: eager,math,flash,flash_attention_2.")
@click.option("--attention-lengths", metavar="TOKENS", help="Prompt lengths for that, 512,2048,8192 for example.")
@click.option("--positions", is_flag=True, help="Perplexity by position, up to the trained length and beyond.")
@click.option("--positions-window", type=int, help="Tokens per window for that; twice the trained length by default.")
@click.option("--memory", is_flag=True, help="The KV cache and the memory ladder, computed and measured.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the report here.")
def validate(model: str, reference: str | None, json_file: Path | None, html_file: Path | None, **options: Any) -> None:
    """Measure MODEL, a directory, against the original it was made from.

    \b
    Example:
      llmconvert validate out/w4 --reference org/name --text pydoc-topics:test --window 512 --max-windows 16
    """
    from llmconvert.cli.summary import print_report
    from llmconvert.progress import console_progress
    from llmconvert.recipes.loading import make_recipe
    from llmconvert.recipes.single import validate_model
    from llmconvert.report.report import require_passed
    from llmconvert.storage.writer import check_output_file, write_file
    from llmconvert.validate.render.blame import blame
    from llmconvert.validate.render.html import render_html

    for file in (json_file, html_file):
        if file is not None:
            check_output_file(file)
    limits = {key: options[key] for key in ("max_kl", "min_top1", "max_bytes")}
    settings: dict[str, Any] = {"generation": options["generation"], **limits}
    if options["min_agreement"] is not None:
        settings["generation"] = {"min_agreement": options["min_agreement"]}
    if options["tasks"] is not None:
        settings["tasks"] = {"names": _names(options["tasks"]), "samples": options["task_samples"]}
    elif options["task_samples"] is not None:
        raise click.UsageError("--task-samples goes with --tasks")
    if options["text"] is not None:
        keys = ("window", "stride", "max_windows", "max_increase")
        settings["perplexity"] = {"dataset": options["text"], **{key: options[key] for key in keys}}
    settings |= _long_inputs(options)
    recipe = make_recipe({"model": model, "validate": settings, "device": options["device"]}, "validate")
    report = validate_model(recipe, reference, progress=console_progress())
    if json_file is not None:
        report.write(json_file)
    if html_file is not None:
        write_file(html_file, render_html(report).encode())
    print_report(report)
    require_passed(report.checks, blame(report))


def _long_inputs(options: dict[str, Any]) -> dict[str, Any]:
    """The recipe's settings for attention backends, positions and memory."""
    found: dict[str, Any] = {"memory": options["memory"]}
    if options["attention"] is not None:
        found["attention"] = {"backends": _names(options["attention"])}
        if options["attention_lengths"] is not None:
            found["attention"]["lengths"] = _numbers(options["attention_lengths"])
    elif options["attention_lengths"] is not None:
        raise click.UsageError("--attention-lengths goes with --attention")
    if options["positions"] or options["positions_window"] is not None:
        found["positions"] = {"window": options["positions_window"]}
    return found


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part.replace("_", "")) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(f"--attention-lengths {text}: expected numbers of tokens with commas between") from None
