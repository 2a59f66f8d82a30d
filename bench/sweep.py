"""Eight variants of one model from one pass, against one alone and against a pass for each: seconds, memory, quality.

    python bench/sweep.py --model DIR --calibration FILE --evaluation FILE --work DIR [--samples 32] [--length 512]
        [--windows 8] [--window 1024] [--rounds 2] [--apart 8]
        [--method gptq] [--format gguf --schemes q4_k_m q2_k …] [--most 1] [--quantizing]

Each phase is a whole process of ``llmconvert run`` in a work directory of its own: first the recipe without its
validate section, then with it, which finds the quantized models there; and once more, which finds everything there and
tells what starting costs, which is taken off. One alone is sequential, as a recipe by itself is. Beside wall-clock time
stands CPU time, which other work on the machine changes less. Quality is measured both ways, on text that calibration
never saw. What a process cost is kept in the scratch directory, so that the same command goes on where it was stopped,
or where ``--most`` processes have run. With ``--quantizing`` whole processes without a validate section are compared,
and nothing else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from measured import Cost, markdown_table, megabytes, run_measured
from options import parser_of

SCHEMES = (
    "w4a16-g64",
    "w2a16-g32-asym",
    "w3a16-g64-asym",
    "w3a16-g64",
    "w4a16-g64-asym",
    "w4a16-g32",
    "w4a16-g32-asym",
    "w8a16-g64",
)


def main() -> None:
    parser = parser_of(__doc__, samples=32, length=512, threads=2, method="gptq", window=1024)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--apart", type=int, default=len(SCHEMES), help="schemes whose sequential quality is shown")
    parser.add_argument("--format", default="compressed-tensors")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, help="the first one is also made alone")
    parser.add_argument("--most", type=int, help="processes that this call runs")
    parser.add_argument("--quantizing", action="store_true", help="leave measuring out")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    kept = Kept(options.work / "costs.json", options.most)
    if options.quantizing:
        compare_quantizing(options, kept)
        return
    ones, eights = [], []
    for number in range(1, options.rounds + 1):
        ones.append(run(options, kept, f"one-{number}", options.schemes[:1], "sequential"))
        eights.append(run(options, kept, f"eight-{number}", options.schemes, None))
    apart = ones[0]
    if options.apart > 1:
        apart = run(options, kept, "apart", options.schemes[: options.apart], "sequential")
    tokens = (
        f"{options.samples} × {options.length} tokens to calibrate, {options.windows} × {options.window} to measure"
    )
    print(f"{options.model.name}, {options.method}, {tokens}, {options.threads} threads")
    rows = []
    for phase in ("quantizing", "measuring"):
        one, eight = (_median([getattr(made, phase) for made in several]) for several in (ones, eights))
        for name, cost in (("one, sequential", one), (f"{len(options.schemes)} in one pass", eight)):
            times = (f"{cost.seconds:.1f} s", f"{cost.cpu:.1f} s", f"{cost.cpu / one.cpu:.2f}")
            rows.append([f"{phase}: {name}", *times, megabytes(cost.peak_rss)])
    print(markdown_table(["", "wall clock", "CPU", "ratio of CPU", "peak RSS of the process"], rows))
    shared, own = eights[0].quality, apart.quality
    quality = []
    for scheme in own:
        pairs = list(zip(shared[scheme], own[scheme], strict=True))
        quality.append([scheme, *(f"{value:.2f}" for value in pairs[0]), *(f"{value:.4f}" for value in pairs[1])])
    heading = ["", "perplexity, original's statistics", "sequential", "KL, original's statistics", "sequential"]
    print("\n" + markdown_table(heading, quality))


def compare_quantizing(options: argparse.Namespace, kept: Kept) -> None:
    """Whole processes that quantize and measure nothing, in turns: their medians."""
    costs: dict[str, list[Cost]] = {"one, sequential": [], f"{len(options.schemes)} in one pass": []}
    for number in range(1, options.rounds + 1):
        for (name, several), schemes in zip(costs.items(), (options.schemes[:1], options.schemes), strict=True):
            key = f"{name.partition(' ')[0].rstrip(',')}-{number}"
            recipe = recipe_of(options, key, schemes, "sequential" if len(schemes) == 1 else None)
            path = options.work / f"{key}.yaml"
            path.write_text(yaml.safe_dump(recipe))
            if f"{key}-0" not in kept:
                shutil.rmtree(options.work / key, ignore_errors=True)
            several.append(kept.cost(f"{key}-0", [Path(sys.executable).parent / "llmconvert", "run", path], options))
    one, *_ = (_median(several) for several in costs.values())
    rows = []
    for name, several in costs.items():
        cost = _median(several)
        ratios = f"{cost.seconds / one.seconds:.2f}", f"{cost.cpu / one.cpu:.2f}"
        rows.append([name, f"{cost.seconds:.1f} s", f"{cost.cpu:.1f} s", *ratios, megabytes(cost.peak_rss)])
    header = ["", "wall clock", "CPU", "ratio", "ratio of CPU", "peak RSS of the process"]
    print(markdown_table(header, rows))


def _median(costs: list[Cost]) -> Cost:
    wall, cpu = (statistics.median(getattr(cost, name) for cost in costs) for name in ("seconds", "cpu"))
    return Cost(wall, max(cost.peak_rss for cost in costs), cpu)


@dataclass(frozen=True, slots=True)
class Made:
    """What the phases of a sweep cost, and perplexity and KL by scheme."""

    quantizing: Cost
    measuring: Cost
    quality: dict[str, tuple[float, float]] = field(repr=False)


class Kept:
    """What processes cost, in a file; ends the program where as many have run as may in one call."""

    def __init__(self, path: Path, most: int | None) -> None:
        self._path, self._left = path, most
        self._costs: dict[str, Cost] = {}
        if path.exists():
            self._costs = {name: Cost(**cost) for name, cost in json.loads(path.read_text()).items()}

    def cost(self, name: str, command: Sequence[str | Path], options: argparse.Namespace) -> Cost:
        """Of a process that has run, or runs now."""
        if name not in self._costs:
            if self._left == 0:
                raise SystemExit(f"{name} is next; the same command goes on")
            self._left = None if self._left is None else self._left - 1
            self._costs[name] = run_measured(command, threads=options.threads, log=options.work / f"{name}.log")
            self._path.write_text(json.dumps({name: asdict(cost) for name, cost in self._costs.items()}, indent=1))
            print(f"{name}: {self._costs[name]}", file=sys.stderr, flush=True)
        return self._costs[name]

    def __contains__(self, name: str) -> bool:
        return name in self._costs


def recipe_of(
    options: argparse.Namespace, name: str, schemes: Sequence[str], statistics_of: str | None
) -> dict[str, Any]:
    """One that quantizes into these schemes and measures nothing."""
    calibrate: dict[str, Any] = {
        "dataset": str(options.calibration),
        "samples": options.samples,
        "length": options.length,
        "order": "sequential",
    }
    return {
        "name": name,
        "model": str(options.model),
        "calibrate": calibrate | ({"statistics": statistics_of} if statistics_of else {}),
        "quantize": {"method": options.method, "format": options.format, "scheme": schemes[0]},
        "matrix": {"quantize.scheme": list(schemes)},
        "work_dir": str(options.work / name),
    }


def run(options: argparse.Namespace, kept: Kept, name: str, schemes: Sequence[str], statistics_of: str | None) -> Made:
    """Run a recipe with these schemes."""
    work = options.work / name
    if f"{name}-0" not in kept:
        shutil.rmtree(work, ignore_errors=True)
    recipe = recipe_of(options, name, schemes, statistics_of)
    text = {"dataset": str(options.evaluation), "window": options.window, "max_windows": options.windows}
    path = options.work / f"{name}.yaml"
    command = [Path(sys.executable).parent / "llmconvert", "run", path]
    costs: list[Cost] = []
    for validate in ({}, {"validate": {"perplexity": text}}, {"validate": {"perplexity": text}}):
        path.write_text(yaml.safe_dump({**recipe, **validate}))
        costs.append(kept.cost(f"{name}-{len(costs)}", command, options))
    *phases, again = costs
    quality = {}
    for stage in sorted(work.glob("artifact-*")):
        report = json.loads((stage / "model" / "llmconvert" / "report.json").read_text())
        checks = {check["name"]: check.get("value") for check in report["checks"]}
        if "perplexity" in checks:
            quality[report["model"]["scheme"].removesuffix("-sym")] = (checks["perplexity"], checks["kl_mean"])
    if len(quality) != len(schemes):
        raise SystemExit(f"{name}: {len(quality)} of {len(schemes)} schemes were made; see {options.work}")
    quantizing, measuring = (Cost(one.seconds - again.seconds, one.peak_rss, one.cpu - again.cpu) for one in phases)
    return Made(quantizing, measuring, {scheme: quality[scheme] for scheme in schemes})


if __name__ == "__main__":
    main()
