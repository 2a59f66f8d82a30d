"""Sinks of a pass over the blocks: an artifact packed in one format, journaled block by block, put in place whole."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from llmconvert.engine.skeleton import Skeleton
from llmconvert.phases import Phases
from llmconvert.quantize.formats.base import Format
from llmconvert.quantize.methods.base import Solution
from llmconvert.quantize.plan import QuantizationPlan
from llmconvert.storage.artifact import Artifact, copy_tensor

__all__ = ["ArtifactSink", "finished_blocks"]


def finished_blocks(artifact: Artifact) -> int:
    """Blocks that an artifact has, without a gap from the first on."""
    return next(index for index in range(len(artifact.done) + 1) if _piece(index) not in artifact.done)


class ArtifactSink:
    """Writes what a pass gives into one artifact; see :class:`llmconvert.quantize.execute.Sink`.

    Args:
        artifact: open.
        skeleton: the model and its source, whose other tensors are copied.
        layout_format: the format on disk.
        plan: which linears are quantized into what; they must be those of the pass.
        phases: where time is counted.
    """

    def __init__(
        self,
        artifact: Artifact,
        skeleton: Skeleton,
        layout_format: Format,
        plan: QuantizationPlan,
        phases: Phases,
    ) -> None:
        self._artifact = artifact
        self._skeleton = skeleton
        self._format = layout_format
        self._plan = plan
        self._phases = phases
        self._changed: set[str] = set()
        self.blocks = finished_blocks(artifact)
        #: Error and damping of every quantized linear so far, by its module name.
        self.results: dict[str, tuple[float | None, float | None]] = {}
        for index in range(self.blocks):
            self.results |= {name: (error, damping) for name, error, damping in artifact.done[_piece(index)]}
        with phases.measure("copying"):
            artifact.copy(skeleton.checkpoint, self._outer_names())
            artifact.sync()

    def take(self, name: str, solution: Solution | torch.Tensor) -> None:
        if isinstance(solution, torch.Tensor):
            stored = self._skeleton.names[name]
            with self._phases.measure("writing"):
                dtype = self._skeleton.checkpoint.infos[stored].dtype
                self._artifact.writer.write(stored, solution.to(dtype))
            self._changed.add(stored)
            return
        with self._phases.measure("packing"):
            packed = self._format.pack(self._plan.sites[name].stored, solution.tensor)
        with self._phases.measure("writing"):
            for stored, tensor in packed.items():
                self._artifact.writer.write(stored, tensor)
        self.results[name] = (solution.error, solution.damping)

    def complete(self, index: int) -> None:
        with self._phases.measure("copying"):
            for name in self._inner_names(index):
                if name not in self._changed:
                    copy_tensor(self._artifact.writer, self._skeleton.checkpoint, name)
        self._changed.clear()

    def commit(self, index: int) -> None:
        prefix = self._skeleton.prefix(index)
        layers = [(name, *result) for name, result in self.results.items() if name.startswith(prefix)]
        with self._phases.measure("writing"):
            self._artifact.finish(_piece(index), layers)
        self.blocks = index + 1

    def publish(self) -> None:
        """Add config and files, and put the artifact in place.

        Raises:
            OutputError, CapacityError: see :meth:`llmconvert.storage.artifact.Artifact.publish`.
        """
        source, declared = self._skeleton.checkpoint, self._plan.declared
        with self._phases.measure("writing"):
            files = {**source.files, **self._format.files(declared)}
            self._artifact.publish({**source.config, "quantization_config": declared}, files)

    def _inner_names(self, index: int) -> list[str]:
        """Checkpoint tensors of a block that are not quantized."""
        prefix, sites = self._skeleton.prefix(index), self._skeleton.sites_of(index)
        quantized = {site.tensor for site in sites if site.name in self._plan.schemes}
        inside = (stored for name, stored in self._skeleton.names.items() if name.startswith(prefix))
        return [stored for stored in inside if stored not in quantized]

    def _outer_names(self) -> Iterable[str]:
        """Checkpoint tensors outside the blocks, and those that the model's class does not know."""
        blocks = f"{self._skeleton.list_name}."
        inside = {stored for name, stored in self._skeleton.names.items() if name.startswith(blocks)}
        return (name for name in self._skeleton.checkpoint if name not in inside)


def _piece(index: int) -> str:
    return f"block {index}"
