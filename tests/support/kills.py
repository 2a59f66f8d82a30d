"""SIGKILL at a chosen moment, for processes of a test's own."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

__all__ = ["die_when_replaced"]


def die_when_replaced(file: Path, kill_at: int) -> None:
    """From now on this process, in one thread, dies when ``file`` is being replaced for the ``kill_at``-th time."""
    torch.set_num_threads(1)
    replace, count = os.replace, 0

    def counted(*names: Any) -> None:
        nonlocal count
        count += str(names[1]) == str(file)
        if kill_at and count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*names)

    os.replace = counted  # type: ignore[assignment]
