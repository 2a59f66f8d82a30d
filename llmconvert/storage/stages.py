"""Stages of a run: directories named by the hash of their inputs, built once, complete or not there at all.

``<work dir>/<stage>-<12 hex digits>/`` holds a stage's output and ``stage.json``
(:mod:`llmconvert.storage.stage_record`). It is built under a hidden name and renamed when complete, so a killed run
leaves only finished stages and, for stages that can resume, the hidden directory they continue from. Runs that need the
same stage share it, in one process or in several at once: a stage is built under its lock, and who comes second waits
and reuses it. A stage is reused only with every file as it was written, and made from what is there now; otherwise it
is built anew, and the progress says why.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from llmconvert.errors import HubError, LlmconvertError, MachineError, OutputError, SourceError, UsageError, one_line
from llmconvert.machine import of_machine
from llmconvert.memory import PeakMemory
from llmconvert.progress import SILENT, Progress
from llmconvert.storage.contents import Hashes
from llmconvert.storage.disk import require_slashes
from llmconvert.storage.lock import Readers, clear_locks, lock_path, locked, unread
from llmconvert.storage.stage_record import (
    STAGE_FILE,
    StageResult,
    describe_changes,
    read_run,
    read_stage,
    stage_key,
    values_in,
    write_run,
    write_stage,
)
from llmconvert.storage.writer import publish_directory
from llmconvert.version import __version__

__all__ = ["Begun", "StageRun", "StageStore"]


class StageStore:
    """A work directory; any number of processes may have it open. What a store's runs use is not removed meanwhile.

    Args:
        work_dir: created if need be; removed on closing if it is still empty.
        progress: where stages say that they are waited for, reused, resumed or begun anew, and why.

    Raises:
        OutputError: the directory cannot be written.
    """

    def __init__(self, work_dir: Path, *, progress: Progress = SILENT) -> None:
        require_slashes(work_dir)
        self.work_dir = work_dir.absolute()
        self.progress = progress
        # Stages built since the store was opened: a batch's --fresh must not undo what its earlier recipes built.
        self.built: set[str] = set()
        self.hashes = Hashes(progress)
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
                if not any(key.startswith(path.name[-12:]) for key in self.built):
                    with locked(path, wait=self.progress.log):
                        self.remove(path)
                        _remove(_staging(path))
        return stages

    def close(self) -> None:
        """Let others remove what was used; remove the work directory if nothing was left in it."""
        self._readers.close()
        _remove_if_empty(self.work_dir / "runs")
        _remove_if_empty(self.work_dir)

    def find(self, path: Path, key: str) -> StageResult | None:
        """The finished stage in ``path``, if it is there and has that key; from here on nobody removes it."""
        if not self._readers.hold(path / STAGE_FILE):
            return None
        result = read_stage(path, key)
        if result is None:
            self._readers.release(path / STAGE_FILE)
        return result

    def remove(self, path: Path) -> None:
        """Remove the finished stage ``path``, if it is there. Its lock is held.

        Raises:
            OutputError: another run is using it.
        """
        self._readers.release(path / STAGE_FILE)
        if (path / STAGE_FILE).exists():
            with unread(path / STAGE_FILE) as free:
                if not free:
                    raise OutputError(f"{path}: another run is using it, so it is not built anew; wait for it")
                _remove(path)
        _remove(path)

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
    made_from: Mapping[str, str]
    build: Callable[[Path], Mapping[str, Any]]
    resumable: bool


@dataclass(frozen=True, slots=True)
class Begun:
    """What it cost to begin a stage together with others, before its own builder continues; see
    :meth:`StageRun.beginning`."""

    seconds: float = 0.0
    peak_rss_bytes: int = 0


class StageRun:
    """The stages of one run, in order; see :meth:`StageStore.begin`. ``results`` grows as they finish.

    ``fresh``: what earlier runs of this name did is built anew.
    """

    def __init__(self, store: StageStore, name: str, *, fresh: bool) -> None:
        self.store = store
        self.name = name
        self.results: list[StageResult] = []
        self.fresh = fresh
        self._record = store.work_dir / "runs" / f"{name}.json"
        self.previous = read_run(self._record)
        self._current: dict[str, dict[str, Any]] = {}
        self._begun: dict[str, Begun] = {}

    def run(
        self,
        name: str,
        inputs: Mapping[str, Any],
        build: Callable[[Path], Mapping[str, Any]],
        *,
        resumable: bool = False,
    ) -> StageResult:
        """The stage with these inputs: reused if complete and undamaged, otherwise built.

        Args:
            name: of the stage, part of its directory's name.
            inputs: JSON values that determine the output, upstream stages' keys among them.
            build: fills the (hidden) directory it is given and returns details, JSON values, for ``stage.json``.
            resumable: ``build`` continues from what it finds in its directory; otherwise it always finds it empty.

        Raises:
            Whatever ``build`` raises. A stage refused for bad input leaves nothing behind; one that can resume and
            was stopped by anything else keeps its hidden directory.
        """
        wanted = self._wanted(name, inputs, build, resumable=resumable)
        key, path = wanted.key, wanted.path
        fresh = self._wants_fresh(key)
        result = None if fresh else self.store.find(path, key)
        if result is None or self._damage(wanted, result):
            result = self._build_locked(wanted, fresh)
        if result.reused:
            if lock_path(path).exists():  # a killed run's, or of one that is looking
                with suppress(LlmconvertError), locked(path):
                    pass
            self._log(f"{name}: unchanged, reusing {wanted.path.name}")
            self._remember(wanted)
        self.results.append(result)
        return result

    @contextmanager
    def beginning(self, name: str, inputs: Mapping[str, Any]) -> Iterator[Path | None]:
        """Hold a stage that can resume, for one who begins several of them in one go.

        Gives the directory to fill as the stage's builder would if it were stopped just before its end; None if the
        stage is there. The builder continues from what is found when the stage is run.
        """
        wanted = self._wanted(name, inputs, lambda _: {}, resumable=True)
        fresh = self._wants_fresh(wanted.key)

        def there() -> bool:
            found = None if fresh else self.store.find(wanted.path, wanted.key)
            return found is not None and not self._damage(wanted, found)

        if there():
            yield None
            return
        with locked(wanted.path, wait=lambda reason: self._log(f"{name}: {reason}")):
            if there():  # whoever held the lock has built it
                yield None
                return
            staging = _staging(wanted.path)
            if fresh:
                self.store.remove(wanted.path)
                _remove(staging)
            self._announce(wanted, "")
            staging.mkdir(parents=True, exist_ok=True)
            self._remember(wanted)
            yield staging

    def begun(self, name: str, inputs: Mapping[str, Any], cost: Begun) -> None:
        """Say what a stage held by :meth:`beginning` has cost so far."""
        self._begun[stage_key(name, inputs)] = cost

    def _wants_fresh(self, key: str) -> bool:
        """Whether a stage is to be built although it may be there; what this run has begun or built is fresh."""
        return self.fresh and key not in self.store.built and key not in self._begun

    def place_of(self, name: str, inputs: Mapping[str, Any]) -> Path:
        """Where the stage with these inputs is, or will be."""
        return self.store.work_dir / f"{name}-{stage_key(name, inputs)[:12]}"

    def _wanted(
        self,
        name: str,
        inputs: Mapping[str, Any],
        build: Callable[[Path], Mapping[str, Any]],
        *,
        resumable: bool,
    ) -> _Wanted:
        key, values = stage_key(name, inputs), set(values_in(inputs))
        made_from = {other.key: other.contents.digest for other in self.results if other.key in values}
        return _Wanted(name, key, self.place_of(name, inputs), inputs, made_from, build, resumable)

    def _build_locked(self, wanted: _Wanted, fresh: bool) -> StageResult:
        """Build the stage, unless another run does: then wait for it, and take what it has built."""
        waited = False

        def wait(reason: str) -> None:
            nonlocal waited
            waited = True
            self._log(f"{wanted.name}: {reason}")

        with locked(wanted.path, wait=wait):
            if fresh and not waited:
                self.store.remove(wanted.path)
                _remove(_staging(wanted.path))
            result = self.store.find(wanted.path, wanted.key)
            damage = self._damage(wanted, result) if result is not None else ""
            if result is None or damage:
                self._announce(wanted, damage)
                result = self._build(wanted)
                self.store.built.add(wanted.key)
                took = f"{result.seconds:.1f} s, peak memory {result.peak_rss_bytes / 1e9:.2f} GB"
                self._log(f"{wanted.name}: done in {took}")
        return result

    def _damage(self, wanted: _Wanted, found: StageResult) -> str:
        """Why a finished stage can't be reused, empty if it can."""
        for key, digest in wanted.made_from.items():
            if found.made_from.get(key, digest) != digest:
                return f"made from another {next(other.name for other in self.results if other.key == key)}"
        return self.store.hashes.damage(wanted.path, found.contents, but=STAGE_FILE)

    def _build(self, wanted: _Wanted) -> StageResult:
        name, path, staging = wanted.name, wanted.path, _staging(wanted.path)
        begun = self._begun.pop(wanted.key, None)
        resumed = wanted.resumable and staging.exists() and begun is None
        if not resumed and begun is None:
            _remove(staging)
        self.store.remove(path)  # damaged, or its stage.json is
        try:
            staging.mkdir(parents=True, exist_ok=True)
            self._remember(wanted)
            begin = time.perf_counter()
            with PeakMemory() as memory:
                details = self._fill(wanted, staging, resumed or begun is not None)
            # A run that was killed just after its artifact appeared left its lock, and nobody builds that one again.
            clear_locks(staging)
            before = begun or Begun()
            result = StageResult(
                name=name,
                path=path,
                key=wanted.key,
                reused=False,
                resumed=resumed,
                seconds=round(time.perf_counter() - begin + before.seconds, 3),
                peak_rss_bytes=max(memory.nbytes, before.peak_rss_bytes),
                peak_rss_method=memory.method,
                details=details,
                contents=self.store.hashes.read(staging, but=STAGE_FILE),
                made_from=wanted.made_from,
            )
            write_stage(staging, result, wanted.inputs)
        except BaseException as error:
            # A lost connection or a disk that fails says nothing against the input.
            refused = isinstance(error, UsageError | SourceError) and not isinstance(error, HubError)
            if not wanted.resumable or (refused and not of_machine(error)):
                with suppress(OSError, LlmconvertError):  # what is raised is why
                    _remove(staging)
                    self._forget(name)
            raise
        publish_directory(staging, path)
        found = self.store.find(path, wanted.key)
        if found is None:
            raise MachineError(f"{path}: was changed by someone else while it was put in place; run it again")
        return replace(found, reused=False)

    def _fill(self, wanted: _Wanted, staging: Path, resumed: bool) -> Mapping[str, Any]:
        """Let the builder fill its directory; where it chokes on what an earlier run left there, from the beginning."""
        try:
            return wanted.build(staging)
        except Exception as error:
            if not resumed or isinstance(error, LlmconvertError) or of_machine(error):
                raise
            self._log(f"{wanted.name}: what an interrupted run left is damaged ({one_line(error)}); starting anew")
        _remove(staging)
        staging.mkdir()
        return wanted.build(staging)

    def _announce(self, wanted: _Wanted, damage: str) -> None:
        name, path, inputs = wanted.name, wanted.path, wanted.inputs
        previous = self.previous.get(name)
        if damage or path.exists():
            damage = damage or f"its {STAGE_FILE} can't be trusted"
            self._log(f"{name}: {path.name} is not as it was written, {damage}; building it anew")
        elif previous is not None and previous["stage"] != path.name:
            changes = describe_changes(previous["inputs"], inputs) or f"version of llmconvert → {__version__}"
            last = self.store.work_dir / previous["stage"]
            note = ""
            if _staging(last).exists():
                with suppress(OutputError), locked(last):  # unless another run is at it
                    _remove(_staging(last))
                    note = ", the unfinished one is removed"
            self._log(f"{name}: {changes}, starting anew{note}")
        elif _staging(path).exists() and wanted.key not in self._begun:
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
                write_run(self._record, stages)
            else:
                self._record.unlink(missing_ok=True)

    def _log(self, message: str) -> None:
        self.store.progress.log(message)


def _staging(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise MachineError(f"{path}: cannot be removed: {error.strerror}; remove it and run it again") from error


def _remove_if_empty(path: Path) -> None:
    with suppress(OSError):
        path.rmdir()
