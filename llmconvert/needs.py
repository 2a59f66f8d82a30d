"""What a job needs of a machine, known before it starts: memory, memory of its device, disk, download, time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

__all__ = ["Needs", "Plan"]

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a job needs, on top of what is there when it starts.

    Attributes:
        memory: peak resident bytes of the process, at most.
        device_memory: peak bytes on an accelerator, at most.
        disk: bytes of its output and, at the worst moment, of what it keeps beside it while it works.
        download: bytes it fetches.
        seconds: wall-clock time; None where nobody has measured it.
        passing: bytes of ``disk`` that are free again when it is done.
    """

    memory: int = 0
    device_memory: int = 0
    disk: int = 0
    download: int = 0
    seconds: float | None = None
    passing: int = 0

    @property
    def left(self) -> int:
        """Bytes of disk that stay taken."""
        return self.disk - self.passing

    def on(self, device: torch.device) -> int:
        """Peak bytes where a device has them: of the process on a CPU, else of the accelerator."""
        return self.memory if device.type == "cpu" else self.device_memory

    def __add__(self, other: Needs) -> Needs:
        """Of two jobs at the same time: everything adds up, but for the time, which is the longer one's."""
        return Needs(
            self.memory + other.memory,
            self.device_memory + other.device_memory,
            self.disk + other.disk,
            self.download + other.download,
            None if self.seconds is None or other.seconds is None else max(self.seconds, other.seconds),
            self.passing + other.passing,
        )

    def then(self, other: Needs) -> Needs:
        """Of two jobs one after the other: what the first one leaves stays, memory is given back."""
        disk = max(self.disk, self.left + other.disk)
        return Needs(
            max(self.memory, other.memory),
            max(self.device_memory, other.device_memory),
            disk,
            self.download + other.download,
            None if self.seconds is None or other.seconds is None else self.seconds + other.seconds,
            disk - self.left - other.left,
        )

    def __str__(self) -> str:
        """``1,234 MB of memory, 250 MB of disk``; ``nothing`` if that is all."""
        return ", ".join(self._parts()) or "nothing"

    def _parts(self) -> Iterator[str]:
        named = (
            (self.memory, "of memory"),
            (self.device_memory, "of device memory"),
            (self.disk, "of disk"),
            (self.download, "to download"),
        )
        yield from (f"{size / 1e6:,.0f} MB {what}" for size, what in named if size)
        if self.seconds is not None:
            yield f"about {self.seconds:,.0f} s"


class Plan(Protocol[T_co]):
    """A job that was settled from headers alone: everything that can be refused was refused while it was planned."""

    @property
    def needs(self) -> Needs:
        """What running it takes."""

    def run(self) -> T_co:
        """Do it. What an interrupted run of the same plan left is continued where the job can."""
