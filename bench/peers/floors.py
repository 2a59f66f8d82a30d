"""What each phase of our GPTQ must do, over what this machine reaches; started by ``bench/peers.py --profile``.

    python bench/peers/floors.py --model DIR --ids FILE.npy --run RUN.json --report FILE.json

``RUN.json`` is the report of ``ours.py`` on the same model and ids. Operations are counted from the model's shapes;
rates are measured here and now, in these shapes: matrix products in bfloat16 and float32, reading from the page
cache, copying in memory, and writing with fsync. A floor is operations over rate, nothing else: no phase can be faster
on this machine with these kernels, unless it does less.

Counted, with ``T`` tokens, windows of ``L``, linears of ``r × n`` and ``n`` columns per stop: forward ``2 T r n`` per
linear and ``2 T L heads · head_dim`` for causal attention; Hessians ``T n²`` (one triangle); solving ``1/3 n³`` per
stop (the factor), ``r n²`` per linear to carry errors on, ``r n²`` for the output's energy (one triangle), and eight
operations per weight and scale candidate. Where bfloat16 operands would do but are not asked for (Hessians, energy), or
float32 where it is faster (forward), the faster of the two rates counts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from llmconvert.engine.discovery import BlockPlan, discover
from llmconvert.engine.skeleton import Skeleton
from llmconvert.quantize.methods.gptq import Gptq
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

_HESSIAN_ROWS = 4096
_CANDIDATE_OPERATIONS = 8
_IO_BYTES = 1 << 28
_EITHER = "bfloat16 or float32"


@dataclass(frozen=True, slots=True)
class Product:
    """Operations (multiply and add counted apart) of one kind of matrix product, ``[m, k] @ [k, n]``."""

    phase: str
    m: int
    k: int
    n: int
    dtype: str
    operations: float


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase's measured seconds, its floor (None where nothing can be counted), and what the floor consists of."""

    name: str
    seconds: float
    floor: float | None
    work: str


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--artifact-bytes", type=int, required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="a directory on the disk that was written to")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    windows, length = np.load(options.ids).shape
    run = json.loads(options.run.read_text())
    with SafetensorsCheckpoint(options.model) as source:
        skeleton = Skeleton(source, torch.device("cpu"))
        plans = discover(skeleton, length)
        products = count_products(skeleton, plans, windows, length)
        sizes = count_bytes(skeleton, plans, windows * length, options.artifact_bytes)
        read_rate = measure_reading(source)
    rates = {shape: measure_product(*shape) for shape in {(p.m, p.k, p.n, p.dtype) for p in products}}
    write_rate, copy_rate = measure_writing(options.scratch), measure_copying()
    phases: list[Phase] = []
    for name, seconds in run["phases"].items():
        own = [product for product in products if product.phase == name]
        if own:
            floor = sum(p.operations / rates[p.m, p.k, p.n, p.dtype] for p in own)
            work = f"{sum(p.operations for p in own) / 1e9:,.0f} GFLOP"
        elif name in sizes:
            rate = {"reading": read_rate, "packing": copy_rate, "writing": write_rate, "copying": write_rate}[name]
            floor, work = sizes[name] / rate, f"{sizes[name] / 1e6:,.0f} MB"
        else:
            floor, work = None, ""
        phases.append(Phase(name, seconds, floor, work))
    rest = run["seconds"] - sum(run["phases"].values())
    phases.append(Phase("opening, tracing, planning", rest, None, ""))
    report = {
        "seconds": run["seconds"],
        "phases": [asdict(phase) for phase in phases],
        "gemm": [
            {"m": m, "k": k, "n": n, "dtype": dtype, "gflops": rate / 1e9} for (m, k, n, dtype), rate in rates.items()
        ],
        "disk": {"read": read_rate, "write": write_rate, "memory": copy_rate},
    }
    options.report.write_text(json.dumps(report))


