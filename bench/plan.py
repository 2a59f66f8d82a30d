"""What ``llmconvert plan`` says against what a run takes: memory, disk and time of ten recipes.

    python bench/plan.py MODEL SCRATCH [--blocks 6] [--only NAME,NAME]

Each recipe is run once in a work directory of its own, so that this machine has timed it; planned; and run again in
another directory by a process of its own, whose peak resident size (``wait4``), files and seconds by step are held
against the plan. ``--blocks`` cuts the model to its first blocks, at its full width. MODEL is a directory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from measured import run_measured

THREADS = 2
CALIBRATE = {"dataset": "pydoc-topics:train", "samples": 16, "length": 512}
SCORED = {"perplexity": {"dataset": "pydoc-topics:test", "window": 512, "max_windows": 8}}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "convert alone": {"convert": {"dtype": "float32"}},
    "rtn w4, scored": {"quantize": {"method": "rtn", "scheme": "w4a16-g64"}, "validate": SCORED},
    "rtn fp8": {"quantize": {"method": "rtn", "scheme": "fp8"}},
    "hqq w3, scored": {"quantize": {"method": "hqq", "scheme": "w3a16-g64"}, "validate": SCORED},
    "gptq w4, scored": {
        "calibrate": CALIBRATE,
        "quantize": {"method": "gptq", "scheme": "w4a16-g64"},
        "validate": SCORED,
    },
    "gptaq w4": {"calibrate": CALIBRATE, "quantize": {"method": "gptaq", "scheme": "w4a16-g64"}},
    "awq": {"calibrate": CALIBRATE, "quantize": {"method": "awq", "scheme": "w4a16-g64-asym", "format": "awq"}},
    "budget 4.5": {"calibrate": CALIBRATE, "quantize": {"method": "gptq", "budget": {"bits_per_weight": 4.5}}},
    "imatrix q4_0": {"calibrate": CALIBRATE, "quantize": {"scheme": "q4_0"}},
    "one head, gptq": {
        "calibrate": CALIBRATE,
        "attention": {"kv_heads": 1},
        "quantize": {"method": "gptq", "scheme": "w4a16-g64"},
    },
}


def main() -> None:
    """Run them all, and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    scratch: Path = arguments.scratch
    scratch.mkdir(parents=True, exist_ok=True)
    model = scratch / "model"
    if not model.exists():
        cut = [sys.executable, "-P", "-c", CUT, arguments.model, model, str(arguments.blocks)]
        subprocess.run(cut, check=True)
    chosen = [name for name in RECIPES if not arguments.only or name in arguments.only.split(",")]
    print("| recipe | memory, said | taken | | disk, said | taken | | time, said | taken | |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in chosen:
        print(row(name, model, scratch), flush=True)


def row(name: str, model: Path, scratch: Path) -> str:
    """One recipe's line of the table."""
    folder = scratch / "".join(letter if letter.isalnum() else "-" for letter in name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"name": "bench", "model": str(model), **RECIPES[name]}))
    history = folder / "history.jsonl"
    run(recipe, folder / "first", history)
    plan = json.loads(
        subprocess.run(
            [*COMMAND, "plan", str(recipe), "--work-dir", str(folder / "second"), "--json"],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(THREADS), "LLMCONVERT_HISTORY": str(history)},
        ).stdout
    )
    peak, steps = run(recipe, folder / "second", history)
    needs = plan["needs"]
    disk = sum(files_in(folder / "second").values())
    said = {step["name"]: step["seconds"][1] for step in plan["steps"] if step["seconds"] is not None}
    expected = sum(said.values())
    seconds = sum(taken for step, taken in steps.items() if step in said)
    shutil.rmtree(folder)
    cells = [
        *(f"{needs['memory'] / 1e6:,.0f} MB", f"{peak / 1e6:,.0f} MB", percent(needs["memory"], peak)),
        *(f"{needs['disk'] / 1e6:,.1f} MB", f"{disk / 1e6:,.1f} MB", percent(needs["disk"], disk)),
        *(f"{expected:.1f} s", f"{seconds:.1f} s", percent(expected, seconds)),
    ]
    return f"| {name} | {' | '.join(cells)} |"


# In a process of its own: a child takes over the memory mark of a parent that has loaded torch.
CUT = """
import sys, torch
from pathlib import Path
from llmconvert.convert.dtype import DtypeRequest, plan_dtype
from llmconvert.recipes.probe import first_blocks
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
with SafetensorsCheckpoint(Path(sys.argv[1])) as source:
    plan_dtype(first_blocks(source, int(sys.argv[3])), Path(sys.argv[2]), DtypeRequest(torch.bfloat16)).run()
"""
COMMAND = (sys.executable, "-P", "-m", "llmconvert.cli")


def run(recipe: Path, work: Path, history: Path) -> tuple[int, dict[str, float]]:
    """Peak resident bytes of a run's process, and seconds by step."""
    command: list[str | Path] = [*COMMAND, "run", recipe, "--work-dir", work, "-q"]
    extra = {"LLMCONVERT_HISTORY": str(history)}
    cost = run_measured(command, threads=THREADS, log=work.with_suffix(".log"), extra=extra)
    (report,) = work.glob("artifact-*/model/llmconvert/report.json")
    return cost.peak_rss, {step["name"]: step["seconds"] for step in json.loads(report.read_bytes())["steps"]}


def files_in(folder: Path) -> dict[int, int]:
    """Bytes of all files by inode, so that links count once."""
    return {status.st_ino: status.st_size for status in _statuses(folder)}


def _statuses(folder: Path) -> Iterator[os.stat_result]:
    yield from (path.stat() for path in folder.rglob("*") if path.is_file())


def percent(said: float, taken: float) -> str:
    """How far what was said lies above what was taken."""
    return f"{100 * (said / taken - 1):+.0f} %" if taken else ""


if __name__ == "__main__":
    main()
