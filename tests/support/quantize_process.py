"""Quantization in a process of its own that can be killed, for the tests of resuming.

A fork server imports the heavy packages once; every run is then a fresh process that starts in milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from support.tiny_architectures import ids

from llmconvert.progress import Progress
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

__all__ = ["STEPS", "FileLog", "FileSteps", "start"]

_CONTEXT: ForkServerContext = multiprocessing.get_context("forkserver")
# Packages only: the server does not search the path that the tests are on.
_CONTEXT.set_forkserver_preload(["llmconvert.quantize.job", "transformers.models.llama.modeling_llama"])

#: What changes files: a process can be killed at any of these calls, counted together.
STEPS = ((os, "pwrite"), (os, "fsync"), (os, "fdatasync"), (os, "replace"), (os, "rename"), (os, "unlink"))


def start(source: Path, output: Path, log: Path, *, kill_at: int = 0, **options: Any) -> ForkServerProcess:
    """Start a run; it ends with code 0, with 1 after an exception, or is killed at its ``kill_at``-th step.

    Args:
        source: the model.
        output: the artifact.
        log: gets what the run reports, one line each, and ``steps N`` at the end.
        options: ``scheme``, ``windows`` (lengths), ``seed`` of the windows, ``mode``, ``method`` and its ``settings``.
    """
    process = _CONTEXT.Process(target=_run, args=(source, output, log, kill_at, options))
    process.start()
    return process


class FileLog(Progress):
    """Keeps what a run reports in a file, one line each."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def task(self, description: str, total: float) -> AbstractContextManager[Any]:
        return nullcontext(self)

    def advance(self, amount: float = 1, note: str = "") -> None:
        pass

    def log(self, message: str) -> None:
        with self._path.open("a") as file:
            file.write(message + "\n")


class FileSteps:
    """Counts the calls that change files, and kills the process in the midst of one of them.

    Args:
        kill_at: which one; 0 for none.
        hold_at: before which one to wait for the file ``held/go``, having made the directory ``held``.
    """

    def __init__(self, kill_at: int = 0, hold_at: int = 0, held: Path | None = None) -> None:
        self.count = 0
        self._kill_at = kill_at
        self._hold_at = hold_at
        self._held = held
        for owner, name in STEPS:
            self._watch(owner, name)

    def _watch(self, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self._hold_at and self._held is not None:
                self._held.mkdir()
                while not (self._held / "go").exists():
                    time.sleep(0.005)
            if self.count == self._kill_at:
                if name == "pwrite":  # torn: half of it is written
                    original(args[0], args[1][: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, step)


def _run(source: Path, output: Path, log: Path, kill_at: int, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    progress = FileLog(log)
    steps = FileSteps(kill_at)
    try:
        quantize_checkpoint(
            SafetensorsCheckpoint(source),
            output,
            method=options.get("method", "gptq"),
            scheme=Scheme.parse(options.get("scheme", "w4a16-g32")),
            windows=ids(options.get("windows", (16, 24)), seed=options.get("seed", 0)),
            mode=options.get("mode"),
            options=options.get("settings"),
            max_shard_bytes=40_000,
            progress=progress,
        )
    except BaseException:
        progress.log(traceback.format_exc())
        os._exit(1)
    progress.log(f"steps {steps.count}")
