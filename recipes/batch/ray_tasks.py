"""What runs on the nodes of a Ray cluster: a job's process, and its conversation with whoever started the batch.

Nothing here computes, so that Ray's own processes start at once and stay small.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any

from llmconvert.recipes.batch.process import worker_command

__all__ = ["Mailbox", "converse", "get_aside", "plan_task", "run_task", "start_process"]

_SEND_EVERY = 0.5
_LOOK_EVERY = 0.1
# Seconds that a job's process has to stop.
_GRACE = 60.0
# Processes of this worker of Ray's that have loaded what jobs need, and wait for one; they end when it does.
_WAITING: list[subprocess.Popen[str]] = []


@dataclass(slots=True)
class Mailbox:
    """An actor beside the driver: jobs leave their messages, and are told what others have built."""

    messages: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    planned: bool = False

    def tell(self, number: int, messages: Sequence[dict[str, Any]]) -> None:
        """Messages of a job, in order."""
        self.messages += [(number, message) for message in messages]
        for message in messages:
            self.keys |= set(message.get("built", ()))
            self.planned |= "planned" in message

    def take(self) -> list[tuple[int, dict[str, Any]]]:
        """All that came since the last time."""
        found, self.messages = self.messages, []
        return found

    def built(self) -> list[str]:
        """Keys of the stages that jobs of this batch have built."""
        return sorted(self.keys)

    def begins(self) -> bool:
        """Whether a job has been planned, and so runs next."""
        return self.planned


def plan_task(jobs: Mapping[int, dict[str, Any]], directory: str, mailbox: Any) -> dict[str, Any]:
    """On a node: tell the driver what each of some jobs needs there, in one process, one job after the other.

    Returns:
        The status that the process ended with, and the job that it was at if it ended before all were planned.
    """
    import ray

    left = list(jobs)
    told: list[Any] = []

    def hear(message: dict[str, Any]) -> bool:
        if left and message.keys() & {"planned", "log"}:
            told.append(mailbox.tell.remote(left.pop(0) if "planned" in message else left[0], [message]))
        return bool(left)

    status = converse(start_process(directory, 1), jobs[left[0]], hear, go=lambda: jobs[left[0]])
    ray.get(told)  # what was told is there before the result is
    return {"status": status, "at": left[0] if left else None}


def run_task(
    values: dict[str, Any] | None, directory: str, cores: int, number: int, mailbox: Any, ahead: bool
) -> dict[str, Any]:
    """On a node: run a job. Gives its last message, or the status that its process ended with.

    Args:
        values: the job; None to have no more than a process ready when the first one has been planned.
        ahead: start the process of the next job while this one runs, so that it has loaded what it needs by then. It is
            there for a job that Ray gives to the same worker next, as Ray does unless that was idle for a second.
    """
    import ray

    process = _WAITING.pop() if _WAITING else start_process(directory, cores)
    if values is None:
        _WAITING.append(process)
        while not ray.get(mailbox.begins.remote()):
            time.sleep(_LOOK_EVERY)
        return {}
    if process.poll() is not None:  # by whatever killed it
        process = start_process(directory, cores)

    outbox: list[dict[str, Any]] = [{"begun": True}]
    sent = 0.0
    last: dict[str, Any] = {}

    def hear(message: dict[str, Any]) -> bool:
        nonlocal outbox, sent, last
        if "planned" not in message:
            outbox.append({key: value for key, value in message.items() if key != "ends"})
        if "ends" in message:
            last = message
        if time.monotonic() - sent >= _SEND_EVERY or last:
            mailbox.tell.remote(number, outbox)
            outbox, sent = [], time.monotonic()
        return True

    def go() -> dict[str, Any]:
        if ahead and not _WAITING:
            _WAITING.append(start_process(directory, cores))
        return {"built": get_aside(mailbox.built.remote())}

    status = converse(process, values, hear, go=go)
    # What was told is there before the result is.
    ray.get(mailbox.tell.remote(number, outbox))
    return last or {"status": status}


def get_aside(reference: Any) -> Any:
    """What a reference of Ray's stands for, without giving up the cores of the task that asks.

    Ray lends those to the next task while one waits in its main thread, and lets both go on together afterwards.
    """
    import ray

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(ray.get, reference).result()


def start_process(directory: str, cores: int) -> subprocess.Popen[str]:
    """A process that waits for a job; it ends when its standard input does.

    Args:
        directory: to run in; local paths of recipes are relative to it.
        cores: threads to compute with.
    """
    return subprocess.Popen(
        worker_command(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": str(cores), "GOMP_SPINCOUNT": "10000"},
    )


def converse(
    process: subprocess.Popen[str],
    values: Mapping[str, Any],
    hear: Callable[[dict[str, Any]], bool],
    *,
    go: Callable[[], dict[str, Any]],
) -> int:
    """Give a process its job and pass on what it tells, and what it writes to its standard error as log lines.

    Args:
        process: see :func:`start_process`.
        values: the job.
        hear: takes each message; the process is stopped when it gives False.
        go: what to let the job in with, or another job to plan, asked for when it has planned.

    Returns:
        the process's exit status.
    """
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    try:
        lock = threading.Lock()
        threading.Thread(target=_forward, args=(process.stderr, hear, lock), daemon=True).start()
        _write(process.stdin, values)
        for line in process.stdout:
            message = json.loads(line)
            with lock:
                goes_on = hear(message)
            if not goes_on:
                break
            if "planned" in message:
                _write(process.stdin, go())
    finally:
        # Its standard input ends: it stops in order.
        with contextlib.suppress(OSError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
        process.kill()
    return process.wait()


def _forward(stream: IO[str], hear: Callable[[dict[str, Any]], bool], lock: threading.Lock) -> None:
    for line in stream:
        with lock:
            hear({"log": line.rstrip("\n")})


def _write(stream: IO[str], message: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it has ended, which its output tells
        stream.write(json.dumps(message) + "\n")
        stream.flush()
