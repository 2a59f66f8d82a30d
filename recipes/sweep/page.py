"""What a sweep shows: all its variants' reports on one page, with the knee and the one taken, and as JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from llmconvert.recipes.sweep.result import SweepResult
from llmconvert.storage.writer import write_file, write_json
from llmconvert.validate.render.comparison import compare_reports, render_comparison
from llmconvert.validate.render.pareto import knee, measure_of, points

__all__ = ["write_page"]

#: Where pages are kept in a work directory.
_FOLDER = "sweeps"


def write_page(swept: SweepResult, work_dir: Path, artifacts: Mapping[str, Path]) -> Path:
    """Write ``sweeps/<name>/index.html`` and ``summary.json`` beside it; gives the page's path."""
    sweep, reports, failures, picked = swept.sweep, swept.reports, swept.failures, swept.picked
    folder = work_dir / _FOLDER / sweep.name
    folder.mkdir(parents=True, exist_ok=True)
    bend = knee(points(reports, measure_of(reports)))
    remarks = []
    if bend is not None:
        remarks.append(f"The knee is {bend.name}: beyond it, more bytes gain little.")
    if sweep.pick is not None:
        remarks.append(f"{sweep.pick.text}: {picked or 'no variant'}.")
    left_out = swept.left_out
    remarks += [f"Left out: {line}" for line in swept.left_out_lines]
    lost = {name: error for name, error in failures.items() if name not in reports and name not in left_out}
    remarks += [f"{name} failed: {error}" for name, error in lost.items()]
    links = {
        name: os.path.relpath(page, folder)
        for name, artifact in artifacts.items()
        if name in reports and (page := artifact / "llmconvert" / "report.html").is_file()
    }
    compared = replace(compare_reports(reports), remarks=tuple(remarks), links=links)
    page = folder / "index.html"
    write_file(page, render_comparison(compared).encode())
    variants = {}
    for variant in sweep.variants:
        about: dict[str, object] = {"settings": dict(variant.settings)}
        if variant.name in reports:
            checks = reports[variant.name].checks
            about["measured"] = {check.name: check.value for check in checks if check.value is not None}
            about["artifact"] = os.path.relpath(artifacts[variant.name], folder)
        if variant.name in left_out:
            about["left_out"] = left_out[variant.name]
        elif variant.name in failures:
            about["failure"] = str(failures[variant.name])
        variants[variant.name] = about
    summary = {"sweep": sweep.name, "knee": bend.name if bend is not None else None, "picked": picked}
    write_json(folder / "summary.json", {**summary, "variants": variants})
    return page
