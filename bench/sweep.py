"""Eight variants of one model from one pass, against one alone and against a pass for each: seconds, memory, quality.

    python bench/sweep.py --model DIR --calibration FILE --evaluation FILE --work DIR [--samples 32] [--length 512]
        [--windows 8] [--window 1024] [--rounds 2] [--method gptq]

Every run is a whole process of ``llmconvert run`` in a work directory of its own; rounds alternate. One alone is
sequential, as a recipe by itself is. What is counted are the steps that quantize and that measure, as reports have
them; the sweep's are those of all variants together. Eight that are quantized in a pass each are measured in one pass
of the original all the same, so eight that are measured by themselves are eight times one. Quality is measured for
every scheme both ways, on text that calibration never saw.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from dataclasses import dataclass, field
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
    ones, eights = [], []
    for number in range(options.rounds):
        ones.append(run(options, "one", SCHEMES[:1], "sequential"))
        eights.append(run(options, "eight", SCHEMES, None))
        print(f"round {number + 1}: {ones[-1]}, {eights[-1]}", file=sys.stderr, flush=True)
    apart = run(options, "apart", SCHEMES, "sequential")
    one, eight = (
        (statistics.median(row.quantizing for row in rows), statistics.median(row.measuring for row in rows))
        for rows in (ones, eights)
    )
    table = [
        [name, f"{q:.1f}", f"{q / one[0]:.2f}", f"{m:.1f}", f"{m / one[1]:.2f}", megabytes(peak)]
        for name, (q, m), peak in (
            ("one, sequential", one, ones[0].peak),
            ("eight in one pass", eight, eights[0].peak),
            ("eight, a pass each", (apart.quantizing, apart.measuring), apart.peak),
        )
    ]
    tokens = f"{options.samples} × {options.length} tokens"
    print(f"{options.model.name}, {options.method}, {tokens}, {options.threads} threads")
    heading = ["", "seconds quantizing", "ratio", "seconds measuring", "ratio", "peak RSS of the process"]
    print(markdown_table(heading, table))
    shared, own = eights[0].quality, apart.quality
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


@dataclass(frozen=True, slots=True)
class Made:
    """What a run cost: seconds of its steps, peak bytes of the process; and perplexity and KL by scheme."""

    quantizing: float
    measuring: float
    peak: int
    quality: dict[str, tuple[float, float]] = field(repr=False)


def run(options: argparse.Namespace, name: str, schemes: tuple[str, ...], statistics_of: str | None) -> Made:
    """Run a recipe with these schemes."""
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
    text = {"dataset": str(options.evaluation), "window": options.window, "max_windows": options.windows}
    recipe["validate"] = {"perplexity": text}
    path = options.work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [Path(sys.executable).parent / "llmconvert", "run", path]
    cost = run_measured(command, threads=options.threads, log=options.work / f"{name}.log")
    seconds = {"quantize": 0.0, "validate": 0.0}
    quality = {}
    for stage in sorted(work.glob("artifact-*")):
        report = json.loads((stage / "model" / "llmconvert" / "report.json").read_text())
        for step in report["steps"]:
            if step["name"] in seconds:
                seconds[step["name"]] += step["seconds"]
        checks = {check["name"]: check.get("value") for check in report["checks"]}
        quality[report["model"]["scheme"].removesuffix("-sym")] = (checks["perplexity"], checks["kl_mean"])
    return Made(seconds["quantize"], seconds["validate"], cost.peak_rss, quality)


if __name__ == "__main__":
    main()
