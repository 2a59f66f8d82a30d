"""Dtype conversion against ``cp``: throughput and memory, from a cold cache, on a checkpoint made here.

    python bench/convert.py --dir DIR [--gigabytes 4] [--rounds 3] [--json FILE]

Makes a checkpoint of random fp32 weights (and one of bf16) in DIR, shard by shard, then alternates copying it with
``cp`` followed by fsync and converting it with error statistics on, each in a process of its own and with the page
cache dropped before. Throughput is bytes read plus bytes written per second. DIR needs three times the size.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from llmconvert.storage.checkpoint import TensorSpec
from llmconvert.storage.writer import TensorWriter, plan_layout, write_json

CONVERSIONS = (("float32", "bfloat16"), ("bfloat16", "float16"), ("bfloat16", "float32"))
_ROWS = 4096

CONVERT = """
import json, sys, time
from pathlib import Path
import torch

def peak_memory():
    # Not getrusage: its maximum survives exec, so a child starts with what its parent had.
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))

idle = peak_memory()
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.convert.dtype import convert_dtype
begin = time.perf_counter()
with SafetensorsCheckpoint(sys.argv[1]) as source:
    report = convert_dtype(source, Path(sys.argv[2]), dtype=getattr(torch, sys.argv[3]))
seconds = time.perf_counter() - begin
above_idle = (peak_memory() - idle) * 1024
print(json.dumps({"seconds": seconds, "above_idle": above_idle, "error": report.largest_relative_error}))
"""

# fsync of every file, from a process of its own, so that cp is the system's and not ours.
SYNC = """
import os, sys
from pathlib import Path
for path in [p for p in Path(sys.argv[1]).iterdir()] + [Path(sys.argv[1])]:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed run: MB/s of bytes read plus written, and the peak memory above an idle interpreter with torch."""

    rate: float
    above_idle: int | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="scratch directory on the disk to measure")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of each source checkpoint (default 4)")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds per conversion (default 3)")
    parser.add_argument("--json", type=Path, help="also write every sample to this file")
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    samples: dict[str, list[Sample]] = {}
    with tempfile.TemporaryDirectory(dir=options.dir) as scratch:
        for dtype in ("float32", "bfloat16"):
            source = Path(scratch) / dtype
            make_checkpoint(source, getattr(torch, dtype), int(options.gigabytes * 1e9))
            for _ in range(options.rounds):
                samples.setdefault(f"cp {dtype}", []).append(time_copy(source, Path(scratch) / "copy"))
                for target in (to for given, to in CONVERSIONS if given == dtype):
                    name = f"{dtype} → {target}"
                    samples.setdefault(name, []).append(time_conversion(source, Path(scratch) / "out", target))
                    print(f"{name}: {samples[name][-1].rate:,.0f} MB/s", file=sys.stderr, flush=True)
            shutil.rmtree(source)
    print_table(samples, options.gigabytes)
    if options.json:
        plain = {name: [[s.rate, s.above_idle] for s in found] for name, found in samples.items()}
        options.json.write_text(json.dumps(plain, indent=2))


def make_checkpoint(directory: Path, dtype: torch.dtype, nbytes: int) -> None:
    """A Llama-shaped checkpoint of about ``nbytes``, normal weights of standard deviation 0.02, seeded."""
    directory.mkdir(parents=True)
    layout = plan_layout(shapes(dtype, nbytes), max_shard_bytes=2_000_000_000)
    # A million random numbers, repeated with an offset, are random enough for a disk and much faster to make.
    pool = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    with TensorWriter(directory, layout) as writer:
        for position, spec in enumerate(layout.specs.values()):
            row = spec.nbytes // dtype.itemsize // spec.shape[0]
            for start in range(0, spec.shape[0], _ROWS):
                rows = min(_ROWS, spec.shape[0] - start)
                shifted = pool.roll(position * 7919 + start)
                values = shifted.repeat(-(-rows * row // len(shifted)))[: rows * row]
                writer.write_rows(spec.name, start, values.reshape(rows, *spec.shape[1:]))
        writer.sync()
    write_json(directory / "config.json", {"model_type": "llama", "dtype": str(dtype).removeprefix("torch.")})


def shapes(dtype: torch.dtype, nbytes: int) -> Iterator[TensorSpec]:
    """Embeddings, then decoder blocks of hidden size 2,048 until ``nbytes`` are reached."""
    hidden, inner, vocabulary = 2048, 5632, 32000
    specs = [TensorSpec("model.embed_tokens.weight", dtype, (vocabulary, hidden))]
    layer = 0
    while sum(spec.nbytes for spec in specs) < nbytes:
        prefix = f"model.layers.{layer}"
        specs += [TensorSpec(f"{prefix}.self_attn.{n}_proj.weight", dtype, (hidden, hidden)) for n in "qkvo"]
        specs += [TensorSpec(f"{prefix}.mlp.{n}_proj.weight", dtype, (inner, hidden)) for n in ("gate", "up")]
        specs.append(TensorSpec(f"{prefix}.mlp.down_proj.weight", dtype, (hidden, inner)))
        specs += [TensorSpec(f"{prefix}.{n}_layernorm.weight", dtype, (hidden,)) for n in ("input", "post_attention")]
        layer += 1
    return iter(specs)


def time_copy(source: Path, target: Path) -> Sample:
    drop_caches(source)
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run([sys.executable, "-S", "-c", SYNC, target], check=True)
    seconds = time.perf_counter() - begin
    rate = (size(source) + size(target)) / seconds / 1e6
    shutil.rmtree(target)
    return Sample(rate)


def time_conversion(source: Path, target: Path, dtype: str) -> Sample:
    drop_caches(source)
    command = [sys.executable, "-P", "-c", CONVERT, str(source), str(target), dtype]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rate = (size(source) + size(target)) / result["seconds"] / 1e6
    shutil.rmtree(target)
    return Sample(rate, result["above_idle"])


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def drop_caches(directory: Path) -> None:
    """Nothing of ``directory`` in memory, nothing of an earlier run still on its way to the disk."""
    os.sync()
    for path in directory.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    if os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")


def print_table(samples: dict[str, list[Sample]], gigabytes: float) -> None:
    rounds = len(next(iter(samples.values())))
    print(f"{gigabytes:g} GB per source, median of {rounds} alternating rounds, cold cache, fsync included\n")
    print(f"| {'what':<22} | MB/s read + written | ratio to cp | peak memory above idle |")
    print(f"|{'-' * 24}|{'-' * 21}|{'-' * 13}|{'-' * 24}|")
    for name, found in samples.items():
        rate = statistics.median(sample.rate for sample in found)
        reference = samples[name if name.startswith("cp") else f"cp {name.split()[0]}"]
        ratio = rate / statistics.median(sample.rate for sample in reference)
        peaks = [sample.above_idle for sample in found if sample.above_idle is not None]
        peak = f"{max(peaks) / 1e6:,.0f} MB" if peaks else ""
        print(f"| {name:<22} | {rate:>19,.0f} | {ratio:>11.2f} | {peak:>22} |")


if __name__ == "__main__":
    main()
