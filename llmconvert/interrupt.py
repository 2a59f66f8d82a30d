"""How a job ends that is stopped from outside: Ctrl-C, SIGTERM and failures of the machine as errors in one line."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llmconvert.errors import RunInterruptedError
from llmconvert.machine import machine_errors

__all__ = ["interruptible"]


@contextmanager
def interruptible(advice: str = "run the same command to continue") -> Iterator[None]:
    """End the block with :class:`RunInterruptedError` when the process is asked to stop, and with
    :class:`~llmconvert.errors.MachineError` when a file operation fails or memory is out.

    Outside the main thread, which alone may handle signals, only a ``KeyboardInterrupt`` raised inside is translated.
    """
    received = signal.SIGINT

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = signal.Signals(number)
        # Not the final exception: libraries catch Exception here and there, and must not catch this.
        raise KeyboardInterrupt

    own = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)} if own else {}
    try:
        with machine_errors():
            yield
    except KeyboardInterrupt:
        raise RunInterruptedError(f"stopped by {received.name}; {advice}") from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
