"""Every writer of artifacts: two at once on one output, and killed at any step, it ends with one whole artifact."""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.writer_process import REFUSED, WRITERS, make_sources, start

QUICK = ("dtype", "quantization")
EACH = [pytest.param(writer, marks=() if writer in QUICK else pytest.mark.slow) for writer in WRITERS]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sources")
    make_sources(directory)
    return directory


@pytest.fixture(scope="module")
def whole(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, bytes], int]]:
    """What a writer makes undisturbed, and in how many steps."""

    @functools.cache
    def found(writer: str) -> tuple[dict[str, bytes], int]:
        place = tmp_path_factory.mktemp("whole")
        assert run(writer, sources, place) == 0, lines(place)
        return content(place / "out"), int(lines(place)[-1].removeprefix("steps "))

    return found


def run(writer: str, sources: Path, place: Path, *, kill_at: int = 0) -> int:
    process = start(writer, sources, place / "out", place / "log", kill_at=kill_at)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def lines(place: Path) -> list[str]:
    return (place / "log").read_text().splitlines() if (place / "log").exists() else []


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def left_in(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()} - {"log", "held", "layers.json"}


@pytest.mark.parametrize("writer", EACH)
def test_a_second_one_is_refused_and_disturbs_nothing(
    sources: Path, whole: Callable[[str], tuple[dict[str, bytes], int]], tmp_path: Path, writer: str
) -> None:
    """The first is held in its middle, and, a directory's writer and a file's, again about when its output appears."""
    expected, steps = whole(writer)
    for late, hold_at in enumerate((steps // 2, steps - 3) if writer in (*QUICK, "GGUF") else (steps // 2,)):
        place = tmp_path / str(hold_at)
        place.mkdir()
        first = start(writer, sources, place / "out", place / "log", hold_at=hold_at, held=place / "held")
        while first.is_alive() and not (place / "held").exists():
            time.sleep(0.005)
        assert first.is_alive(), lines(place)
        assert run(writer, sources, place) == REFUSED, lines(place)
        reason = lines(place)[-1]
        there = late and reason.endswith("out: exists and is not empty; name another output or remove it first")
        assert there or reason.endswith(
            f"out: another run (process {first.pid}) is using it; wait for it, or name another place for this one"
        )
        (place / "held" / "go").touch()
        first.join()
        assert first.exitcode == 0, lines(place)
        assert content(place / "out") == expected
        assert left_in(place) == {"out"}


@pytest.mark.parametrize("writer", EACH)
def test_a_killed_one_is_continued_to_the_same_bytes(
    sources: Path, whole: Callable[[str], tuple[dict[str, bytes], int]], tmp_path: Path, writer: str
) -> None:
    """One chain: each run is killed at a later step than the one before; the last one gets through."""
    expected, steps = whole(writer)
    for share in (0.3, 0.6, 0.9):
        if (tmp_path / "out").exists():
            break
        code = run(writer, sources, tmp_path, kill_at=max(1, int(share * steps)))
        assert code in (0, -signal.SIGKILL), lines(tmp_path)
    if not (tmp_path / "out").exists():
        assert run(writer, sources, tmp_path) == 0, lines(tmp_path)
    assert content(tmp_path / "out") == expected
    assert any("continuing an interrupted run" in line for line in lines(tmp_path))
    assert left_in(tmp_path) == {"out"}
