"""A batch's forward pass as a coroutine (greenlet): it pauses at every block's entry and before linears.

A greenlet, because the forward is not ours to write as a generator. It stops at the entry of decoder blocks and before
linears, and whoever runs it decides there what it meets next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn
from torch.utils.hooks import RemovableHandle

from llmconvert.compute.precision import all_finite
from llmconvert.engine.discovery import BlockPlan
from llmconvert.engine.experts import ExpertsSlot, Visit
from llmconvert.engine.skeleton import BlockCall, BlockSlot, Skeleton
from llmconvert.errors import CalibrationError, UnsupportedError

__all__ = [
    "AnsweredCall",
    "Carried",
    "Pass",
    "check_start",
    "gate",
    "hook_block",
    "keep_input",
    "record_inputs",
    "remove_hooks",
    "require_finite",
    "stand_at_linear",
]

#: Argument of a block's call → what it holds of the blocks before.
Carried = Mapping[str, Mapping[Any, Any]]


class Pass(greenlet):
    """One batch inside the model's forward.

    ``at`` is where it stands: the index of the block it is about to enter (their number, if it stands behind the last
    one), a linear it is about to call, or None once the forward has ended; ``tensor`` is what it brought there, and
    ``call`` the block it entered last with all else it is called with, ``shape`` that of the hidden state that it
    entered with. ``tokens`` is how many it has.

    Args:
        skeleton: the model; its slots' gates are :func:`gate`, and linears to stop at have :func:`stand_at_linear`
            as a hook.
        plans: of its blocks.
        ids: token ids, ``[1, length]``, on the model's device.
        start: the block to enter first; those before it are passed by.
        hidden: what it enters that block with; None: what the blocks before it gave.
        batch: its number, under which experts keep answers for it; None: they are computed on the spot.
        carried: what the blocks before ``start`` have left for later ones (:attr:`carried` of the batch there).
    """

    def __init__(
        self,
        skeleton: Skeleton,
        plans: Sequence[BlockPlan],
        ids: torch.Tensor,
        start: int,
        hidden: torch.Tensor | None,
        batch: int | None = None,
        carried: Carried = MappingProxyType({}),
    ) -> None:
        super().__init__(self._forward)
        self._skeleton = skeleton
        self._plans = plans
        self._ids = ids
        self._start = start
        self._replacement = hidden
        self._target: nn.Module | None = None
        self._behind = False
        self._leaves_last = False
        self.tokens = ids.shape[1]
        self.at: int | nn.Module | None = -1
        self.tensor: torch.Tensor | None = None
        self.call: BlockCall | None = None
        self.shape = torch.Size()
        self._kept: dict[nn.Module, torch.Tensor] = {}
        self._batch = batch
        self._visit: Visit | None = None
        self._carried = carried
        self.switch()

    @property
    def carried(self) -> Carried:
        """What blocks have left so far for later ones beside the hidden state: keys and values that layers share."""
        kwargs = {} if self.call is None else self.call.kwargs
        return {name: dict(value) for name, value in kwargs.items() if isinstance(value, MutableMapping) and value}

    def run_to_linear(self, block: int, linear: nn.Module, *, behind: bool = False) -> torch.Tensor | None:
        """Go on to ``linear`` inside ``block`` and give its input, or ``behind`` it and give its output.

        None if this batch does not call it.
        """
        if self.at == block or (isinstance(self.at, nn.Module) and (behind or self.at is not linear)):
            self._target, self._behind = linear, behind
            self.switch()
        return self.tensor if self.at is linear else None

    def run_to_experts(self, block: int, slot: ExpertsSlot) -> Visit | None:
        """Go on to a layer's experts inside ``block`` and give what this batch brings; None if it calls none."""
        self.run_to_linear(block, slot)
        return self._visit

    def take_kept(self, module: nn.Module) -> torch.Tensor:
        """The first input of a module of this block that has been called and has :func:`keep_input` as a hook."""
        return self._kept.pop(module)

    def run_to_next_block(self, block: int) -> torch.Tensor:
        """Go on to the exit of ``block``, which is the entry of the one after it; gives the hidden state."""
        if self.at == block or isinstance(self.at, nn.Module):
            self._target, self._leaves_last = None, True
            self.switch()
        assert self.tensor is not None
        return self.tensor

    def run_to_head(self, head: nn.Module) -> torch.Tensor | None:
        """Go on behind the last block to the output head, which has :func:`stand_at_linear` as a hook; its input."""
        self._target, self._behind, self._leaves_last = head, False, False
        while self.at is not None and self.at is not head:
            self.switch()
        return self.tensor if self.at is head else None

    def run_to_end(self) -> torch.Tensor:
        """Go on to the end of the forward; gives the logits."""
        self._target, self._leaves_last = None, False
        while self.at is not None:
            self.switch()
        assert self.tensor is not None
        return self.tensor

    def kill(self) -> None:
        """Unwind the frames and free what they hold."""
        self.tensor = self.call = None
        self._kept.clear()
        if not self.dead:
            self.throw(GreenletExit)

    # What follows runs inside the coroutine.

    def _forward(self) -> None:
        output = self._skeleton.model(input_ids=self._ids, use_cache=False)
        self.at, self.tensor = None, output.logits

    def pass_block(self, slot: BlockSlot, hidden: torch.Tensor, call: BlockCall) -> Any:
        last = self._skeleton.block_count - 1
        if slot.index < self._start:
            if slot.index == last and self._replacement is not None:
                hidden, self._replacement = self._replaced(hidden), None
            # What else a block returns (attention weights, a cache) is for callers who asked for it; nobody did.
            returned = self._plans[slot.index].returned
            return (hidden, *[None] * (returned - 1)) if returned else hidden
        if slot.index == self._start and self._replacement is not None:
            hidden, self._replacement = self._replaced(hidden), None
            for name, values in self._carried.items():
                call.kwargs[name].update(values)
        self.call, self.shape = call, hidden.shape
        self._stand(slot.index, hidden)
        result = call(hidden)
        self._kept.clear()
        if self._leaves_last and slot.index == last:
            self._stand(slot.index + 1, result[0] if isinstance(result, tuple) else result)
        return result

    def _replaced(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self._replacement is not None
        return self._replacement.to(hidden.device).view(hidden.shape)

    def keep(self, module: nn.Module, value: torch.Tensor) -> None:
        self._kept[module] = value

    def pass_linear(self, module: nn.Module, value: torch.Tensor) -> None:
        if module is self._target and not self._behind:
            self._stand(module, value)

    def leave_linear(self, module: nn.Module, value: torch.Tensor) -> None:
        if module is self._target and self._behind:
            self._stand(module, value)

    def visit(self, slot: ExpertsSlot, visit: Visit) -> torch.Tensor | None:
        """What a layer's experts give; stands there first if it is looked for."""
        if slot is self._target:
            self._visit = visit
            self._stand(slot, visit.hidden)
            self._visit = None
        return None if self._batch is None else slot.answers.get(self._batch)

    def _stand(self, at: int | nn.Module, value: torch.Tensor) -> None:
        self.at, self.tensor = at, value
        self.parent.switch()
        self.tensor = None


@dataclass(frozen=True, slots=True)
class AnsweredCall(BlockCall):
    """A block's call outside of any batch's forward, with somebody who answers for the experts inside.

    Attributes:
        answer: what the experts of a layer give for what is brought to them.
    """

    answer: Callable[[ExpertsSlot, Visit], torch.Tensor]

    @classmethod
    def of(cls, call: BlockCall, answer: Callable[[ExpertsSlot, Visit], torch.Tensor]) -> AnsweredCall:
        """The same call with such answers."""
        return cls(call.block, call.args, call.kwargs, answer)

    def output(self, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor] = MappingProxyType({})) -> torch.Tensor:
        guest = _Guest(partial(BlockCall.output, self, hidden, weights), self.answer)
        output: torch.Tensor = guest.switch()
        return output


