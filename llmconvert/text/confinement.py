"""A process of bounded time and memory for the programs that come with a model: chat templates and tokenizers.

A template is a program in Jinja, a tokenizer one in regular expressions and tables, and both run on whatever their
author wrote: for ever, through all memory, or into a panic. Here they run where that ends a child.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from llmconvert.errors import MachineError, SourceError

__all__ = ["Confinement", "ConfinementError"]

_CHILD = Path(__file__).with_name("confined.py")


class ConfinementError(SourceError):
    """What was run in the child failed there, or was ended."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """What may be taken for one request: seconds of processor time, and bytes beside what the child's imports take."""

    seconds: int
    nbytes: int


_KINDS: Mapping[str, _Kind] = {"render": _Kind(5, 1 << 29), "try_tokenizer": _Kind(60, 1 << 32)}


class Confinement:
    """A child process that answers requests of one kind, started with the first and ended with the block.

    Args:
        do: what it does: ``render`` a conversation, or ``try_tokenizer`` on a piece of text.
    """

    def __init__(self, do: Literal["render", "try_tokenizer"]) -> None:
        self._do = do
        self._kind = _KINDS[do]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def ask(self, **arguments: Any) -> Any:
        """Do it with ``arguments``, JSON values; gives the result.

        Raises:
            ConfinementError: it failed, with the line of a template, or took too much time or memory.
            MachineError: no process could be started.
        """
        process = self._process or self._start()
        answer = self._exchange(process, arguments)
        if answer is None:
            _, errors = process.communicate()
            self._process = None
            raise ConfinementError(self._ended(process.returncode, errors))
        if "result" in answer:
            return answer["result"]
        if answer["memory"]:
            raise ConfinementError(f"takes more than {self._kind.nbytes >> 20} MiB of memory")
        where = f"line {answer['line']}: " if answer["line"] is not None else ""
        raise ConfinementError(f"{where}{answer['error']}: {answer['reason']}")

    def _start(self) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", str(_CHILD)], stdin=pipe, stdout=pipe, stderr=pipe, text=True, encoding="utf-8"
            )
        except OSError as error:
            raise MachineError(f"no process can be started to run what comes with the model: {error}") from error
        self._process = process
        limits = {"do": self._do, "seconds": self._kind.seconds, "nbytes": self._kind.nbytes}
        if self._exchange(process, limits) is None:
            _, errors = process.communicate()
            self._process = None
            reason = errors.strip().splitlines()[-1] if errors.strip() else f"it ended with {process.returncode}"
            raise MachineError(f"the process that runs what comes with the model does not start: {reason}")
        return process

    @staticmethod
    def _exchange(process: subprocess.Popen[str], request: Mapping[str, Any]) -> dict[str, Any] | None:
        """Send a line and read the answer; None if the child ended instead."""
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None
        line = process.stdout.readline()
        answer: dict[str, Any] | None = json.loads(line) if line.endswith("\n") else None
        return answer

    def _ended(self, status: int, errors: str) -> str:
        if status == -signal.SIGXCPU:
            return f"takes more than {self._kind.seconds} s"
        if status < 0:
            return f"ends the process that runs it ({signal.Signals(-status).name})"
        lines = errors.strip().splitlines()
        return f"ends the process that runs it: {lines[-1] if lines else status}"
