"""How all jobs of a batch stand: on the screen, in a log for each of them, and in a summary."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from llmconvert.printable import printable
from llmconvert.progress import Progress, TerminalProgress
from llmconvert.recipes.batch.jobs import Job
from llmconvert.recipes.batch.messages import JobState
from llmconvert.recipes.batch.outcome import Outcome
from llmconvert.storage.writer import write_json

__all__ = ["Board"]

SUMMARY = "summary.json"
# Seconds between two lines about one job where there is no terminal.
_STEADY = 10.0
# Finished and waiting jobs that the table shows; of many, the rest is counted.
_ROWS = 12
_LONGEST_NAME = 100


class Board:
    """The jobs of one batch.

    Args:
        jobs: all of them, in order.
        logs: directory for a log of each job and ``summary.json``, which is up to date whenever a job ends.
        progress: where the jobs are shown: a table that changes in place on a terminal, lines elsewhere.
    """

    def __init__(self, jobs: Sequence[Job], logs: Path, progress: Progress) -> None:
        self.jobs = jobs
        self.states = [JobState() for _ in jobs]
        self._outcomes: dict[int, list[Outcome]] = {}
        self._logs = logs
        self._progress = progress
        self._console = progress.console if isinstance(progress, TerminalProgress) else None
        self._began: dict[int, float] = {}
        self._took: dict[int, float] = {}
        self._told: dict[int, float] = {}
        self._open: dict[int, IO[bytes]] = {}
        self._live: Live | None = None
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Board:
        if self._console is not None:
            self._live = Live(console=self._console, get_renderable=self.table, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    @property
    def outcomes(self) -> list[Outcome]:
        """Of the jobs that have ended, in the order of the jobs."""
        return [outcome for number in sorted(self._outcomes) for outcome in self._outcomes[number]]

    def log_of(self, number: int) -> Path:
        """Where a job's log is."""
        return self._logs / f"{number + 1:03d}-{Path(self.jobs[number].recipe).stem[:_LONGEST_NAME]}.log"

    def open_log(self, number: int) -> IO[bytes]:
        """The log, for what the job's process writes to its standard error, and what it says."""
        self._open[number] = self.log_of(number).open("ab", buffering=0)
        return self._open[number]

    def begin(self, number: int, state: str) -> None:
        """A job plans, or runs."""
        self.states[number].state = state
        if state == "running":
            self._began[number] = time.monotonic()
            self._say(number, "started")

    def hear(self, number: int, message: Mapping[str, Any]) -> None:
        """Take in what a job's process tells."""
        line = self.states[number].hear(message)
        if line is not None and number in self._open:
            self._open[number].write(f"{line}\n".encode())

    def end(self, number: int, outcomes: list[Outcome]) -> None:
        """A job has ended so."""
        failed = [one for one in outcomes if one.exit_code]
        self.states[number].state = "failed" if failed else "done"
        self._took[number] = self.seconds(number)
        self._outcomes[number] = outcomes
        self._open.pop(number, None)
        self._say(number, f"failed: {failed[0].error}" if failed else f"done in {self._took[number]:.1f} s")
        write_json(self._logs / SUMMARY, self.summary())

    def seconds(self, number: int) -> float:
        """Since the job was let in."""
        began = self._began.get(number)
        return self._took.get(number, 0.0 if began is None else time.monotonic() - began)

    def show(self) -> None:
        """Say how running jobs stand, where it is time and nothing shows it all the while."""
        if self._live is not None:
            return
        now = time.monotonic()
        for number, state in enumerate(self.states):
            if state.state == "running" and state.step and now - self._told.get(number, now) >= _STEADY:
                self._say(number, " ".join(_step(state)))
            self._told.setdefault(number, now)

    def summary(self) -> dict[str, Any]:
        """All jobs as JSON values: state, exit code, what they made or why not, where their log is."""
        return {
            "jobs": [
                {
                    "recipe": job.recipe,
                    "state": self.states[number].state,
                    "seconds": round(self.seconds(number), 3),
                    "log": str(self.log_of(number)),
                    "ends": [_summary(one) for one in self._outcomes.get(number, [])],
                }
                for number, job in enumerate(self.jobs)
            ]
        }

    def table(self) -> Table:
        """All jobs, or of many those that tell most, within 80 columns."""
        table = Table(
            Column("job", ratio=3, no_wrap=True, overflow="ellipsis"),
            Column("state", no_wrap=True, min_width=7),
            Column("step", ratio=2, no_wrap=True, overflow="ellipsis"),
            Column("", width=10),
            Column("left", justify="right", no_wrap=True, min_width=6),
            Column("memory", justify="right", no_wrap=True, min_width=7),
            expand=True,
            box=None,
        )
        shown = self._shown()
        for number in shown:
            table.add_row(Text(printable(self.jobs[number].recipe)), *self._cells(number))
        counts = dict.fromkeys(("done", "failed", "waiting"), 0)
        for number, state in enumerate(self.states):
            if number not in shown:
                counts[state.state] = counts.get(state.state, 0) + 1
        rest = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        if rest:
            table.add_row(Text(f"and {rest}", "dim"))
        return table

    def _shown(self) -> list[int]:
        """Jobs under way, and as many as there is room for of those that ended last and come next."""
        names = [state.state for state in self.states]
        under_way = [number for number, name in enumerate(names) if name in ("planning", "ready", "running")]
        ended = [number for number, name in enumerate(names) if name in ("done", "failed")]
        waiting = [number for number, name in enumerate(names) if name == "waiting"]
        room = max(0, _ROWS - len(under_way))
        last = ended[-max(room // 2, room - len(waiting)) :] if room else []
        return sorted({*under_way, *last, *waiting[: room - len(last)]})

    def _cells(self, number: int) -> list[Any]:
        state = self.states[number]
        colour = {"done": "green", "failed": "red", "running": "cyan"}.get(state.state, "dim")
        label = Text("waits" if state.state in ("ready", "waiting") else state.state, colour)
        if state.state in ("done", "failed"):
            return [label, "", "", _clock(self.seconds(number)), ""]
        left = "" if state.seconds_left is None else _clock(state.seconds_left)
        bar = ProgressBar(total=1.0, completed=state.share, width=10) if state.share is not None else ""
        memory = f"{state.memory / 1e9:.1f} GB" if state.memory else ""
        return [label, Text(printable(state.step)), bar, left, memory]

    def _say(self, number: int, text: str) -> None:
        self._told[number] = time.monotonic()
        if self._live is None:
            self._progress.log(f"[{number + 1}/{len(self.jobs)}] {self.jobs[number].recipe}: {text}")


def _step(state: JobState) -> list[str]:
    words = [state.step]
    if state.share is not None:
        words.append(f"{100 * state.share:.0f} %")
    if state.seconds_left is not None:
        words.append(f"{_clock(state.seconds_left)} left")
    return words


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _summary(outcome: Outcome) -> dict[str, Any]:
    made = outcome.result
    return {
        "recipe": outcome.recipe,
        "exit_code": outcome.exit_code,
        "error": outcome.error or None,
        "artifact": None if made is None else str(made.artifact),
        "published": None if made is None else made.published,
    }
