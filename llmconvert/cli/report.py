"""``llmconvert report``: several artifacts' reports side by side."""

from __future__ import annotations

from pathlib import Path

import click

from llmconvert.cli.manners import Manners, manners


@click.command(short_help="Compare the reports of several artifacts.")
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT...")
@click.option("--html", "html_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the page here.")
@manners
def report(artifacts: tuple[str, ...], html_file: Path | None, manners: Manners) -> None:
    """Compare artifacts by what was measured: directories with llmconvert/report.json, or report files.

    \b
    Example:
      llmconvert report out/w4 out/w3 out/w8 --html compared.html
    """
    from llmconvert.cli.summary import print_comparison
    from llmconvert.storage.writer import check_output_file, write_file
    from llmconvert.validate.render.comparison import compare_reports, read_reports, render_comparison

    if html_file is not None:
        check_output_file(html_file)
    comparison = compare_reports(read_reports(artifacts))
    if html_file is not None:
        write_file(html_file, render_comparison(comparison).encode())
    if manners.as_json:
        manners.result({name: one.model_dump(mode="json") for name, one in comparison.reports.items()})
    else:
        print_comparison(comparison)