class _Guest(greenlet):
    """Runs a function, and passes on what experts are asked inside."""

    def __init__(self, run: Callable[[], torch.Tensor], answer: Callable[[ExpertsSlot, Visit], torch.Tensor]) -> None:
        super().__init__(run)
        self._answer = answer

    def visit(self, slot: ExpertsSlot, visit: Visit) -> torch.Tensor | None:
        """See :class:`~llmconvert.engine.experts.Visitor`."""
        return self._answer(slot, visit)


def check_start(skeleton: Skeleton, start: int) -> None:
    """Refuse to begin a pass at a block that needs more of those before it than hidden states.

    Raises:
        UnsupportedError: the model's last layers use keys and values of earlier ones.
    """
    if start and skeleton.architecture.hands_over:
        raise UnsupportedError(
            f"architecture {skeleton.architecture.model_type!r}: its last layers use keys and values of earlier ones, "
            f"so a pass cannot begin at block {start}, which budgets, healing and repair need; quantize with one "
            "scheme, or with overrides"
        )


def require_finite(value: torch.Tensor, skeleton: Skeleton, index: int, batch: int) -> None:
    """Refuse what ``batch`` brings from block ``index`` if it is not finite.

    Raises:
        CalibrationError: naming block and batch.
    """
    if all_finite(value):
        return
    raise CalibrationError(
        f"block {index} ({skeleton.prefix(index).rstrip('.')}): batch {batch} leaves it with values "
        "that are not finite; the weights may be damaged, or need a wider dtype (bfloat16 or float32)"
    )


