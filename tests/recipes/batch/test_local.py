"""Batches in processes of this machine: failures and kills stay with their job, and the same call continues."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmconvert.errors import MachineError, SourceError, UsageError
from llmconvert.progress import SILENT, TerminalProgress
from llmconvert.recipes.batch.board import Board
from llmconvert.recipes.batch.jobs import Settings, read_jobs
from llmconvert.recipes.batch.local import _Queue
from llmconvert.recipes.batch.run import run_batch

SCHEMES = ("w4a16-g32", "w8a16-g32")


def quick(write_recipe: Any, name: str, scheme: str = SCHEMES[0], **sections: Any) -> str:
    return str(write_recipe(name, quantize={"method": "rtn", "scheme": scheme}, validate=None, **sections))


def children(process: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


def alive(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


class Log:
    """Keeps lines, and kills this process's children when one of them is ``killing``."""

    def __init__(self, killing: str = "") -> None:
        self.lines: list[str] = []
        self._killing = killing

    def log(self, message: str) -> None:
        self.lines.append(message)
        if self._killing and self._killing in message:
            for process in children(os.getpid()):
                os.kill(process, signal.SIGKILL)

    def task(self, description: str, total: float) -> Any:
        return SILENT.task(description, total)


def weights(outcome: Any) -> bytes:
    content: bytes = (outcome.result.artifact / "model.safetensors").read_bytes()
    return content


@pytest.mark.slow
def test_what_happens_to_one_job_is_its_own(write_recipe: Any, tmp_path: Path) -> None:
    recipes = [
        quick(write_recipe, "good"),
        quick(write_recipe, "absent", model=str(tmp_path / "none")),
        quick(write_recipe, "killed", SCHEMES[1]),
    ]
    log = Log("killed.yaml: started")
    work = tmp_path / "work"
    outcomes = run_batch(recipes, work_dir=work, engine="local", progress=log)
    assert [outcome.exit_code for outcome in outcomes] == [0, 4, 5]
    assert [type(outcome.failure) for outcome in outcomes[1:]] == [SourceError, MachineError]
    assert "signal 9" in outcomes[2].error and outcomes[2].log is not None and outcomes[2].log.name in outcomes[2].error
    summary = json.loads((work / "batch" / "summary.json").read_text())
    assert [job["state"] for job in summary["jobs"]] == ["done", "failed", "failed"]
    assert "convert: done in" in (work / "batch" / "001-good.log").read_text()

    again = run_batch(recipes, work_dir=work, engine="local", progress=Log())
    assert [outcome.exit_code for outcome in again] == [0, 4, 0]
    assert "quantize: unchanged, reusing" in (work / "batch" / "001-good.log").read_text()
    here = run_batch([recipes[0], recipes[2]], work_dir=tmp_path / "here")
    assert [weights(outcome) for outcome in here] == [weights(again[0]), weights(again[2])]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_it_leaves_nobody_running(number: int, write_recipe: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmconvert.cli", "batch", quick(write_recipe, "one"), quick(write_recipe, "two")]
    with subprocess.Popen(
        [*command, "--work-dir", str(tmp_path / "work")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "one.yaml: started" in line:
                break
        jobs = children(process.pid)
        assert jobs
        process.send_signal(number)
        assert process.wait() == (6 if number == signal.SIGINT else -signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(alive(job) for job in jobs):
        assert time.monotonic() < deadline, "a job's process outlives the batch"
        time.sleep(0.05)


def test_two_that_would_take_one_place_are_refused_before_anything_starts(write_recipe: Any, tmp_path: Path) -> None:
    one = quick(write_recipe, "one", publish={"to": f"file:{tmp_path}/out"})
    two = quick(write_recipe, "two", publish={"to": f"file:{tmp_path}/there/../out"})
    for engine in ("here", "local"):
        with pytest.raises(UsageError, match=r"one\.yaml and .*two\.yaml would both be published to file:.*/out"):
            run_batch([one, two], work_dir=tmp_path / "work", engine=engine)
    assert not (tmp_path / "work").exists()
    # Not published, they take no place.
    assert len(read_jobs([one, two], Settings(publish=False))) == 2
    matrix = {"quantize.scheme": list(SCHEMES)}
    pages = [quick(write_recipe, file, matrix=matrix) for file in ("three", "four")]
    with pytest.raises(UsageError, match=r"three\.yaml and .*four\.yaml are both sweeps of the name 'many'"):
        run_batch(pages, overrides=["name=many"], work_dir=tmp_path / "work", engine="local", publish=False)
    assert not (tmp_path / "work").exists()


def test_memory_and_disk_say_what_runs_together(write_recipe: Any, tmp_path: Path) -> None:
    jobs = read_jobs([quick(write_recipe, name) for name in "abc"], Settings(work_dir=tmp_path))
    with Board(jobs, tmp_path / "logs", SILENT) as board:
        queue = _Queue(jobs, board, 3, 1000)
        for state, memory in zip(board.states, (600, 400, 401), strict=True):
            state.needs = {"memory": memory, "disk": 1, "device_memory": 0}
        assert queue._has_room(1, [0]) and not queue._has_room(2, [0])
        assert queue._has_room(2, []), "alone, it has what there is"
        board.states[1].needs = {"memory": 1, "disk": 1 << 62, "device_memory": 0}
        assert not queue._has_room(1, [0]), "the disk is full"
        board.states[1].needs = None
        assert not queue._has_room(1, [0]) and not queue._has_room(0, [1]), "what isn't known runs alone"
        for state in board.states:
            state.needs = {"memory": 1, "disk": 1, "device_memory": 5}
        assert not queue._has_room(1, [0]), "one accelerator"
        queue.close()


def test_the_table_fits_80_columns_and_counts_what_it_leaves_out(write_recipe: Any, tmp_path: Path) -> None:
    path = quick(write_recipe, "a-recipe-with-a-name-that-is-far-longer-than-its-column-could-ever-be")
    jobs = read_jobs([path] * 40, Settings(work_dir=tmp_path))
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    board = Board(jobs, tmp_path / "logs", TerminalProgress(console))
    for state in board.states[:3]:
        state.state = "done"
    board.begin(3, "running")
    for message in ({"task": "Quantizing", "total": 30.0}, {"done": 15.0}, {"memory": 1_500_000_000}):
        board.hear(3, message)
    console.print(board.table())
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    (row,) = (line for line in lines if "running" in line)
    assert "Quantizing" in row and "━━━━━" in row and "1.5 GB" in row and "0:00" in row
    assert "28 waiting" in lines[-1] and len(lines) < 20
