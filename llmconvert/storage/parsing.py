"""JSON that others wrote, read within bounds: what is too large, nested too deep, or holds numbers nobody means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["parse_json", "read_json"]

# The largest JSON file of a model is its tokenizer, or the index of a thousand shards: tens of megabytes.
_LARGEST_FILE = 1 << 28

# Configs, indexes and headers need a handful of levels, tokenizers some more; libraries recurse on what they are given.
_DEEPEST = 64
# Enough for every number that a computer's memory or a float64 could hold.
_LONGEST_NUMBER = 320


def read_json(path: Path) -> Any:
    """The value that a file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: as :func:`parse_json`; it is no regular file, or larger than 256 MiB.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError("it is no regular file")
    if size > _LARGEST_FILE:
        raise ValueError(f"it has {size:,} bytes, {_LARGEST_FILE:,} at most were expected")
    return parse_json(path.read_bytes())


def parse_json(raw: bytes | str) -> Any:
    """The value that ``raw`` holds, UTF-8 where it is bytes.

    Raises:
        ValueError: it is no JSON, is nested deeper than 64 levels, or holds a whole number of more than 320 digits.
    """
    try:
        value = json.loads(raw, parse_int=_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error.reason} at byte {error.start:,}") from None
    except RecursionError:
        raise ValueError(f"it is nested deeper than {_DEEPEST} levels") from None
    level = [value]
    for _ in range(_DEEPEST):
        level = [part for container in level for part in _parts(container) if isinstance(part, dict | list)]
        if not level:
            return value
    raise ValueError(f"it is nested deeper than {_DEEPEST} levels")


def _number(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"it holds a number of {len(digits):,} digits")
    return int(digits)


def _parts(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container if isinstance(container, list) else ()
