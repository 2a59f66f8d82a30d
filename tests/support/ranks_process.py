"""Several real processes that do one job, as torchrun starts them; forked from a server that has imported packages."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch

from llmconvert.cli import main
from llmconvert.compute.ranks.group import Ranks
from llmconvert.compute.ranks.launch import Launch
from llmconvert.compute.ranks.opening import opened

__all__ = ["Ended", "run_ranks"]

_CONTEXT: ForkServerContext = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["llmconvert.recipes.single", "llmconvert.cli.summary", "transformers.models.llama.modeling_llama"]
)
_SECONDS = 120


@dataclass(frozen=True)
class Ended:
    """How the processes ended, by rank: exit codes (negative: the signal), and what they wrote."""

    codes: tuple[int, ...]
    errors: tuple[str, ...]
    outputs: tuple[str, ...]


def run_ranks(count: int, logs: Path, job: Callable[[Ranks], None] | Sequence[str] | Sequence[Sequence[str]]) -> Ended:
    """Run a function, or a command line, or one for each process, in ``count`` processes; logs go to a directory."""
    logs.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(count):
        own = job if callable(job) or isinstance(job[0], str) else job[rank]
        processes.append(_CONTEXT.Process(target=_run, args=(rank, count, port, logs, own)))
        processes[-1].start()
    for process in processes:
        process.join(_SECONDS)
    left = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in left:
        processes[rank].kill()
    assert not left, f"ranks {left} did not end: {[_text(logs, rank, 'err')[-2000:] for rank in left]}"
    return Ended(
        tuple(process.exitcode if process.exitcode is not None else 0 for process in processes),
        tuple(_text(logs, rank, "err") for rank in range(count)),
        tuple(_text(logs, rank, "out") for rank in range(count)),
    )


def _text(logs: Path, rank: int, kind: str) -> str:
    return (logs / f"{rank}.{kind}").read_text()


def _run(rank: int, count: int, port: int, logs: Path, job: Callable[[Ranks], None] | Sequence[str]) -> None:
    torch.set_num_threads(1)
    for descriptor, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(logs / f"{rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    if not callable(job):
        main(list(job), prog_name="llmconvert")
        return
    launch = Launch.of(os.environ)
    assert launch is not None
    try:
        with opened(launch) as ranks:
            job(ranks)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
