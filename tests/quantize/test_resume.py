"""Runs killed without warning, at any step: the same call continues, and ends with the same bytes."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantize_process import start
from support.tiny_architectures import ids, tiny_model

from llmconvert.errors import OutputError
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.numbers import Int
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

BLOCKS = 4
Run = Callable[..., int]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("resume") / "model"
    return tiny_model(directory, "llama-tied", dtype=torch.bfloat16, num_hidden_layers=BLOCKS)


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Run:
    """Run the job in a process of its own and give its exit code."""

    def run(output: str = "out", **options: Any) -> int:
        process = start(source, tmp_path / output, tmp_path / "log", **options)
        process.join()
        assert process.exitcode is not None
        assert process.exitcode != 1, (tmp_path / "log").read_text()
        return process.exitcode

    return run


def artifact(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """What an uninterrupted run writes, and the steps it takes."""
    place = tmp_path_factory.mktemp("whole")
    # The first one writes the cache of compiled loops, which would be counted as steps.
    for output in ("first", "out"):
        process = start(source, place / output, place / "log")
        process.join()
    found = artifact(place / "out")
    assert sum(name.endswith(".safetensors") for name in found) > 2
    assert {"config.json", "model.safetensors.index.json"} <= set(found)
    return found, steps_of(place)


@pytest.fixture
def expected(whole: tuple[dict[str, bytes], int]) -> dict[str, bytes]:
    """The files of the artifact, bit for bit."""
    return whole[0]


@pytest.fixture
def total(whole: tuple[dict[str, bytes], int]) -> int:
    """Steps of an uninterrupted run."""
    return whole[1]


def lines(tmp_path: Path) -> list[str]:
    """What the runs so far have reported."""
    return (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []


def steps_of(tmp_path: Path) -> int:
    return int(lines(tmp_path)[-1].removeprefix("steps "))


@pytest.mark.slow
def test_killed_again_and_again(run: Run, expected: dict[str, bytes], tmp_path: Path) -> None:
    """One chain: each run is killed some steps later into what is left than the one before, until one gets through."""
    kills = 0
    while not (tmp_path / "out").exists():
        kills += run(kill_at=4 + 5 * kills) == -signal.SIGKILL
    assert kills > 4
    assert artifact(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir() if path.name != "log"] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lockstep", "replay"])
def test_killed_at_random_steps(run: Run, expected: dict[str, bytes], tmp_path: Path, mode: str) -> None:
    generator = random.Random(mode)
    for _ in range(30):
        run(kill_at=generator.randint(1, 60), mode=mode)
        if (tmp_path / "out").exists():
            break
    else:
        assert run(mode=mode) == 0
    assert artifact(tmp_path / "out") == expected


@pytest.mark.slow
@pytest.mark.parametrize(("method", "mode"), [("gptaq", "replay"), ("awq", "lockstep")])
def test_two_streams_and_moved_scales_are_continued(run: Run, tmp_path: Path, method: str, mode: str) -> None:
    assert run("whole", method=method, mode=mode) == 0
    kills = 0
    while not (tmp_path / "out").exists():
        kills += run(method=method, mode=mode, kill_at=20 + 9 * kills) == -signal.SIGKILL
    assert kills > 2
    assert any("continuing an interrupted run" in line for line in lines(tmp_path))
    assert artifact(tmp_path / "out") == artifact(tmp_path / "whole")


def test_killed_at_random_times(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    generator = random.Random(0)
    for _ in range(12):
        process = start(source, tmp_path / "out", tmp_path / "log")
        time.sleep(generator.uniform(0.02, 0.5))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
    else:
        process = start(source, tmp_path / "out", tmp_path / "log")
        process.join()
    assert artifact(tmp_path / "out") == expected


@pytest.mark.slow
def test_killed_at_each_of_the_last_steps(run: Run, expected: dict[str, bytes], total: int, tmp_path: Path) -> None:
    """Side files, the removal of work files, the rename that makes the artifact appear, and what follows it."""
    complete = []
    for left in range(10):
        output = f"out{left}"
        assert run(output, kill_at=total - left) == -signal.SIGKILL
        if (tmp_path / output).exists():
            complete.append(left)
        else:
            assert run(output) == 0
        assert artifact(tmp_path / output) == expected
    # Behind the rename its folder is forced to disk and the lock goes; a second run would be refused.
    assert complete == list(range(len(complete))) and 1 <= len(complete) <= 3


@pytest.fixture
def half_done(run: Run, total: int, tmp_path: Path) -> Path:
    """The directory that a run worked in until it was killed after some of its blocks."""
    assert run(kill_at=total * 6 // 10, mode="lockstep") == -signal.SIGKILL
    staging = tmp_path / ".out.partial"
    journal = (staging / ".work" / "journal.jsonl").read_text()
    assert 1 <= journal.count('"block ') < BLOCKS
    return staging


def test_finished_blocks_are_not_done_again(
    run: Run, half_done: Path, expected: dict[str, bytes], total: int, tmp_path: Path
) -> None:
    assert run() == 0
    assert any("continuing an interrupted run: " in line for line in lines(tmp_path))
    assert steps_of(tmp_path) < 0.75 * total
    assert artifact(tmp_path / "out") == expected


def test_results_of_all_blocks_are_reported_after_resuming(half_done: Path, source: Path, tmp_path: Path) -> None:
    request: dict[str, Any] = {"method": "gptq", "scheme": Scheme(Int(4), 32), "windows": ids((16, 24))}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        resumed, whole = (
            quantize_checkpoint(SafetensorsCheckpoint(source), tmp_path / name, max_shard_bytes=40_000, **request)
            for name in ("out", "anew")
        )
    finally:
        torch.set_num_threads(before)
    assert resumed.resumed_blocks >= 1 and whole.resumed_blocks == 0
    assert resumed.layers == whole.layers


@pytest.mark.parametrize(
    "change",
    [{"scheme": "w3a16-g32"}, {"seed": 1}, {"windows": (16, 25)}, {"method": "rtn"}],
    ids=lambda item: str(item),
)
def test_other_inputs_start_anew_and_say_so(run: Run, half_done: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    assert run(**change) == 0
    assert any(line.endswith("holds an interrupted run with other inputs; starting anew") for line in lines(tmp_path))
    assert run("other", **change) == 0
    assert artifact(tmp_path / "out") == artifact(tmp_path / "other")


def test_the_mode_may_change_in_between(run: Run, half_done: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    assert run(mode="replay") == 0
    assert any("continuing an interrupted run" in line for line in lines(tmp_path))
    assert artifact(tmp_path / "out") == expected


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [remove, cut])
@pytest.mark.parametrize("victim", [".work/states-*.bin", "model-00001-of-*.safetensors"])
def test_lost_work_files_start_anew_and_say_so(
    run: Run,
    half_done: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    victim: str,
    damage: Callable[[Path], None],
) -> None:
    for path in half_done.glob(victim):
        damage(path)
    assert run() == 0
    assert any("gone or cut short; starting anew" in line for line in lines(tmp_path))
    assert artifact(tmp_path / "out") == expected


def test_a_damaged_journal_continues_from_what_is_certain(
    run: Run, half_done: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    journal = half_done / ".work" / "journal.jsonl"
    content = bytearray(journal.read_bytes())
    content[-20] ^= 1
    journal.write_bytes(content)
    assert run() == 0
    assert artifact(tmp_path / "out") == expected


def test_a_second_run_on_the_same_output_is_refused(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    process = start(source, tmp_path / "out", tmp_path / "log", windows=(120,) * 30)
    while not (tmp_path / ".out.partial" / ".work" / "journal.jsonl").exists():
        time.sleep(0.002)
    with pytest.raises(OutputError, match=r"another run \(process \d+\) is using it"):
        quantize_checkpoint(
            SafetensorsCheckpoint(source),
            tmp_path / "out",
            method="gptq",
            scheme=Scheme(Int(4), 32),
            windows=ids((16, 24)),
        )
    assert process.is_alive()
    process.join()
    assert process.exitcode == 0, "the first run was not disturbed"
    assert set(artifact(tmp_path / "out")) == set(expected)
