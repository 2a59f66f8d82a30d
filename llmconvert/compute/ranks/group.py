"""Several processes that do one job: who takes what, and what they give each other.

Every process holds a :class:`Ranks`. What one gives to all is bit for bit the same everywhere, and sums are taken in
the order of ranks in float64: for a number of processes there is one result. Of a process that is alone,
:data:`ALONE`, nothing is exchanged and nothing copied.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from llmconvert.compute.ranks.watch import Watch
from llmconvert.errors import MachineError, one_line

__all__ = ["ALONE", "LostRankError", "Ranks"]

# Numbers that are summed at a time; of each, a process holds what all others have.
_AT_ONCE = 1 << 22
# Bytes between tensors that travel together: so far the largest number has to be aligned.
_ALIGNMENT = 16
# A broken collective waits so long to hear what has broken it.
_HEAR_SECONDS = 2.0


class LostRankError(MachineError):
    """Another process is gone."""


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """This process among those that do a job.

    Attributes:
        rank: its number, from 0. The first one alone writes, and talks to whoever runs the job.
        count: how many there are.
        local_rank: its number among those on this machine.
        local_count: how many there are on this machine.

    The backends are torch's, by device. They are no default process group of torch's: libraries that find one take
    themselves for a part of it, and wait for what other processes never call.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    _backends: Mapping[str, Any] = field(default_factory=dict, repr=False)
    _watch: Watch | None = field(default=None, repr=False)

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and talks."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.count == 1

    def share(self, total: int, rank: int | None = None) -> range:
        """Which of ``total`` pieces this process takes, or that of another rank: as many as come next."""
        rank = self.rank if rank is None else rank
        return range(total * rank // self.count, total * (rank + 1) // self.count)

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        """Add up, in place, what all processes have in a contiguous float tensor of one shape.

        Each process sums a part of it in float64, rank after rank, rounds it once and gives it to the others.
        """
        if self.alone:
            return values
        for part in values.view(-1).split(_AT_ONCE):
            width = -(-len(part) // self.count)
            sent = part.new_zeros(self.count * width)
            sent[: len(part)] = part
            received = torch.empty_like(sent)
            backend = self._backends[part.device.type]
            with self._exchanging():
                backend.alltoall_base(received, sent, [], []).wait()
            total = torch.zeros(width, dtype=torch.float64, device=part.device)
            for row in received.view(self.count, width):
                total += row
            with self._exchanging():
                backend.allgather([list(received.view(self.count, width))], [total.to(part.dtype)]).wait()
            part.copy_(received[: len(part)])
        return values

    def sum_number(self, value: int) -> int:
        """The sum of what all processes say."""
        return value if self.alone else sum(self.ask(value))

    def largest(self, value: float) -> float:
        """The largest number that a process says."""
        return value if self.alone else max(self.ask(value))

    def ask(self, value: Any) -> list[Any]:
        """What every process says, by rank: JSON values."""
        if self.alone:
            return [value]
        said = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = torch.empty(self.count, dtype=torch.int64)
        with self._exchanging():
            self._backends["cpu"].allgather([list(lengths.view(-1, 1))], [torch.tensor([len(said)])]).wait()
        width = int(lengths.max())
        padded, rows = said.new_zeros(width), said.new_empty((self.count, width))
        padded[: len(said)] = said
        with self._exchanging():
            self._backends["cpu"].allgather([list(rows)], [padded]).wait()
        return [json.loads(bytes(row[:length].numpy())) for row, length in zip(rows, lengths.tolist(), strict=True)]

    def tell(self, value: Any = None) -> Any:
        """What the first process says: a JSON value."""
        return self.ask(value)[0]

    def wait(self) -> None:
        """Until all processes have come here."""
        self.ask(None)

    def exchange(self, tensors: Sequence[torch.Tensor], device: torch.device) -> list[list[torch.Tensor]]:
        """The tensors that every process gives, by rank; they may be none, and of any dtypes and shapes.

        Args:
            tensors: of this process.
            device: where they are, and come to.
        """
        if self.alone:
            return [list(tensors)]
        kinds = self.ask([[str(one.dtype).removeprefix("torch."), list(one.shape)] for one in tensors])
        found: list[list[torch.Tensor]] = []
        for rank, described in enumerate(kinds):
            places, end = _places(described)
            parcel = torch.empty(end, dtype=torch.uint8, device=device)
            if rank == self.rank:
                for one, (start, stop) in zip(tensors, places, strict=True):
                    parcel[start:stop] = _bytes(one)
            if end:
                with self._exchanging():
                    self._backends[device.type].broadcast(parcel, rank).wait()
            opened = [
                parcel[start:stop].view(getattr(torch, dtype)).view(shape)
                for (dtype, shape), (start, stop) in zip(described, places, strict=True)
            ]
            found.append(list(tensors) if rank == self.rank else opened)
        return found

    @contextmanager
    def _exchanging(self) -> Iterator[None]:
        """Say which process is gone where an exchange breaks.

        Raises:
            LostRankError: one is.
        """
        try:
            yield
        except RuntimeError as error:
            failure = self._watch.wait(_HEAR_SECONDS) if self._watch is not None else None
            if failure is not None:
                raise LostRankError(str(failure.error(self.count))) from error
            raise LostRankError(f"the processes have lost touch: {one_line(error)}; run it again") from error


#: A process that does a job by itself.
ALONE = Ranks()


def _places(described: Sequence[tuple[str, Sequence[int]]]) -> tuple[list[tuple[int, int]], int]:
    """Where tensors lie in the bytes that travel, and where these end."""
    places: list[tuple[int, int]] = []
    end = 0
    for dtype, shape in described:
        nbytes = getattr(torch, dtype).itemsize
        for size in shape:
            nbytes *= size
        places.append((end, end + nbytes))
        end += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    return places, end


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
