"""Drift of the hidden state between a model and what was made of it, streamed side by side over the same text.

All run in replay mode, and block by block: the original's is held while each artifact's is there in turn. So memory
holds two blocks, the outer weights that the artifacts don't have in common with the original, and a bounded part of
hidden states, whatever the models' sizes and however many artifacts there are; the original passes its blocks once for
all of them. What a block adds to the drift is partly what it makes of the drift that it inherits. So an artifact's
block is run once more on a little text, entered with the original's state: what is off behind it then is its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Self, TypeVar

import torch

from llmconvert.compute.drift import DriftSums, join_drift
from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.compute.saturation import Saturation, all_saturation, uncounted
from llmconvert.engine.discovery import discover
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.states import passing_states
from llmconvert.engine.stream import Stream
from llmconvert.errors import CalibrationError, CheckpointError, GateError, LlmconvertError, UsageError
from llmconvert.machine import of_machine
from llmconvert.memory import release_freed_memory
from llmconvert.progress import SILENT, Progress
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["BlockDivergence", "Pair", "SideBySide", "blame_artifact"]

T = TypeVar("T")
# Tokens on which blocks are run alone; a window at least.
_ALONE_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class BlockDivergence:
    """The hidden state after a block, in the artifact against the original.

    Attributes:
        index: of the block.
        name: its module name, ``model.layers.3``.
        error: ‖ĥ − h‖ / ‖h‖ per token, root mean square over all tokens.
        added: what of it this block added: the root of the increase of its square, 0 if it shrank.
        cosine: mean over all tokens of the cosine between the two states.
        own: the error behind this block when it is entered with the original's state, over the first tokens.
    """

    index: int
    name: str
    error: float
    added: float
    cosine: float
    own: float


@dataclass(frozen=True, slots=True)
class Pair:
    """Logits ``[1, length, vocabulary]`` of the original and of one artifact, by its number, for the same window."""

    artifact: int
    ours: torch.Tensor
    theirs: torch.Tensor


class SideBySide:
    """A context manager; ask for :meth:`logits`, and for :meth:`divergences` when they are exhausted.

    An artifact that can't be run ends alone, and the others go on; when none is left, what ended the last one is
    raised.

    Args:
        reference: dense weights of the original.
        artifacts: dense weights of what was made of it.
        windows: token ids, each ``[1, length]``.
        device: where to compute.
        dtype: of weights and activations; each checkpoint's own by default.
        progress: one unit per block of each artifact.
        ranks: the processes, each of which runs a part of the windows.
        drift: whether hidden states are compared; without, there are logits alone.

    Attributes:
        failures: why artifacts ended, by their numbers.

    Raises:
        UnsupportedError: the engine cannot run the original's architecture, or no artifact's.
        GateError: tensors of the last artifact are missing or have other shapes than its config says.
    """

    def __init__(
        self,
        reference: Checkpoint,
        artifacts: Sequence[Checkpoint],
        windows: Sequence[torch.Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        progress: Progress = SILENT,
        ranks: Ranks = ALONE,
        drift: bool = True,
    ) -> None:
        own = ranks.share(len(windows))
        self._windows, self._all = tuple(windows[own.start : own.stop]), len(windows)
        self._progress, self._ranks = progress, ranks
        ends = accumulate(window.shape[1] for window in windows)
        first = max(1, sum(end <= _ALONE_TOKENS for end in ends))
        alone = min(max(0, first - own.start), len(own))
        self._count = len(artifacts)
        models = len(artifacts) + 1
        self._reference = _Side(reference, self._windows, device, dtype, models)
        self._artifacts: dict[int, _Artifact] = {}
        self.failures: dict[int, LlmconvertError] = {}
        for number, artifact in enumerate(artifacts):
            with self._running(number):
                self._artifacts[number] = _Artifact(
                    self._reference, artifact, self._windows, device, dtype, models, alone if drift else None
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for side in (self._reference, *self._artifacts.values()):
            side.close()

    def divergences(self, artifact: int = 0) -> tuple[BlockDivergence, ...]:
        """Of every block that all windows have passed in an artifact; empty if the models don't correspond, or unasked.

        Of several processes, all have to ask.
        """
        return self._artifacts[artifact].divergences(self._all, self._ranks)

    def saturation(self, artifact: int = 0) -> tuple[Saturation, ...]:
        """Of an artifact's linears with fixed scales what came in and what was cut off; as :meth:`divergences`."""
        return all_saturation(self._artifacts[artifact].skeleton.input_counts, self._ranks)

    def logits(self) -> Iterator[Pair]:
        """Window after window, and for each of them artifact after artifact.

        Raises:
            CalibrationError: a hidden state of the original is not finite; the block is named.
            GateError: one of the last artifact is not, or its weights can't be read.
        """
        ours, reference = self._reference, _naming(self._reference.stream.blocks())
        deepest = max(side.skeleton.block_count for side in (ours, *self._artifacts.values()))
        with self._progress.task("Comparing", deepest * self._count) as task:
            for _ in range(deepest):
                reached = next(reference, None) is not None
                for number in list(self._artifacts):
                    with self._running(number):
                        self._artifacts[number].pass_block(ours if reached else None)
                    task.advance()
        with _named():
            ours.leave()
        for number in list(self._artifacts):
            with self._running(number):
                self._artifacts[number].arrive(ours)
        # Logits have pages of their own, and would come on top of what the blocks have left.
        release_freed_memory(everything=True)
        ends = _naming(ours.stream.logits())
        for _ in self._windows:
            yield from self._pairs(next(ends))  # under no name here, which would hold it beside the next window's
        assert next(ends, None) is None

    def _pairs(self, ours: torch.Tensor) -> Iterator[Pair]:
        for number in list(self._artifacts):
            theirs: list[torch.Tensor] = []
            with self._running(number):
                theirs.append(self._artifacts[number].next_logits())
            if theirs:
                yield Pair(number, ours, theirs.pop())

    @contextmanager
    def alone(self, artifact: int) -> Iterator[None]:
        """What is found to be wrong with one artifact in here ends it, and nothing else while there are others."""
        try:
            yield
        except (GateError, UsageError) as error:
            if len(self.failures) + 1 == self._count:
                raise
            self.failures[artifact] = error
            if artifact in self._artifacts:
                self._artifacts.pop(artifact).close()

    @contextmanager
    def _running(self, artifact: int) -> Iterator[None]:
        """An artifact is run in here."""
        with self.alone(artifact), blame_artifact():
            yield


