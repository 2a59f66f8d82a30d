"""Shard by shard from the Hub: each shard is worked on when it is there, and deleted when it is done.

The model's headers are read first, so the output is laid out, and its disk space reserved, before the first shard
comes. From then on at most two source shards are on disk: one being worked on, one on its way. Finished shards are
journaled, and a download that was cut off is continued, so the same call goes on where an earlier one was killed.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmconvert.errors import CapacityError, CheckpointError
from llmconvert.hub import RemoteFile, RemoteModel, download_file, fetch_without_weights, hub_errors
from llmconvert.progress import SILENT, Bytes, Progress, Task
from llmconvert.storage.artifact import build_artifact
from llmconvert.storage.checkpoint import Checkpoint, CheckpointView, SafetensorsCheckpoint
from llmconvert.storage.directory import SINGLE_NAME, other_files
from llmconvert.storage.remote import RemoteCheckpoint
from llmconvert.storage.writer import Layout, TensorWriter, write_json

__all__ = ["ShardJob", "StreamedModel", "describe_remote", "stream_shards"]


class ShardJob(Protocol):
    """What becomes of a model's tensors."""

    #: Where they go.
    layout: Layout
    #: ``config.json`` of the output.
    config: Mapping[str, Any]
    #: Its other files.
    files: Mapping[str, Path | bytes]
    #: What decides the output's bytes; an interrupted call is continued only under the same key.
    key: str

    def process(self, shard: SafetensorsCheckpoint, writer: TensorWriter) -> Mapping[str, Any]:
        """Write the tensors of one shard; returns what is to be remembered of it, as JSON values."""


@dataclass(frozen=True, slots=True)
class StreamedModel:
    """A model on the Hub, known from its headers: every tensor's dtype and shape, config and small files."""

    remote: RemoteModel
    checkpoint: Checkpoint


def describe_remote(model_id: str, revision: str | None = None) -> StreamedModel:
    """Look at a Hub model without downloading its weights.

    Raises:
        HubError: see :func:`llmconvert.hub.fetch_without_weights`.
        CheckpointError: its weights are no safetensors, or the index doesn't name the files that hold them.
    """
    remote = fetch_without_weights(model_id, revision)
    checkpoint = CheckpointView(RemoteCheckpoint(model_id, remote.commit_hash))
    checkpoint.files = other_files(remote.directory)
    named, listed = {info.shard for info in checkpoint.infos.values()}, {file.name for file in remote.shards}
    if named != listed:
        raise CheckpointError(
            f"{model_id}: {', '.join(sorted(named ^ listed)[:3])} is in the index or in the repository, not in both; "
            "it cannot be streamed"
        )
    return StreamedModel(remote, checkpoint)


def stream_shards(
    model: StreamedModel, output: Path, job: ShardJob, *, progress: Progress = SILENT
) -> list[Mapping[str, Any]]:
    """Run ``job`` over the shards as they come, and put the finished directory in place.

    Args:
        model: what to stream.
        output: a directory that does not exist yet or is empty.
        job: what to do with each shard.
        progress: in bytes downloaded.

    Returns:
        What the job said of each shard.

    Raises:
        HubError: the connection failed for good; the same call continues.
        CapacityError: the disk can't hold the output and two shards.
        UsageError, CheckpointError: what the job refuses; nothing is left behind.
    """
    with build_artifact(output, job.layout, job.key, progress=progress) as artifact:
        todo = [file for file in model.remote.shards if file.name not in artifact.done]
        with progress.task(
            f"streaming {model.remote.repo_id}", Bytes(sum(file.size for file in model.remote.shards))
        ) as task:
            task.advance(sum(file.size for file in model.remote.shards if file.name in artifact.done))
            with closing(_arriving(model, todo, artifact.work, task)) as arriving:
                for file, directory in arriving:
                    artifact.finish(file.name, _process(model.checkpoint, file, directory, job, artifact.writer))
                    shutil.rmtree(directory)
        artifact.publish(job.config, job.files)
        return [artifact.done[file.name] for file in model.remote.shards]


def _arriving(
    model: StreamedModel, files: Sequence[RemoteFile], work: Path, task: Task
) -> Generator[tuple[RemoteFile, Path], None, None]:
    """Each shard in a directory of its own, while the next one is on its way."""
    _require_space(files, work)
    stop = threading.Event()

    def fetch(file: RemoteFile) -> Path:
        directory = work / f"shard-{file.digest[:16]}"
        directory.mkdir(exist_ok=True)
        write_json(directory / "config.json", model.checkpoint.config)
        download_file(file, directory / SINGLE_NAME, advance=task.advance, stop=stop)
        return directory

    with ThreadPoolExecutor(1) as pool:
        try:
            coming: Future[Path] | None = pool.submit(fetch, files[0]) if files else None
            for index, file in enumerate(files):
                assert coming is not None
                with hub_errors(file.repo_id):
                    directory = coming.result()
                following = files[index + 1 : index + 2]
                coming = pool.submit(fetch, following[0]) if following else None
                yield file, directory
        finally:
            stop.set()


def _require_space(files: Sequence[RemoteFile], work: Path) -> None:
    """The output's space is taken already; two shards must fit beside it, less what is there of them."""
    here = sum(path.stat().st_size for path in work.glob("shard-*/*") if path.is_file())
    needed = sum(sorted((file.size for file in files), reverse=True)[:2]) - here
    free = shutil.disk_usage(work).free
    if free < needed:
        raise CapacityError(
            f"{work.parent}: beside the output, the two largest source shards need {needed:,} bytes, "
            f"{free:,} are free; free some, or write to another disk"
        )


def _process(
    described: Checkpoint, file: RemoteFile, directory: Path, job: ShardJob, writer: TensorWriter
) -> Mapping[str, Any]:
    with SafetensorsCheckpoint(directory) as shard:
        expected = {name: (info.dtype, info.shape) for name, info in described.infos.items() if info.shard == file.name}
        if {name: (info.dtype, info.shape) for name, info in shard.infos.items()} != expected:
            raise CheckpointError(f"{file.repo_id}: {file.name} holds other tensors than its header said before")
        return job.process(shard, writer)