def count_products(skeleton: Skeleton, plans: tuple[BlockPlan, ...], windows: int, length: int) -> list[Product]:
    """Every matrix product that the job cannot do without."""
    tokens = windows * length
    width = skeleton.architecture.query_heads * skeleton.architecture.head_dim
    gptq = Gptq()
    products: list[Product] = []
    for plan in plans:
        linears = skeleton.linears[plan.index]
        products.append(Product("forward", length, width, length, _EITHER, 2 * tokens * length * width))
        for stop in plan.stops:
            n = stop.columns
            rows = sum(linears[name].out_features for name in stop.linears)
            products.append(Product("Hessians", n, _HESSIAN_ROWS, n, _EITHER, tokens * n * n))
            products.append(Product("solving", n, 256, n, "float32", n**3 / 3))
            candidates = math.ceil(gptq.scale_steps / gptq.scale_stride) + 2 * (gptq.scale_stride - 1)
            carry = rows * n * n + _CANDIDATE_OPERATIONS * candidates * rows * n
            products.append(Product("solving", rows, gptq.block, n, "float32", carry))
            products.append(Product("solving", rows, n, n, _EITHER, rows * n * n))
            # Batches stop at the last block's last linear; what comes after is not needed.
            if plan is not plans[-1] or stop is not plan.stops[-1]:
                for name in stop.linears:
                    r = linears[name].out_features
                    products.append(Product("forward", length, n, r, _EITHER, 2 * tokens * r * n))
    return products


def count_bytes(skeleton: Skeleton, plans: tuple[BlockPlan, ...], tokens: int, artifact: int) -> dict[str, int]:
    """Bytes that have to be moved, by phase."""
    outer, codes = skeleton.outer_nbytes(head=False), 0
    for plan in plans:
        linears = skeleton.linears[plan.index]
        codes += sum(linears[name].weight.numel() for stop in plan.stops for name in stop.linears)
    blocks = sum(skeleton.block_nbytes(plan.index) for plan in plans)
    states = len(plans) * tokens * skeleton.hidden_size * skeleton.dtype.itemsize
    copied = sum(info.nbytes for info in skeleton.checkpoint.infos.values()) - 2 * codes
    return {"reading": outer + blocks, "packing": codes, "writing": artifact - copied + states, "copying": copied}


def measure_product(m: int, k: int, n: int, dtype: str) -> float:
    """Operations per second of ``[m, k] @ [k, n]``, the best of several runs of a tenth of a second."""
    if dtype == _EITHER:
        return max(measure_product(m, k, n, name) for name in _EITHER.split(" or "))
    left, right = (torch.randn(shape).to(getattr(torch, dtype)) for shape in ((m, k), (k, n)))
    out = torch.empty((m, n), dtype=left.dtype)
    seconds = fastest(lambda: torch.mm(left, right, out=out))
    return 2 * m * k * n / seconds


def measure_reading(source: SafetensorsCheckpoint) -> float:
    """Bytes per second of ``preadv`` from the page cache, into memory that is there already."""
    name = max(source.infos, key=lambda key: source.infos[key].nbytes)
    buffer = memoryview(bytearray(min(source.infos[name].nbytes, _IO_BYTES)))
    return len(buffer) / fastest(lambda: source.read_bytes(name, 0, buffer))


def measure_copying() -> float:
    """Bytes per second copied in memory."""
    source = torch.ones(_IO_BYTES, dtype=torch.uint8)
    target = torch.ones_like(source)
    return _IO_BYTES / fastest(lambda: target.copy_(source))


def measure_writing(directory: Path) -> float:
    """Bytes per second written to a file of reserved size and forced to disk, the best of three."""
    data = memoryview(os.urandom(1 << 20) * (_IO_BYTES >> 20))
    best = 0.0
    with tempfile.TemporaryFile(dir=directory) as file:
        os.posix_fallocate(file.fileno(), 0, len(data))
        os.fsync(file.fileno())
        for _ in range(3):
            begin = time.perf_counter()
            os.pwrite(file.fileno(), data, 0)
            os.fsync(file.fileno())
            best = max(best, len(data) / (time.perf_counter() - begin))
    return best


def fastest(work: Callable[[], object]) -> float:
    """Seconds of one call: the least of five runs, each of as many calls as fill a twentieth of a second."""
    work()
    begin = time.perf_counter()
    work()
    calls = max(1, int(0.05 / max(1e-6, time.perf_counter() - begin)))
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        seconds.append((time.perf_counter() - begin) / calls)
    return min(seconds)


if __name__ == "__main__":
    main()
