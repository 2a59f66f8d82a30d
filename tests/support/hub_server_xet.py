"""The loopback Hub's side of Xet: a store directory that the real ``hf_xet`` client writes, read back by hash.

The client uploads chunks into xorbs and describes files in shards, in which each file has a Xet hash and its sha256
(https://huggingface.co/docs/xet/shard). A commit then names files by sha256 alone.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

_HEADER_BYTES = _ENTRY_BYTES = 48
_WITH_VERIFICATION, _WITH_METADATA = 1 << 31, 1 << 30
_BOOKEND = b"\xff" * 32


class XetStore:
    """The directory behind ``casUrl: local://DIR``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def url(self) -> str:
        return f"local://{self.directory}"

    def nbytes(self) -> int:
        """Bytes of all xorbs: what was really sent."""
        return sum(path.stat().st_size for path in self.directory.rglob("xorbs/default.*") if path.suffix != ".tagset")

    def read(self, sha256: str) -> bytes | None:
        """The content of the uploaded file with this hash; None if it never arrived."""
        for shard in sorted(self.directory.rglob("shards/*.mdb")):
            for xet_hash, found, size in _files(shard.read_bytes()):
                if found == sha256:
                    return self._reconstruct(xet_hash, size)
        return None

    def _reconstruct(self, xet_hash: str, size: int) -> bytes:
        from hf_xet import XetFileInfo, XetSession

        with tempfile.TemporaryDirectory() as scratch:
            # A copy, because the client's process holds a lock on the store's index.
            copy, target = Path(scratch, "store"), Path(scratch, "content")
            shutil.copytree(self.directory, copy)
            with XetSession().new_file_download_group(endpoint=f"local://{copy}") as group:
                group.start_download_file(XetFileInfo(xet_hash, size), str(target))
            return target.read_bytes()


def _files(shard: bytes) -> Iterator[tuple[str, str, int]]:
    """Xet hash, sha256 and size of every file that a shard describes."""
    position = _HEADER_BYTES
    while (file_hash := shard[position : position + 32]) != _BOOKEND:
        flags, count = struct.unpack_from("<II", shard, position + 32)
        position += _ENTRY_BYTES
        # An entry is a xorb's hash, its flags, the segment's unpacked bytes, and a range of chunks.
        size = sum(struct.unpack_from("<I", shard, position + i * _ENTRY_BYTES + 36)[0] for i in range(count))
        position += count * _ENTRY_BYTES * (2 if flags & _WITH_VERIFICATION else 1)
        if flags & _WITH_METADATA:
            yield _hex(file_hash), _hex(shard[position : position + 32]), size
            position += _ENTRY_BYTES


def _hex(digest: bytes) -> str:
    """Xet writes hashes as four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", digest))
