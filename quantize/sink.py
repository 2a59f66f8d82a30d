"""Sinks of a pass over the blocks: an artifact in one format, journaled block by block, put in place whole."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch

from llmconvert.compute.kv_cache import CacheScales
from llmconvert.engine.skeleton import Skeleton
from llmconvert.phases import Phases
from llmconvert.quantize.formats.container import Container
from llmconvert.quantize.formats.encoded import Encoded
from llmconvert.quantize.methods.base import InputSquares
from llmconvert.quantize.narrow import check_kept, coarse_share
from llmconvert.quantize.plan import QuantizationPlan
from llmconvert.quantize.steps import Outcome
from llmconvert.storage.artifact import Artifact

__all__ = ["ArtifactSink", "Taken", "finished_blocks"]


class Taken(NamedTuple):
    """What is known of a quantized linear beside its tensors.

    Attributes:
        error, damping, tokens: see :class:`~llmconvert.quantize.passes.results.LayerResult`.
        coarse: see :func:`~llmconvert.quantize.narrow.coarse_share`.
    """

    error: float | None
    damping: float | None
    tokens: int | None
    coarse: float | None = None


def finished_blocks(artifact: Artifact) -> int:
    """Blocks that an artifact has, without a gap from the first on."""
    return next(index for index in range(len(artifact.done) + 1) if _piece(index) not in artifact.done)


class ArtifactSink:
    """Writes what a pass gives into one artifact; see :class:`llmconvert.quantize.execute.Sink`.

    Args:
        artifact: open.
        skeleton: the model and its source, whose other tensors are taken over.
        container: what the tensors go into; the artifact has its layout.
        plan: which linears are quantized into what; they must be those of the pass.
        phases: where time is counted.
        encoded: what is encoded for all artifacts of the pass.
    """

    def __init__(
        self,
        artifact: Artifact,
        skeleton: Skeleton,
        container: Container,
        plan: QuantizationPlan,
        phases: Phases,
        encoded: Encoded | None = None,
    ) -> None:
        self._artifact = artifact
        self._skeleton = skeleton
        self._container = container
        self._plan = plan
        self._phases = phases
        self._encoded = encoded
        self._changed: set[str] = set()
        self._squares: dict[str, dict[str, torch.Tensor]] = {}
        self.blocks = finished_blocks(artifact)
        #: Of every quantized linear so far, by its module name.
        self.results: dict[str, Taken] = {}
        for index in range(self.blocks):
            found = artifact.done[_piece(index)]
            self.results |= {name: Taken(*result) for name, *result in found}
        with phases.measure("copying"):
            container.begin(artifact.writer)
            for name in self._outer_names():
                if name not in artifact.done and name != plan.head:
                    container.copy(artifact.writer, name, None, encoded)
                    artifact.finish(name, batched=True)
            artifact.sync()

    def take(self, name: str, outcome: Outcome) -> None:
        if isinstance(outcome, InputSquares):
            site = self._plan.sites.get(name)
            tensor, linear = (site.tensor, site.stored) if site is not None else (name, name.removesuffix(".weight"))
            self._squares.setdefault(tensor, {})[linear] = outcome.mean
        elif isinstance(outcome, CacheScales):
            with self._phases.measure("writing"):
                self._artifact.writer.write(f"{name}.k_scale", outcome.key)
                self._artifact.writer.write(f"{name}.v_scale", outcome.value)
        elif isinstance(outcome, torch.Tensor):
            stored = self._skeleton.names[name]
            with self._phases.measure("writing"):
                self._container.write_values(self._artifact.writer, stored, outcome)
            self._changed.add(stored)
        else:
            site = self._plan.sites[name]
            with self._phases.measure("packing"):
                weight, coarse = partial(site.read, self._skeleton.checkpoint), None
                # Types of files have a check of their own as they are encoded.
                if outcome.tensor.scheme.block is None:
                    check_kept(site.stored, outcome.tensor, self._skeleton.dtype, weight)
                    coarse = coarse_share(outcome.tensor, weight)
                packed = list(self._container.pack(site.stored, outcome.tensor))
            with self._phases.measure("writing"):
                for part in packed:
                    self._artifact.writer.write_rows(part.name, part.start, part.rows)
            self.results[name] = Taken(outcome.error, outcome.damping, outcome.tokens, coarse)

    def complete(self, index: int) -> None:
        with self._phases.measure("copying"):
            # The head waits for what comes to it behind the last block.
            last = [name for name in (self._plan.head,) if name is not None and name in self._squares]
            for name in (*self._inner_names(index), *last):
                if name not in self._changed:
                    self._container.copy(self._artifact.writer, name, self._squares.get(name), self._encoded)
        self._changed.clear()
        self._squares.clear()

    def commit(self, index: int) -> None:
        own = (name for name in self.results if self._plan.sites[name].block == index)
        layers = [(name, *self.results[name]) for name in own]
        with self._phases.measure("writing"):
            self._artifact.finish(_piece(index), layers)
        self.blocks = index + 1

    def publish(self) -> None:
        """Add config and files, and put the artifact in place.

        Raises:
            OutputError, CapacityError: see :meth:`llmconvert.storage.artifact.Artifact.publish`.
        """
        container = self._container
        with self._phases.measure("writing"):
            self._artifact.publish(container.config, container.files, single=container.single)

    def _inner_names(self, index: int) -> list[str]:
        """Checkpoint tensors of a block that are not quantized."""
        prefix, sites = self._skeleton.prefix(index), self._skeleton.sites_of(index)
        quantized = {site.tensor for site in sites if site.name in self._plan.schemes}
        inside = (stored for name, stored in self._skeleton.names.items() if name.startswith(prefix))
        return [stored for stored in inside if stored not in quantized]

    def _outer_names(self) -> Iterable[str]:
        """Checkpoint tensors outside the blocks, and those that the model's class does not know."""
        inside = {stored for name, stored in self._skeleton.names.items() if self._skeleton.holds(name)}
        inside |= {self._plan.sites[name].tensor for name in self._plan.schemes}
        return (name for name in self._skeleton.checkpoint if name not in inside)


def _piece(index: int) -> str:
    return f"block {index}"
