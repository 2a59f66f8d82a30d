"""``llmconvert batch``: recipes on an engine of one's choice, all read before the first one starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from llmconvert.errors import UsageError
from llmconvert.interrupt import interruptible
from llmconvert.progress import SILENT, Progress
from llmconvert.recipes.batch.board import Board
from llmconvert.recipes.batch.in_turn import run_in_turn
from llmconvert.recipes.batch.jobs import Job, Settings, read_jobs
from llmconvert.recipes.batch.local import LocalEngine
from llmconvert.recipes.batch.outcome import Outcome

__all__ = ["Engine", "run_batch"]

#: ``here``: one after the other in this process. ``local``: each in a process of its own, as memory and disk allow.
#: ``ray``: as tasks of a Ray cluster.
Engine = Literal["here", "local", "ray"]


def run_batch(
    recipes: Sequence[str],
    *,
    overrides: Sequence[str] = (),
    work_dir: Path | str | None = None,
    fresh: bool = False,
    publish: bool = True,
    progress: Progress = SILENT,
    engine: Engine = "here",
    at_once: int = 1,
    memory: int | None = None,
    address: str | None = None,
    logs: Path | str | None = None,
) -> list[Outcome]:
    """Run recipes; all are read before the first one starts, and one that fails neither stops nor blocks the others.

    Example::

        outcomes = llmconvert.run_batch(["a.yaml", "b.yaml"], engine="local", at_once=2)
        assert all(outcome.failure is None for outcome in outcomes)

    Args:
        recipes: files or names of shipped recipes.
        overrides: ``"a.b=value"`` for every recipe.
        work_dir: for all of them; each recipe's own by default.
        fresh: forget what earlier runs of these recipes did. What one recipe of the batch builds serves the others.
        publish: false leaves artifacts in the work directory.
        engine: see :data:`Engine`. A process of its own keeps what happens to one job, running out of memory included,
            from the others.
        at_once: jobs that run together, at most, on engine ``local``; whether they do is for their plans to say, by
            memory and disk. The processor's cores are shared out among them, and another number of threads rounds in
            another order: artifacts are the same bytes only for the same number.
        memory: bytes for all that run together; what is free by default.
        address: of the cluster, for engine ``ray``; one is started here by default.
        logs: where engines other than ``here`` keep a log for each job and ``summary.json``; the folder ``batch`` in
            the work directory by default.

    Raises:
        UsageError: two recipes would be published to one place; nothing was started.
        RunInterruptedError: the process was asked to stop. The same call continues; finished recipes are reused.
        MachineError: the cluster cannot be reached.
    """
    if engine not in ("here", "local", "ray"):
        raise UsageError(f"engine: found {engine!r}, expected here, local or ray")
    if at_once < 1:
        raise UsageError(f"at_once: found {at_once}, expected 1 or more")
    settings = Settings(tuple(overrides), None if work_dir is None else Path(work_dir), fresh, publish)
    jobs = read_jobs(recipes, settings)
    if engine == "here":
        return run_in_turn(jobs, progress)
    with interruptible(), Board(jobs, _logs(logs, jobs), progress) as board:
        if engine == "local":
            LocalEngine(at_once, memory).run(jobs, board)
        else:
            from llmconvert.recipes.batch.ray_cluster import RayEngine

            RayEngine(address, at_once).run(jobs, board)
    return board.outcomes


def _logs(asked: Path | str | None, jobs: Sequence[Job]) -> Path:
    if asked is not None:
        return Path(asked).absolute()
    return jobs[0].work_dir / "batch" if jobs else Path("work", "batch").absolute()
