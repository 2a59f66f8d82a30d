"""Block-by-block quantization in one pass, in the memory of one block, resumable to the bit.

The pass knows nothing of files: it hands every linear's solution to sinks, one for each artifact that is made of it,
and tells them when a block is complete. A block lasts once every sink has it on disk, and the activations that enter
the next one are there too; a killed pass continues behind it, and the same bytes go to the same places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.progress import Progress
from llmconvert.quantize.methods.base import Solution
from llmconvert.quantize.steps import Steps

__all__ = ["Sink", "quantize_blocks", "resumed_blocks"]

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class Sink(Protocol[T_contra]):
    """Where the results of a pass go."""

    #: Blocks that it has, from this pass or an earlier one, without a gap from the first on.
    blocks: int

    def take(self, name: str, outcome: T_contra) -> None:
        """What has become of a linear, or is known of it, by its module name; or of another parameter, as a tensor."""

    def complete(self, index: int) -> None:
        """Everything of block ``index`` that is not as it was has been taken."""

    def commit(self, index: int) -> None:
        """Make block ``index`` last."""


def resumed_blocks(sinks: Sequence[Sink[T]]) -> int:
    """The blocks that a pass into these sinks need not do again.

    Activations of the last two blocks are kept. A pass that is killed while its sinks commit leaves some a block ahead;
    any other difference is not of one pass, which then starts over.
    """
    counts = [sink.blocks for sink in sinks]
    return min(counts) if max(counts) - min(counts) <= 1 else 0


def quantize_blocks(
    steps: Steps[T],
    count: int,
    sinks: Sequence[Sink[T]],
    work: Path,
    progress: Progress,
    *,
    done: int | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Solve all blocks, from the first that the sinks lack.

    Args:
        steps: the way through the blocks.
        count: how many there are.
        sinks: get every block, each one for itself.
        work: a directory for activations, the same one when the pass is continued.
        progress: one unit per block.
        done: blocks to leave out; by default what the sinks have.
        ranks: the processes that do it together, the first of which has all sinks.
    """
    done = resumed_blocks(sinks) if done is None else done
    with progress.task("Quantizing", count) as task:
        task.advance(done)
        for step in steps.run(work, done):
            if step.index > done:
                _commit(sinks, step.index - 1, step.sync, ranks)
            errors: list[float] = []
            for name, outcome in step.solve():
                for sink in sinks:
                    sink.take(name, outcome)
                if isinstance(outcome, Solution) and outcome.error is not None:
                    errors.append(outcome.error)
                del outcome  # it would stand beside the next linear's statistics
            for sink in sinks:
                sink.complete(step.index)
            task.advance(1, f"output error {max(errors):.2%} at most" if errors else "")
    if done < count:
        _commit(sinks, count - 1, None, ranks)


def _commit(sinks: Sequence[Sink[T]], index: int, sync: Callable[[], None] | None, ranks: Ranks) -> None:
    if sync is not None:
        sync()
        ranks.wait()  # until all of them are on disk
    for sink in sinks:
        sink.commit(index)
