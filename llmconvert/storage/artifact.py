"""One way to disk for every artifact: begin, resume or clear, write in pieces, add the small files, publish.

An output is built in a hidden sibling and appears under its name when it is whole. Meanwhile its lock is held, so a
second run on the same output is refused. Finished pieces (a tensor, a layer, a block, a downloaded shard) are forced
to disk and then named in a journal; a run that was killed is continued from there, if it is the same job
(:func:`job_key`), and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from llmconvert.errors import CapacityError, HubError, LlmconvertError, SourceError, UsageError
from llmconvert.machine import of_machine
from llmconvert.memory import row_slices
from llmconvert.progress import SILENT, Progress
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.disk import put_in_place, sync_directory
from llmconvert.storage.journal import Journal
from llmconvert.storage.lock import locked
from llmconvert.storage.writer import (
    Layout,
    TensorWriter,
    check_output_directory,
    json_bytes,
    publish_directory,
    staging_directory,
    write_json,
    write_side_files,
)
from llmconvert.version import __version__

__all__ = ["Artifact", "build_artifact", "copy_tensor", "job_key", "output_nbytes"]

#: Of a staging directory: what goes before the artifact appears, the journal among it.
WORK = ".work"
JOURNAL = "journal.jsonl"
# Pieces that come in quick succession are forced to disk together, this often: so much a killed run does again.
_SYNC_SECONDS = 5.0
_COPY_NBYTES = 1 << 26


def job_key(
    source: Checkpoint,
    layout: Layout,
    settings: Mapping[str, Any],
    *,
    identity: str = "",
    windows: Sequence[torch.Tensor] = (),
) -> str:
    """Hash of all that decides an artifact's bytes: whether two runs are the same job.

    Args:
        source: the weights; its config and its tensors' names, dtypes and shapes count.
        layout: of the artifact, whose headers count.
        settings: everything else that the job was asked for, JSON values or what ``str`` tells apart.
        identity: tells sources apart that look alike; what is known of the source's files by default.
        windows: token ids, each ``[1, length]``.

    Returns:
        sha256 in hex.
    """
    about = {
        "version": __version__,
        "torch": torch.__version__,
        "identity": identity or source.identity,
        "config": source.config,
        "tensors": [(info.name, str(info.dtype), info.shape) for info in source.infos.values()],
        **settings,
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for shard in layout.shards:
        digest.update(shard.header)
    for window in windows:
        digest.update(window.cpu().numpy().tobytes())
    return digest.hexdigest()


def output_nbytes(layout: Layout, config: Mapping[str, Any] | None, files: Mapping[str, Path | bytes]) -> int:
    """Bytes of all files of an output, before it is begun; what :meth:`Artifact.publish` will have written."""
    small = sum(len(content) if isinstance(content, bytes) else content.stat().st_size for content in files.values())
    return layout.nbytes + small + (len(json_bytes(dict(config))) if config is not None else 0)


class Artifact:
    """An output on its way to disk; :func:`build_artifact` opens one.

    Attributes:
        staging: the directory it is built in.
        work: a directory in it for what a continued run needs; it goes before the output appears.
        done: finished pieces by name, with what was to be remembered of each; an earlier run's come first.
        resumed: whether an earlier run had finished any.
    """

    def __init__(self, output: Path, layout: Layout, key: str, lost: Callable[[Artifact], str], progress: Progress):
        self.output = output
        self.layout = layout
        self.staging = staging_directory(output)
        self.work = self.staging / WORK
        self.work.mkdir(exist_ok=True)
        self._unsynced: list[tuple[str, Any]] = []
        self._synced = time.monotonic()
        self._whole = False
        self._journal = Journal(self.work / JOURNAL)
        self.done = _pieces(self._journal)
        problem = "holds an interrupted run with other inputs"
        if self._journal.entries and self._journal.entries[0].get("key") == key:
            problem = self._damage() or lost(self)
        if problem:
            if self._journal.entries:
                progress.log(f"{self.staging.name}: {problem}; starting anew")
            self._clear(key)
        self.resumed = bool(self.done)
        if self.resumed:
            progress.log(f"continuing an interrupted run: {list(self.done)[-1]} was finished last")
        self._writer: TensorWriter | None = None

    @property
    def writer(self) -> TensorWriter:
        """For its tensors; disk space for all of them is reserved."""
        assert self._writer is not None
        return self._writer

    def reserve(self) -> None:
        """Take the disk space.

        Raises:
            CapacityError: there is too little.
        """
        self._writer = TensorWriter(self.staging, self.layout)

    def finish(self, name: str, detail: Any = None, *, batched: bool = False) -> None:
        """Say that a piece is written.

        Args:
            name: of the piece.
            detail: JSON value to be found in :attr:`done` by a run that continues this one.
            batched: pieces come in quick succession, and those of some seconds are made last together. Otherwise the
                piece is on disk when this returns.
        """
        self.done[name] = detail
        self._unsynced.append((name, detail))
        if not batched or time.monotonic() - self._synced >= _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Make every finished piece last: force it to disk, then say so in the journal."""
        if self._unsynced:
            # Forgotten first: the kernel reports a lost write once, and a second attempt would seem to succeed.
            pieces, self._unsynced = self._unsynced, []
            self.writer.sync()
            self._journal.append({"done": pieces})
            self._synced = time.monotonic()

    def copy(self, source: Checkpoint, names: Iterable[str]) -> None:
        """Copy tensors that stay as they are; each is a piece of its name, and those that are done are left out."""
        for name in names:
            if name not in self.done:
                copy_tensor(self.writer, source, name)
                self.finish(name, batched=True)

    def publish(
        self, config: Mapping[str, Any] | None, files: Mapping[str, Path | bytes], *, single: bool = False
    ) -> int:
        """Add the small files and put the output in place.

        Args:
            config: of the model, for ``config.json``; None if there is none.
            files: file name → a path to copy, or the bytes themselves.
            single: the output is the layout's only file, without a directory around it.

        Returns:
            bytes of all its files.

        Raises:
            OutputError: something else has taken its place meanwhile.
            CapacityError: the disk is full.
        """
        self.writer.sync()
        self.writer.close()
        nbytes = self.layout.nbytes + write_side_files(self.staging, files)
        if config is not None:
            write_json(self.staging / "config.json", dict(config))
            nbytes += (self.staging / "config.json").stat().st_size
        # The journal goes last: a run killed in between finds every piece done, and needs nothing else.
        _remove_contents(self.work, but=JOURNAL)
        shutil.rmtree(self.work)
        self._whole = True
        if single:
            _publish_file(self.staging, self.layout.shards[0].name, self.output)
        else:
            publish_directory(self.staging, self.output)
        return nbytes

    def _damage(self) -> str:
        """What is missing of the finished pieces, empty if nothing is."""
        for shard in self.layout.shards:
            path = self.staging / shard.name
            if self.done and not (path.is_file() and path.stat().st_size == shard.nbytes):
                return f"{shard.name} of an interrupted run is gone or cut short"
        return ""

    def _clear(self, key: str) -> None:
        _remove_contents(self.staging)
        self.work.mkdir()
        self._journal = Journal(self.work / JOURNAL)
        self._journal.append({"key": key})
        self.done = {}

    def _leave(self, error: BaseException | None) -> None:
        """Close the files; after an error, remove what nobody could continue from, or would want to."""
        if error is not None and not self._whole:
            with suppress(OSError, LlmconvertError):
                self.sync()
        if self._writer is not None:
            self._writer.close()
        if error is None or self._whole:
            return
        if isinstance(error, UsageError | SourceError) and not isinstance(error, HubError) and not of_machine(error):
            worth = self.resumed  # what an earlier run achieved is not thrown away because this one was refused
        elif isinstance(error, CapacityError):
            worth = bool(self.done)
        else:
            worth = bool(self.done) or any(path.name != JOURNAL for path in self.work.glob("*"))
        if not worth:
            shutil.rmtree(self.staging, ignore_errors=True)


