"""Where time is counted: on the clock, inner phases apart, once a device has done what was begun."""

from __future__ import annotations

import time
from collections.abc import Iterator

from llmconvert.phases import Phases


def test_time_is_counted_when_what_was_begun_is_done() -> None:
    begun: list[float] = []

    def wait() -> None:
        while begun:
            time.sleep(begun.pop())

    phases = Phases(wait)
    with phases.measure("outer"):
        begun.append(0.05)
        with phases.measure("inner"):
            begun.append(0.1)
    assert 0.05 <= phases.seconds["outer"] < 0.1 <= phases.seconds["inner"]


def test_producing_values_is_a_phase() -> None:
    def slow() -> Iterator[int]:
        time.sleep(0.05)
        yield 1

    phases = Phases()
    with phases.measure("using"):
        for _ in phases.pull("producing", slow()):
            time.sleep(0.01)
    assert phases.seconds["producing"] >= 0.05 > phases.seconds["using"] >= 0.01
