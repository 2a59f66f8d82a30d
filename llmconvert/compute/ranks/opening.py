"""Beginning and ending of several processes that do one job."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from llmconvert.compute.ranks.group import LostRankError, Ranks
from llmconvert.compute.ranks.launch import Launch
from llmconvert.compute.ranks.watch import Failure, Watch, invite
from llmconvert.errors import LlmconvertError, MachineError, RunInterruptedError, one_line
from llmconvert.interrupt import interruptible

__all__ = ["opened"]

_MEET = timedelta(minutes=10)
# One process may build for hours what the others wait for; that one is gone is for the watch to tell.
_PATIENCE = timedelta(days=1000)
# What torchrun sends to those that are left comes a moment before or after what the watch sees.
_HEAR_SECONDS = 1.0


@contextmanager
def opened(launch: Launch) -> Iterator[Ranks]:
    """Meet the other processes, and end with them.

    The first one says why all of them end; if it is gone itself, the second. Others end with the same exit code.

    Raises:
        MachineError: they don't meet.
        LlmconvertError: what the block raises; in the first process also what ended another.
        SystemExit: in other processes, instead.
    """
    with interruptible():
        ranks, watch = _meet(launch)
    Launch.forget(os.environ)
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if ranks.leads else nowhere):
        try:
            with interruptible():
                yield ranks
        except BaseException as error:
            watch.ending()
            if getattr(error, "exit_code", None) == 0:  # help was asked for
                watch.tell(None)
                raise
            _part(launch, watch, error)
        watch.ending()
        watch.tell(None)


def _meet(launch: Launch) -> tuple[Ranks, Watch]:
    try:
        store, rank, count = next(rendezvous("env://", timeout=_MEET))
        store = PrefixStore("llmconvert", store)
        store.set(f"here {rank}", "")
        store.wait([f"here {other}" for other in range(count)], _MEET)
        backends: dict[str, Any] = {"cpu": dist.ProcessGroupGloo(store, rank, count, _PATIENCE)}
        if torch.cuda.is_available() and dist.is_nccl_available():
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = _PATIENCE
            backends["cuda"] = dist.ProcessGroupNCCL(PrefixStore("nccl", store), rank, count, options)
    except RuntimeError as error:
        raise MachineError(
            f"{launch.count} processes did not meet at {launch.host}:{launch.port}: {one_line(error)}"
        ) from error
    where = launch.rank, launch.count, launch.local_rank, launch.local_count
    unwatched = Ranks(*where, backends)

    def last_words(failure: Failure) -> None:
        if launch.rank == 0 or (launch.rank == 1 and failure.rank == 0 and not failure.kind):
            sys.stderr.write(f"error: {failure.error(launch.count)}\n")

    def pass_on(value: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = unwatched.tell(value)
        return found

    watch = invite(launch, pass_on, last_words)
    return Ranks(*where, backends, watch), watch


def _part(launch: Launch, watch: Watch, error: BaseException) -> None:
    """End because of an error, whose own or another process's it is."""
    stopped = isinstance(error, RunInterruptedError | KeyboardInterrupt | LostRankError)
    failure = watch.wait(_HEAR_SECONDS) if stopped else None
    if failure is not None and failure.kind != RunInterruptedError.__name__:
        if launch.rank == 0 or (launch.rank == 1 and failure.rank == 0 and not failure.kind):
            raise failure.error(launch.count) from None
        raise SystemExit(failure.code) from None
    code = int(getattr(error, "exit_code", 1))
    text = str(error) if isinstance(error, LlmconvertError) else f"failed by a bug, {one_line(error)}"
    watch.tell(Failure(launch.rank, type(error).__name__, code, text))
    if launch.rank and hasattr(error, "exit_code"):
        raise SystemExit(code) from None
    raise error
