"""Ctrl-C and SIGTERM as an exception that says how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llmconvert.errors import RunInterruptedError

__all__ = ["interruptible"]


@contextmanager
def interruptible(advice: str = "run the same command to continue") -> Iterator[None]:
    """End the block with :class:`RunInterruptedError` when the process is asked to stop.

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
        yield
    except KeyboardInterrupt:
        raise RunInterruptedError(f"stopped by {received.name}; {advice}") from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
