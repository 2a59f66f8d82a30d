"""How time and memory of GPTQ grow with tokens, layers, width and experts, and how fast what has to be done grows.

    python bench/growth.py --work DIR --picture docs/growth.png [--threads 2] [--rounds 2]
        [--json FILE] [--markdown FILE]

Models of random weights (``bench/random_llama.py``) and random tokens, in processes of their own; of each axis all else
stays. Times are those of the phases, without start-up and planning, the least of the rounds; memory is the process's
peak less what it is when its libraries are loaded. An exponent is the slope of a line through the logarithms.

What has to be done: operations of matrix products as ``bench/peers/floors.py`` counts them; of memory two blocks, the
activations that wait and those of the running batch, and one linear's Hessian, weights and codes, which is what the job
states of itself.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measured import markdown_table, run_measured

from llmconvert.validate.render.drawing import COLOURS, INK, legend, render, style

_HERE = Path(__file__).parent
_LENGTH = 256
_CANDIDATE_OPERATIONS = 8 * 15
# Libraries and planning take their own, and the same at every point.
_BASE = ("base", "tokenizer")


@dataclass(frozen=True, slots=True)
class Shape:
    """A model and its calibration: ``inner`` is an expert's width where there are experts."""

    samples: int = 16
    layers: int = 2
    hidden: int = 512
    inner: int = 1408
    experts: int = 0
    chosen: int = 2

    @property
    def tokens(self) -> int:
        return self.samples * _LENGTH

    def operations(self) -> float:
        """Of the products that GPTQ can't do without."""
        tokens, hidden, inner, groups = self.tokens, self.hidden, self.inner, max(self.experts, 1)
        shown = tokens * (self.chosen if self.experts else 1)  # to all experts together
        # Rows, columns, tokens that come to it, and how many there are of it in a layer.
        stops: list[tuple[int, int, float, int]] = [(3 * hidden, hidden, tokens, 1), (hidden, hidden, tokens, 1)]
        stops += [(2 * inner, hidden, shown / groups, groups), (hidden, inner, shown / groups, groups)]
        total = 2.0 * tokens * _LENGTH * hidden
        for rows, columns, seen, count in stops:
            moments = seen * columns**2 + columns**3 / 3
            solving = 2 * rows * columns**2 + _CANDIDATE_OPERATIONS * rows * columns
            total += count * (2 * seen * rows * columns + moments + solving)
        return self.layers * total