def gate(slot: BlockSlot, hidden: torch.Tensor, call: BlockCall) -> Any:
    """What a slot does in place of its block: the coroutine's part, if one is under way; else it runs the block."""
    coroutine = getcurrent()
    return coroutine.pass_block(slot, hidden, call) if isinstance(coroutine, Pass) else call(hidden)


def hook_block(skeleton: Skeleton, plan: BlockPlan, *, residuals: bool) -> list[RemovableHandle]:
    """Make batches stand at the linears of a block; with ``residuals`` also behind these, keeping what they add to."""
    linears = skeleton.linears[plan.index].values()
    hooks: list[RemovableHandle] = []
    if residuals:
        names = dict.fromkeys(stop.residual for stop in plan.stops if stop.residual is not None)
        hooks = [skeleton.submodule(plan.index, name).register_forward_pre_hook(keep_input) for name in names]
        hooks += [linear.register_forward_hook(_stand_behind_linear) for linear in linears]
    return hooks + [linear.register_forward_pre_hook(stand_at_linear) for linear in linears]


def stand_at_linear(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A linear's hook before its call: a coroutine that looks for this one stands still."""
    coroutine = getcurrent()
    if isinstance(coroutine, Pass):
        coroutine.pass_linear(module, args[0])


def _stand_behind_linear(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
    coroutine = getcurrent()
    if isinstance(coroutine, Pass):
        coroutine.leave_linear(module, output)


def keep_input(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A module's hook before its call: a coroutine keeps its first input until asked for it."""
    coroutine = getcurrent()
    if isinstance(coroutine, Pass):
        coroutine.keep(module, args[0])


def remove_hooks(hooks: Sequence[RemovableHandle]) -> None:
    """Let modules go without hooks again."""
    for hook in hooks:
        hook.remove()


@contextmanager
def record_inputs(
    block: nn.Module, linears: Sequence[str], record: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Give ``record`` the inputs of linears, by their names inside the block, whenever the block runs.

    They are given as they come, before anything that quantizes them at run time.
    """
    handles = []
    for name in linears:

        def note(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            record(name, args[0])

        handles.append(block.get_submodule(name).register_forward_pre_hook(note, prepend=True))
    try:
        yield
    finally:
        remove_hooks(handles)
