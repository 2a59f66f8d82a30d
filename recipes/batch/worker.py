"""The process of one job: it plans, waits to be let in, runs, and tells how far it is.

Its standard input holds the job in the first line; the second lets it run, or is another job to plan. When the input
ends, whoever started it is gone, and it stops as if asked to: what it has finished stays. Messages go to standard
output (:mod:`llmconvert.recipes.batch.messages`), everything else to standard error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from llmconvert.errors import LlmconvertError, RunInterruptedError
from llmconvert.memory import resident_nbytes
from llmconvert.recipes.batch.in_turn import run_job
from llmconvert.recipes.batch.jobs import Job, Settings, load_job
from llmconvert.recipes.batch.messages import Sender
from llmconvert.recipes.batch.outcome import to_values
from llmconvert.recipes.planning.headers import UnknownWeightsError
from llmconvert.recipes.planning.planner import plan_run
from llmconvert.recipes.planning.shared import SharedWork
from llmconvert.storage.stages import StageStore

__all__ = ["main", "needs_of"]

_HEARTBEAT = 1.0


def main() -> int:
    """Run the job that the standard input describes; gives the exit status."""
    sender = Sender(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    first = sys.stdin.readline()
    if not first:
        return RunInterruptedError.exit_code
    told: dict[str, Any] = json.loads(first)
    threading.Thread(target=_beat, args=(sender,), daemon=True).start()
    with SharedWork() as shared:
        while "recipe" in told:
            job = _job(told)
            sender.send(planned=needs_of(job, shared) if told.get("needs") is None else told["needs"])
            line = sys.stdin.readline()
            if not line:
                return RunInterruptedError.exit_code
            told = json.loads(line)
    del shared  # and with it the models that plans were made on
    threading.Thread(target=_watch, args=(sys.stdin,), daemon=True).start()
    try:
        ended, built = _run(job, sender, set(told["built"]))
    except RunInterruptedError as error:
        sender.log(str(error))
        return error.exit_code
    sender.send(ends=ended, built=built)
    return 0


def _job(values: Mapping[str, Any]) -> Job:
    """What :meth:`llmconvert.recipes.batch.jobs.Job.to_values` has put into words."""
    overrides, work_dir = tuple(values["overrides"]), Path(values["work_dir"])
    if values["memory"] is not None:
        overrides += (f"memory={values['memory']}",)
    return load_job(values["recipe"], Settings(overrides, work_dir, values["fresh"], values["publish"]))


def _run(job: Job, sender: Sender, built: set[str]) -> tuple[dict[str, Any], list[str]]:
    if isinstance(job.loaded, LlmconvertError):
        return to_values(run_job(job, None, sender)), []
    with StageStore(job.work_dir, progress=sender) as store:
        store.built |= built
        return to_values(run_job(job, store, sender)), sorted(store.built)


def needs_of(job: Job, shared: SharedWork) -> dict[str, int] | None:
    """What a job needs by its plan, bytes by kind; None where that isn't known before it runs.

    A job that will be refused needs nothing: it says so when it runs.

    Args:
        shared: what its plans have in common with others.
    """
    if isinstance(job.loaded, LlmconvertError):
        return {}
    found: dict[str, int] = {}
    for recipe in job.recipes:
        try:
            plan = plan_run(recipe, job.work_dir, publish=False, fresh=job.settings.fresh, shared=shared)
        except UnknownWeightsError:
            return None
        except LlmconvertError:
            continue
        needs = plan.needs
        found["memory"] = max(found.get("memory", 0), needs.memory)
        found["device_memory"] = max(found.get("device_memory", 0), needs.device_memory)
        # Artifacts of variants lie beside each other.
        found["disk"] = found.get("disk", 0) + needs.disk
    return found


def _beat(sender: Sender) -> None:
    while True:
        sender.send(memory=resident_nbytes())
        threading.Event().wait(_HEARTBEAT)


def _watch(stream: TextIO) -> None:
    """Stop this process as if it was asked to when its input ends."""
    stream.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    # Threads that wait for input or time are not waited for.
    sys.stderr.flush()
    os._exit(status)
