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
@click.option("--max-windows", type=int, help="Use only the first windows of the text.")
@click.option("--max-increase", metavar="SHARE", help="Fail if perplexity rises by more than this, 5% for example.")
@click.option("--max-kl", type=float, help="Fail if the predictions diverge by more nats per token on average.")
@click.option("--min-top1", metavar="SHARE", help="Fail if fewer predictions agree, 90% for example.")
@click.option("--max-bytes", metavar="SIZE", help="Fail if the weight files are larger, 4GB for example.")
@click.option("--html", "html_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the page here.")
@click.option("--generation", is_flag=True, help="Generate greedily, and compare with the original's text.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the report here.")
def validate(model: str, reference: str | None, json_file: Path | None, html_file: Path | None, **options: Any) -> None:
    """Measure MODEL, a directory, against the original it was made from.

    \b
    Example:
      llmconvert validate out/w4 --reference org/name --text pydoc-topics:test --window 512 --max-windows 16
    """
    from llmconvert.progress import console_progress
    from llmconvert.recipes.loading import make_recipe
    from llmconvert.recipes.single import validate_model
    from llmconvert.recipes.summary import print_report
    from llmconvert.validate.blame import blame
    from llmconvert.validate.html import render_html
    from llmconvert.validate.report import require_passed
    from llmconvert.writer import write_file

    limits = {key: options[key] for key in ("max_kl", "min_top1", "max_bytes")}
    settings: dict[str, Any] = {"generation": options["generation"], **limits}
    if options["text"] is not None:
        keys = ("window", "max_windows", "max_increase")
        settings["perplexity"] = {"dataset": options["text"], **{key: options[key] for key in keys}}
    recipe = make_recipe({"model": model, "validate": settings, "device": options["device"]}, "validate")
    report = validate_model(recipe, reference, progress=console_progress())
    if json_file is not None:
        report.write(json_file)
    if html_file is not None:
        write_file(html_file, render_html(report).encode())
    print_report(report)
    require_passed(report.checks, blame(report))
