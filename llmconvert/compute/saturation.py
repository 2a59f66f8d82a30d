"""What a fixed scale cuts off of a linear's inputs: counted while text passes, and added up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Protocol

from llmconvert.compute.ranks.group import ALONE, Ranks

__all__ = ["Counter", "Saturation", "all_saturation", "uncounted"]


@dataclass(frozen=True, slots=True)
class Saturation:
    """What a linear with a fixed scale was given, and how much of it lies beyond.

    Attributes:
        name: of the linear.
        inputs: numbers that came in.
        beyond: those of a magnitude that the scale cuts off (:attr:`InputKind.limit`).
        largest: magnitude of all.
        limit: up to which none is cut off.
    """

    name: str
    inputs: int
    beyond: int
    largest: float
    limit: float

    @property
    def share(self) -> float:
        """Of the inputs, those cut off."""
        return self.beyond / self.inputs if self.inputs else 0.0

    @property
    def excess(self) -> float:
        """The largest magnitude by the limit; above 1 something was cut off."""
        return self.largest / self.limit

    def joined(self, other: Saturation) -> Saturation:
        """With what came to the same linear elsewhere."""
        largest = max(self.largest, other.largest)
        return replace(self, inputs=self.inputs + other.inputs, beyond=self.beyond + other.beyond, largest=largest)


class Counter(Protocol):
    """What counts the inputs of a linear: :class:`~llmconvert.compute.activations.InputQuantizer`."""

    counting: bool

    def saturation(self, name: str) -> Saturation | None:
        """What has come in so far; None where no scale is fixed, or nothing came."""


def all_saturation(counters: Mapping[str, Counter], ranks: Ranks = ALONE) -> tuple[Saturation, ...]:
    """What has come to linears so far, in their order; those of fixed scales that were given something.

    Args:
        counters: by the names of the linears.
        ranks: the processes, each of which has met a part of the inputs; all of them have to ask.
    """
    own = [found for name, one in counters.items() if (found := one.saturation(name)) is not None]
    if ranks.alone:
        return tuple(own)
    joined: dict[str, Saturation] = {}
    for values in (values for said in ranks.ask([astuple(one) for one in own]) for values in said):
        found = Saturation(*values)
        joined[found.name] = joined[found.name].joined(found) if found.name in joined else found
    return tuple(joined.values())


@contextmanager
def uncounted(counters: Iterable[Counter]) -> Iterator[None]:
    """What comes in here is not what a served model meets, and is not counted."""
    quiet = [one for one in counters if one.counting]
    for one in quiet:
        one.counting = False
    try:
        yield
    finally:
        for one in quiet:
            one.counting = True
