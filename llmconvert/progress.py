"""Progress of long work: a bar with the time left on a terminal, plain lines at a steady pace elsewhere.

Functions that take long accept a :class:`Progress` and open one :class:`Task` per piece of work; the default,
:data:`SILENT`, shows nothing. Libraries never print by themselves.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from llmconvert.printable import printable

__all__ = ["SILENT", "LineProgress", "Progress", "Task", "TerminalProgress", "console_progress"]


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """``amount`` units are done; ``note`` says what came last."""


class Progress(Protocol):
    """Where pieces of work report themselves."""

    def task(self, description: str, total: float) -> AbstractContextManager[Task]:
        """A context manager giving a :class:`Task` of ``total`` units."""

    def log(self, message: str) -> None:
        """One line worth keeping."""


class _SilentTask:
    def advance(self, amount: float = 1, note: str = "") -> None:
        pass


class _Silent:
    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        yield _SilentTask()

    def log(self, message: str) -> None:
        pass


SILENT: Progress = _Silent()


class _BarTask:
    def __init__(self, bars: RichProgress, task_id: TaskID) -> None:
        self._bars = bars
        self._id = task_id

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._bars.update(self._id, advance=amount, note=printable(note))


class TerminalProgress:
    """Rich progress bars on a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        columns = (
            TextColumn("{task.description:<28}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
        )
        with RichProgress(*columns, console=self._console, refresh_per_second=4) as bars:
            yield _BarTask(bars, bars.add_task(printable(description), total=total, note=""))

    def log(self, message: str) -> None:
        self._console.print(printable(message), markup=False, highlight=False)


class _LineTask:
    def __init__(self, stream: TextIO, description: str, total: float, interval: float) -> None:
        self._stream = stream
        self._description = description
        self._total = total
        self._interval = interval
        self._done = 0.0
        self._begin = self._last = time.monotonic()

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._last < self._interval:
            return
        self._last = now
        left = (now - self._begin) / self._done * (self._total - self._done) if self._done else 0.0
        done = f"{self._description}: {100 * self._done / self._total:.0f} %, {left:.0f} s left {printable(note)}"
        print(done.rstrip(), file=self._stream, flush=True)

    def end(self) -> None:
        print(f"{self._description}: {time.monotonic() - self._begin:.1f} s", file=self._stream, flush=True)


class LineProgress:
    """Plain log lines, at most one per task and ``interval`` seconds, and one when the task ends."""

    def __init__(self, stream: TextIO, interval: float = 10.0) -> None:
        self._stream = stream
        self._interval = interval

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        task = _LineTask(self._stream, printable(description), total, self._interval)
        yield task
        task.end()

    def log(self, message: str) -> None:
        print(printable(message), file=self._stream, flush=True)


def console_progress(stream: TextIO | None = None) -> Progress:
    """Bars if ``stream`` (standard error by default) is a terminal, lines otherwise."""
    stream = stream if stream is not None else sys.stderr
    return TerminalProgress(Console(file=stream)) if stream.isatty() else LineProgress(stream)
