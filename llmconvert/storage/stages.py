"""Stages of a run: directories named by the hash of their inputs, built once, complete or not there at all.

``<work dir>/<stage>-<12 hex digits>/`` holds a stage's output and ``stage.json`` (inputs, seconds, peak memory).
It is built under a hidden name and renamed when complete, so a killed run leaves only finished stages and, for
stages that can resume, the hidden directory they continue from. Runs that need the same stage share it, in one process
or in several at once: a stage is built under its lock, and who comes second waits and reuses it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from llmconvert.errors import HubError, OutputError, SourceError, UsageError
from llmconvert.memory import PeakMemory
from llmconvert.progress import SILENT, Progress
from llmconvert.storage.lock import Readers, locked, unread
from llmconvert.storage.writer import publish_directory, write_json
from llmconvert.version import __version__

__all__ = ["STAGE_FILE", "StageResult", "StageRun", "StageStore", "describe_changes", "stage_key"]

STAGE_FILE = "stage.json"
_SCHEMA = "llmconvert.stage/1"
_SHOWN_CHANGES = 4
_HASH = re.compile(r"[0-9a-f]{64}")


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


def stage_key(name: str, inputs: Mapping[str, Any]) -> str:
    """sha256 in hex of a stage's name and inputs (any JSON values) in canonical form, and the package's version."""
    value = {"schema": _SCHEMA, "version": __version__, "name": name, "inputs": inputs}
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class StageStore:
    """A work directory; any number of processes may have it open. What a store's runs use is not removed meanwhile.

    Args:
        work_dir: created if need be; removed on closing if it is still empty.
        progress: where stages say that they are waited for, reused, resumed or begun anew, and why.

    Raises:
        OutputError: the directory cannot be written.
    """

    def __init__(self, work_dir: Path, *, progress: Progress = SILENT) -> None:
        self.work_dir = work_dir.absolute()
        self.progress = progress
        # Stages built since the store was opened: a batch's --fresh must not undo what its earlier recipes built.
        self.built: set[str] = set()
        self._readers = Readers()
        try:
            self.work_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.work_dir}: cannot be used: {error.strerror}") from error

    def begin(self, run: str, *, fresh: bool = False) -> StageRun:
        """Start a run. ``run`` names it in the work directory, so that its next one can be compared with it.

        With ``fresh``, the stages that the last run of this name used are removed first, and those that this one
        asks for are built even if they exist.
        """
        stages = StageRun(self, run, fresh=fresh)
        if fresh:
            for entry in stages.previous.values():
                path = self.work_dir / entry["stage"]
                with locked(path, wait=self.progress.log):
                    self.discard(path)
        return stages

    def close(self) -> None:
        """Let others remove what was used; remove the work directory if nothing was left in it."""
        self._readers.close()
        _remove_if_empty(self.work_dir / "runs")
        _remove_if_empty(self.work_dir)

    def find(self, path: Path, name: str, key: str) -> StageResult | None:
        """The finished stage in ``path``, if it is there and has that key; from here on nobody removes it."""
        if not self._readers.hold(path / STAGE_FILE):
            return None
        result = _load_result(path, name, key)
        if result is None:
            self._readers.release(path / STAGE_FILE)
        return result

    def discard(self, path: Path) -> None:
        """Remove the stage ``path``, finished or not, unless it was built since the store was opened. Its lock is held.

        Raises:
            OutputError: another run is using it.
        """
        record = _read_json(path / STAGE_FILE)
        if record is not None and record.get("key") in self.built:
            return
        self._readers.release(path / STAGE_FILE)
        if record is not None:
            with unread(path / STAGE_FILE) as free:
                if not free:
                    raise OutputError(
                        f"{path}: another run is using it, so it is not built anew; wait for it, or do without --fresh"
                    )
                _remove(path)
        _remove(path)
        _remove(_staging(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A stage as a run asks for it; see :meth:`StageRun.run`."""

    name: str
    key: str
    path: Path
    inputs: Mapping[str, Any]
    build: Callable[[Path], Mapping[str, Any]]
    resumable: bool


