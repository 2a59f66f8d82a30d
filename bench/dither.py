"""Make the dithered variant of a model: the same weights plus noise, so that they sit on no lattice.

    python bench/dither.py MODEL OUTPUT [--seed 0] [--group 32] [--levels 16]

A model that was stored in 4 bits before, like the GGUF of the demo, is nearly lossless to any method that hits upon
its groups. Here every linear weight of the decoder blocks gets uniform noise of plus or minus half its own cell, where
the cell of a row's group of ``--group`` columns is the group's range over ``--levels - 1``. Everything else is copied.
Works on safetensors directories, one slice of rows at a time; the noise depends on the seed and the tensor's name
alone.
"""

from __future__ import annotations

import argparse
import time
import zlib
from pathlib import Path

import torch

from llmconvert.engine.skeleton import Skeleton
from llmconvert.storage.checkpoint import SafetensorsCheckpoint, TensorSpec
from llmconvert.storage.writer import (
    TensorWriter,
    check_output_directory,
    plan_layout,
    publish_directory,
    staging_directory,
    write_json,
    write_side_files,
)

_SLICE_NBYTES = 1 << 25


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="an unquantized model directory")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--group", type=int, default=32, help="columns that share a cell (default 32)")
    parser.add_argument("--levels", type=int, default=16, help="levels in a group's range (default 16)")
    options = parser.parse_args()
    begin = time.perf_counter()
    with SafetensorsCheckpoint(options.model) as source:
        changed = dither(source, options.output, options.seed, options.group, options.levels)
    print(f"{options.output}: {changed} weights dithered in {time.perf_counter() - begin:.1f} s")


def dither(source: SafetensorsCheckpoint, output: Path, seed: int, group: int, levels: int) -> int:
    """Write the variant; gives the number of tensors that were changed."""
    check_output_directory(output)
    skeleton = Skeleton(source, torch.device("cpu"))
    linears = {site.tensor for site in skeleton.sites.values()}
    layout = plan_layout(TensorSpec(info.name, info.dtype, info.shape) for info in source.infos.values())
    staging = staging_directory(output)
    with TensorWriter(staging, layout) as writer:
        for name, info in source.infos.items():
            generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
            rows = info.shape[0] if info.shape else 1
            step = max(1, rows * _SLICE_NBYTES // max(1, info.nbytes))
            for start in range(0, rows, step):
                part = source.read_rows(name, start, min(rows, start + step))
                writer.write_rows(name, start, add_noise(part, group, levels, generator) if name in linears else part)
        writer.sync()
    write_side_files(staging, source.files)
    write_json(staging / "config.json", source.config)
    publish_directory(staging, output)
    return len(linears)


def add_noise(weight: torch.Tensor, group: int, levels: int, generator: torch.Generator) -> torch.Tensor:
    """Rows of a weight with noise, in its own dtype. The last group of a row may be shorter."""
    noisy = weight.float()
    for start in range(0, noisy.shape[1], group):
        part = noisy[:, start : start + group]
        cell = (part.amax(1, keepdim=True) - part.amin(1, keepdim=True)) / (levels - 1)
        part += (torch.rand(part.shape, generator=generator) - 0.5) * cell
    return noisy.to(weight.dtype)


if __name__ == "__main__":
    main()
