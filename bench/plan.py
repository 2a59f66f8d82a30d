"""What ``llmconvert plan`` says against what a run takes: memory, disk and time of ten recipes.

    python bench/plan.py MODEL SCRATCH [--blocks 6] [--only NAME]... [--again]

Each recipe is run once in a work directory of its own, so that this machine has timed it; planned; and run again in
another directory by a process of its own. Held against the plan are that process's peak resident size (``wait4``), the
most that the work directory took while it ran (looked at every 20 ms, links once), and seconds by step. ``--blocks``
cuts the model to its first blocks, at its full width. MODEL is a directory. What is done is kept in SCRATCH, and the
same command goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

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
    """Run those that are still to be run, and print the table of all as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--only", action="append", choices=list(RECIPES), help="of the recipes, those with these names")
    parser.add_argument("--again", action="store_true", help="forget what was done before")
    arguments = parser.parse_args()
    scratch: Path = arguments.scratch / f"{arguments.blocks}-blocks"
    scratch.mkdir(parents=True, exist_ok=True)
    model, kept = scratch / "model", scratch / "rows.jsonl"
    if arguments.again:
        kept.unlink(missing_ok=True)
    if not model.exists():
        cut = [sys.executable, "-P", "-c", CUT, arguments.model, model, str(arguments.blocks)]
        subprocess.run(cut, check=True)
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    rows = {one["recipe"]: one for one in done}
    chosen = [name for name in RECIPES if not arguments.only or name in arguments.only]
    print("| recipe | memory, said | taken | | disk, said | taken | | time, said | taken | | load |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in chosen:
        if name not in rows:
            rows[name] = measure(name, model, scratch)
            with kept.open("a") as file:
                file.write(json.dumps(rows[name]) + "\n")
        print(table_row(rows[name]), flush=True)


def measure(name: str, model: Path, scratch: Path) -> dict[str, Any]:
    """What the plan of one recipe says, and what its run takes: bytes and seconds."""
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
    load = os.getloadavg()[0]
    with DiskPeak(folder / "second") as disk:
        peak, steps = run(recipe, folder / "second", history)
    said = {step["name"]: step["seconds"][1] for step in plan["steps"] if step["seconds"] is not None}
    shutil.rmtree(folder)
    return {
        "recipe": name,
        "memory": [plan["needs"]["memory"], peak],
        "disk": [plan["needs"]["disk"], disk.nbytes],
        "seconds": [sum(said.values()), sum(taken for step, taken in steps.items() if step in said)],
        "load": round(load, 1),
    }


def table_row(found: Mapping[str, Any]) -> str:
    """One recipe's line of the table."""
    (memory, peak), (disk, taken), (expected, seconds) = found["memory"], found["disk"], found["seconds"]
    cells = [
        *(f"{memory / 1e6:,.0f} MB", f"{peak / 1e6:,.0f} MB", percent(memory, peak)),
        *(f"{disk / 1e6:,.1f} MB", f"{taken / 1e6:,.1f} MB", percent(disk, taken)),
        *(f"{expected:.1f} s", f"{seconds:.1f} s", percent(expected, seconds)),
    ]
    return f"| {found['recipe']} | {' | '.join(cells)} | {found['load']} |"


class DiskPeak:
    """Context manager: the most bytes that all files of a directory have taken at once while it was open."""

    def __init__(self, folder: Path) -> None:
        self.nbytes = 0
        self._folder = folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.nbytes = max(self.nbytes, sum(dict(_sizes(str(self._folder))).values()))


def _sizes(folder: str) -> Iterator[tuple[int, int]]:
    """Inode and bytes on disk of every file; those that go while one looks are left out."""
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                status = Path(place, name).stat()
                yield status.st_ino, status.st_blocks * 512


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


def percent(said: float, taken: float) -> str:
    """How far what was said lies above what was taken."""
    return f"{100 * (said / taken - 1):+.0f} %" if taken else ""


if __name__ == "__main__":
    main()
