"""Kills and failing file operations, by seed, over a whole run: what comes of it must be what an undisturbed run makes.

    python bench/faults.py SCRATCH [--kills 200] [--errors 100] [--seed 0] [--workers 3] [--minutes 60] [--report FILE]

A run over a tiny model with multi-head attention converts it, draws text, merges key-value heads, measures
sensitivities and quantizes within a budget, validates against limits with repair allowed, and publishes to a directory.
One process imports everything once and forks each run; plots are
left blank, which saves half of the time. Runs come in chains in one work directory: up to three that are
disturbed, each continuing what the one before left, then one that is not. Half of the kills (SIGKILL) come at a random
time, half before, after or half-way through a random file operation; errors (EIO, ENOSPC, EACCES) at a random file
operation, alone or from there on (``bench/file_faults.py`` says which operations are met, and which are not).

Counted are disturbed runs:

- *resumed*: the next run in its chain took over or continued finished work; *anew*: there was nothing to take over.
- *refused clearly*: ended with one line and an exit code of 2 to 6; *absorbed*: ended well nevertheless.
- *tracebacks*: in it or in the run after it, or an exit code of 1.
- *wrong artifacts*: at any time something else lay at the published place than nothing or the whole artifact of the
  undisturbed run, byte for byte; or the last run's artifact differs.
- *wrong verdicts*: the last run failed, or its report's checks are not the undisturbed run's (speeds apart).
- *leftovers*: files of the disturbed runs beside those of an undisturbed one, after the last run; what a process that
  was killed, or could remove nothing any more, had in ``TMPDIR`` is not counted: it is the system's to remove.

Several schedules, of following seeds, run side by side with ``--workers``, in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disturbed_run import Disturbance, Outcome, empty, listing, new_place, prepare, published, run, verdicts
from file_faults import ERRORS, FileFault
from measured import markdown_table

CHAIN = 3
TAKEN_OVER = ("unchanged, reusing", "was interrupted, continuing")
FAULTS = ("tracebacks", "wrong artifacts", "wrong verdicts", "leftovers")
COLUMNS = ("resumed", "anew", "refused clearly", "absorbed", *FAULTS, "seconds")


@dataclass(slots=True)
class Found:
    """An undisturbed run: what it published, what its checks say, how long it took, its file operations, its files."""

    files: dict[str, bytes]
    checks: list[Any]
    seconds: float
    operations: int
    listing: set[str]


@dataclass(slots=True)
class Bench:
    """The place, the recipe and what was counted so far."""

    scratch: Path
    recipe: Path
    generator: random.Random
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    operations: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    def count(self, row: str, what: str, note: str = "") -> None:
        self.counts.setdefault(row, Counter())[what] += 1
        if what in FAULTS:
            self.findings.append(f"{what}: {note}")
            print(self.findings[-1], file=sys.stderr, flush=True)


def undisturbed(bench: Bench) -> Found:
    """Run twice without disturbance; how long the first took, and what lies there after the second.

    Raises:
        SystemExit: a run failed.
    """
    place = new_place(bench.scratch, "undisturbed")
    first = run(bench.recipe, place, Disturbance(""))
    second = run(bench.recipe, place, Disturbance(""))
    if first.code or second.code:
        raise SystemExit(f"the undisturbed run failed:\n{first.log}\n{second.log}")
    return Found(published(place), verdicts(place), first.seconds, int(first.met), listing(place))


def schedule(bench: Bench, expected: Found, kills: int, errors: int, deadline: float) -> None:
    """Run chains until as many kills and errors were met, or it is that late (:func:`time.monotonic`)."""
    number = 0
    while (left := _left(bench, kills, errors)) and time.monotonic() < deadline:
        _chain(bench, expected, number, left)
        number += 1
        done = sum(counts["met"] for counts in bench.counts.values())
        print(f"{done} of {kills + errors}, {len(bench.findings)} findings", file=sys.stderr, flush=True)


def _left(bench: Bench, kills: int, errors: int) -> list[str]:
    """The kinds of disturbance that are still wanted."""
    wanted = {"killed by time": kills // 2, "killed at an operation": kills - kills // 2}
    wanted |= {name: (errors + index) // len(ERRORS) for index, name in enumerate(ERRORS)}
    return [row for row, count in wanted.items() if bench.counts.get(row, Counter())["met"] < count]


def _disturbance(bench: Bench, expected: Found, left: list[str]) -> Disturbance:
    generator = bench.generator
    row = generator.choice(left)
    if row == "killed by time":
        return Disturbance(row, seconds=generator.uniform(0.001, expected.seconds))
    at = generator.randint(1, expected.operations)
    if row in ERRORS:
        return Disturbance(row, fault=FileFault(at, row, generator.random() < 0.5))  # type: ignore[arg-type]  # a row of ERRORS
    return Disturbance(row, fault=FileFault(at, generator.choice(("before", "after"))))


def _chain(bench: Bench, expected: Found, number: int, left: list[str]) -> None:
    place = new_place(bench.scratch, f"chain-{number}")
    before: list[tuple[Disturbance, str]] = []
    known = 0
    for step in range(CHAIN):
        disturbance = _disturbance(bench, expected, left)
        what = f"chain {number}, run {step}: {disturbance}"
        outcome = run(bench.recipe, place, disturbance)
        if outcome.code == -signal.SIGKILL or disturbance.fault.lasting:
            empty(place / "tmp")
        _judge_next(bench, before[known:], outcome)
        known = len(before)
        bench.seconds[disturbance.row] += outcome.seconds
        met = outcome.code == -signal.SIGKILL or (disturbance.fault.at > 0 and bool(outcome.met))
        if met:
            before.append((disturbance, what))
            bench.operations[outcome.met if disturbance.fault.at else "time"] += 1
            bench.count(disturbance.row, "met")
            _judge(bench, disturbance.row, outcome, f"{what} at {outcome.met}\n{outcome.log}")
        elif outcome.code:
            bench.count(
                disturbance.row, "wrong verdicts", f"{what}: undisturbed, exit code {outcome.code}\n{outcome.log}"
            )
        if published(place) not in ({}, expected.files):
            bench.count(disturbance.row, "wrong artifacts", what)
        if not outcome.code:
            break
    last = run(bench.recipe, place, Disturbance(""))
    _judge_next(bench, before[known:], last)
    _judge_end(bench, expected, place, before, last)
    shutil.rmtree(place)


def _judge(bench: Bench, row: str, outcome: Outcome, note: str) -> None:
    """A disturbed run by itself."""
    if outcome.code == -signal.SIGKILL:
        return
    lines = [line for line in outcome.log.splitlines() if line.startswith("error: ")]
    if "Traceback" in outcome.log or outcome.code == 1 or outcome.code < 0:
        bench.count(row, "tracebacks", note)
    elif outcome.code == 0:
        bench.count(row, "absorbed")
    elif len(lines) == 1 and outcome.code in (2, 4, 5, 6):
        bench.count(row, "refused clearly")
    else:
        bench.count(row, "wrong verdicts", note)


def _judge_next(bench: Bench, before: list[tuple[Disturbance, str]], outcome: Outcome) -> None:
    """What the run after a disturbed one took over."""
    for disturbance, _ in before:
        taken = any(words in outcome.log for words in TAKEN_OVER)
        bench.count(disturbance.row, "resumed" if taken else "anew")


def _judge_end(
    bench: Bench, expected: Found, place: Path, before: list[tuple[Disturbance, str]], last: Outcome
) -> None:
    """What the last run of a chain, which nothing disturbed, has made; the disturbance before it is to blame."""
    row, what = (before[-1][0].row, before[-1][1]) if before else ("killed by time", "nothing met")
    if "Traceback" in last.log:
        bench.count(row, "tracebacks", f"after {what}\n{last.log}")
    elif last.code:
        bench.count(row, "wrong verdicts", f"after {what}: exit code {last.code}\n{last.log}")
    elif verdicts(place) != expected.checks:
        bench.count(row, "wrong verdicts", f"after {what}: other checks")
    if last.code == 0 and published(place) != expected.files:
        bench.count(row, "wrong artifacts", f"after {what}")
    if left := listing(place) - expected.listing:
        bench.count(row, "leftovers", f"after {what}: {', '.join(sorted(left))}")


def table(report: dict[str, Any]) -> str:
    """Markdown: what came of each kind of disturbance, and of all."""
    total: Counter[str] = Counter()
    lines = []
    for row in ("killed by time", "killed at an operation", *ERRORS):
        counts = {**report["counts"].get(row, {}), "seconds": round(report["seconds"].get(row, 0))}
        total.update(counts)
        lines.append(_row(row, counts))
    return markdown_table(["disturbed by", "runs", *COLUMNS], [*lines, _row("all", total)])


def _row(name: str, counts: dict[str, int] | Counter[str]) -> list[str]:
    return [name, str(counts.get("met", 0)), *(f"{counts.get(column, 0)}" for column in COLUMNS)]


def measure(scratch: Path, kills: int, errors: int, seed: int, minutes: float) -> dict[str, Any]:
    """One schedule; counts, seconds and operations by kind, findings, and what an undisturbed run takes."""
    deadline = time.monotonic() + 60 * minutes
    scratch = scratch.absolute()
    bench = Bench(scratch, prepare(scratch), random.Random(seed))
    expected = undisturbed(bench)
    schedule(bench, expected, kills, errors, deadline)
    about = {"undisturbed_seconds": expected.seconds, "undisturbed_operations": expected.operations}
    return {**{key: getattr(bench, key) for key in ("counts", "seconds", "operations", "findings")}, **about}


def side_by_side(arguments: argparse.Namespace) -> dict[str, Any]:
    """Schedules of following seeds, each in a process of its own, and the sum of what they found."""
    processes, reports = [], []
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    for worker in range(arguments.workers):
        share = [str((count + worker) // arguments.workers) for count in (arguments.kills, arguments.errors)]
        reports.append(arguments.scratch / f"report-{worker}.json")
        command = [sys.executable, __file__, str(arguments.scratch / f"worker-{worker}"), "--report", str(reports[-1])]
        command += ["--kills", share[0], "--errors", share[1], "--seed", str(arguments.seed + worker)]
        command += ["--minutes", str(arguments.minutes)]
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    for process in processes:
        process.wait()
    return merged([json.loads(path.read_text()) for path in reports])


def merged(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of several schedules' reports."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: Counter[str] = Counter()
    operations: Counter[str] = Counter()
    for report in reports:
        for row, found in report["counts"].items():
            counts[row].update(found)
        seconds.update(report["seconds"])
        operations.update(report["operations"])
    findings = [finding for report in reports for finding in report["findings"]]
    return {**reports[0], "counts": counts, "seconds": seconds, "operations": operations, "findings": findings}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--errors", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no chain after that")
    parser.add_argument("--report", type=Path, help="counts and findings as JSON")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    if arguments.workers > 1:
        report = side_by_side(arguments)
    else:
        report = measure(arguments.scratch, arguments.kills, arguments.errors, arguments.seed, arguments.minutes)
    if arguments.report:
        arguments.report.write_text(json.dumps(report, indent=2))
    print(table(report))
    met = ", ".join(f"{name} {count}" for name, count in Counter(report["operations"]).most_common())
    takes = f"{report['undisturbed_seconds']:.1f} s and {report['undisturbed_operations']:,} file operations"
    print(f"\nAn undisturbed run takes {takes}. Met at: {met}. All in {time.perf_counter() - begin:,.0f} s.")
    for finding in report["findings"]:
        print(f"\n{finding}")
    raise SystemExit(1 if report["findings"] else 0)


if __name__ == "__main__":
    main()
