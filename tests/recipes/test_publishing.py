"""Publishing to a local directory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llmconvert.errors import CapacityError, MachineError, OutputError
from llmconvert.recipes import publishing
from llmconvert.recipes.publishing import PUBLICATION_FILE, check_local_target
from llmconvert.recipes.publishing import publish_local as publish
from llmconvert.storage.contents import Contents, Hashes, listing


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    directory = tmp_path / "artifact"
    (directory / "llmconvert").mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(b"weights")
    (directory / "llmconvert" / "report.json").write_text("{}")
    return directory


def publish_local(artifact: Path, directory: Path, recipe: str) -> None:
    publish(artifact, Hashes().read(artifact), directory, recipe, Hashes())


def content(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in listing(directory) if name != str(PUBLICATION_FILE)}


def test_it_is_a_copy_that_says_what_it_is(artifact: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "demo"
    publish_local(artifact, target, "demo")
    assert content(target) == content(artifact)
    record = json.loads((target / PUBLICATION_FILE).read_text())
    assert record["recipe"] == "demo" and Contents.from_mapping(record["files"]) == Hashes().read(artifact)
    assert os.listdir(target.parent) == ["demo"]


def test_it_replaces_its_own_earlier_publication(artifact: Path, tmp_path: Path) -> None:
    target = tmp_path / "demo"
    publish_local(artifact, target, "demo")
    (artifact / "model.safetensors").write_bytes(b"better weights")
    (artifact / "llmconvert" / "report.json").unlink()
    publish_local(artifact, target, "demo")
    assert content(target) == {"model.safetensors": b"better weights"}
    assert sorted(os.listdir(tmp_path)) == ["artifact", "demo"]


def test_an_empty_directory_is_used(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    publish_local(artifact, tmp_path / "demo", "demo")
    assert content(tmp_path / "demo") == content(artifact)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda target: (target / "notes.txt").write_text("mine"), "notes.txt was added"),
        (lambda target: (target / ".notes").write_text("mine"), ".notes was added"),
        (lambda target: (target / "model.safetensors").write_bytes(b"edited weights"), "has 14 bytes, 7 were written"),
        (lambda target: (target / "model.safetensors").write_bytes(b"weightz"), "holds other bytes than were written"),
        (lambda target: (target / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda target: (target / PUBLICATION_FILE).unlink(), "was not published by llmconvert"),
        (lambda target: (target / PUBLICATION_FILE).write_text("[]"), "was not published by llmconvert"),
        (lambda target: (target / PUBLICATION_FILE).write_text("[" * 99_999), "was not published by llmconvert"),
    ],
)
def test_what_others_put_there_is_never_replaced(artifact: Path, tmp_path: Path, spoil: object, reason: str) -> None:
    target = tmp_path / "demo"
    publish_local(artifact, target, "demo")
    spoil(target)  # type: ignore[operator]
    before = {name: (target / name).read_bytes() for name in listing(target)}
    with pytest.raises(OutputError, match=reason):
        publish_local(artifact, target, "demo")
    assert {name: (target / name).read_bytes() for name in listing(target)} == before
    assert sorted(os.listdir(tmp_path)) == ["artifact", "demo"]


def test_another_recipes_publication_stays(artifact: Path, tmp_path: Path) -> None:
    publish_local(artifact, tmp_path / "demo", "demo")
    with pytest.raises(OutputError, match="recipe 'demo' published, not 'other'"):
        check_local_target(tmp_path / "demo", "other", Hashes())


def test_a_full_disk_leaves_the_old_one(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_local(artifact, tmp_path / "demo", "demo")
    before = content(tmp_path / "demo")

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publishing.shutil, "copyfile", full)
    with pytest.raises(CapacityError, match="No space left"):
        publish_local(artifact, tmp_path / "demo", "demo")
    assert content(tmp_path / "demo") == before
    assert sorted(os.listdir(tmp_path)) == ["artifact", "demo"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OutputError])
def test_stopped_between_the_renames_the_old_one_is_back(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    publish_local(artifact, tmp_path / "demo", "demo")
    before = content(tmp_path / "demo")
    (artifact / "model.safetensors").write_bytes(b"better weights")

    def fail(staging: Path, target: Path) -> None:
        raise stop("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(publishing, "publish_directory", fail)
        with pytest.raises(stop):
            publish_local(artifact, tmp_path / "demo", "demo")
    assert content(tmp_path / "demo") == before
    assert sorted(os.listdir(tmp_path)) == ["artifact", "demo"]
    publish_local(artifact, tmp_path / "demo", "demo")
    assert content(tmp_path / "demo") == content(artifact)


def test_killed_between_the_renames_the_next_run_puts_it_there(artifact: Path, tmp_path: Path) -> None:
    publish_local(artifact, tmp_path / "demo", "demo")
    (tmp_path / "demo").rename(tmp_path / ".demo.replaced")  # as a kill leaves it
    publish_local(artifact, tmp_path / "demo", "demo")
    assert content(tmp_path / "demo") == content(artifact)
    assert sorted(os.listdir(tmp_path)) == ["artifact", "demo"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda artifact: (artifact / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda artifact: (artifact / "model.safetensors").write_bytes(b"weightz"), "holds other bytes"),
    ],
)
def test_only_what_was_written_is_published(artifact: Path, tmp_path: Path, spoil: object, reason: str) -> None:
    contents = Hashes().read(artifact)
    (artifact / "llmconvert" / "report.json").chmod(0o600)
    (artifact / ".DS_Store").write_bytes(b"a file manager's")
    publish(artifact, contents, tmp_path / "demo", "demo", Hashes())
    assert content(tmp_path / "demo") == {"model.safetensors": b"weights", "llmconvert/report.json": b"{}"}
    spoil(artifact)  # type: ignore[operator]
    with pytest.raises(MachineError, match=reason):
        publish(artifact, contents, tmp_path / "demo", "demo", Hashes())
    assert content(tmp_path / "demo")["model.safetensors"] == b"weights"
    assert sorted(os.listdir(tmp_path)) == ["artifact", "demo"]
