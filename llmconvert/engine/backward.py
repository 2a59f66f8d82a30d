"""Backward pass of a streamed model, block by block, and the Fisher information of the output of every linear.

Only one block is in memory, as on the way forward: its inputs come from a tape, it is run again with gradients, and
what reaches its input is what the block before it receives.

A small error ``e`` of the logits moves the distribution over the next token by ``KL ≈ ½ eᵀ F e``, where
``F = diag(p) − p pᵀ`` is the Fisher information of its probabilities ``p``. ``v = √p ∘ ε − p (√p · ε)`` with normal
``ε`` has the covariance ``F``. So with ``g_t``, the gradient of ``v`` · logits, summed over a window, by a linear's
output at token ``t``, errors ``d_t`` of this output come to ``½ E[(Σ_t g_t · d_t)²]`` in all, whatever later tokens
make of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from llmconvert.compute.precision import all_finite
from llmconvert.engine.discovery import BlockPlan
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.states import States
from llmconvert.engine.stream import BlockRun, Stream
from llmconvert.errors import CalibrationError
from llmconvert.memory import release_freed_memory

__all__ = ["Passage", "differentiate_back", "graph_nbytes", "sampled_gradient", "sampled_nbytes", "walk_back"]

# Positions whose probabilities are held in float32 at a time.
_ROWS_AT_ONCE = 256
# What a forward pass with gradients keeps, as a multiple of what one without has alive at most.
_GRAPH = 3


@dataclass(slots=True)
class Passage:
    """What went through a linear, window after window.

    Attributes:
        inputs: ``[tokens, columns]`` each; linears that share an input share the tensors.
        gradients: by the picked components of its output, ``[tokens, picked]`` each.
        squares: float32 ``[rows]``, the squared gradients by all components, summed over all tokens.
    """

    inputs: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)
    squares: torch.Tensor | None = None


def walk_back(
    skeleton: Skeleton,
    windows: Sequence[torch.Tensor],
    plans: Sequence[BlockPlan],
    tape: States,
    gradients: States,
    *,
    pick: Callable[[int], slice],
    begin: int | None = None,
    seed: int = 0,
) -> Generator[tuple[int, Mapping[str, Passage]], None, None]:
    """Walk from the last block to the first.

    Args:
        skeleton: the model, none of whose blocks is loaded.
        windows: token ids, each ``[1, length]``.
        plans: of the longest window.
        tape: holds the input of every block for every window.
        gradients: by the inputs of blocks, filled from the last to the first; to begin below the last block, it must
            hold those of the block above.
        pick: which components of an output to keep gradients of, by their number.
        begin: the first block to take, the last one by default.
        seed: of the samples.

    Yields:
        the index of a block, which is loaded until the next one is asked for, and what went through those of its
        linears that some window reached.

    Raises:
        CalibrationError: gradients are not finite.
    """
    seen: dict[str, Passage] = {}
    hooks: list[RemovableHandle] = []

    def watch(index: int) -> None:
        for name, linear in skeleton.linears[index].items():
            hooks.append(linear.register_forward_hook(partial(_watch, seen, name, pick)))

    def sampled(batch: int, logits: torch.Tensor) -> torch.Tensor:
        return sampled_gradient(logits, torch.Generator().manual_seed(seed + batch))

    walk = differentiate_back(skeleton, windows, plans, tape, gradients, end=sampled, enter=watch, begin=begin)
    with closing(walk):
        for index in walk:
            while hooks:
                hooks.pop().remove()
            yield index, seen
            seen.clear()


def differentiate_back(
    skeleton: Skeleton,
    windows: Sequence[torch.Tensor],
    plans: Sequence[BlockPlan],
    tape: States,
    gradients: States,
    *,
    end: Callable[[int, torch.Tensor], torch.Tensor],
    enter: Callable[[int], None],
    begin: int | None = None,
) -> Generator[int, None, None]:
    """Walk from the last block to the first with gradients, all windows through one block before the next.

    Args:
        skeleton, windows, plans, tape, gradients, begin: as for :func:`walk_back`.
        end: of a window's number and its logits ``[1, length, vocabulary]``, what these are to be differentiated in
            the direction of, of the same shape.
        enter: called with the index of a block once it is loaded, before the first window comes to it.

    Yields:
        the index of a block that all windows have come back through, which is loaded until the next one is asked for.

    Raises:
        CalibrationError: gradients are not finite.
    """
    last = skeleton.block_count - 1
    leaves = _Leaves(tape)
    stream = Stream(skeleton, windows, plans, mode="replay", states=leaves, start=last, head=True, answers=False)
    try:
        for index in range(last if begin is None else begin, -1, -1):
            skeleton.load_block(index)
            enter(index)
            outputs = _last_outputs(stream, end) if index == last else _outputs(stream, index, gradients)
            for batch in range(len(windows)):
                _differentiate(outputs)
                leaf = leaves.take()
                assert leaf.grad is not None
                if not all_finite(leaf.grad):
                    raise CalibrationError(
                        f"block {index} ({skeleton.prefix(index).rstrip('.')}): the gradients of batch {batch} are not "
                        "finite; going back through the model needs bfloat16 or float32"
                    )
                gradients.put(index, batch, leaf.grad)
                del leaf
            assert next(outputs, None) is None
            yield index
            skeleton.drop_block(index)
            release_freed_memory()
    finally:
        stream.close()


def sampled_gradient(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A vector for every position whose covariance is the Fisher information of the prediction there.

    Args:
        logits: ``[1, length, vocabulary]``.
        generator: on the CPU.

    Returns:
        the same shape and dtype.
    """
    found = torch.empty_like(logits, requires_grad=False)
    for start in range(0, logits.shape[1], _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        probabilities = logits.detach()[:, part].float().softmax(-1)
        noise = torch.randn(probabilities.shape, generator=generator).to(probabilities.device)
        noise.mul_(probabilities.sqrt())
        found[:, part] = noise.sub_(probabilities.mul_(noise.sum(-1, keepdim=True)))
    return found


def sampled_nbytes(length: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Peak bytes of :func:`sampled_gradient` with its argument: both, and three pieces in float32."""
    return vocabulary * (2 * length * dtype.itemsize + 3 * 4 * min(length, _ROWS_AT_ONCE))


def graph_nbytes(plans: Sequence[BlockPlan]) -> int:
    """Bytes that a block's forward pass of the longest window keeps for its way back."""
    return _GRAPH * max(plan.peak_nbytes for plan in plans)


class _Leaves:
    """A tape whose states can be differentiated by; knows the one that was taken last."""

    def __init__(self, tape: States) -> None:
        self._tape = tape
        self._last: torch.Tensor | None = None

    def put(self, block: int, batch: int, hidden: torch.Tensor) -> None:
        self._tape.put(block, batch, hidden)

    def get(self, block: int, batch: int) -> torch.Tensor:
        self._last = self._tape.get(block, batch).requires_grad_()
        return self._last

    def take(self) -> torch.Tensor:
        assert self._last is not None
        leaf, self._last = self._last, None
        return leaf


def _differentiate(outputs: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Go back from the next window's output; nothing holds it or its gradient when the one after it is computed."""
    output, gradient = next(outputs)
    output.backward(gradient)


def _last_outputs(
    stream: Stream, end: Callable[[int, torch.Tensor], torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The logits of every window, behind the last block, and what they are to be differentiated in the direction of."""
    ends = stream.logits()
    for batch in range(len(stream.windows)):
        yield _directed(next(ends), partial(end, batch))  # under no name, which would hold it beside the next window's


def _directed(logits: torch.Tensor, end: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return logits, end(logits)


def _outputs(stream: Stream, index: int, gradients: States) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What block ``index`` gives for every window, and the gradient with respect to it."""
    run = BlockRun(stream, stream.plans[index])
    for batch, (hidden, call) in enumerate(run.entries(range(len(stream.windows)))):
        yield call.output(hidden), gradients.get(index + 1, batch).to(hidden.device)


def _watch(
    seen: dict[str, Passage],
    name: str,
    pick: Callable[[int], slice],
    module: nn.Module,
    args: tuple[torch.Tensor, ...],
    output: torch.Tensor,
) -> None:
    """A hook of a linear's forward: notes its input now, and the gradient that will come to its output."""
    passage = seen.setdefault(name, Passage())
    passage.inputs.append(args[0].detach().flatten(0, -2))

    def add(gradient: torch.Tensor) -> None:
        rows = gradient.flatten(0, -2)
        passage.gradients.append(rows[:, pick(rows.shape[1])].clone())
        squares = rows.float().square().sum(0)
        passage.squares = squares if passage.squares is None else passage.squares + squares

    output.register_hook(add)