class _Side:
    """One of the models."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Sequence[torch.Tensor],
        device: torch.device,
        dtype: torch.dtype | None,
        models: int,
    ) -> None:
        self.skeleton = Skeleton(checkpoint, device, dtype, products="wide")
        lengths = [window.shape[1] for window in windows]
        plans = discover(self.skeleton, max(lengths))
        self._states = passing_states(lengths, self.skeleton.hidden_size, self.skeleton.dtype, models)
        self.stream = Stream(self.skeleton, windows, plans, mode="replay", head=True, states=self._states)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of blocks and width of the hidden state."""
        return self.skeleton.block_count, self.skeleton.hidden_size

    def leave(self) -> None:
        """Let all windows leave the last block, which isn't needed any more."""
        last = self.skeleton.block_count - 1
        self.stream.cross(last)
        self.skeleton.drop_block(last)

    def close(self) -> None:
        """Drop all weights and states."""
        self.stream.close()
        self._states.close()


class _Artifact(_Side):
    """A model that was made of the original, and how far it has drifted from it.

    A block is loaded from :meth:`pass_block` to its end alone; the windows wait behind it.
    """

    def __init__(
        self,
        reference: _Side,
        checkpoint: Checkpoint,
        windows: Sequence[torch.Tensor],
        device: torch.device,
        dtype: torch.dtype | None,
        models: int,
        alone: int | None,
    ) -> None:
        super().__init__(checkpoint, windows, device, dtype, models)
        _share_outer(self.skeleton, reference.skeleton)
        #: Whether hidden states are compared: as asked for, where the models' blocks correspond.
        self.comparable = alone is not None and self.shape == reference.shape
        self._windows = len(windows)
        self._names = [self.skeleton.prefix(index).rstrip(".") for index in range(self.skeleton.block_count)]
        count = self.skeleton.block_count if self.comparable else 0
        self._sums = [DriftSums() for _ in range(count)]
        self._own = [DriftSums() for _ in range(count)]
        self._alone_windows = alone or 0
        #: The current block on the original's entries: its outputs, for the first windows.
        self._alone: list[torch.Tensor] = []
        self._index = 0
        self._blocks = self.stream.blocks()
        self._logits: Iterator[torch.Tensor] | None = None

    def pass_block(self, reference: _Side | None) -> None:
        """Take all windows through the next block, if there is one; the original stands at its entry, unless None."""
        if next(self._blocks, None) is None:
            return
        index = self._index
        if self.comparable and reference is not None:
            if index:
                self._compare(reference, index)
            self._run_alone(reference, index)
        self.stream.cross(index)
        self.skeleton.drop_block(index)
        release_freed_memory()
        self._index += 1

    def close(self) -> None:
        """See above; of one that ends in the middle of a block, that one's as well."""
        super().close()
        if self._index < self.skeleton.block_count:
            self.skeleton.drop_block(self._index)

    def arrive(self, reference: _Side) -> None:
        """Both have left their last block."""
        next(self._blocks, None)
        if self.comparable:
            self._compare(reference, self._index)

    def next_logits(self) -> torch.Tensor:
        """Of the next window."""
        if self._logits is None:
            self._logits = self.stream.logits()
        return next(self._logits)

    def divergences(self, windows: int, ranks: Ranks) -> tuple[BlockDivergence, ...]:
        found: list[BlockDivergence] = []
        before = 0.0
        everything = join_drift([*self._sums, *self._own], ranks)
        all_sums, all_own = everything[: len(self._sums)], everything[len(self._sums) :]
        for index, sums in enumerate(all_sums):
            if sums.windows < windows:
                break
            square = sums.square / sums.tokens
            added = math.sqrt(max(0.0, square - before))
            own = math.sqrt(all_own[index].square / all_own[index].tokens)
            cosine = sums.cosine / sums.tokens
            found.append(BlockDivergence(index, self._names[index], math.sqrt(square), added, cosine, own))
            before = square
        return tuple(found)

    def _compare(self, reference: _Side, index: int) -> None:
        """Both models stand at the entry of block ``index``: compare what the block before it gave."""
        for window in range(self._windows):
            state = reference.stream.state(index, window)
            self._sums[index - 1].add(state, self.stream.state(index, window))
            if self._alone:
                self._own[index - 1].add(state, self._alone.pop(0))

    def _run_alone(self, reference: _Side, index: int) -> None:
        """Both models stand at the entry of block ``index``: run the artifact's on the original's state."""
        numbers = range(self._alone_windows)
        states = ((one, reference.stream.state(index, one), self.stream.state(index, one)) for one in numbers)
        with uncounted(self.skeleton.input_counts.values()):
            self._alone = [self.stream.try_block(index, window, entry.to(like)) for window, entry, like in states]


