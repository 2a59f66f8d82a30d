"""Eight variants of one model from one pass, against one alone and against a pass for each: seconds, memory, quality.

    python bench/sweep.py --model DIR --calibration FILE --evaluation FILE --work DIR [--samples 32] [--length 512]
        [--windows 8] [--window 1024] [--rounds 2] [--method gptq]

Every run is a whole process of ``llmconvert run`` in a work directory of its own; rounds alternate. One alone is
sequential, as a recipe by itself is. What is counted is the step that quantizes, as its report has it; the sweep's is
that of all variants together. Quality is measured for every scheme both ways, on text that calibration never saw.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml
from measured import markdown_table, megabytes, run_measured

SCHEMES = (
    "w4a16-g64",
    "w4a16-g128",
    "w4a16-g32",
    "w4a16-g64-asym",
    "w3a16-g64",
    "w3a16-g64-asym",
    "w8a16-g128",
    "w2a16-g32-asym",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(options.rounds):
        measured = number == 0
        rows.append(
            (run(options, "one", SCHEMES[:1], "sequential", measured), run(options, "eight", SCHEMES, None, measured))
        )
        print(f"round {number + 1}: {rows[-1][0][0]:.1f} s, {rows[-1][1][0]:.1f} s", file=sys.stderr, flush=True)
    one, eight = (statistics.median(row[kind][0] for row in rows) for kind in (0, 1))
    apart = run(options, "apart", SCHEMES, "sequential", True)
    table = [
        [name, f"{seconds:.1f}", f"{seconds / one:.2f}", megabytes(peak)]
        for name, seconds, peak in (
            ("one, sequential", one, rows[0][0][1]),
            ("eight in one pass", eight, rows[0][1][1]),
            ("eight, a pass each", apart[0], apart[1]),
        )
    ]
    tokens = f"{options.samples} × {options.length} tokens"
    print(f"{options.model.name}, {options.method}, {tokens}, {options.threads} threads")
    print(markdown_table(["", "seconds quantizing", "ratio", "peak RSS of the process"], table))
    shared, own = rows[0][1][2], apart[2]
    quality = [
        [
            scheme,
            f"{shared[scheme][0]:.2f}",
            f"{own[scheme][0]:.2f}",
            f"{shared[scheme][1]:.4f}",
            f"{own[scheme][1]:.4f}",
        ]
        for scheme in SCHEMES
    ]
    heading = ["", "perplexity, original's statistics", "sequential", "KL, original's statistics", "sequential"]
    print("\n" + markdown_table(heading, quality))


def run(
    options: argparse.Namespace, name: str, schemes: tuple[str, ...], statistics_of: str | None, measured: bool
) -> tuple[float, int, dict[str, tuple[float, float]]]:
    """Seconds of the steps that quantize, peak bytes of the process, and perplexity and KL by scheme."""
    work = options.work / name
    shutil.rmtree(work, ignore_errors=True)
    calibrate: dict[str, Any] = {
        "dataset": str(options.calibration),
        "samples": options.samples,
        "length": options.length,
        "order": "sequential",
    }
    recipe: dict[str, Any] = {
        "name": name,
        "model": str(options.model),
        "calibrate": calibrate | ({"statistics": statistics_of} if statistics_of else {}),
        "quantize": {"method": options.method, "scheme": schemes[0]},
        "matrix": {"quantize.scheme": list(schemes)},
        "work_dir": str(work),
    }
    if measured:
        text = {"dataset": str(options.evaluation), "window": options.window, "max_windows": options.windows}
        recipe["validate"] = {"perplexity": text}
    path = options.work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [Path(sys.executable).parent / "llmconvert", "run", path]
    cost = run_measured(command, threads=options.threads, log=options.work / f"{name}.log")
    seconds, quality = 0.0, {}
    for stage in sorted(work.glob("artifact-*")):
        report = json.loads((stage / "model" / "llmconvert" / "report.json").read_text())
        seconds += next(step["seconds"] for step in report["steps"] if step["name"] == "quantize")
        checks = {check["name"]: check.get("value") for check in report["checks"]}
        scheme = report["model"]["scheme"].removesuffix("-sym")
        if measured:
            quality[scheme] = (checks["perplexity"], checks["kl_mean"])
    return seconds, cost.peak_rss, quality


if __name__ == "__main__":
    main()
