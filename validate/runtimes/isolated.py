"""A measurement in a subprocess: its memory peak is its own, and running out of memory ends only it.

The parent sends the name of a function and its arguments as JSON; the child answers with what the function returns.
A child that may only take so much memory gets that as a limit of the system, so an allocation beyond it fails in the
child instead of taking the machine's last page.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmconvert.errors import LlmconvertError, MachineError, one_line
from llmconvert.machine import of_machine, out_of_memory

__all__ = ["UnmeasuredError", "limit_memory", "require_not_killed", "reset_peak", "run_isolated"]

_STATUS = Path("/proc/self/status")
_TAIL = 300
# Of a process that ended of itself, however badly; any other signal came from outside, or from a file that failed.
_OWN_SIGNALS = (signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)


class UnmeasuredError(Exception):
    """A measurement that could not be made; its text is the reason, for the report.

    Attributes:
        by_limit: whether a limit of the model or the machine is the reason, which is a finding by itself.
    """

    def __init__(self, reason: str, *, by_limit: bool = False) -> None:
        super().__init__(reason)
        self.by_limit = by_limit


def run_isolated(function: str, arguments: Mapping[str, Any], *, timeout: float) -> Any:
    """Call ``function`` (``"package.module:name"``, of this package) with ``arguments`` in a new Python process.

    Args:
        arguments: JSON values.
        timeout: seconds; the process is ended after that.

    Returns:
        What the function returned, as JSON values.

    Raises:
        UnmeasuredError: it failed, ran out of the memory that it was allowed, or took too long.
        MachineError: it was killed, or a file could not be read: nothing to remember as a measurement.
    """
    command = [sys.executable, "-P", "-m", "llmconvert.validate.runtimes.isolated", function]
    # What it starts in turn must not import from the working directory either.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            output, errors = process.communicate(json.dumps(arguments), timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise UnmeasuredError(f"took longer than {timeout:,.0f} s", by_limit=True) from error
        finally:
            process.kill()
    answer = _answer(output)
    if answer is not None and "error" not in answer:
        return answer["result"]
    name = function.partition(":")[2]
    if answer is not None:
        if answer["of_machine"]:
            raise MachineError(f"{name}, in a process of its own: {answer['error']}; run the same command again")
        raise UnmeasuredError(answer["error"], by_limit=answer["by_limit"])
    require_not_killed(process.returncode, name)
    raise UnmeasuredError(_tail(errors) or f"its process ended with {process.returncode}")


def require_not_killed(returncode: int, name: str) -> None:
    """Tell a process that ended of itself, however badly, from one that was killed.

    Args:
        returncode: as :mod:`subprocess` gives it.
        name: what it was doing.

    Raises:
        MachineError: a signal came from outside, or from a file that failed.
    """
    if returncode >= 0 or -returncode in _OWN_SIGNALS:
        return
    raise MachineError(
        f"{name}, in a process of its own, was killed ({signal.Signals(-returncode).name}), as the system does when "
        "memory is out; run the same command again, with more of it free, or allow less (memory)"
    )


def limit_memory(nbytes: int | None) -> None:
    """From here on, this process may take ``nbytes`` more than it has (None: no limit); only the system's are enforced.

    Where there is no such limit (outside Linux) this does nothing.
    """
    if nbytes is None or not _STATUS.exists():
        return
    import resource

    taken = _status("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (taken + nbytes, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def reset_peak() -> bool:
    """Start the kernel's high-water mark of this process anew; whether it could be done.

    Only for processes that exist for one measurement: it changes what ``time -v`` says about them.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if line.startswith("Vm"))
    return int(lines[field].split()[0]) * 1024


def _answer(output: str) -> dict[str, Any] | None:
    """The last line that the child printed, if it is an answer."""
    with contextlib.suppress(ValueError, IndexError):
        found = json.loads(output.splitlines()[-1])
        return found if isinstance(found, dict) else None
    return None


def _tail(errors: str) -> str:
    lines = [line for line in errors.splitlines() if line.strip()]
    return lines[-1][-_TAIL:] if lines else ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What libraries print goes to standard error; standard output is for the answer."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main(function: str) -> None:
    """The child: arguments from standard input, the answer to standard output."""
    module, _, name = function.partition(":")
    answer: dict[str, Any]
    try:
        with _quiet():
            result = getattr(importlib.import_module(module), name)(**json.load(sys.stdin))
        answer = {"result": result}
    except Exception as error:
        reason = str(error) if isinstance(error, LlmconvertError) else one_line(error)
        # Out of the memory that it was allowed: that is what a process of its own is to find out.
        no_memory = out_of_memory(error)
        answer = {"error": f"out of memory: {reason}" if no_memory else reason, "by_limit": no_memory}
        answer["of_machine"] = of_machine(error) and not no_memory
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