@contextmanager
def build_artifact(
    output: Path,
    layout: Layout,
    key: str,
    *,
    lost: Callable[[Artifact], str] = lambda _: "",
    progress: Progress = SILENT,
) -> Iterator[Artifact]:
    """Hold the lock of ``output`` and build it, from what an interrupted run of the same job left, if there is one.

    Args:
        output: a directory that does not exist yet or is empty, or a file to be.
        layout: of its tensors.
        key: of the job, see :func:`job_key`; what another job left is removed, and the progress says so.
        lost: why the finished pieces that it finds are of no use, empty if they are.
        progress: where to say so.

    Raises:
        OutputError: another process builds it, or something is in its place; see also
            :func:`llmconvert.storage.writer.check_output_directory`.
        CapacityError: the disk cannot hold it.
    """
    with locked(output):
        # Whoever held the lock may have finished just now.
        check_output_directory(output)
        artifact: Artifact | None = None
        try:
            artifact = Artifact(output, layout, key, lost, progress)
            artifact.reserve()
            yield artifact
        except BaseException as error:
            if artifact is not None:
                artifact._leave(error)
            raise
        artifact._leave(None)


def copy_tensor(writer: TensorWriter, source: Checkpoint, name: str) -> None:
    """Copy a tensor, as it is, in slices of rows."""
    info = source.infos[name]
    for part in row_slices(info.shape, _COPY_NBYTES // info.dtype.itemsize):
        writer.write_rows(name, part.start, source.read_rows(name, part.start, part.stop))


def _pieces(journal: Journal) -> dict[str, Any]:
    return {name: detail for entry in journal.entries for name, detail in entry.get("done", ())}


def _remove_contents(directory: Path, *, but: str = "") -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != but:
            path.unlink()


def _publish_file(staging: Path, name: str, output: Path) -> None:
    put_in_place(staging / name, output.absolute())
    staging.rmdir()
    sync_directory(output.absolute().parent)
