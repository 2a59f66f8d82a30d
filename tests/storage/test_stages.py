"""Stages: reuse, changes, what a run leaves."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from llmconvert.errors import CapacityError, CheckpointError, MachineError, OutputError, SchemeError
from llmconvert.storage.stage_record import STAGE_FILE, describe_changes, stage_key, write_run
from llmconvert.storage.stages import Begun, StageStore


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


def keep_times(path: Path, content: bytes) -> None:
    """Overwrite a file so that its size and its time of modification stay."""
    status = path.stat()
    assert len(content) == status.st_size
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def edit_record(path: Path) -> None:
    record = json.loads((path / STAGE_FILE).read_text())
    record["details"]["length"] = 7
    (path / STAGE_FILE).write_text(json.dumps(record))


def drop_key(path: Path) -> None:
    record = json.loads((path / STAGE_FILE).read_text())
    del record["seconds"]
    (path / STAGE_FILE).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: (path / "out.txt").unlink(), "out.txt is missing"),
        (lambda path: (path / "out.txt").write_text("a longer one"), "out.txt has 12 bytes, 5 were written"),
        (lambda path: keep_times(path / "out.txt", b"hellO"), "out.txt holds other bytes than were written"),
        (lambda path: (path / "more.txt").write_text(""), "more.txt was added"),
        (lambda path: (path / STAGE_FILE).write_text('{"schema": "llmconv'), "its stage.json can't be trusted"),
        (lambda path: (path / STAGE_FILE).write_text("[" * 99_999), "its stage.json can't be trusted"),
        (lambda path: (path / STAGE_FILE).unlink(), "its stage.json can't be trusted"),
        (edit_record, "its stage.json can't be trusted"),
        (drop_key, "its stage.json can't be trusted"),
    ],
)
def test_a_stage_that_is_not_as_it_was_written_is_built_anew_and_said_so(
    tmp_path: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    log = Log()
    with StageStore(tmp_path) as store:
        path = store.begin("demo").run("convert", {}, writing("hello")).path
    spoil(path)
    for built in (True, False):
        with StageStore(tmp_path, progress=log) as store:
            result = store.begin("demo").run("convert", {}, writing("hello") if built else never)
        assert result.reused is not built and (result.path / "out.txt").read_text() == "hello"
    assert log.lines[0] == f"convert: {path.name} is not as it was written, {reason}; building it anew"
    assert not (path / "more.txt").exists()


def test_what_is_hidden_is_nobodys(tmp_path: Path) -> None:
    with StageStore(tmp_path) as store:
        path = store.begin("demo").run("convert", {}, writing("hello")).path
        (path / ".DS_Store").write_text("a file manager's")
        store.begin("demo").run("convert", {}, never)


def test_what_was_made_from_a_stage_that_came_out_otherwise_is_built_anew(tmp_path: Path) -> None:
    """The same inputs may give other bytes: another number of threads sums in another order."""
    log = Log()
    for text in ("one", "one", "two", "two"):
        with StageStore(tmp_path, progress=log) as store:
            run = store.begin("demo")
            made = run.run("convert", {}, writing(text))
            run.run("validate", {"artifact": {"model": made.key}}, writing(f"measured on {text}"))
        (made.path / "out.txt").unlink()
    rebuilt = [line.partition(" is not")[2] for line in log.lines if line.startswith("validate: ") and "anew" in line]
    assert rebuilt == [" as it was written, made from another convert; building it anew"]
    (measured,) = tmp_path.glob("validate-*/out.txt")
    assert measured.read_text() == "measured on two"


def test_a_stage_that_cannot_be_read_now_is_no_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StageStore(tmp_path) as store:
        result = store.begin("demo").run("convert", {}, writing("hello"))

    def broken(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    for name in ("contents.hashlib.file_digest", "contents.os.scandir", "lock.os.open", "stage_record.Path.read_bytes"):
        with monkeypatch.context() as patched, StageStore(tmp_path) as store:
            patched.setattr(f"llmconvert.storage.{name}", broken)
            with pytest.raises(MachineError, match="Input/output error"):
                store.begin("demo").run("convert", {}, never)
    with StageStore(tmp_path) as store:
        assert store.begin("demo").run("convert", {}, never).path == result.path


def test_a_disk_that_fails_leaves_what_a_stage_can_continue_from(tmp_path: Path) -> None:
    error = CheckpointError("reading weights: Input/output error")
    error.__cause__ = OSError(errno.EIO, "Input/output error")
    with StageStore(tmp_path) as store, pytest.raises(CheckpointError):
        store.begin("demo").run("quantize", {}, failing(error), resumable=True)
    assert len(list(tmp_path.glob(".quantize-*.partial/half"))) == 1


def test_damaged_leftovers_of_a_killed_run_are_left_behind(tmp_path: Path) -> None:
    log = Log()
    with StageStore(tmp_path) as store, pytest.raises(KeyboardInterrupt):
        store.begin("demo").run("quantize", {}, failing(KeyboardInterrupt()), resumable=True)

    def resume(path: Path) -> Mapping[str, Any]:
        if (path / "half").exists():
            json.loads((path / "half").read_text())
        return writing("whole")(path)

    with StageStore(tmp_path, progress=log) as store:
        result = store.begin("demo").run("quantize", {}, resume, resumable=True)
    assert result.contents.files.keys() == {"out.txt"}
    assert any("what an interrupted run left is damaged (JSONDecodeError: " in line for line in log.lines)


def test_fresh_removes_no_directory_that_a_damaged_record_names(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    work = tmp_path / "work"
    with StageStore(work) as store:
        store.begin("demo").run("convert", {}, writing("hello"))
    record = work / "runs" / "demo.json"
    for stage in ("../mine", str(mine), "", "."):
        write_run(record, {"convert": {"stage": stage, "inputs": {}}})
        with StageStore(work) as store:
            store.begin("demo", fresh=True)
        assert mine.is_dir() and len(list(work.glob("convert-*"))) == 1
    record.write_text(json.dumps({"schema": "llmconvert.stage/2", "stages": {"convert": {}}}))
    with StageStore(work) as store:
        store.begin("demo").run("convert", {}, never)


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


def test_what_another_run_uses_is_not_removed(tmp_path: Path) -> None:
    with StageStore(tmp_path / "w") as reading:
        used = reading.begin("one").run("convert", {}, writing("x"))
        with StageStore(tmp_path / "w") as other:
            reused = other.begin("two").run("convert", {}, never)
            with pytest.raises(OutputError, match="another run is using it, so it is not built anew"):
                other.begin("two", fresh=True)
        assert reused.path == used.path and (used.path / "out.txt").read_text() == "x"
    with StageStore(tmp_path / "w") as alone:
        assert not alone.begin("two", fresh=True).run("convert", {}, writing("y")).reused


def test_an_empty_work_directory_goes_when_it_is_closed(tmp_path: Path) -> None:
    with StageStore(tmp_path / "w"), StageStore(tmp_path / "w"):
        assert (tmp_path / "w").is_dir()
    assert not (tmp_path / "w").exists()


def test_a_work_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be used"):
        StageStore(tmp_path / "file" / "work")


@pytest.mark.parametrize("fresh", [False, True])
def test_what_was_begun_together_with_others_is_continued(tmp_path: Path, fresh: bool) -> None:
    with StageStore(tmp_path) as store:
        if fresh:
            store.begin("demo").run("convert", {"a": 1}, writing("old"), resumable=True)
            store.built.clear()  # by an earlier process
        run = store.begin("demo", fresh=fresh)
        with run.beginning("convert", {"a": 1}) as directory:
            assert directory is not None and not list(directory.iterdir())
            (directory / "begun").write_text("together")
        run.begun("convert", {"a": 1}, Begun(seconds=100.0, peak_rss_bytes=1 << 60))

        def build(path: Path) -> Mapping[str, Any]:
            return {"text": (path / "begun").read_text()}

        result = run.run("convert", {"a": 1}, build, resumable=True)
        assert result.details == {"text": "together"} and not result.resumed and not result.reused
        assert result.seconds >= 100 and result.peak_rss_bytes == 1 << 60
        with run.beginning("convert", {"a": 1}) as directory:
            assert directory is None
