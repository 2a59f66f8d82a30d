"""The artifact that a training ends in: begun with the state of an interrupted run, and written whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from llmconvert.memory import release_freed_memory
from llmconvert.progress import Progress
from llmconvert.storage.artifact import Artifact, build_artifact
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.writer import Layout
from llmconvert.training.state import TrainingState, load_state, save_state

__all__ = ["TrainedArtifact", "build_trained"]

_STATE = "training.safetensors"


class TrainedArtifact:
    """An artifact in the making, and where its training stands; :func:`build_trained` makes one.

    Attributes:
        found: the state that an interrupted run of the same job has saved.
        start: steps that it had done.
    """

    def __init__(self, artifact: Artifact, job: str, state: Path | None) -> None:
        self._artifact = artifact
        self._kept = state or artifact.work / _STATE
        self.found = load_state(self._kept, job)
        self.start = self.found.step if self.found is not None else 0

    @property
    def work(self) -> Path:
        """A directory for what a training leaves on its way; it goes with the training."""
        return self._artifact.work

    def save(self, current: TrainingState) -> None:
        """Keep a state to continue from."""
        save_state(self._kept, current)
        self._artifact.finish(f"step {current.step}")

    def write(self, trained: Iterable[tuple[str, torch.Tensor]], before: Checkpoint) -> None:
        """Write the ``trained`` tensors, all others and the files as they were ``before``, and let it appear; where
        that has no config, there is none."""
        self.found = None
        release_freed_memory()
        written = set()
        for name, tensor in trained:
            self._artifact.writer.write(name, tensor)
            written.add(name)
        self._artifact.copy(before, (name for name in before if name not in written))
        self._artifact.publish(before.config or None, before.files)


@contextmanager
def build_trained(
    output: Path, layout: Layout, job: str, state: Path | None, progress: Progress
) -> Iterator[TrainedArtifact]:
    """Hold the lock of ``output`` and build it, see :func:`llmconvert.storage.artifact.build_artifact`.

    Args:
        output: a directory that does not exist yet or is empty.
        layout: of its tensors.
        job: key of the job; the state of another one is not taken up.
        state: the file of the state, which stays; by default it lies in the hidden directory that the output is built
            in, and goes with it.
        progress: told of what is continued.

    Raises:
        OutputError: another process builds it, or something is in its place.
        CapacityError: the disk cannot hold it.
    """
    with build_artifact(output, layout, job, progress=progress) as artifact:
        yield TrainedArtifact(artifact, job, state)