#: Of each axis, where points lie on it and the shapes that they stand for.
AXES: Mapping[str, Mapping[int, Shape]] = {
    "tokens": {samples * _LENGTH: Shape(samples=samples) for samples in (8, 16, 32, 64)},
    "layers": {layers: Shape(layers=layers) for layers in (2, 4, 8, 16)},
    "width": {hidden: Shape(hidden=hidden, inner=hidden * 11 // 4) for hidden in (256, 512, 1024, 1536)},
    "experts": {experts: Shape(inner=704, experts=experts) for experts in (4, 8, 16, 32)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="scratch directory")
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--axes", default=",".join(AXES), help="which of tokens, layers, width, experts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write everything measured to this file, or draw what is in it")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.json and options.json.exists():
        found = json.loads(options.json.read_text())
    else:
        found = {axis: measure(options, axis) for axis in options.axes.split(",")}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    options.picture.write_bytes(render(lambda figure: draw(figure, found), "png", "growth"))
    text = table(found)
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")


def measure(options: argparse.Namespace, axis: str) -> list[dict[str, float]]:
    """The points of an axis: ``at``, ``seconds`` and ``bytes``, and their floors."""
    points: list[dict[str, float]] = []
    for at, shape in AXES[axis].items():
        runs = [run(options, shape) for _ in range(options.rounds)]
        seconds = min(sum(one["phases"].values()) - one["phases"].get("loading kernels", 0) for one in runs)
        memory = statistics.median(one["peak_rss"] - one["idle_rss"] for one in runs)
        stated = sum(size for name, size in runs[0]["estimate"].items() if name not in _BASE)
        points.append(
            {"at": at, "seconds": seconds, "operations": shape.operations(), "bytes": memory, "stated": stated}
        )
        print(f"{axis} {at}: {seconds:.2f} s, {memory / 1e6:.0f} MB ({runs[0]['mode']})", file=sys.stderr, flush=True)
    return points


def run(options: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """One quantization in a process of its own; the model of a shape is made when it is first asked for."""
    model = options.work / f"model-{shape.layers}-{shape.hidden}-{shape.inner}-{shape.experts}"
    if not (model / "config.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        command: list[str | Path] = [sys.executable, _HERE / "random_llama.py", model, "--vocabulary", "4096"]
        command += ["--layers", str(shape.layers), "--hidden", str(shape.hidden), "--intermediate", str(shape.inner)]
        command += ["--heads", str(shape.hidden // 64), "--experts", str(shape.experts), "--chosen", str(shape.chosen)]
        run_measured(command, threads=options.threads, log=options.work / "make.log")
    output, report = options.work / "out", options.work / "out.json"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, _HERE / "quantize_once.py", "--model", model, "--output", output, "--report", report]
    command += ["--method", "gptq", "--scheme", "w4a16-g64", "--mode", "lockstep", "--threads", str(options.threads)]
    command += ["--samples", str(shape.samples), "--length", str(_LENGTH)]
    cost = run_measured(command, threads=options.threads, log=options.work / "run.log")
    return {**json.loads(report.read_text()), "peak_rss": cost.peak_rss}


def exponent(points: Sequence[Mapping[str, float]], name: str) -> float:
    """The slope of ``name`` over where the points lie, both as logarithms, by least squares."""
    x, y = ([math.log(point[key]) for point in points] for key in ("at", name))
    return statistics.linear_regression(x, y).slope


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    header = ["", "from", "to", "seconds", "time", "operations", "MB", "memory", "stated"]
    rows = []
    for axis, points in found.items():
        ends = points[0], points[-1]
        rows.append(
            [
                axis,
                *(f"{end['at']:,.0f}" for end in ends),
                "–".join(f"{end['seconds']:.1f}" for end in ends),
                *(f"{exponent(points, name):.2f}" for name in ("seconds", "operations")),
                "–".join(f"{end['bytes'] / 1e6:.0f}" for end in ends),
                *(f"{exponent(points, name):.2f}" for name in ("bytes", "stated")),
            ]
        )
    return markdown_table(header, rows)


def draw(figure: Any, found: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Time above, memory below, an axis in each column: what was measured, its line, and the floor's growth."""
    figure.set_size_inches(2.6 * len(found), 5.2)
    kinds = (("seconds", "operations", 1.0, "seconds"), ("bytes", "stated", 1e-6, "MB beside libraries"))
    for row, (name, floor, unit, label) in enumerate(kinds):
        for column, (axis, points) in enumerate(found.items()):
            axes = figure.add_subplot(len(kinds), len(found), row * len(found) + column + 1)
            style(axes)
            at = [point["at"] for point in points]
            measured = [point[name] * unit for point in points]
            slopes = exponent(points, name), exponent(points, floor)
            middle = [statistics.fmean(map(math.log, values)) for values in (at, measured)]
            named = row == column == 0
            for slope, colour, dashes, text in zip(
                slopes, (COLOURS[0], COLOURS[1]), ("-", "--"), ("fitted", "what has to be done grows"), strict=True
            ):
                line = [math.exp(middle[1] + slope * (math.log(one) - middle[0])) for one in at]
                axes.plot(at, line, dashes, color=colour, linewidth=1.3, label=text if named else None)
            axes.plot(at, measured, "o", color=COLOURS[0], markersize=5, label="measured" if named else None)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xticks(at, [f"{one:,.0f}" for one in at], fontsize=8)
            axes.set_xticks([], minor=True)
            low, high = min(measured), max(measured)
            axes.set_ylim(low / 1.7, max(high, 4 * low) * 1.7)
            axes.set_yticks([], minor=True)
            ticks = (low, high) if high > 1.2 * low else (high,)
            axes.set_yticks(ticks, [f"{tick:.2g}" if tick < 10 else f"{tick:.0f}" for tick in ticks])
            axes.set_title(f"{axis}: {slopes[0]:.2f} ({slopes[1]:.2f})", color=INK, fontsize=9.5, loc="left")
            if row:
                axes.set_xlabel(axis)
            if not column:
                axes.set_ylabel(label)
    legend(figure, 3)


if __name__ == "__main__":
    main()
