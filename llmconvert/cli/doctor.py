"""``llmconvert doctor``: what this machine has for the work."""

from __future__ import annotations

from pathlib import Path

import click

from llmconvert.cli.manners import Manners, manners
from llmconvert.cli.say import beside


@click.command(short_help="Show what this machine has for the work.")
@click.option("--offline", is_flag=True, help="Don't ask the Hub.")
@click.option("--work-dir", type=click.Path(path_type=Path), default=".", help="Whose disk counts. [default: here]")
@manners
def doctor(offline: bool, work_dir: Path, manners: Manners) -> None:
    """Show versions, processor and kernels, GPUs, memory, disk, readers that are installed, and the Hub.

    \b
    Example:
      llmconvert doctor
    """
    from dataclasses import asdict

    from llmconvert.recipes.doctor import examine

    found = list(examine(work_dir, network=not offline))
    rows: list[tuple[str, str]] = []
    for finding in found:
        rows += [(finding.topic, finding.found), *([("", f"→ {finding.advice}")] if finding.advice else [])]
    manners.result([asdict(finding) for finding in found], *beside(rows))
