"""One model quantized by one, two and three processes: codes that differ, perplexity, and where the time goes.

    python bench/ranks.py --model DIR --calibration FILE --evaluation FILE --work DIR [--samples 8] [--length 256]
        [--method gptaq] [--windows 8] [--window 512] [--threads 1]

Each is a whole run of ``torchrun … -m llmconvert quantize``, measured afterwards by one process. What several processes
on as many cores as there are here gain can't be seen on this machine; how time would go down is a model: phases of the
run by one process, those that are shared divided by the processes, the others as they are, and the bytes that processes
give each other at the rate at which this machine exchanges them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from measured import markdown_table
from options import parser_of

from llmconvert.engine.statistics import Hessian
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.methods.base import Target, load_quantizer
from llmconvert.quantize.methods.gptq import Gptq
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

SHARED = ("forward", "Hessians")
COUNTS = (1, 2, 3)
EXCHANGE = """
import os, time, torch
from llmconvert.compute.ranks.launch import Launch
from llmconvert.compute.ranks.opening import opened
with opened(Launch.of(os.environ)) as ranks:
    values = torch.zeros(1 << 22)
    ranks.sum_(values)
    begin = time.perf_counter()
    for _ in range(5):
        ranks.sum_(values)
    print(5 * values.nbytes / (time.perf_counter() - begin))
"""


def main() -> None:
    parser = parser_of(__doc__, samples=8, length=256, threads=1, method="gptaq", window=512)
    parser.add_argument("--scheme", default="w4a16-g64")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for name in ("model", "calibration", "evaluation", "work"):
        setattr(options, name, getattr(options, name).absolute())
    runs = {count: quantize(options, count) for count in COUNTS}
    rows = []
    first = perplexity(options, 1, 1)
    for count in COUNTS:
        found = first if count == 1 else perplexity(options, count, 1)
        codes, differing = compare(options.work / "1", options.work / str(count))
        share = "" if count == 1 else f"{differing / codes:.3%}"
        rows.append([str(count), share, f"{found:.4f}", f"{found / first - 1:+.3%}"])
    print(f"{options.model.name}, {options.method} {options.scheme}, {options.samples} × {options.length} tokens")
    print(markdown_table(["processes", "codes that differ", "perplexity", "against one"], rows))
    shared = perplexity(options, 1, 2)
    print(f"evaluated by two processes: {shared!r}, by one: {first!r}")
    model(options, runs[1])


def launched(options: argparse.Namespace, count: int, *arguments: str | Path) -> str:
    """What a command prints that so many processes run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    return subprocess.run(
        command, check=True, text=True, stdout=subprocess.PIPE, env=environment, cwd=options.work
    ).stdout


def quantize(options: argparse.Namespace, count: int) -> dict[str, Any]:
    output, kept = options.work / str(count), options.work / f"{count}.json"
    if kept.exists():  # of a run that was stopped
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    shutil.rmtree(output, ignore_errors=True)
    given = ["--method", options.method, "--scheme", options.scheme, "--calibration", options.calibration, "--json"]
    given += ["--samples", str(options.samples), "--length", str(options.length), "-q"]
    said: dict[str, Any] = json.loads(
        launched(options, count, "-m", "llmconvert", "quantize", options.model, output, *given)
    )
    print(f"{count}: {said['seconds']} s {said['phases']}", file=sys.stderr, flush=True)
    kept.write_text(json.dumps(said))
    return said


def perplexity(options: argparse.Namespace, artifact: int, count: int) -> float:
    given = ["--text", options.evaluation, "--window", str(options.window), "--max-windows", str(options.windows)]
    said = launched(
        options, count, "-m", "llmconvert", "validate", options.work / str(artifact), *given, "-q", "--json"
    )
    checks = {check["name"]: check for check in json.loads(said)["checks"]}
    value: float = checks["perplexity"]["value"]
    return value


def compare(one: Path, other: Path) -> tuple[int, int]:
    """Codes, and how many of them differ."""
    codes = differing = 0
    with SafetensorsCheckpoint(one) as first, SafetensorsCheckpoint(other) as second:
        ours, theirs = open_dense(first), open_dense(second)
        for name in ours.quantized:  # type: ignore[attr-defined]
            left, right = (view.read_quantized(name).codes for view in (ours, theirs))  # type: ignore[attr-defined]
            codes += left.numel()
            differing += int((left != right).sum())
    return codes, differing


def model(options: argparse.Namespace, said: Mapping[str, Any]) -> None:
    """Time by processes, computed from the phases of one."""
    phases: dict[str, float] = said["phases"]
    config = json.loads((options.model / "config.json").read_text())
    width, inner, blocks = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    keys = width * config["num_key_value_heads"] // config["num_attention_heads"]
    stops = [(width, width + 2 * keys), (width, width), (width, 2 * inner), (inner, width)]  # columns, rows
    kept = sum(replicated(options, *stop) * stop[0] ** 2 for stop in stops) / sum(stop[0] ** 2 for stop in stops)
    solving = phases.get("solving", 0.0)
    split = sum(phases.get(name, 0.0) for name in SHARED) + (1 - kept) * solving
    alone = sum(phases.values()) - split
    program = options.work / "exchange.py"
    program.write_text(EXCHANGE)
    rate = float(launched(options, 2, program).split()[0])
    moments = sum(columns * columns * 4 * (2 if options.method == "gptaq" else 1) for columns, _ in stops) * blocks
    rows = []
    for count in (1, 2, 4, 8):
        exchanged = 0.0 if count == 1 else moments / rate
        seconds = alone + split / count + exchanged
        rows.append([str(count), f"{seconds:.1f}", f"{(alone + split) / seconds:.2f}", f"{exchanged:.2f}"])
    print(f"model: {split:.1f} s shared, {alone:.1f} s not; {kept:.0%} of solving is done by every process; ", end="")
    print(f"{moments / 1e6:,.0f} MB of moments at {rate / 1e6:,.0f} MB/s")
    print(markdown_table(["processes", "seconds (model)", "times as fast", "of it exchanging"], rows))


def replicated(options: argparse.Namespace, columns: int, rows: int) -> float:
    """The share of solving a stop that does not depend on its rows."""
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4 * columns, columns, generator=generator)
    matrix = inputs.T @ inputs / len(inputs)
    scheme, method = Scheme.parse(options.scheme), load_quantizer("gptq", {})
    assert isinstance(method, Gptq)
    weight = torch.randn(rows, columns, generator=generator)
    method.quantize([Target("warm", weight[:64], scheme)], Hessian(matrix.clone(), 1), torch.bfloat16)
    begin = time.perf_counter()
    method.prepare("layer", Hessian(matrix.clone(), 1))
    middle = time.perf_counter()
    method.quantize([Target("layer", weight, scheme)], Hessian(matrix.clone(), 1), torch.bfloat16)
    return min(1.0, (middle - begin) / (time.perf_counter() - middle))


if __name__ == "__main__":
    main()
