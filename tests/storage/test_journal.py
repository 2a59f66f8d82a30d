"""The journal: what was completely written is read back, whatever happened to the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmconvert.storage.journal import Journal

ENTRIES: list[dict[str, Any]] = [
    {"key": "0123abcd"},
    {"outer": True},
    {"block": 0, "layers": [["model.layers.0.mlp.down_proj", 0.0123, 0.01], ["näme\n\u2028", None, None]]},
    {"block": 1, "layers": []},
]


def written(path: Path, entries: list[dict[str, Any]]) -> bytes:
    journal = Journal(path)
    for entry in entries:
        journal.append(entry)
    assert journal.entries == entries
    return path.read_bytes()


def test_entries_come_back(tmp_path: Path) -> None:
    written(tmp_path / "journal", ENTRIES)
    assert Journal(tmp_path / "journal").entries == ENTRIES


def test_a_journal_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert Journal(tmp_path / "journal").entries == []
    assert not (tmp_path / "journal").exists()


def test_a_last_line_torn_at_any_byte_is_dropped_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    whole = written(path, ENTRIES)
    path.unlink()
    before = written(path, ENTRIES[:-1])
    for length in range(len(before), len(whole)):
        path.write_bytes(whole[:length])
        journal = Journal(path)
        assert journal.entries == ENTRIES[:-1]
        assert path.read_bytes() == before
        journal.append(ENTRIES[-1])
        assert path.read_bytes() == whole
        assert Journal(path).entries == ENTRIES


def test_a_flipped_bit_ends_the_journal_before_its_line(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    whole = written(path, ENTRIES)
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for position in range(len(whole)):
        intact = sum(end <= position for end in ends)
        for bit in (0, 1, 3, 6):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            assert Journal(path).entries == ENTRIES[:intact], (position, bit)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200))
def test_garbage_is_no_journal(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal"
    path.write_bytes(content)
    assert Journal(path).entries == []
    assert path.read_bytes() == b""


def test_a_line_is_checksum_and_json(tmp_path: Path) -> None:
    line = written(tmp_path / "journal", [{"b": [1, None], "a": "x"}]).decode()
    checksum, _, body = line.rstrip("\n").partition(" ")
    assert json.loads(body) == {"a": "x", "b": [1, None]}
    assert body == '{"a":"x","b":[1,null]}' and len(checksum) == 8
