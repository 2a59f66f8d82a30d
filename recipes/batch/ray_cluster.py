"""Jobs as tasks of a Ray cluster (https://docs.ray.io): Ray decides where each runs, and runs it again if a node dies.

A task asks for what the job's plan says: memory, a GPU where one is computed on, and ``disk`` where nodes declare such
a resource, in bytes. It runs the job in a process of its own, as the local engine does. All nodes see work directory,
recipes and local models under the same paths; finished stages are there for whichever node continues.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmconvert.errors import CapacityError, LlmconvertError, MachineError, UsageError, one_line
from llmconvert.recipes.batch import process, ray_tasks
from llmconvert.recipes.batch.board import Board
from llmconvert.recipes.batch.jobs import Job
from llmconvert.recipes.batch.local import ended_early
from llmconvert.recipes.batch.outcome import Outcome, from_values
from llmconvert.recipes.batch.ray_tasks import Mailbox, plan_task, run_task

__all__ = ["RayEngine"]

_TICK = 0.25
# Seconds in which a cluster has to take up a connection.
_ANSWER = 10.0
# Seconds in which a worker becomes idle that has waited for a job to be planned.
_IDLE = 2.0
# Stands where a task's job does, for the one that plans.
_PLANNING = -1
# How often a job is run again whose node or process dies.
_RETRIES = 3


@dataclass(frozen=True, slots=True)
class RayEngine:
    """A queue on a cluster.

    Attributes:
        address: ``host:port`` of its head, or ``ray://host:port``; a cluster of this machine alone is started if None.
        at_once: jobs that share a node; each gets that part of the cores of the smallest one.
    """

    address: str | None = None
    at_once: int = 1

    def run(self, jobs: Sequence[Job], board: Board) -> None:
        """Run all jobs; the board has their outcomes afterwards.

        Raises:
            KeyboardInterrupt: this process was asked to stop; tasks are cancelled.
            UsageError: Ray is not installed.
            MachineError: no cluster answers.
        """
        with _connected(self.address) as ray:
            _Driver(ray, jobs, board, self.at_once).run()


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    try:
        import ray
    except ImportError as error:
        raise UsageError('engine ray: Ray is not installed; pip install "llmconvert[ray]"') from error
    if address is not None:
        _require_listening(address)
    # What a run says is on the board and in the logs; usage statistics are nobody's business.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    alone = {} if address is not None else {"include_dashboard": False}
    try:
        ray.init(address=address or "local", **quiet, **alone)
    except (ConnectionError, RuntimeError, OSError, ValueError) as error:
        raise MachineError(
            f"no Ray cluster answers at {address or 'this machine'}: {one_line(error)}; "
            "start one (ray start --head), or name another (--address). One that wants a token (it was started where "
            "~/.ray/auth_token is) is told it with RAY_AUTH_MODE=token: Ray sends it to no address by itself"
        ) from error
    # Sent along instead of imported: what a node's working directory holds may be in the way of this package.
    for module in (ray_tasks, process):
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_listening(address: str) -> None:
    """Refuse an address that nobody listens at, which Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdecimal():
        raise UsageError(f"address: found {address!r}, expected host:port, ray://host:port or auto")
    try:
        with socket.create_connection((host, int(port)), timeout=_ANSWER):
            pass
    except OSError as error:
        raise MachineError(
            f"no Ray cluster answers at {address}: {error.strerror or error}; start one (ray start --head), or name "
            "another (--address)"
        ) from error