def _share_outer(artifact: Skeleton, reference: Skeleton) -> None:
    """Let an artifact have the reference's own embedding, norm and head, where its are the same to the bit."""
    known = dict(reference.model.named_parameters(remove_duplicate=False))
    for name, parameter in list(artifact.model.named_parameters(remove_duplicate=False)):
        other, (path, _, leaf) = known.get(name), name.rpartition(".")
        if other is None or "meta" in (parameter.device.type, other.device.type) or path in artifact.reach.idle:
            continue
        if parameter.dtype == other.dtype and parameter.shape == other.shape and _same_bits(parameter, other):
            setattr(artifact.model.get_submodule(path), leaf, other)


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    ours, theirs = (one.detach().contiguous().reshape(-1).view(torch.uint8) for one in (first, second))
    return torch.equal(ours, theirs)


@contextmanager
def _named() -> Iterator[None]:
    """A state that is not finite in here is the original's."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(f"the original computes no usable numbers: {error}") from error


def _naming(steps: Iterator[T]) -> Iterator[T]:
    """As ``steps``, which run the original."""
    with _named():
        yield from steps


@contextmanager
def blame_artifact() -> Iterator[None]:
    """What goes wrong while an artifact is run is its failure, not the input's; but for what the machine does.

    Raises:
        GateError: instead of the errors about tensors that are missing or malformed and states that are not finite.
    """
    try:
        yield
    except CheckpointError as error:
        if of_machine(error):
            raise
        raise GateError(f"the artifact can't be run: {error}") from error
    except CalibrationError as error:
        raise GateError(f"the artifact computes no usable numbers: {error}") from error
