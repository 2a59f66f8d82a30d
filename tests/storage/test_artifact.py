"""One way to disk: what is continued and what is cleared, what an error leaves, and what makes two runs one job."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmconvert.errors import (
    CalibrationError,
    CapacityError,
    HubError,
    OutputError,
    RunInterruptedError,
    UnsupportedError,
)
from llmconvert.progress import LineProgress
from llmconvert.storage import artifact as artifact_module
from llmconvert.storage.artifact import Artifact, build_artifact, job_key
from llmconvert.storage.checkpoint import CheckpointView, SafetensorsCheckpoint, TensorSpec
from llmconvert.storage.writer import plan_layout

SPECS = [TensorSpec(name, torch.float32, (4, 3)) for name in ("a", "b", "c")]
LAYOUT = plan_layout(SPECS, max_shard_bytes=60)
VALUES = {spec.name: torch.arange(12.0).reshape(4, 3) + 100 * index for index, spec in enumerate(SPECS)}


def write(artifact: Artifact, *names: str) -> None:
    for name in names:
        artifact.writer.write(name, VALUES[name])
        artifact.finish(name, {"sum": float(VALUES[name].sum())})


def stop_after(output: Path, error: BaseException, *names: str, key: str = "key") -> None:
    with pytest.raises(type(error)), build_artifact(output, LAYOUT, key) as artifact:
        write(artifact, *names)
        raise error


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    with SafetensorsCheckpoint(directory) as checkpoint:
        return dict(checkpoint)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    save_file(VALUES, directory / "model.safetensors")
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


def test_an_artifact_appears_whole_and_nothing_else_stays(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "place" / "out"
    with SafetensorsCheckpoint(source) as checkpoint, build_artifact(out, LAYOUT, "key") as artifact:
        write(artifact, "b")
        (artifact.work / "activations.bin").write_bytes(b"x")
        (artifact.work / "folder").mkdir()
        artifact.copy(checkpoint, checkpoint)
        assert not out.exists()
        nbytes = artifact.publish({"model_type": "llama"}, {"note.txt": b"hello", "copy.json": source / "config.json"})
    assert all(torch.equal(tensors(out)[name], value) for name, value in VALUES.items())
    assert nbytes == sum(path.stat().st_size for path in out.iterdir())
    assert (out / "note.txt").read_bytes() == b"hello" and json.loads((out / "copy.json").read_text())
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["out"]


def test_a_single_file_needs_no_directory(tmp_path: Path) -> None:
    layout = plan_layout(SPECS)
    with build_artifact(tmp_path / "one.bin", layout, "key") as artifact:
        write(artifact, *VALUES)
        artifact.publish(None, {}, single=True)
    found = load_file(tmp_path / "one.bin")
    assert all(torch.equal(found[name], value) for name, value in VALUES.items())
    assert [path.name for path in tmp_path.iterdir()] == ["one.bin"]


def test_the_same_job_is_continued_and_says_what_it_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: Path
) -> None:
    stop_after(tmp_path / "out", KeyboardInterrupt(), "a", "b")
    with build_artifact(tmp_path / "out", LAYOUT, "key", progress=LineProgress(sys.stdout)) as artifact:
        assert artifact.resumed and artifact.done == {"a": {"sum": 66.0}, "b": {"sum": 1266.0}}
        write(artifact, "c")
        artifact.publish({"model_type": "llama"}, {})
    assert "continuing an interrupted run: b was finished last" in capsys.readouterr().out
    assert all(torch.equal(tensors(tmp_path / "out")[name], value) for name, value in VALUES.items())


def test_finished_tensors_are_not_copied_again(source: Path, tmp_path: Path) -> None:
    read: list[str] = []

    class Reading(CheckpointView):
        def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
            read.append(name)
            return super().read_rows(name, start, stop)

    stop_after(tmp_path / "out", KeyboardInterrupt(), "b")
    with SafetensorsCheckpoint(source) as checkpoint, build_artifact(tmp_path / "out", LAYOUT, "key") as artifact:
        view = Reading(checkpoint)
        artifact.copy(view, view)
        assert read == ["a", "c"] and list(artifact.done) == ["b", "a", "c"]


def test_tensors_are_copied_in_slices(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_module, "_COPY_NBYTES", 13)
    with SafetensorsCheckpoint(source) as checkpoint, build_artifact(tmp_path / "out", LAYOUT, "key") as artifact:
        artifact.copy(checkpoint, VALUES)
        artifact.publish({"model_type": "llama"}, {})
    assert all(torch.equal(tensors(tmp_path / "out")[name], value) for name, value in VALUES.items())


def _other_key(staging: Path) -> str:
    return "another"


def _cut(staging: Path) -> str:
    shard = staging / LAYOUT.shards[0].name
    shard.write_bytes(shard.read_bytes()[:-1])
    return "key"


def _gone(staging: Path) -> str:
    (staging / LAYOUT.shards[-1].name).unlink()
    return "key"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_other_key, "holds an interrupted run with other inputs"),
        (_cut, "of an interrupted run is gone or cut short"),
        (_gone, "of an interrupted run is gone or cut short"),
    ],
)
def test_what_cannot_be_continued_is_cleared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], str], reason: str
) -> None:
    stop_after(tmp_path / "out", KeyboardInterrupt(), "a", "b")
    staging = tmp_path / ".out.partial"
    (staging / "stray").mkdir()
    key = change(staging)
    with build_artifact(tmp_path / "out", LAYOUT, key, progress=LineProgress(sys.stdout)) as artifact:
        assert not artifact.resumed and not artifact.done and not (staging / "stray").exists()
        assert not tensors_in(staging).any(), "no byte of the other run is left"
    assert f"{reason}; starting anew" in capsys.readouterr().out


def tensors_in(staging: Path) -> torch.Tensor:
    shards = [(staging / shard.name).read_bytes()[len(shard.header) :] for shard in LAYOUT.shards]
    return torch.frombuffer(bytearray(b"".join(shards)), dtype=torch.uint8)


def test_the_writer_may_say_that_finished_pieces_are_of_no_use(tmp_path: Path) -> None:
    stop_after(tmp_path / "out", KeyboardInterrupt(), "a")
    with build_artifact(tmp_path / "out", LAYOUT, "key", lost=lambda found: f"{list(found.done)} lost") as artifact:
        assert not artifact.resumed


def test_pieces_in_quick_succession_are_made_last_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with build_artifact(tmp_path / "out", LAYOUT, "key") as artifact:
        journal = artifact.work / artifact_module.JOURNAL
        counts = []
        for name in VALUES:
            artifact.writer.write(name, VALUES[name])
            monkeypatch.setattr(artifact_module, "_SYNC_SECONDS", 0 if name == "c" else 3600)
            artifact.finish(name, batched=True)
            counts.append(len(journal.read_text().splitlines()))
        assert counts == [1, 1, 2]


Keep = tuple[BaseException, tuple[str, ...], bool]
ERRORS: Mapping[str, Keep] = {
    "refused": (UnsupportedError("no"), ("a",), False),
    "unusable input": (CalibrationError("nan"), ("a",), False),
    "full disk, nothing done": (CapacityError("full"), (), False),
    "full disk, something done": (CapacityError("full"), ("a",), True),
    "interrupted, nothing done": (RunInterruptedError("stop"), (), False),
    "interrupted, something done": (RunInterruptedError("stop"), ("a",), True),
    "lost connection": (HubError("gone"), ("a",), True),
    "a bug": (ZeroDivisionError(), ("a",), True),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_leaves_what_can_be_continued_and_nothing_else(tmp_path: Path, case: str) -> None:
    error, done, kept = ERRORS[case]
    stop_after(tmp_path / "out", error, *done)
    assert [path.name for path in tmp_path.iterdir()] == ([".out.partial"] if kept else [])


def test_what_an_earlier_run_achieved_outlives_a_refusal(tmp_path: Path) -> None:
    stop_after(tmp_path / "out", KeyboardInterrupt(), "a")
    stop_after(tmp_path / "out", UnsupportedError("no"), "b")
    with build_artifact(tmp_path / "out", LAYOUT, "key") as artifact:
        assert list(artifact.done) == ["a", "b"]


def test_work_files_alone_are_worth_keeping(tmp_path: Path) -> None:
    """A download that broke off has no finished piece, and goes on from the bytes that came."""
    with pytest.raises(HubError), build_artifact(tmp_path / "out", LAYOUT, "key") as artifact:
        (artifact.work / "shard").write_bytes(b"half")
        raise HubError("gone")
    with build_artifact(tmp_path / "out", LAYOUT, "key") as artifact:
        assert (artifact.work / "shard").read_bytes() == b"half"


def test_pieces_finished_before_an_interrupt_are_kept_though_not_yet_journaled(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), build_artifact(tmp_path / "out", LAYOUT, "key") as artifact:
        artifact.writer.write("a", VALUES["a"])
        artifact.finish("a", batched=True)
        raise KeyboardInterrupt
    with build_artifact(tmp_path / "out", LAYOUT, "key") as artifact:
        assert list(artifact.done) == ["a"]


def test_one_at_a_time(tmp_path: Path) -> None:
    with build_artifact(tmp_path / "out", LAYOUT, "key") as first:
        write(first, "a")
        with pytest.raises(OutputError, match="another run"), build_artifact(tmp_path / "out", LAYOUT, "other"):
            pass
        assert first.done and (first.staging / LAYOUT.shards[0].name).exists()


def test_an_output_that_is_there_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(OutputError, match="not empty"), build_artifact(tmp_path / "out", LAYOUT, "key"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("single", [False, True])
def test_a_result_that_cannot_be_put_in_place_is_kept(tmp_path: Path, single: bool) -> None:
    layout = plan_layout(SPECS)
    refused = pytest.raises(OutputError, match=r"cannot be put in place: .*; the result is in ")
    with refused, build_artifact(tmp_path / "out", layout, "key") as artifact:
        write(artifact, *VALUES)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "someone else's").touch()
        artifact.publish({} if not single else None, {}, single=single)
    found = load_file(tmp_path / ".out.partial" / layout.shards[0].name)
    assert all(torch.equal(found[name], value) for name, value in VALUES.items())


def _with(checkpoint: SafetensorsCheckpoint, **attributes: Any) -> CheckpointView:
    view = CheckpointView(checkpoint)
    for name, value in attributes.items():
        setattr(view, name, value)
    return view


def test_everything_that_decides_the_bytes_is_in_the_key(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    window = torch.tensor([[1, 2, 3]])
    with SafetensorsCheckpoint(source) as checkpoint:
        base = job_key(checkpoint, LAYOUT, {"method": "x"}, windows=[window])
        assert job_key(checkpoint, LAYOUT, {"method": "x"}, windows=[window]) == base
        info = replace(checkpoint.infos["a"], dtype=torch.bfloat16)
        others = {
            "settings": job_key(checkpoint, LAYOUT, {"method": "y"}, windows=[window]),
            "windows": job_key(checkpoint, LAYOUT, {"method": "x"}, windows=[window + 1]),
            "no windows": job_key(checkpoint, LAYOUT, {"method": "x"}),
            "layout": job_key(checkpoint, plan_layout(SPECS), {"method": "x"}, windows=[window]),
            "identity": job_key(checkpoint, LAYOUT, {"method": "x"}, identity="i", windows=[window]),
            "files": job_key(_with(checkpoint, identity="f"), LAYOUT, {"method": "x"}, windows=[window]),
            "config": job_key(_with(checkpoint, config={}), LAYOUT, {"method": "x"}, windows=[window]),
            "tensors": job_key(_with(checkpoint, infos={"a": info}), LAYOUT, {"method": "x"}, windows=[window]),
        }
        monkeypatch.setattr(artifact_module, "__version__", "0.0.0")
        others["version"] = job_key(checkpoint, LAYOUT, {"method": "x"}, windows=[window])
    assert len({base, *others.values()}) == len(others) + 1


def test_checkpoints_that_look_alike_are_told_apart_by_their_files(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file({name: value + 1 for name, value in VALUES.items()}, other / "model.safetensors")
    with SafetensorsCheckpoint(source) as one, SafetensorsCheckpoint(other) as two:
        assert dict(one.infos) == dict(two.infos) and one.config == two.config
        assert job_key(one, LAYOUT, {}) != job_key(two, LAYOUT, {}) == job_key(CheckpointView(two), LAYOUT, {})
