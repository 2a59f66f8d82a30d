"""How a job's process is started."""

from __future__ import annotations

import os
import sys

__all__ = ["worker_command", "worker_environment"]


def worker_command() -> list[str]:
    """What starts a job's process."""
    return [sys.executable, "-P", "-m", "llmconvert.recipes.batch.worker"]


def worker_environment(at_once: int) -> dict[str, str]:
    """Of a job's process: the processor's cores are shared out among those that run together."""
    environment = {**os.environ, "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000")}
    if at_once > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment["OMP_NUM_THREADS"] = str(max(1, cores // at_once))
    return environment
