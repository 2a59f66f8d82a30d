"""Locks between processes: refused or waited for, let go of with the process, kept from removing what is read."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from llmconvert.errors import OutputError
from llmconvert.storage.lock import Readers, lock_path, locked, unread

_HOLD = """
import sys
from pathlib import Path
from llmconvert.storage.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def hold(path: Path) -> subprocess.Popen[str]:
    """A process that holds the lock until it is sent a line, or killed."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(path)], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_held_lock_is_refused_with_its_holder_and_what_to_do(tmp_path: Path) -> None:
    with hold(tmp_path / "out") as process:
        with pytest.raises(OutputError) as refused, locked(tmp_path / "out"):
            pass
        assert str(refused.value) == (
            f"{tmp_path / 'out'}: another run (process {process.pid}) is using it; "
            "wait for it, or name another place for this one"
        )
        process.communicate("go\n")
    with locked(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == [], "nothing of a lock stays"


def test_a_place_that_takes_no_lock_is_not_called_in_use() -> None:
    """Nobody can make a file in /proc, whatever its permissions say."""
    if not Path("/proc").is_dir():
        pytest.skip("no /proc here")
    expected = r"/proc/out: cannot be used: its lock \.out\.lock cannot be taken"
    with pytest.raises(OutputError, match=expected), locked(Path("/proc/out")):
        pass


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    with hold(tmp_path / "out") as process:
        process.kill()
    assert lock_path(tmp_path / "out").exists(), "its file stays"
    with locked(tmp_path / "out"):
        assert lock_path(tmp_path / "out").read_text() == f"{os.getpid()}\n"
    assert list(tmp_path.iterdir()) == []


def test_who_waits_says_so_once_and_gets_it(tmp_path: Path) -> None:
    reasons: list[str] = []
    with hold(tmp_path / "out") as process:

        def wait(reason: str) -> None:
            reasons.append(reason)
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()

        with locked(tmp_path / "out", wait=wait):
            process.wait()
    assert reasons == [f"{tmp_path / 'out'}: another run (process {process.pid}) is using it; waiting"]


def test_only_one_of_many_holds_it_at_a_time(tmp_path: Path) -> None:
    """Its file is removed each time, and so is the directory around it now and then."""
    inside, most = 0, 0
    place = tmp_path / "work"

    def take() -> None:
        nonlocal inside, most
        for _ in range(6):
            with locked(place / "out", wait=lambda _: None):
                inside += 1
                most = max(most, inside)
                time.sleep(0.002)
                inside -= 1
            with suppress(OSError):
                place.rmdir()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_a_place_that_cannot_hold_a_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be used"), locked(tmp_path / "file" / "out"):
        pass


def test_what_is_read_is_not_free_until_all_have_left(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    path.write_text("")
    one, two = Readers(), Readers()
    assert one.hold(path) and one.hold(path) and two.hold(path)
    one.release(path)
    with unread(path) as free:
        assert not free
    two.close()
    with unread(path) as free:
        assert free
        path.unlink()
    assert not one.hold(path)
