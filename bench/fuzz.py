"""What comes with a model, made wrong in thousands of ways: every outcome but success or one line is a finding.

    python bench/fuzz.py [--seconds 60] [--only TARGET ...] [--seed 0]

One row of :data:`TARGETS` is one kind of input: how it is made (hypothesis), and what reads it. Prints executions,
refusals, findings and seconds of each, and every finding once, with where it was raised and the input. A run that takes
more than :data:`SLOWEST` seconds of processor time, or more than :data:`MOST_BYTES` beside what the libraries take, is
a finding too. Ends with 1 if there are any.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
import torch
from fuzz_targets import TARGETS, Target
from transformers import logging

from llmconvert.errors import LlmconvertError

__all__ = ["TARGETS", "Outcome", "Target", "fuzz"]

SLOWEST = 30
MOST_BYTES = 4 << 30
# Shown of an input, at most.
_SHOWN = 400


class _Slow(BaseException):
    """A run that was ended."""


@dataclass
class Outcome:
    """What became of one target's inputs. ``findings`` has the first input by where and how it failed."""

    executions: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: dict[str, str] = field(default_factory=dict)


def fuzz(target: Target, seconds: float, seed: int = 0, executions: int = 1 << 30) -> Outcome:
    """Feed a target for ``seconds``, or ``executions``; what isn't success or an error of the package is kept."""
    outcome = Outcome()
    started = time.monotonic()
    end = started + seconds

    def once(given: Any) -> None:
        if time.monotonic() > end or outcome.executions >= executions:
            return
        outcome.executions += 1
        with tempfile.TemporaryDirectory(prefix="llmconvert-fuzz-") as directory:
            try:
                with _bounded(SLOWEST):
                    target.run(given, Path(directory))
            except LlmconvertError as error:
                outcome.refused += 1
                if "\n" in str(error) or len(str(error)) > 1000:
                    outcome.findings.setdefault(
                        f"a message of {len(str(error))} characters: {error!s:.80}", repr(given)
                    )
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                outcome.findings.setdefault(_where(error), repr(given)[:_SHOWN])

    while time.monotonic() < end and outcome.executions < executions:
        quiet = hypothesis.settings(
            max_examples=200,
            deadline=None,
            database=None,
            phases=(hypothesis.Phase.generate,),
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        hypothesis.seed(seed)(quiet(hypothesis.given(target.inputs)(once)))()
        seed += 1
    outcome.seconds = time.monotonic() - started
    return outcome


@contextlib.contextmanager
def _bounded(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise _Slow(f"took longer than {seconds} s")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def _where(error: BaseException) -> str:
    """The kind of an exception and the last line of this package that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename != __file__ and "site-packages" not in frame.filename]
    frame = (own or frames)[-1]
    reason = re.sub(r"[^\s']*llmconvert-fuzz-[^\s']*", "…", " ".join(str(error).split()))[:120]
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {reason}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Feed broken inputs to what reads them.")
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--only", nargs="*", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.nice(10)
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    taken = next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line
    )
    resource.setrlimit(resource.RLIMIT_DATA, (taken * 1024 + MOST_BYTES, resource.RLIM_INFINITY))
    rows: list[str] = []
    all_findings: dict[str, str] = {}
    for name in options.only:
        outcome = fuzz(TARGETS[name], options.seconds, options.seed)
        found = len(outcome.findings)
        rows.append(f"| {name} | {outcome.executions:,} | {outcome.refused:,} | {found} | {outcome.seconds:.0f} |")
        all_findings |= {f"{name}: {where}": given for where, given in outcome.findings.items()}
        print(rows[-1], file=sys.stderr, flush=True)
    print("| input | executions | refused in one line | findings | seconds |\n|---|---|---|---|---|")
    print("\n".join(rows))
    for where, given in all_findings.items():
        print(f"\n{where}\n  {given}")
    return 1 if all_findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
