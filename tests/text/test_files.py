"""Text that a user names: how much of it is read, and from what."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmconvert.text.files import local_path, read_text


def test_the_size_of_a_text_is_bounded(tmp_path: Path) -> None:
    """A file of any length is refused after so many bytes."""
    path = tmp_path / "long.txt"
    path.write_bytes(b"12345678")
    assert read_text(path, 8) == "12345678"
    with pytest.raises(ValueError, match="more than 7 bytes"):
        read_text(path, 7)


def test_pipes_are_read() -> None:
    read, write = os.pipe()
    try:
        os.write(write, b"from\r\na pipe")
        os.close(write)
        assert read_text(Path(f"/dev/fd/{read}"), 100) == "from\na pipe"
    finally:
        os.close(read)


def test_unknown_users_are_names_like_others() -> None:
    assert local_path("~no-such-user-here/a") == Path("~no-such-user-here/a")
    assert local_path("~/a") == Path.home() / "a"
