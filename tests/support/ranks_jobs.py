"""What the processes of the tests of ranks do; in a module that they can import."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import llmconvert
from llmconvert.compute.ranks.group import Ranks
from llmconvert.engine.statistics import Aim, Arrival, Departure, Hessian, HessianSum
from llmconvert.errors import CalibrationError, UnsupportedError
from llmconvert.progress import Task
from llmconvert.recipes.loading import load_recipe
from llmconvert.recipes.runner import run_recipe

__all__ = [
    "BATCHES",
    "JOBS",
    "SHAPES",
    "arrivals",
    "both_refuse",
    "die",
    "exercise",
    "quantize_all",
    "refuse",
    "run_and_kill",
    "summed",
]

CPU = torch.device("cpu")
SHAPES = ((96, 0), (600, 40))  # columns; rows of the weight, if what the original gives comes too
BATCHES = (64, 1, 300, 2500, 7)  # tokens


def arrivals(seed: int, columns: int, rows: int, dtype: torch.dtype) -> list[tuple[Arrival, Departure | None]]:
    """Batches whose columns are of very different sizes, as those of models are."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-2, 2, columns)

    def one(tokens: int) -> tuple[Arrival, Departure | None]:
        inputs = (torch.randn(tokens, columns, generator=generator) * sizes).to(dtype)
        here, outputs, there = (torch.randn(tokens, rows, generator=generator).to(dtype) for _ in range(3))
        return (Arrival(inputs, here), Departure(outputs, there)) if rows else (Arrival(inputs), None)

    return [one(tokens) for tokens in BATCHES]


def summed(ranks: Ranks, seed: int, columns: int, rows: int, dtype: torch.dtype) -> Hessian:
    """The Hessian of all batches, of which this process adds its share."""
    aim = Aim(rows, 0.5) if rows else None
    total = HessianSum("layer", columns, CPU, original=bool(rows), aim=aim, ranks=ranks)
    batches = arrivals(seed, columns, rows, dtype)
    for number in ranks.share(len(batches)):
        total.add(*batches[number])
    return total.hessian()


def exercise(directory: Path, ranks: Ranks) -> None:
    found: dict[str, torch.Tensor] = {}
    for seed, (columns, rows) in enumerate(SHAPES):
        for dtype in (torch.float32, torch.bfloat16):
            hessian = summed(ranks, seed, columns, rows, dtype)
            name = f"{seed} {str(dtype)[6:]}"
            found |= {f"{name} matrix": hessian.matrix, f"{name} tokens": torch.tensor(hessian.tokens)}
            if hessian.aim is not None:
                found[f"{name} aim"] = hessian.aim
    generator = torch.Generator().manual_seed(ranks.rank)
    own = [torch.randn(3, ranks.rank + 2, generator=generator), torch.tensor(ranks.rank, dtype=torch.int16)]
    own.append(torch.zeros(2, 0, dtype=torch.float8_e4m3fn))
    own = own[: 3 - ranks.rank % 2]
    for rank, tensors in enumerate(ranks.exchange(own, CPU)):
        found |= {f"from {rank} {number}": tensor for number, tensor in enumerate(tensors)}
    assert ranks.ask({"rank": ranks.rank}) == [{"rank": rank} for rank in range(ranks.count)]
    assert ranks.tell("this" if ranks.leads else "other") == "this"
    assert ranks.largest(float(ranks.rank)) == ranks.count - 1 and ranks.sum_number(2) == 2 * ranks.count
    assert "RANK" not in os.environ and "WORLD_SIZE" not in os.environ
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, directory / f"{ranks.rank}.safetensors")


def die(rank: int, ranks: Ranks) -> None:
    if ranks.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    if ranks.rank == (rank + 1) % ranks.count:
        ranks.wait()
    time.sleep(60)  # computes, and waits for nobody


def refuse(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise CalibrationError("layer 7: values that are not finite")
    ranks.wait()


def both_refuse(ranks: Ranks) -> None:
    raise UnsupportedError("the same in all of them")


#: What is quantized by several processes and by one: name → model and options.
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptaq": ("llama", {"method": "gptaq", "scheme": "w4a16-g32"}),
    "awq": ("llama", {"method": "awq", "scheme": "w4a16-g32-asym"}),
    "static": ("llama", {"method": "gptq", "scheme": "fp8-static", "kv_cache": "fp8"}),
    "rtn": ("llama", {"method": "rtn", "scheme": "w4a16-g32"}),
    "hqq": ("small", {"method": "hqq", "scheme": "w4a16-g32-asym"}),
    "smoothquant": ("small", {"method": "smoothquant", "scheme": "w8a8"}),
    "fp8": ("block", {"method": "gptq", "scheme": "fp8-block"}),
    "nvfp4": ("small", {"method": "gptq", "scheme": "nvfp4"}),
    "mixture": ("mixture", {"method": "gptaq", "scheme": "w4a16-g32"}),
    "q4_k.gguf": ("wide", {"method": "gptq", "scheme": "q4_k_m"}),
    "imatrix.gguf": ("wide", {"method": "imatrix", "scheme": "q4_k_m"}),
}
_TEXT = {"samples": 5, "length": 48}


def quantize_all(directory: Path, where: str, ranks: Ranks | None) -> None:
    """Every job, and a measurement of one of the artifacts, in a folder of the directory."""
    text = directory / "text.txt"
    for name, (model, options) in JOBS.items():
        given = options if options["method"] in ("rtn", "hqq") else {"calibration": text, **_TEXT, **options}
        given = given if model == "mixture" else {"dtype": "float32", **given}
        made = llmconvert.quantize_model(directory / model, directory / where / name, ranks=ranks, **given)
        assert made.layers
        if ranks is None or ranks.leads:
            errors = {linear.name: linear.error for linear in made.details.linears}
            (directory / where / f"{name}.json").write_text(json.dumps(errors))
    artifact, original, other = directory / "single" / "gptaq", directory / "llama", directory / "other.txt"
    report = llmconvert.validate_model(artifact, original, text=other, window=64, max_windows=5, ranks=ranks)
    number = 0 if ranks is None else ranks.rank
    (directory / where / f"{number}.json").write_text(report.to_json())


class _Killing:
    """Progress that kills a process when so many blocks are quantized."""

    def __init__(self, victim: int, blocks: int) -> None:
        self._victim, self._left = victim, blocks

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        yield self if description == "Quantizing" else _Killing(0, 1 << 30)

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(self._victim, signal.SIGKILL)

    def log(self, message: str) -> None:
        pass


def run_and_kill(recipe: Path, ranks: Ranks) -> None:
    """Run a recipe until three blocks are quantized; then the last process is killed."""
    victim = ranks.ask(os.getpid())[-1]
    run_recipe(load_recipe(str(recipe)), publish=False, progress=_Killing(victim, 4), ranks=ranks)
