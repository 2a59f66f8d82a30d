"""Every exception this package raises on purpose, and the exit code each one ends the program with.

::

    LlmconvertError                       1
    ├── UsageError                        2   what was asked for is wrong or impossible
    │   ├── RecipeError                       a recipe key or value
    │   ├── SchemeError                       a quantization scheme that does not parse or does not fit a layer
    │   ├── UnsupportedError                  an architecture, method or format this version cannot do
    │   └── OutputError                       an output directory that cannot be used
    ├── GateError                         3   the artifact was measured and fell short of the recipe's limits
    ├── SourceError                       4   what was given as input cannot be read
    │   ├── CheckpointError                   truncated, corrupt or inconsistent weight files
    │   │   └── ChangedError                  cut or replaced while they were read
    │   ├── DatasetError                      calibration or evaluation text
    │   ├── CalibrationError                  activations or statistics no quantizer can work with
    │   └── HubError                          the Hub refused or could not be reached
    ├── MachineError                      5   this machine failed: its disk, its memory, a process that was killed
    │   └── CapacityError                     the job does not fit its memory or disk
    └── RunInterruptedError               6   stopped on request; the same command continues

Messages name the tensor, file or key, say what was found and what was expected, and what to do about it.
Anything else that escapes is a bug, and ends with exit code 1 and a traceback.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from llmconvert.printable import printable

__all__ = [
    "CalibrationError",
    "CapacityError",
    "ChangedError",
    "CheckpointError",
    "DatasetError",
    "GateError",
    "HubError",
    "LlmconvertError",
    "MachineError",
    "OutputError",
    "RecipeError",
    "RunInterruptedError",
    "SchemeError",
    "SourceError",
    "UnsupportedError",
    "UsageError",
]

_LONGEST_REASON = 300
# Sentences in which libraries advise what this package never does: to run code that comes with a model.
_ADVICE = re.compile(r"[^.!?:;]*\b(trust_remote_code|weights_only)\b[^.!?;]*[.!?;]?")


def one_line(error: BaseException) -> str:
    """What a library's exception says, with its kind, in one line of bounded length for a message of ours."""
    reason = " ".join(_ADVICE.sub("", " ".join(str(error).split())).split())
    if len(reason) > _LONGEST_REASON:
        reason = f"{reason[:_LONGEST_REASON]}…"
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


class LlmconvertError(Exception):
    """Root of the tree. ``exit_code`` is what the command line ends with.

    As text, its message commands no terminal, whatever names of others stand in it.
    """

    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class UsageError(LlmconvertError):
    """What was asked for is wrong or impossible; nothing was started."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe has an unknown key, a bad value or a contradiction; the message holds the key's path."""


class SchemeError(UsageError):
    """A quantization scheme does not parse, or does not fit a layer's shape."""


class UnsupportedError(UsageError):
    """An architecture, method, format or combination this version refuses by name."""


@contextmanager
def advising(instead: str) -> Iterator[None]:
    """Let a refusal from inside say what to do instead.

    Raises:
        UnsupportedError: the one that was raised, and behind its message this advice.
    """
    try:
        yield
    except UnsupportedError as error:
        raise UnsupportedError(f"{error}; {instead}") from error


class OutputError(UsageError):
    """The output directory exists and is not empty, or cannot be written."""


class GateError(LlmconvertError):
    """The artifact was measured and misses a limit of the recipe. It is kept, and not published."""

    exit_code = 3


class SourceError(LlmconvertError):
    """What was given as input does not exist or cannot be read."""

    exit_code = 4


class CheckpointError(SourceError):
    """A weight file or its index is truncated, corrupt or inconsistent."""


class ChangedError(CheckpointError):
    """A weight file was cut or replaced while it was read; that says nothing of what it held."""


class DatasetError(SourceError):
    """Calibration or evaluation text is missing, empty or unreadable."""


class CalibrationError(SourceError):
    """Activations or statistics are unusable: not finite, never reached, or impossible to factorize."""


class HubError(SourceError):
    """The Hub refused a request or could not be reached."""


class MachineError(LlmconvertError):
    """This machine failed: its disk, its memory, or a process that was killed. Says nothing about what was asked for.

    What was finished before stays, and the same command continues.
    """

    exit_code = 5


class CapacityError(MachineError):
    """The job does not fit the memory or the disk of this machine."""


class RunInterruptedError(LlmconvertError):
    """Stopped on request. Finished work is on disk, and the same command continues from it."""

    exit_code = 6