class _Driver:
    """A run of the engine, on the machine where it was started."""

    def __init__(self, ray: Any, jobs: Sequence[Job], board: Board, at_once: int) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray, self._jobs, self._board = ray, jobs, board
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._mailbox = ray.remote(num_cpus=0)(Mailbox).options(scheduling_strategy=here).remote()
        alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        self._nodes = list(alive.values())
        cores = [int(node["CPU"]) for node in self._nodes if node.get("CPU")]
        self._cores = max(1, min(cores, default=1) // at_once)
        self._tasks: dict[Any, int] = {}
        self._unplanned: list[int] = []
        # One function for all jobs: its workers keep what it leaves for the next one.
        self._job = ray.remote(run_task)
        computing = [name for name, node in alive.items() if node.get("CPU")]
        places = [NodeAffinitySchedulingStrategy(name, soft=True) for name in computing[: len(jobs)]]
        self._ready = [self._start(None, len(jobs), num_cpus=0, scheduling_strategy=place) for place in places]

    def _start(self, values: dict[str, Any] | None, number: int, **asked: Any) -> Any:
        """A task for a job, or one that only has a process ready for it while jobs are planned."""
        task = self._job.options(max_retries=_RETRIES, **asked)
        ahead = number + 1 < len(self._jobs)
        return task.remote(values, str(Path.cwd()), self._cores, number, self._mailbox, ahead)

    def run(self) -> None:
        for number, job in enumerate(self._jobs):
            if isinstance(job.loaded, LlmconvertError):
                self._board.end(number, [Outcome(job.recipe, None, job.loaded, 0.0)])
                continue
            self._board.open_log(number)
            self._board.begin(number, "planning")
            self._unplanned.append(number)
        self._plan()
        try:
            while self._tasks:
                ready, _ = self._ray.wait(list(self._tasks), timeout=_TICK)
                self._listen()
                for task in ready:
                    self._advance(task, self._tasks.pop(task))
                self._board.show()
        finally:
            for task in self._tasks:
                self._ray.cancel(task, force=True)

    def _plan(self) -> None:
        """Have all jobs planned that are not yet, while others run: in one process, which takes no job's place."""
        if self._unplanned:
            plan = self._ray.remote(num_cpus=0, max_retries=_RETRIES)(plan_task)
            jobs = {number: self._jobs[number].to_values() for number in self._unplanned}
            self._tasks[plan.remote(jobs, str(Path.cwd()), self._mailbox)] = _PLANNING

    def _listen(self) -> None:
        for number, message in self._ray.get(self._mailbox.take.remote()):
            if "planned" in message:
                if number in self._unplanned:  # not so if a node died and its plans are made again
                    self._unplanned.remove(number)
                    self._board.hear(number, message)
                    self._submit(number, message["planned"])
                continue
            if "begun" in message:
                self._board.begin(number, "running")
            self._board.hear(number, message)

    def _advance(self, task: Any, number: int) -> None:
        """Jobs have been planned, or one has ended."""
        try:
            found: dict[str, Any] = self._ray.get(task)
        except (self._ray.exceptions.RayError, LlmconvertError) as error:
            for failed in list(self._unplanned) if number == _PLANNING else [number]:
                self._fail(failed, _reason(error))
            return
        self._listen()
        if number == _PLANNING:
            if found["at"] is not None:
                self._fail(found["at"], ended_early(found["status"], self._board.log_of(found["at"])))
            self._plan()
            return
        job = self._jobs[number]
        if "ends" in found:
            assert not isinstance(job.loaded, LlmconvertError)
            self._board.hear(number, found)
            self._board.end(number, from_values(found["ends"], job.recipe, job.loaded, self._board.log_of(number)))
        else:
            self._fail(number, ended_early(found["status"], self._board.log_of(number)))

    def _submit(self, number: int, planned: Mapping[str, int] | None) -> None:
        """Hand a job to the cluster with what it needs, or refuse one that no node can hold."""
        needs = planned or {}
        memory, disk = needs.get("memory", 0), needs.get("disk", 0)
        asked: dict[str, Any] = {"num_cpus": self._cores, "memory": memory}
        if needs.get("device_memory", 0):
            asked["num_gpus"] = 1
        if any("disk" in node for node in self._nodes):
            asked["resources"] = {"disk": disk}
        if not any(_holds(node, asked) for node in self._nodes):
            largest = max((int(node.get("memory", 0)) for node in self._nodes), default=0)
            self._fail(
                number,
                CapacityError(
                    f"no node of the cluster can hold this job: it needs {memory / 1e6:,.0f} MB of memory, "
                    f"{disk / 1e6:,.0f} MB of disk and {asked.get('num_gpus', 0)} GPUs; the largest declares "
                    f"{largest / 1e6:,.0f} MB of memory"
                ),
            )
            return
        # The first job is for a worker that has become idle now, and not for another one that Ray starts meanwhile.
        if self._ready:
            self._ray.wait(self._ready, num_returns=len(self._ready), timeout=_IDLE)
            self._ready = []
        self._tasks[self._start(self._jobs[number].to_values(needs=needs), number, **asked)] = number

    def _fail(self, number: int, failure: Exception) -> None:
        if number in self._unplanned:
            self._unplanned.remove(number)
        recipe, log = self._jobs[number].recipe, self._board.log_of(number)
        self._board.end(number, [Outcome(recipe, None, failure, self._board.seconds(number), log=log)])


def _holds(node: Mapping[str, float], asked: Mapping[str, Any]) -> bool:
    wanted = {"CPU": asked["num_cpus"], "memory": asked["memory"], "GPU": asked.get("num_gpus", 0)}
    wanted |= asked.get("resources", {})
    return all(node.get(name, 0) >= amount for name, amount in wanted.items())


def _reason(error: Exception) -> Exception:
    cause = getattr(error, "cause", None)
    if isinstance(cause, LlmconvertError):
        return cause
    return MachineError(f"the cluster could not finish this job: {one_line(error)}; the same command continues")
