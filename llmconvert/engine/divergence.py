"""Drift of the hidden state between two models, streamed side by side over the same text: what each block adds to it.

Both run in replay mode, one block ahead of the other at most, so that memory holds two blocks, both models' outer
weights and a bounded part of their hidden states, whatever the models' sizes. What a block adds to the drift is partly
what it makes of the drift that it inherits. So the artifact's block is run once more on a little text, entered with the
original's state: what is off behind it then is its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from typing import Any, Self, TypeVar

import torch

from llmconvert.engine.discovery import discover
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.stream import Stream
from llmconvert.errors import CalibrationError, CheckpointError, GateError
from llmconvert.machine import of_machine
from llmconvert.progress import SILENT, Progress
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["BlockDivergence", "SideBySide", "blame_artifact"]

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


class SideBySide:
    """A context manager; ask for :meth:`logits`, and for :attr:`divergences` when they are exhausted.

    Args:
        reference: dense weights of the original.
        artifact: dense weights of what was made of it.
        windows: token ids, each ``[1, length]``.
        device: where to compute.
        dtype: of weights and activations; each checkpoint's own by default.
        progress: one unit per block.

    Raises:
        UnsupportedError: the engine cannot run one of the architectures.
        GateError: tensors of the artifact are missing or have other shapes than its config says.
    """

    def __init__(
        self,
        reference: Checkpoint,
        artifact: Checkpoint,
        windows: Sequence[torch.Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self._windows = tuple(windows)
        self._progress = progress
        self._reference = _Side(reference, self._windows, device, dtype)
        with blame_artifact():
            self._artifact = _Side(artifact, self._windows, device, dtype)
        #: Whether blocks and hidden states of the two models correspond at all.
        self.comparable = self._reference.shape == self._artifact.shape
        count = self._reference.skeleton.block_count if self.comparable else 0
        self._sums = [_Sums() for _ in range(count)]
        self._own = [_Sums() for _ in range(count)]
        ends = accumulate(window.shape[1] for window in self._windows)
        #: The artifact's current block on the original's entries: its outputs, for the first windows.
        self._alone: list[torch.Tensor] = []
        self._alone_windows = max(1, sum(end <= _ALONE_TOKENS for end in ends))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for side in (self._reference, self._artifact):
            side.stream.close()

    @property
    def divergences(self) -> tuple[BlockDivergence, ...]:
        """Of every block that all windows have passed; empty if the models don't correspond."""
        found: list[BlockDivergence] = []
        before = 0.0
        for index, sums in enumerate(self._sums):
            if sums.windows < len(self._windows):
                break
            square = sums.square / sums.tokens
            name = self._reference.skeleton.prefix(index).rstrip(".")
            added = math.sqrt(max(0.0, square - before))
            own = math.sqrt(self._own[index].square / self._own[index].tokens)
            found.append(BlockDivergence(index, name, math.sqrt(square), added, sums.cosine / sums.tokens, own))
            before = square
        return tuple(found)

    def logits(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The logits ``[1, length, vocabulary]`` of original and artifact, window after window.

        Raises:
            CalibrationError: a hidden state of the original is not finite; the block is named.
            GateError: one of the artifact is not, or its weights can't be read.
        """
        count = max(side.skeleton.block_count for side in (self._reference, self._artifact))
        with self._progress.task("Comparing", count) as task:
            passed = zip_longest(_naming(self._reference.stream.blocks()), _blaming(self._artifact.stream.blocks()))
            for index, _ in enumerate(passed):
                if self.comparable:
                    if index:
                        self._compare_entries(index)
                    self._run_alone(index)
                task.advance()
        ours, theirs = _naming(self._reference.stream.logits()), _blaming(self._artifact.stream.logits())
        for _ in self._windows:
            yield self._pair(ours, theirs)  # under no name here, which would hold them beside the next window's
        for rest in (ours, theirs):
            assert next(rest, None) is None

    def _pair(self, ours: Iterator[torch.Tensor], theirs: Iterator[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        logits = next(ours), next(theirs)
        if self.comparable:
            state = self._reference.leaving()
            self._sums[-1].add(state, self._artifact.leaving())
            if self._alone:
                self._own[-1].add(state, self._alone.pop(0))
        return logits

    def _compare_entries(self, index: int) -> None:
        """Both models stand at the entry of block ``index``: compare what the block before it gave."""
        for window in range(len(self._windows)):
            state = self._reference.stream.state(index, window)
            self._sums[index - 1].add(state, self._artifact.stream.state(index, window))
            if self._alone:
                self._own[index - 1].add(state, self._alone.pop(0))

    def _run_alone(self, index: int) -> None:
        """Both models stand at the entry of block ``index``: run the artifact's on the original's state."""
        numbers = range(self._alone_windows)
        entries = (self._reference.stream.state(index, window) for window in numbers)
        likes = (self._artifact.stream.state(index, window) for window in numbers)
        tried = (
            self._artifact.stream.try_block(index, window, entry.to(like))
            for window, entry, like in zip(numbers, entries, likes, strict=True)
        )
        self._alone = list(_blaming(tried))


class _Side:
    """One of the two models."""

    def __init__(
        self, checkpoint: Checkpoint, windows: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype | None
    ) -> None:
        self.skeleton = Skeleton(checkpoint, device, dtype)
        plans = discover(self.skeleton, max(window.shape[1] for window in windows))
        self.stream = Stream(self.skeleton, windows, plans, mode="replay", head=True)
        self._left: torch.Tensor | None = None
        # The last block has no successor at whose entry its output could be looked at.
        self.skeleton.slots[-1].register_forward_hook(self._keep)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of blocks and width of the hidden state."""
        return self.skeleton.block_count, self.skeleton.hidden_size

    def leaving(self) -> torch.Tensor:
        """What the last block gave for the window whose logits were computed last."""
        assert self._left is not None
        hidden, self._left = self._left, None
        return hidden

    def _keep(self, module: Any, args: Any, output: Any) -> None:
        self._left = output[0] if isinstance(output, tuple) else output


class _Sums:
    """Sums over tokens of a block's relative squared error and cosine."""

    def __init__(self) -> None:
        self.square = self.cosine = 0.0
        self.tokens = self.windows = 0

    def add(self, reference: torch.Tensor, artifact: torch.Tensor) -> None:
        """Add a window's hidden states, ``[1, length, hidden size]`` each."""
        ours, theirs = reference[0].float(), artifact[0].float()
        norm = ours.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        self.square += float(((theirs - ours).square().sum(-1) / norm).sum(dtype=torch.float64))
        self.cosine += float(torch.cosine_similarity(ours, theirs, dim=-1).sum(dtype=torch.float64))
        self.tokens += len(ours)
        self.windows += 1


def _naming(steps: Iterator[T]) -> Iterator[T]:
    """As ``steps``; says that a state that is not finite is the original's."""
    try:
        yield from steps
    except CalibrationError as error:
        raise CalibrationError(f"the original computes no usable numbers: {error}") from error


def _blaming(steps: Iterator[T]) -> Iterator[T]:
    """As ``steps``, which run the artifact."""
    with blame_artifact():
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
