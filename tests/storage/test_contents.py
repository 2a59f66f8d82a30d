"""Contents of directories: recorded, compared, read once."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from llmconvert.errors import MachineError
from llmconvert.storage import contents
from llmconvert.storage.contents import Contents, FileContent, Hashes


def test_they_are_hashes_of_every_file_but_hidden_ones(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_bytes(b"weights")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "b").write_bytes(b"")
    (tmp_path / "stage.json").write_bytes(b"{}")
    found = Hashes().read(tmp_path, but="stage.json")
    assert found.files == {"model/a": FileContent(7, hashlib.sha256(b"weights").hexdigest())}
    assert Contents.from_mapping(found.to_mapping()) == found
    assert found.below("model").files == {"a": found.files["model/a"]} and not found.below("mod").files
    assert found.digest != found.below("model").digest


def test_a_file_is_read_once_while_it_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    before = path.stat()
    reads: list[str] = []
    true_digest = hashlib.file_digest

    def digest(file: object, name: str) -> object:
        reads.append(name)
        return true_digest(file, name)  # type: ignore[arg-type]

    monkeypatch.setattr(contents.hashlib, "file_digest", digest)
    hashes = Hashes()
    recorded = hashes.read(tmp_path)
    assert not hashes.damage(tmp_path, recorded) and len(reads) == 2, "just written: its time may not tell"
    monkeypatch.setattr(contents, "_SETTLED_NS", 0)
    time.sleep(0.01)
    assert not hashes.damage(tmp_path, recorded) and not hashes.damage(tmp_path, recorded) and len(reads) == 3
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hashes.damage(tmp_path, recorded) == "a holds other bytes than were written"


def test_large_ones_are_shown_and_read_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode() * 99)
    small = Hashes().read(tmp_path)
    monkeypatch.setattr(contents, "_SHOWN_NBYTES", 1)
    assert Hashes().read(tmp_path) == small


def test_a_directory_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="gone: cannot be read"):
        Hashes().read(tmp_path / "gone")
