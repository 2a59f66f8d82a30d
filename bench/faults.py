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
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from file_faults import ERRORS, FileFault, install
from measured import markdown_table

TESTS = Path(__file__).parent.parent / "tests"
CHAIN = 3
_KEY = re.compile(r"-[0-9a-f]{12}(?=[./]|$)")
# Files of an artifact that tell of one run: when, how long.
VOLATILE = ("README.md", "llmconvert/report.json", "llmconvert/report.html", "llmconvert/publication.json")
TAKEN_OVER = ("unchanged, reusing", "was interrupted, continuing")
FAULTS = ("tracebacks", "wrong artifacts", "wrong verdicts", "leftovers")
COLUMNS = ("resumed", "anew", "refused clearly", "absorbed", *FAULTS, "seconds")


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What happens to one run: a kill after ``seconds``, or a fault at a file operation."""

    row: str
    seconds: float = 0.0
    fault: FileFault = FileFault()  # noqa: RUF009 (frozen)


@dataclass(slots=True)
class Outcome:
    """How a run ended: ``code`` as :func:`os.waitstatus_to_exitcode` gives it; ``met`` the operation disturbed."""

    code: int
    seconds: float
    log: str
    met: str


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


def run(bench: Bench, place: Path, disturbance: Disturbance) -> Outcome:
    """Fork a run in ``place``, disturb it, and wait for its end."""
    log, met = place / "log.txt", place / "met.txt"
    met.unlink(missing_ok=True)
    log.write_text("")
    sys.stdout.flush()
    begin = time.perf_counter()
    child = os.fork()
    if child == 0:
        _child(bench, place, disturbance.fault, log, met)
    status = _wait(child, begin + disturbance.seconds if disturbance.seconds else None)
    operation = met.read_text() if met.exists() else ""
    return Outcome(os.waitstatus_to_exitcode(status), time.perf_counter() - begin, log.read_text(), operation)


def _wait(child: int, deadline: float | None) -> int:
    while deadline is not None and time.perf_counter() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.002)
    if deadline is not None:
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _child(bench: Bench, place: Path, fault: FileFault, log: Path, met: Path) -> None:
    """The forked process: the command, with its output in ``log``; never returns."""
    import torch

    from llmconvert.cli import main

    # A thread pool of torch is made anew after a fork; two threads at once must not be the first to ask for it.
    torch.set_num_threads(1)
    code = 1
    true_open, true_write = os.open, os.write

    def note(text: str) -> None:
        true_write(true_open(met, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), text.encode())

    try:
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        tempfile.tempdir = str(place / "tmp")
        names = install(f"{place}/", fault, note)
        arguments = ["run", str(bench.recipe), "--work-dir", str(place / "work")]
        try:
            main.main([*arguments, "--set", f"publish.to=file:{place}/out"], prog_name="llmconvert")
        except SystemExit as end:
            code = int(end.code or 0)
        if not fault.at:
            note(str(len(names)))
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def published(place: Path) -> dict[str, bytes]:
    """What lies at the published place, but for what tells of one run."""
    files = sorted(path for path in (place / "out").rglob("*") if path.is_file())
    named = {str(path.relative_to(place / "out")): path for path in files}
    return {name: path.read_bytes() for name, path in named.items() if name not in VOLATILE and path.suffix != ".png"}


def verdicts(place: Path) -> list[Any]:
    """Name, value, limit and verdict of every check but speeds."""
    report = json.loads((place / "out" / "llmconvert" / "report.json").read_text())
    kept = [check for check in report["checks"] if not check["name"].startswith("speed.")]
    return [[check[key] for key in ("name", "value", "reference", "limit", "ok")] for check in kept]


def listing(place: Path) -> set[str]:
    """Everything in a place, hidden or not, as relative names; stages without their keys."""
    names = {_KEY.sub("-", str(path.relative_to(place))) for path in place.rglob("*")}
    return names - {"log.txt", "met.txt"}


def undisturbed(bench: Bench) -> Found:
    """Run twice without disturbance; how long the first took, and what lies there after the second.

    Raises:
        SystemExit: a run failed.
    """
    place = _new_place(bench, "undisturbed")
    first = run(bench, place, Disturbance(""))
    second = run(bench, place, Disturbance(""))
    if first.code or second.code:
        raise SystemExit(f"the undisturbed run failed:\n{first.log}\n{second.log}")
    return Found(published(place), verdicts(place), first.seconds, int(first.met), listing(place))


def _new_place(bench: Bench, name: str) -> Path:
    place = bench.scratch / name
    shutil.rmtree(place, ignore_errors=True)
    (place / "tmp").mkdir(parents=True)
    return place


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
    place = _new_place(bench, f"chain-{number}")
    before: list[tuple[Disturbance, str]] = []
    known = 0
    for step in range(CHAIN):
        disturbance = _disturbance(bench, expected, left)
        what = f"chain {number}, run {step}: {disturbance}"
        outcome = run(bench, place, disturbance)
        if outcome.code == -signal.SIGKILL or disturbance.fault.lasting:
            _empty(place / "tmp")
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
    last = run(bench, place, Disturbance(""))
    _judge_next(bench, before[known:], last)
    _judge_end(bench, expected, place, before, last)
    shutil.rmtree(place)


def _empty(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


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


def prepare(scratch: Path, seed: int) -> Bench:
    """A tiny model, two texts and a recipe over them; one run in this process, so that all is imported and compiled."""
    sys.path.insert(0, str(TESTS))
    from pydoc_data.topics import topics

    import torch
    from support.tiny_models import tiny_llama_dir

    torch.set_num_threads(1)
    scratch = scratch.absolute()
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    model = tiny_llama_dir(scratch / "llama", num_key_value_heads=4)
    for name, keys in (("train", ("assignment", "while")), ("test", ("class", "import"))):
        (scratch / f"{name}.txt").write_text("\n\n".join(topics[key] for key in keys)[:6000])
    values = {
        "model": str(model),
        "calibrate": {"dataset": str(scratch / "train.txt"), "samples": 4, "length": 64},
        "attention": {"kv_heads": 2},
        "quantize": {"method": "gptq", "budget": {"bits_per_weight": 5, "group_sizes": [32]}},
        "validate": {
            "perplexity": {"dataset": str(scratch / "test.txt"), "window": 64, "max_windows": 4, "max_increase": 0.5},
            "generation": {"max_new_tokens": 4, "prompts": ["Where?", "Say hello."]},
            "decoding": None,
            "repair": True,
        },
    }
    recipe = scratch / "tiny.yaml"
    recipe.write_text(json.dumps(values))  # JSON is YAML
    bench = Bench(scratch, recipe, random.Random(seed))
    from llmconvert.recipes.loading import load_recipe
    from llmconvert.recipes.runner import run_recipe

    _leave_plots_blank()
    place = _new_place(bench, "warm")
    run_recipe(load_recipe(recipe, [f"publish.to=file:{place}/out"]), work_dir=place / "work")
    return bench


def _leave_plots_blank() -> None:
    from matplotlib.figure import Figure

    def save(figure: Any, file: Any, **options: Any) -> None:
        file.write(b"<svg></svg>")

    setattr(Figure, "savefig", save)  # noqa: B010 (a declared method)


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
    bench = prepare(scratch, seed)
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
