"""What is written down of stages and runs: sealed by a checksum, so that what cannot be trusted is not read.

``stage.json`` of a stage has its inputs, time and memory, what its builder said, the contents of its files, and those
of the stages that it was made from; ``runs/NAME.json`` which stages the last run of that name used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmconvert.errors import MachineError
from llmconvert.storage.contents import Contents
from llmconvert.storage.writer import write_json
from llmconvert.version import __version__

__all__ = [
    "STAGE_FILE",
    "StageResult",
    "describe_changes",
    "read_run",
    "read_stage",
    "stage_key",
    "values_in",
    "write_run",
    "write_stage",
]

STAGE_FILE = "stage.json"
_SCHEMA = "llmconvert.stage/2"
_SEAL = "sha256"
_SHOWN_CHANGES = 4
_HASH = re.compile(r"[0-9a-f]{64}")
_DIRECTORY = re.compile(r"(.+)-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class StageResult:
    """A finished stage.

    Attributes:
        name: the stage's name.
        path: its directory.
        key: sha256 of its name, inputs and this package's version, in hex.
        reused: it was complete before this run.
        resumed: it had been begun by an earlier run, whose time is not in ``seconds``.
        seconds: wall-clock time it took when it was built.
        peak_rss_bytes: peak resident memory of the process while it was built.
        peak_rss_method: how that is known, see :class:`llmconvert.memory.PeakMemory`.
        details: what its builder returned, as read back from JSON.
        contents: of its files.
        made_from: key → digest of the contents of each stage that it was made from.
    """

    name: str
    path: Path
    key: str
    reused: bool
    resumed: bool
    seconds: float
    peak_rss_bytes: int
    peak_rss_method: str
    details: Mapping[str, Any]
    contents: Contents
    made_from: Mapping[str, str]


def stage_key(name: str, inputs: Mapping[str, Any]) -> str:
    """sha256 in hex of a stage's name and inputs (any JSON values) in canonical form, and the package's version."""
    value = {"schema": _SCHEMA, "version": __version__, "name": name, "inputs": inputs}
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_stage(path: Path, key: str) -> StageResult | None:
    """What is written down of the stage ``path``; None if nothing is that can be trusted, or of another key.

    Raises:
        MachineError: it cannot be read now.
    """
    record = _read_sealed(path / STAGE_FILE)
    if record is None or record["key"] != key:
        return None
    return StageResult(
        name=record["name"],
        path=path,
        key=key,
        reused=True,
        resumed=record["resumed"],
        seconds=record["seconds"],
        peak_rss_bytes=record["peak_rss_bytes"],
        peak_rss_method=record["peak_rss_method"],
        details=record["details"],
        contents=Contents.from_mapping(record["files"]),
        made_from=record["made_from"],
    )


def write_stage(directory: Path, result: StageResult, inputs: Mapping[str, Any]) -> None:
    """Write down a stage that lies in ``directory``."""
    record = {
        "schema": _SCHEMA,
        "name": result.name,
        "key": result.key,
        "inputs": inputs,
        "made_from": result.made_from,
        "resumed": result.resumed,
        "seconds": result.seconds,
        "peak_rss_bytes": result.peak_rss_bytes,
        "peak_rss_method": result.peak_rss_method,
        "details": result.details,
        "files": result.contents.to_mapping(),
    }
    _write_sealed(directory / STAGE_FILE, record)


def read_run(path: Path) -> dict[str, dict[str, Any]]:
    """The stages that a run used: name → ``stage``, its directory, and ``inputs``; empty where nothing is known.

    Raises:
        MachineError: it cannot be read now.
    """
    record = _read_sealed(path)
    stages: dict[str, dict[str, Any]] = record["stages"] if record is not None else {}
    # These directories may be removed.
    named = ((name, _DIRECTORY.fullmatch(entry["stage"])) for name, entry in stages.items())
    return {name: stages[name] for name, match in named if match is not None and match[1] == name}


def write_run(path: Path, stages: Mapping[str, Mapping[str, Any]]) -> None:
    """Write down the stages that a run uses."""
    _write_sealed(path, {"schema": _SCHEMA, "stages": stages})


def values_in(value: object) -> Iterator[str]:
    """All strings in a JSON value but the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from values_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from values_in(item)


def describe_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two stages' inputs, ``scheme w4a16-g64-sym → w3a16-g64-sym``; empty if nothing does."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    shown = [f"{key} {_show(before.get(key))} → {_show(after.get(key))}" for key in changed[:_SHOWN_CHANGES]]
    more = [f"{len(changed) - _SHOWN_CHANGES} more"] if len(changed) > _SHOWN_CHANGES else []
    return ", ".join(shown + more)


def _show(value: Any) -> str:
    """A value in short; of a hash, as much as its stage's directory name has."""
    if isinstance(value, str) and _HASH.fullmatch(value):
        return value[:12]
    return "unset" if value is None else str(value)


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flatten(item, f"{prefix}{key}.")
        elif item is not None:
            yield f"{prefix}{key}", item


def _write_sealed(path: Path, record: Mapping[str, Any]) -> None:
    write_json(path, {_SEAL: _seal(record), **record})


def _read_sealed(path: Path) -> dict[str, Any] | None:
    """A record of this version as it was written; None if it is not there, or was cut or changed since."""
    try:
        record = json.loads(path.read_bytes())
        if not isinstance(record, dict) or record.pop(_SEAL, None) != _seal(record) or record.get("schema") != _SCHEMA:
            return None
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    except OSError as error:
        raise MachineError(f"{path}: cannot be read: {error.strerror}; run the same command again") from error
    return record


def _seal(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
