"""Carrying a quantization plan out: block by block, in the memory of one block, resumable to the bit.

After each block its packed tensors and the activations that enter the next one are forced to disk, and only then the
journal says so. A killed run continues behind the last block its journal names; the same bytes go to the same places.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import LlmconvertError, RunInterruptedError
from llmconvert.memory import map_large_tensors
from llmconvert.phases import Phases
from llmconvert.progress import Progress
from llmconvert.quantize.formats.base import Format
from llmconvert.quantize.methods.base import Solution
from llmconvert.quantize.plan import QuantizationPlan
from llmconvert.quantize.steps import Steps
from llmconvert.storage.journal import Journal
from llmconvert.storage.lock import LOCK_NAME, DirectoryLock
from llmconvert.storage.writer import Layout, TensorWriter, publish_directory, staging_directory, write_file, write_json

__all__ = ["Execution"]

_WORK = ".work"
_JOURNAL = "journal.jsonl"
_COPY_NBYTES = 1 << 26


class Execution:
    """One run over the blocks of a model; holds what its steps share.

    Args:
        skeleton: the model and its source.
        layout_format: the format on disk.
        plan: what is quantized into what.
        steps: the way through the blocks.
        phases: where time is counted, the steps' as well.
    """

    def __init__(
        self, skeleton: Skeleton, layout_format: Format, plan: QuantizationPlan, steps: Steps, phases: Phases
    ) -> None:
        self.skeleton = skeleton
        self.format = layout_format
        self.plan = plan
        self.steps = steps
        self.phases = phases
        #: ``(linear, error, damping)`` of every quantized linear so far.
        self.results: list[tuple[str, float | None, float | None]] = []

    def run(
        self, output: Path, layout: Layout, key: str, progress: Progress, note: Callable[[], None] | None = None
    ) -> int:
        """Build the artifact and put it in place.

        Args:
            output: its directory.
            layout: of its weight files.
            key: what identifies the job; an interrupted run is continued only under the same key.
            progress: one unit per block.
            note: called when all is done, before the artifact appears.

        Returns:
            the number of blocks taken over from an interrupted run.
        """
        staging = staging_directory(output)
        work = staging / _WORK
        lock = DirectoryLock(work)
        map_large_tensors()
        try:
            journal, done = self._resume(staging, layout, key, progress)
            try:
                with TensorWriter(staging, layout) as writer:
                    self._write_all(writer, journal, work, done, progress)
                (note or _nothing)()
                self._finish(staging, output)
            except LlmconvertError as error:
                # What an earlier run achieved is not thrown away because this one was refused.
                if done == 0 and not isinstance(error, RunInterruptedError):
                    shutil.rmtree(staging, ignore_errors=True)
                raise
        finally:
            lock.release()
        return done

    def _resume(self, staging: Path, layout: Layout, key: str, progress: Progress) -> tuple[Journal, int]:
        """Open the journal, and clear what belongs to another job; gives the number of finished blocks."""
        work = staging / _WORK
        journal = Journal(work / _JOURNAL)
        problem = self._unusable(staging, journal, layout, key)
        if problem:
            if journal.entries:
                progress.log(f"{staging.name}: {problem}; starting anew")
            for stale in (*staging.iterdir(), *work.iterdir()):
                if stale.is_file() and stale.name != LOCK_NAME:
                    stale.unlink()
            journal = Journal(work / _JOURNAL)
            journal.append({"key": key})
        finished = [entry for entry in journal.entries if "block" in entry]
        self.results += [tuple(layer) for entry in finished for layer in entry["layers"]]
        if finished:
            progress.log(f"continuing an interrupted run: {len(finished)} blocks are done")
        return journal, len(finished)

    def _unusable(self, staging: Path, journal: Journal, layout: Layout, key: str) -> str:
        """Why the run that the journal tells of can't be continued; empty if it can."""
        if not journal.entries or journal.entries[0].get("key") != key:
            return "holds an interrupted run with other inputs"
        for shard in layout.shards:
            path = staging / shard.name
            if len(journal.entries) > 1 and not (path.is_file() and path.stat().st_size == shard.nbytes):
                return f"{shard.name} of an interrupted run is gone or cut short"
        if self.steps.lost(staging / _WORK, sum("block" in entry for entry in journal.entries)):
            return "the activations of an interrupted run are gone or cut short"
        return ""

    def _write_all(self, writer: TensorWriter, journal: Journal, work: Path, done: int, progress: Progress) -> None:
        if not any("outer" in entry for entry in journal.entries):
            self._copy(writer, self._outer_names())
            with self.phases.measure("writing"):
                writer.sync()
            journal.append({"outer": True})
        with progress.task("Quantizing", self.skeleton.block_count) as task:
            task.advance(done)
            for step in self.steps.run(work, done):
                if step.index > done:
                    self._journal_block(writer, journal, step.sync, step.index - 1)
                first = len(self.results)
                changed: set[str] = set()
                for name, solution in step.solve():
                    if isinstance(solution, torch.Tensor):
                        changed.add(self._store_dense(writer, name, solution))
                    else:
                        self._store(writer, name, solution)
                    del solution  # it would stand beside the next linear's statistics
                self._copy(writer, [name for name in self._block_names(step.index) if name not in changed])
                errors = [error for _, error, _ in self.results[first:] if error is not None]
                task.advance(1, f"output error {max(errors):.2%} at most" if errors else "")
        if done < self.skeleton.block_count:
            self._journal_block(writer, journal, _nothing, self.skeleton.block_count - 1)

    def _journal_block(self, writer: TensorWriter, journal: Journal, sync: Callable[[], None], index: int) -> None:
        """Everything of block ``index`` is written: make it last, then say so."""
        with self.phases.measure("writing"):
            writer.sync()
            sync()
            layers = [entry for entry in self.results if entry[0].startswith(self.skeleton.prefix(index))]
            journal.append({"block": index, "layers": layers})

    def _store(self, writer: TensorWriter, name: str, solution: Solution) -> None:
        with self.phases.measure("packing"):
            packed = self.format.pack(self.plan.stored[name], solution.tensor)
        with self.phases.measure("writing"):
            for stored, tensor in packed.items():
                writer.write(stored, tensor)
        self.results.append((name, solution.error, solution.damping))

    def _store_dense(self, writer: TensorWriter, name: str, tensor: torch.Tensor) -> str:
        """Write a parameter that got new values, in its dtype in the source; gives its name there."""
        stored = self.skeleton.names[name]
        with self.phases.measure("writing"):
            writer.write(stored, tensor.to(self.skeleton.checkpoint.infos[stored].dtype))
        return stored

    def _copy(self, writer: TensorWriter, names: Sequence[str]) -> None:
        """Copy tensors that stay as they are, in slices of rows."""
        checkpoint = self.skeleton.checkpoint
        with self.phases.measure("copying"):
            for name in names:
                info = checkpoint.infos[name]
                rows = info.shape[0] if info.shape else 1
                step = max(1, rows * _COPY_NBYTES // max(1, info.nbytes))
                for start in range(0, rows, step):
                    writer.write_rows(name, start, checkpoint.read_rows(name, start, min(rows, start + step)))

    def _block_names(self, index: int) -> list[str]:
        """Checkpoint tensors of a block that are copied."""
        linears, prefix = self.skeleton.linears[index], self.skeleton.prefix(index)
        quantized = {f"{self.plan.stored[name]}.weight" for name in linears if name in self.plan.schemes}
        inside = (stored for name, stored in self.skeleton.names.items() if name.startswith(prefix))
        return [stored for stored in inside if stored not in quantized]

    def _outer_names(self) -> list[str]:
        """Checkpoint tensors outside the blocks, and those that the model's class does not know."""
        blocks = f"{self.skeleton.list_name}."
        inside = {stored for name, stored in self.skeleton.names.items() if name.startswith(blocks)}
        return [name for name in self.skeleton.checkpoint if name not in inside]

    def _finish(self, staging: Path, output: Path) -> None:
        """Add config and files, remove the work files, and put the directory in place."""
        source = self.skeleton.checkpoint
        declared = self.plan.declared
        with self.phases.measure("writing"):
            for name in source.files:
                write_file(staging / name, source.read_file(name))
            for name, content in self.format.files(declared).items():
                write_file(staging / name, content)
            write_json(staging / "config.json", {**source.config, "quantization_config": declared})
            # The journal goes last: a run killed in between finds all blocks done, and needs nothing else.
            for path in (staging / _WORK).iterdir():
                if path.name not in (_JOURNAL, LOCK_NAME):
                    path.unlink()
            shutil.rmtree(staging / _WORK)
            publish_directory(staging, output)


def _nothing() -> None:
    """There is nothing to do."""
