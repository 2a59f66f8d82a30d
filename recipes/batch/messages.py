"""What a job's process tells whoever started it: JSON values, one to a line, and what they come to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from llmconvert.progress import Task

__all__ = ["JobState", "Sender"]

_INTERVAL = 0.5


class Sender:
    """Progress that is told to another process. Lines of a message are whole, whatever thread writes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def send(self, **message: Any) -> None:
        """One message. Where nobody listens any more, it is lost."""
        line = json.dumps(message) + "\n"
        with self._lock:
            try:
                self._stream.write(line)
                self._stream.flush()
            except (BrokenPipeError, ValueError):
                pass

    def log(self, message: str) -> None:
        """One line worth keeping."""
        self.send(log=message)

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        """A piece of work of ``total`` units."""
        self.send(task=description, total=float(total))
        yield _SentTask(self)
        self.send(ended=description)


class _SentTask:
    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._done = 0.0
        self._last = 0.0

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._last >= _INTERVAL:
            self._last = now
            self._sender.send(done=self._done)


@dataclass(slots=True)
class JobState:
    """How far a job has come, from its messages.

    Attributes:
        state: ``waiting``, ``planning``, ``ready``, ``running``, ``done`` or ``failed``.
        step: the piece of work under way; empty between two.
        done, total: of its units.
        memory: resident bytes of the process when it last said so.
        needs: what the job needs by its plan; None before, and where nothing is known before it runs.
        ends: its result, as :func:`~llmconvert.recipes.batch.outcome.to_values` gives it.
        built: keys of the stages that it has built.
    """

    state: str = "waiting"
    step: str = ""
    done: float = 0.0
    total: float = 0.0
    memory: int = 0
    needs: dict[str, int] | None = None
    ends: dict[str, Any] | None = None
    built: tuple[str, ...] = ()
    _began: float = field(default_factory=time.monotonic)

    def hear(self, message: Mapping[str, Any]) -> str | None:
        """Take in a message; gives the line to keep, if it holds one."""
        if "task" in message:
            self.step, self.total, self.done = message["task"], message["total"], 0.0
            self._began = time.monotonic()
        elif "done" in message:
            self.done = message["done"]
        elif "ended" in message:
            self.step = ""
        elif "memory" in message:
            self.memory = message["memory"]
        elif "planned" in message:
            self.state, self.needs = "ready", message["planned"]
        elif "ends" in message:
            self.ends, self.built, self.step = message["ends"], tuple(message["built"]), ""
        return message.get("log")

    @property
    def share(self) -> float | None:
        """Of the piece of work under way; None if none is."""
        return min(1.0, self.done / self.total) if self.step and self.total else None

    @property
    def seconds_left(self) -> float | None:
        """Of the piece of work under way, if it goes on as it did."""
        share = self.share
        return (time.monotonic() - self._began) * (1 - share) / share if share else None