class StageRun:
    """The stages of one run, in order; see :meth:`StageStore.begin`. ``results`` grows as they finish."""

    def __init__(self, store: StageStore, name: str, *, fresh: bool) -> None:
        self.store = store
        self.name = name
        self.results: list[StageResult] = []
        self.previous: dict[str, dict[str, Any]] = {}
        self._fresh = fresh
        self._record = store.work_dir / "runs" / f"{name}.json"
        record = _read_json(self._record)
        if record is not None and isinstance(record.get("stages"), dict):
            self.previous = record["stages"]
        self._current: dict[str, dict[str, Any]] = {}

    def run(
        self,
        name: str,
        inputs: Mapping[str, Any],
        build: Callable[[Path], Mapping[str, Any]],
        *,
        resumable: bool = False,
    ) -> StageResult:
        """The stage with these inputs: reused if complete, otherwise built.

        Args:
            name: of the stage, part of its directory's name.
            inputs: JSON values that determine the output, upstream stages' keys among them.
            build: fills the (hidden) directory it is given and returns details, JSON values, for ``stage.json``.
            resumable: ``build`` continues from what it finds in its directory; otherwise it always finds it empty.

        Raises:
            Whatever ``build`` raises. A stage refused for bad input leaves nothing behind; one that can resume and
            was stopped by anything else keeps its hidden directory.
        """
        key = stage_key(name, inputs)
        wanted = _Wanted(name, key, self.store.work_dir / f"{name}-{key[:12]}", inputs, build, resumable)
        fresh = self._fresh and key not in self.store.built
        result = None if fresh else self.store.find(wanted.path, name, key)
        if result is None:
            result = self._build_locked(wanted, fresh)
        if result.reused:
            self._log(f"{name}: unchanged, reusing {wanted.path.name}")
            self._remember(wanted)
        self.results.append(result)
        return result

    def _build_locked(self, wanted: _Wanted, fresh: bool) -> StageResult:
        """Build the stage, unless another run does: then wait for it, and take what it has built."""
        waited = False

        def wait(reason: str) -> None:
            nonlocal waited
            waited = True
            self._log(f"{wanted.name}: {reason}")

        with locked(wanted.path, wait=wait):
            if fresh and not waited:
                self.store.discard(wanted.path)
            result = self.store.find(wanted.path, wanted.name, wanted.key)
            if result is None:
                self._announce(wanted)
                result = self._build(wanted)
                self.store.built.add(wanted.key)
                took = f"{result.seconds:.1f} s, peak memory {result.peak_rss_bytes / 1e9:.2f} GB"
                self._log(f"{wanted.name}: done in {took}")
        return result

    def _build(self, wanted: _Wanted) -> StageResult:
        name, path, staging = wanted.name, wanted.path, _staging(wanted.path)
        resumed = wanted.resumable and staging.exists()
        if not resumed:
            _remove(staging)
        _remove(path)  # incomplete, or its stage.json is unreadable
        try:
            staging.mkdir(parents=True, exist_ok=True)
            self._remember(wanted)
            begin = time.perf_counter()
            with PeakMemory() as memory:
                details = wanted.build(staging)
            record = {
                "schema": _SCHEMA,
                "name": name,
                "key": wanted.key,
                "inputs": wanted.inputs,
                "resumed": resumed,
                "seconds": round(time.perf_counter() - begin, 3),
                "peak_rss_bytes": memory.nbytes,
                "peak_rss_method": memory.method,
                "details": details,
            }
            write_json(staging / STAGE_FILE, record)
        except BaseException as error:
            # A lost connection says nothing against the input.
            refused = isinstance(error, UsageError | SourceError) and not isinstance(error, HubError)
            if not wanted.resumable or refused:
                _remove(staging)
                self._forget(name)
            raise
        publish_directory(staging, path)
        result = self.store.find(path, name, wanted.key)
        if result is None:
            raise OutputError(f"{path}: was changed by someone else while it was put in place")
        return replace(result, reused=False)

    def _announce(self, wanted: _Wanted) -> None:
        name, path, inputs = wanted.name, wanted.path, wanted.inputs
        previous = self.previous.get(name)
        if previous is not None and previous["stage"] != path.name:
            changes = describe_changes(previous["inputs"], inputs) or f"version of llmconvert → {__version__}"
            last = self.store.work_dir / previous["stage"]
            note = ""
            if _staging(last).exists():
                with suppress(OutputError), locked(last):  # unless another run is at it
                    _remove(_staging(last))
                    note = ", the unfinished one is removed"
            self._log(f"{name}: {changes}, starting anew{note}")
        elif _staging(path).exists():
            self._log(f"{name}: was interrupted, continuing")

    def _remember(self, wanted: _Wanted) -> None:
        self._current[wanted.name] = {"stage": wanted.path.name, "inputs": wanted.inputs}
        self._save()

    def _forget(self, name: str) -> None:
        self._current.pop(name, None)
        self._save()

    def _save(self) -> None:
        stages = {**self.previous, **self._current}
        with locked(self._record, wait=lambda _: None):
            if stages:
                write_json(self._record, {"schema": _SCHEMA, "stages": stages})
            else:
                self._record.unlink(missing_ok=True)

    def _log(self, message: str) -> None:
        self.store.progress.log(message)


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


def _load_result(path: Path, name: str, key: str) -> StageResult | None:
    record = _read_json(path / STAGE_FILE)
    if record is None or record.get("schema") != _SCHEMA or record.get("key") != key:
        return None
    return StageResult(
        name=name,
        path=path,
        key=key,
        reused=True,
        resumed=record["resumed"],
        seconds=record["seconds"],
        peak_rss_bytes=record["peak_rss_bytes"],
        peak_rss_method=record["peak_rss_method"],
        details=record["details"],
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _staging(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise OutputError(f"{path}: cannot be removed: {error.strerror}") from error


def _remove_if_empty(path: Path) -> None:
    try:
        path.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.ENOENT, errno.EEXIST):
            raise
