"""How processes of one job were started: what torchrun, or whoever does as it does, says in the environment."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from llmconvert.errors import UsageError

__all__ = ["Launch"]

_OWN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOCAL = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True, slots=True)
class Launch:
    """One of several processes that do one job.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
        local_rank: its number among those on this machine.
        local_count: how many there are on this machine.
        host, port: where the first one is met.
    """

    rank: int
    count: int
    local_rank: int
    local_count: int
    host: str
    port: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Launch | None:
        """What an environment says; None of a process that is alone.

        Raises:
            UsageError: it contradicts itself.
        """
        if any(not environment.get(name) for name in _OWN):
            return None
        numbers = {name: _number(name, environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
        rank, count = numbers["RANK"], numbers["WORLD_SIZE"]
        # Who sets these by hand and leaves them out has all processes on one machine.
        local_rank, local_count = (
            _number(name, environment[name]) if environment.get(name) else default
            for name, default in zip(_LOCAL, (rank, count), strict=True)
        )
        if not 0 <= rank < count or not 0 <= local_rank < local_count <= count:
            raise UsageError(
                f"RANK={rank} of WORLD_SIZE={count} and LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE={local_count} "
                "contradict each other; start processes with torchrun"
            )
        if count == 1:
            return None
        return cls(rank, count, local_rank, local_count, environment["MASTER_ADDR"], numbers["MASTER_PORT"])

    @staticmethod
    def forget(environment: MutableMapping[str, str]) -> None:
        """Let programs that this one starts not take themselves for one of the processes."""
        for name in [name for name in environment if name in (*_OWN, *_LOCAL) or name.startswith(_FAMILIES)]:
            del environment[name]


_FAMILIES = ("TORCHELASTIC_", "GROUP_", "ROLE_")


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"{name}={text!r} is no number; start processes with torchrun")
    return int(text)
