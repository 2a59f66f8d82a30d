"""Shares and sizes as people write them: ``5%``, ``4GB``."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, PlainSerializer, PlainValidator, WithJsonSchema

__all__ = ["Bytes", "FileSize", "LeastShare", "Memory", "Share", "parse_bytes", "parse_share"]

_SIZE = re.compile(r"(?P<number>\d{1,18}(?:\.\d{1,18})?)\s*(?P<unit>[kKMGT]?)(?P<binary>i?)B?")
_HUGE = 1 << 64
_NO_SHARE = "expected a share such as 5% or 0.05"
# Below this a number was meant in a larger unit.
_WITHOUT_UNIT = 100_000
# Fewer bytes of memory, or of a model's file, are a number that lacks its unit.
_LEAST_MEMORY = _LEAST_FILE = 1 << 20
_UNITS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_share(value: object) -> float:
    """``"5%"`` or ``0.05`` as 0.05.

    Raises:
        ValueError: neither form, negative, or a bare number above 1 (surely meant as a percentage).
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(_NO_SHARE)
    percent = isinstance(value, str) and value.strip().endswith("%")
    try:
        share = float(value.strip().removesuffix("%") if isinstance(value, str) else value)
    except (ValueError, OverflowError):
        raise ValueError(_NO_SHARE) from None
    if percent:
        share /= 100
    elif share > 1:
        raise ValueError(f"found {value}, which would mean {100 * share:g}%; write {share:g}% or {share / 100:g}")
    if not 0 <= share < float("inf"):
        raise ValueError("expected a share of 0% or more")
    return share


def parse_bytes(value: object) -> int:
    """``"4GB"``, ``"512 MiB"`` or a plain number of bytes.

    Raises:
        ValueError: another form, or zero.
    """
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _HUGE:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("expected a size such as 4GB, 512MiB or a number of bytes")
    size = int(float(match["number"]) * (1024 if match["binary"] else 1000) ** _UNITS[match["unit"]])
    if size < 1:
        raise ValueError("expected a size above zero")
    return size


def _reachable(share: float) -> float:
    if share > 1:
        raise ValueError(f"{100 * share:.10g}% can't be reached; expected 100% at most")
    return share


def _working(size: int) -> int:
    if size < _LEAST_MEMORY:
        raise ValueError(f"{size:,} bytes are too few for anything; {_meant(size, 'to use what is free')}")
    return size


def _file(size: int) -> int:
    if size < _LEAST_FILE:
        raise ValueError(f"{size:,} bytes are too few for a file of tensors; {_meant(size, 'for one file')}")
    return size


def _meant(size: int, without: str) -> str:
    return f"with a unit it is {size}GB or {size}MB" if size < _WITHOUT_UNIT else f"leave it out {without}"


_SHARE = {"type": ["string", "number"], "description": "a share: `5%` or `0.05`"}
_BYTES = {"type": ["string", "integer"], "description": "a size: `4GB`, `512MiB` or a number of bytes"}

Share = Annotated[
    float, PlainValidator(parse_share), PlainSerializer(lambda share: f"{100 * share:.10g}%"), WithJsonSchema(_SHARE)
]
#: A share that has to be reached.
LeastShare = Annotated[Share, AfterValidator(_reachable)]
Bytes = Annotated[int, PlainValidator(parse_bytes), WithJsonSchema(_BYTES)]
#: Bytes to work in.
Memory = Annotated[Bytes, AfterValidator(_working)]
#: Bytes of one file of several.
FileSize = Annotated[Bytes, AfterValidator(_file)]
