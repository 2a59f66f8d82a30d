"""Profile of a job: seconds by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["LOADING_KERNELS", "Phases"]

T = TypeVar("T")

#: The phase in which kernels are loaded, and compiled if they never were on this machine.
LOADING_KERNELS = "loading kernels"


class Phases:
    """Seconds by phase name, on the wall clock. Phases nest: an inner one's time is not counted to the outer.

    Args:
        wait: called before the clock is read, until what was begun is done; for devices that work on their own.
    """

    def __init__(self, wait: Callable[[], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._wait = wait
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count the time of a block of code to a phase."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def pull(self, name: str, values: Iterable[T]) -> Iterator[T]:
        """Pass an iterable on, and count the time it takes to produce its values to a phase."""
        iterator = iter(values)
        while True:
            with self.measure(name):
                try:
                    value = next(iterator)
                except StopIteration:
                    return
            yield value

    def _charge(self) -> None:
        if self._wait is not None:
            self._wait()
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now
