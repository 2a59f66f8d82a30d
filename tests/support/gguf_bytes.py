"""GGUF headers byte by byte, so that they can say what no writer would."""

from __future__ import annotations

import struct


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return string(name) + dimensions + struct.pack("<IQ", kind, offset)


def header(pairs: list[bytes], tensors: list[bytes], /, **counts: int) -> bytes:
    begin = struct.pack(
        "<IQQ", counts.get("version", 3), counts.get("tensors", len(tensors)), counts.get("pairs", len(pairs))
    )
    raw = b"GGUF" + begin + b"".join(pairs) + b"".join(tensors)
    return raw + bytes(-len(raw) % 32)
