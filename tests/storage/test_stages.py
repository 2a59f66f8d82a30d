"""Stages: reuse, changes, kills, locks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from llmconvert.errors import CapacityError, OutputError, SchemeError
from llmconvert.storage.stages import STAGE_FILE, StageStore, describe_changes, stage_key


class Log:
    """A progress that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)

    def task(self, description: str, total: float) -> Any:
        raise AssertionError("no task expected")


def writing(text: str) -> Callable[[Path], Mapping[str, Any]]:
    def build(path: Path) -> Mapping[str, Any]:
        assert not list(path.iterdir()), "a stage that cannot resume starts empty"
        (path / "out.txt").write_text(text)
        return {"length": len(text)}

    return build


def never(path: Path) -> Mapping[str, Any]:
    raise AssertionError(f"{path} must not be built")


def failing(error: BaseException) -> Callable[[Path], Mapping[str, Any]]:
    def build(path: Path) -> Mapping[str, Any]:
        (path / "half").write_text("half")
        raise error

    return build


def test_a_stage_is_built_once_and_described(tmp_path: Path) -> None:
    with StageStore(tmp_path / "work") as store:
        first = store.begin("demo").run("convert", {"dtype": "bfloat16"}, writing("hello"))
        second = store.begin("demo").run("convert", {"dtype": "bfloat16"}, never)
    assert (first.reused, second.reused) == (False, True)
    assert first.path == second.path == tmp_path / "work" / f"convert-{first.key[:12]}"
    assert second.details == {"length": 5} and second.seconds == first.seconds and second.peak_rss_bytes > 1 << 20
    record = json.loads((first.path / STAGE_FILE).read_text())
    assert record["inputs"] == {"dtype": "bfloat16"} and record["key"] == first.key


def test_keys_depend_on_values_and_not_on_their_order() -> None:
    assert stage_key("a", {"x": 1, "y": [2]}) == stage_key("a", {"y": [2], "x": 1})
    assert len({stage_key("a", {"x": 1}), stage_key("b", {"x": 1}), stage_key("a", {"x": 2})}) == 3


def test_a_changed_input_is_named_and_the_old_stage_stays(tmp_path: Path) -> None:
    log = Log()
    with StageStore(tmp_path, progress=log) as store:
        for scheme in ("w4a16-g64-sym", "w3a16-g64-sym", "w4a16-g64-sym"):
            run = store.begin("demo")
            run.run("convert", {"dtype": "bfloat16"}, writing("model"))
            run.run("quantize", {"settings": {"scheme": scheme, "seed": 0}}, writing(scheme))
    assert "quantize: settings.scheme w4a16-g64-sym → w3a16-g64-sym, starting anew" in log.lines
    assert sum("starting anew" in line for line in log.lines) == 1, "going back finds the first one again"
    assert sum(line.startswith("convert: unchanged, reusing convert-") for line in log.lines) == 2


def test_changes_are_listed_up_to_a_few() -> None:
    assert describe_changes({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}, "d": 4}) == "b.c 2 → 3, d unset → 4"
    assert describe_changes({"a": 1}, {"a": 1}) == ""
    assert describe_changes({"model": "a" * 64}, {"model": "b" * 64}) == f"model {'a' * 12} → {'b' * 12}"
    assert describe_changes({}, {str(i): i for i in range(6)}).endswith("3 unset → 3, 2 more")


def test_bad_input_leaves_nothing_behind(tmp_path: Path) -> None:
    work = tmp_path / "work"
    for resumable in (False, True):
        with StageStore(work) as store, pytest.raises(SchemeError):
            store.begin("demo").run("quantize", {}, failing(SchemeError("no")), resumable=resumable)
        assert not work.exists()


def test_only_a_resumable_stage_keeps_what_it_had(tmp_path: Path) -> None:
    log = Log()
    with StageStore(tmp_path, progress=log) as store:
        with pytest.raises(CapacityError):
            store.begin("demo").run("convert", {}, failing(CapacityError("disk full")))
        with pytest.raises(KeyboardInterrupt):
            store.begin("demo").run("quantize", {}, failing(KeyboardInterrupt()), resumable=True)
    hidden = sorted(path.name for path in tmp_path.iterdir() if path.name.endswith(".partial"))
    assert len(hidden) == 1 and hidden[0].startswith(".quantize-")

    def resume(path: Path) -> Mapping[str, Any]:
        assert (path / "half").read_text() == "half"
        return {}

    with StageStore(tmp_path, progress=log) as store:
        result = store.begin("demo").run("quantize", {}, resume, resumable=True)
    assert result.resumed and not result.reused
    assert "quantize: was interrupted, continuing" in log.lines


def test_an_unfinished_stage_goes_when_its_inputs_change(tmp_path: Path) -> None:
    log = Log()
    with StageStore(tmp_path, progress=log) as store:
        with pytest.raises(KeyboardInterrupt):
            store.begin("demo").run("quantize", {"bits": 4}, failing(KeyboardInterrupt()), resumable=True)
        store.begin("demo").run("quantize", {"bits": 3}, writing("x"), resumable=True)
    assert log.lines[0] == "quantize: bits 4 → 3, starting anew, the unfinished one is removed"
    assert not list(tmp_path.glob(".*.partial"))


def test_a_stage_with_a_torn_description_is_built_again(tmp_path: Path) -> None:
    with StageStore(tmp_path) as store:
        result = store.begin("demo").run("convert", {}, writing("a"))
        (result.path / STAGE_FILE).write_text('{"schema": "llmconv')
        again = store.begin("demo").run("convert", {}, writing("b"))
    assert not again.reused and (again.path / "out.txt").read_text() == "b"


def test_fresh_builds_everything_anew_but_once_per_batch(tmp_path: Path) -> None:
    built: list[str] = []

    def build(path: Path) -> Mapping[str, Any]:
        built.append(path.name)
        return {}

    for fresh in (False, True):
        with StageStore(tmp_path) as store:
            for name in ("a", "b"):
                run = store.begin(name, fresh=fresh)
                run.run("convert", {}, build)
                run.run("quantize", {"recipe": name}, build)
    assert len(built) == 6, "three stages, twice: the conversion is shared within each batch"


def test_fresh_removes_what_the_recipe_used_before(tmp_path: Path) -> None:
    with StageStore(tmp_path) as store:
        old = store.begin("demo").run("quantize", {"bits": 4}, writing("4"))
    with StageStore(tmp_path) as store:
        store.begin("demo", fresh=True).run("quantize", {"bits": 3}, writing("3"))
    assert not old.path.exists()


def test_a_work_directory_has_one_run_at_a_time(tmp_path: Path) -> None:
    with StageStore(tmp_path / "w"), pytest.raises(OutputError, match=rf"process {os.getpid()}\) is using it"):
        StageStore(tmp_path / "w")
    assert not (tmp_path / "w").exists()
    with StageStore(tmp_path / "w"):
        pass


def test_a_work_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be used"):
        StageStore(tmp_path / "file" / "work")


_KILLED = """
import sys, time
from pathlib import Path
from llmconvert.storage.stages import StageStore

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
