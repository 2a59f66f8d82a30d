"""JSON of others: what it holds, or one line about why it isn't read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import ones

from llmconvert.errors import CheckpointError
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.storage.directory import INDEX_NAME
from llmconvert.storage.parsing import parse_json, read_json

#: What a file may hold, with what is said about it.
HOSTILE: dict[str, tuple[bytes, str]] = {
    "lists in lists": (b"[" * 1000 + b"]" * 1000, "nested deeper than 64 levels"),
    "lists in lists, not closed": (b"[" * 100_000, "nested deeper than 64 levels"),
    "objects in objects": (b'{"a":' * 200 + b"1" + b"}" * 200, "nested deeper than 64 levels"),
    "a number of 5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "a number of 5,000 digits"),
    "a number of 321 digits": (b"9" * 321, "a number of 321 digits"),
    "NUL bytes": (b"\0" * 100, "Expecting value|not UTF-8|null byte"),
    "a NUL in a name": (b'{"a\0b": 1}', "control character"),
    "not UTF-8": (b'"\xff\xfe\xfa"', "not UTF-8"),
    "nothing": (b"", "Expecting value"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_not_read_is_one_line(tmp_path: Path, case: str) -> None:
    raw, reason = HOSTILE[case]
    with pytest.raises(ValueError, match=reason) as caught:
        parse_json(raw)
    assert len(str(caught.value)) < 200
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*({reason})"):
        SafetensorsCheckpoint(model)
    (model / "config.json").write_text("{}")
    (model / INDEX_NAME).write_bytes(raw)
    with pytest.raises(CheckpointError, match=rf"index\.json: .*({reason})"):
        SafetensorsCheckpoint(model)
    (model / INDEX_NAME).unlink()
    (model / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: header is not JSON"):
        SafetensorsCheckpoint(model)


def test_what_is_read() -> None:
    nested = json.loads("[" * 60 + "]" * 60)
    values: list[Any] = [nested, {"a": [1, 2.5, None, True, "x"], "b": {}}, 10**300, [], "", 0]
    for value in values:
        assert parse_json(json.dumps(value)) == value
    assert parse_json(b"1e999") == float("inf")


def test_a_file_that_is_no_file(tmp_path: Path) -> None:
    """A pipe would wait for ever, a device never end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(ValueError, match="no regular file"):
            read_json(tmp_path / name)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ValueError, match="1,073,741,824 bytes"):
        read_json(tmp_path / "large")


def test_an_index_may_name_a_tensor_that_is_nowhere(tmp_path: Path) -> None:
    """Some writers leave the entry of a tied head behind; transformers reads such a model."""
    save_file({"w": ones(1)}, tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text("{}")
    weight_map = {"w": "a.safetensors", "lm_head.weight": "a.safetensors"}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    assert list(SafetensorsCheckpoint(tmp_path)) == ["w"]
