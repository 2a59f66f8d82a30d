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
from rich.progress import BarColumn, ProgressColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.progress import Task as RichTask
from rich.table import Column
from rich.text import Text

from llmconvert.printable import printable

__all__ = ["SILENT", "Bytes", "LineProgress", "Progress", "Task", "TerminalProgress", "console_progress"]


class Bytes(int):
    """A total that counts bytes, which are shown in units."""


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


class _DoneColumn(ProgressColumn):
    """``12/30``; of bytes ``1.2/3.4 GB``."""

    def render(self, task: RichTask) -> Text:
        total = task.total or 0
        return Text(_of_bytes(task.completed, total) if task.fields["bytes"] else f"{task.completed:.0f}/{total:.0f}")


def _of_bytes(done: float, total: float) -> str:
    scale, unit = next((step for step in _UNITS if total >= step[0]), _UNITS[-1])
    return f"{done / scale:.1f}/{total / scale:.1f} {unit}"


_UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "B"))
# Columns of a terminal: what is said of a piece of work, and its bar, on 80 of them and on more.
_NARROW = 100
_DESCRIPTION, _BAR, _WIDE_BAR = 24, 16, 30


class TerminalProgress:
    """Rich progress bars on a terminal: bar, count and time always, the rest as far as there is room.

    ``console`` is for those who show more than bars there.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        bar = _BAR if self.console.width < _NARROW else _WIDE_BAR
        described = Column(width=_DESCRIPTION, no_wrap=True, overflow="ellipsis")
        columns = (
            TextColumn("{task.description}", markup=False, table_column=described),
            BarColumn(bar_width=bar, table_column=Column(width=bar)),
            _DoneColumn(table_column=Column(no_wrap=True, min_width=5)),
            TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5)),
            TextColumn(
                "{task.fields[note]}",
                style="dim",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
        )
        with RichProgress(*columns, console=self.console, refresh_per_second=4, expand=True) as bars:
            counted = isinstance(total, Bytes)
            yield _BarTask(bars, bars.add_task(printable(description), total=total, note="", bytes=counted))

    def log(self, message: str) -> None:
        self.console.print(printable(message), markup=False, highlight=False)


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
