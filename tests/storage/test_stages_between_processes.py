"""Stages between processes: two that share one, and runs that are killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path

import pytest

from llmconvert.storage.lock import locked
from llmconvert.storage.stages import StageStore

_SHARING = """
import sys, time
from pathlib import Path
from llmconvert.progress import LineProgress
from llmconvert.storage.stages import Begun, StageStore

work, name, go = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])

def build(path):
    (path / "begun").write_text(name)
    print("building", flush=True)
    while not go.exists():
        time.sleep(0.01)
    (path / "out.txt").write_text(name)
    return {"by": name}

with StageStore(work, progress=LineProgress(sys.stdout)) as store:
    run = store.begin(name)
    print("shared by", run.run("shared", {}, build).details["by"], flush=True)
    print("own by", run.run("own", {"name": name}, lambda path: {"by": name}).details["by"], flush=True)
"""


def test_two_processes_build_each_stage_once(tmp_path: Path) -> None:
    """The second one waits for the stage that the first is building, says so, and reuses it."""
    script, work, go = tmp_path / "script.py", tmp_path / "work", tmp_path / "go"
    script.write_text(_SHARING)

    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), str(work), name, str(go)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    with start("one") as first:
        assert first.stdout is not None and first.stdout.readline() == "building\n"
        with start("two") as second:
            assert second.stdout is not None
            line = second.stdout.readline()
            assert line.startswith("shared: ") and line.endswith(f"(process {first.pid}) is using it; waiting\n")
            go.write_text("")
            others = second.communicate()[0].splitlines()
        lines = first.communicate()[0].splitlines()
    assert (first.returncode, second.returncode) == (0, 0)
    assert "shared by one" in lines and "own by one" in lines
    assert "building" not in others and "shared by one" in others and "own by two" in others
    assert any(line.startswith("shared: unchanged, reusing shared-") for line in others)
    assert sorted(path.name.partition("-")[0] for path in work.iterdir()) == ["own", "own", "runs", "shared"]


def test_a_stage_whose_builder_was_killed_is_built_by_who_waited(tmp_path: Path) -> None:
    script, work, go = tmp_path / "script.py", tmp_path / "work", tmp_path / "go"
    script.write_text(_SHARING)
    command = [sys.executable, str(script), str(work)]
    with subprocess.Popen([*command, "one", str(go)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "building\n"
        with subprocess.Popen([*command, "two", str(go)], stdout=subprocess.PIPE, text=True) as second:
            assert second.stdout is not None and "waiting" in second.stdout.readline()
            first.kill()
            while "building" not in second.stdout.readline():
                pass
            go.write_text("")
            assert "shared by two\n" in second.communicate()[0]


_KILLED = """
import sys, time
from pathlib import Path
from llmconvert.storage.stages import Begun, StageStore

def count(path):
    done = sorted(path.glob("part-*"))
    for i in range(len(done), 5):
        (path / f"part-{i}").write_text(str(i))
        print("part", i, flush=True)
        time.sleep(float(sys.argv[2]))
    return {"resumed_from": len(done)}

with StageStore(Path(sys.argv[1])) as store:
    run = store.begin("demo")
    run.run("first", {}, lambda path: print("first", flush=True) or {})
    print(run.run("second", {}, count, resumable=True).details, flush=True)
"""


def test_a_killed_run_continues_and_finished_stages_stay(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(_KILLED))
    command = [sys.executable, str(script), str(tmp_path / "work")]
    with subprocess.Popen([*command, "60"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "first\n"
        assert process.stdout.readline() == "part 0\n"
        process.send_signal(signal.SIGKILL)
    again = subprocess.run([*command, "0"], stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    assert again[0] == "part 1" and again[-1] == "{'resumed_from': 1}"


def test_the_lock_of_an_artifact_whose_builder_was_killed_goes_with_it(tmp_path: Path) -> None:
    """Killed between the artifact's appearance and the removal of its lock, inside a stage that can resume."""

    def killed(path: Path) -> dict[str, object]:
        (path / "model").mkdir()
        (path / ".model.lock").write_text("1\n")
        raise KeyboardInterrupt

    with StageStore(tmp_path) as store, pytest.raises(KeyboardInterrupt):
        store.begin("demo").run("quantize", {}, killed, resumable=True)
    with StageStore(tmp_path) as store:
        result = store.begin("demo").run("quantize", {}, lambda path: {}, resumable=True)
    assert [path.name for path in result.path.iterdir() if path.name != "stage.json"] == ["model"]
    assert not [name for name in result.contents.files if "lock" in name]


def test_a_lock_that_is_held_stays(tmp_path: Path) -> None:
    def build(path: Path) -> dict[str, object]:
        holding.enter_context(locked(path / "model"))
        return {}

    with ExitStack() as holding:
        with StageStore(tmp_path) as store:
            result = store.begin("demo").run("quantize", {}, build)
        assert (result.path / ".model.lock").exists()
