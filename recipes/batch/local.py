"""Jobs as processes of this machine: each starts when its turn comes and memory and disk take it beside the others.

A job plans before it runs, and the plan says what it needs. Jobs start in order: one that has to wait for room is not
overtaken, so each has its turn. The next one plans while others run. A process that ends in any way ends its job alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from llmconvert.errors import CapacityError, LlmconvertError, MachineError
from llmconvert.memory import available_nbytes
from llmconvert.recipes.batch.board import Board
from llmconvert.recipes.batch.jobs import Job
from llmconvert.recipes.batch.outcome import Outcome, from_values
from llmconvert.recipes.batch.process import worker_command, worker_environment

__all__ = ["LocalEngine", "ended_early"]

_TICK = 0.25
# Seconds that a process has to come to a stop when it is asked to.
_GRACE = 60.0
# Of what is free when the batch starts.
_USABLE = 0.9


@dataclass(slots=True)
class _Process:
    """A job's process, its log open."""

    number: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    rest: bytes = b""


@dataclass(frozen=True, slots=True)
class LocalEngine:
    """A queue on this machine.

    Attributes:
        at_once: jobs that run together, at most.
        memory: bytes that they may use together; what is free, but for a tenth, if None.
    """

    at_once: int = 1
    memory: int | None = None

    def run(self, jobs: Sequence[Job], board: Board) -> None:
        """Run all jobs; the board has their outcomes afterwards.

        Raises:
            KeyboardInterrupt: this process was asked to stop; every job's process has stopped.
        """
        usable = self.memory or int(_USABLE * available_nbytes(torch.device("cpu")))
        with contextlib.closing(_Queue(jobs, board, self.at_once, usable)) as queue:
            queue.run()


class _Queue:
    """A run of the engine: which jobs wait, plan and run."""

    def __init__(self, jobs: Sequence[Job], board: Board, at_once: int, memory: int) -> None:
        self._jobs, self._board, self._memory = jobs, board, memory
        self._at_once = at_once
        self._waiting = list(range(len(jobs)))
        self._processes: dict[int, _Process] = {}
        self._selector = selectors.DefaultSelector()
        self._built: set[str] = set()

    def run(self) -> None:
        while self._waiting or self._processes:
            self._start_next()
            self._let_in()
            for key, _ in self._selector.select(_TICK):
                self._hear(key.data)
            self._board.show()

    def close(self) -> None:
        """Ask what still runs to stop, and wait for it."""
        running = list(self._processes.values())
        for one in running:
            one.process.terminate()
        deadline = time.monotonic() + _GRACE
        for one in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(max(0.1, deadline - time.monotonic()))
            one.process.kill()
            one.process.wait()
            _close(one)
        self._selector.close()

    def _states(self, *names: str) -> list[int]:
        return [number for number in self._processes if self._board.states[number].state in names]

    def _start_next(self) -> None:
        """Let the next job plan, while others run."""
        while self._waiting and not self._states("planning", "ready"):
            number = self._waiting.pop(0)
            job = self._jobs[number]
            if isinstance(job.loaded, LlmconvertError):
                self._board.end(number, [Outcome(job.recipe, None, job.loaded, 0.0)])
                continue
            limited = any(recipe.memory is not None for recipe in job.recipes)
            share = self._memory // self._at_once if self._at_once > 1 and not limited else None
            log = self._board.open_log(number)
            process = subprocess.Popen(
                worker_command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=worker_environment(self._at_once),
                start_new_session=True,  # Ctrl-C is for this process, which stops the others in order
            )
            one = self._processes[number] = _Process(number, process, log)
            assert process.stdout is not None
            self._selector.register(process.stdout, selectors.EVENT_READ, one)
            self._board.begin(number, "planning")
            _tell(one, job.to_values(memory=share))

    def _let_in(self) -> None:
        for number in self._states("ready"):
            state = self._board.states[number]
            running = self._states("running")
            if len(running) >= self._at_once or not self._has_room(number, running):
                continue
            needed = (state.needs or {}).get("memory", 0)
            if needed > self._memory:
                size = f"{needed / 1e6:,.0f} MB of memory, the batch may use {self._memory / 1e6:,.0f} MB"
                self._end(number, CapacityError(f"needs {size}; allow more (--memory), or run it elsewhere"))
                continue
            self._board.begin(number, "running")
            _tell(self._processes[number], {"built": sorted(self._built)})

    def _has_room(self, number: int, running: Sequence[int]) -> bool:
        """Whether memory and disk take a job beside those that run; alone, it has what there is."""
        if not running:
            return True
        needs = [self._board.states[one].needs for one in (number, *running)]
        if any(one is None for one in needs):
            return False  # what isn't known runs alone
        known = [one for one in needs if one is not None]
        if sum(one.get("device_memory", 0) > 0 for one in known) > 1:
            return False  # an accelerator is for one job at a time
        if sum(one.get("memory", 0) for one in known) > self._memory:
            return False
        return sum(one.get("disk", 0) for one in known) <= _free_disk(self._jobs[number].work_dir)

    def _hear(self, one: _Process) -> None:
        assert one.process.stdout is not None
        chunk = os.read(one.process.stdout.fileno(), 1 << 16)
        *lines, one.rest = (one.rest + chunk).split(b"\n")
        for line in lines:
            self._board.hear(one.number, json.loads(line))
        if not chunk:
            self._end(one.number)

    def _end(self, number: int, refused: LlmconvertError | None = None) -> None:
        """A process has ended, or will since it isn't let in."""
        one = self._processes.pop(number)
        job, state = self._jobs[number], self._board.states[number]
        assert one.process.stdout is not None and not isinstance(job.loaded, LlmconvertError)
        self._selector.unregister(one.process.stdout)
        if refused is not None:
            one.process.kill()
        status = one.process.wait()
        _close(one)
        self._built |= set(state.built)
        if state.ends is not None:
            ended = from_values(state.ends, job.recipe, job.loaded, self._board.log_of(number))
        else:
            said = refused or ended_early(status, self._board.log_of(number))
            ended = [Outcome(job.recipe, None, said, self._board.seconds(number), log=self._board.log_of(number))]
        self._board.end(number, ended)


def ended_early(status: int, log: Path | None) -> MachineError:
    """Why a process gave no result."""
    how = f"was killed by signal {-status}" if status < 0 else f"ended with {status}"
    where = f"; its log is {log}" if log is not None else ""
    return MachineError(
        f"the process of this job {how} before it was done, as the system does when memory is out; what it finished "
        f"is kept, and the same command continues{where}"
    )


def _free_disk(place: Path) -> int:
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _tell(one: _Process, message: dict[str, Any]) -> None:
    assert one.process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended, which its output tells
        one.process.stdin.write(json.dumps(message).encode() + b"\n")
        one.process.stdin.flush()


def _close(one: _Process) -> None:
    for stream in (one.process.stdin, one.process.stdout, one.log):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
