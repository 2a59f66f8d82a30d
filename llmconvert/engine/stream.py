"""Streaming batches through a model block by block: one coroutine per batch, one forward pass in all.

Every batch runs the model's own, unmodified ``forward`` inside a greenlet. It stands still where the engine has
business with it: at the entry of each decoder block, and at the linears whose inputs are asked for. Meanwhile the
weights it will meet next can be replaced, which makes true-sequential quantization a matter of one pass.

Two modes give the same numbers:

* **lockstep**: all batches are under way at once, each holding what its frames hold
  (:class:`~llmconvert.engine.discovery.Stop` says how much);
* **replay**: only the block inputs are kept; a batch is run again from the block's entry up to the linear at hand,
  and dropped there. Costs time, and the memory of a single batch.

No parameter requires gradients, so no grad mode has to be set: it is thread-local and would leak across switches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from llmconvert.engine.coroutine import Carried, Pass, check_start, gate, hook_block, remove_hooks, require_finite
from llmconvert.engine.discovery import BlockPlan, Stop
from llmconvert.engine.experts import ExpertsRun, ExpertsSlot
from llmconvert.engine.sites import Site
from llmconvert.engine.skeleton import BlockCall, Skeleton
from llmconvert.engine.states import States, passing_states
from llmconvert.engine.statistics import Arrival, Departure
from llmconvert.memory import release_freed_memory
from llmconvert.phases import Phases

__all__ = ["BlockRun", "Mode", "Stream"]

Mode = Literal["lockstep", "replay"]

# Batches leave holes in the heap. After so many bytes of hidden states have moved on, these may go back to the system.
_RELEASE_NBYTES = 8 << 20


class BlockRun:
    """One block with its weights loaded and all batches at its entry."""

    def __init__(self, stream: Stream, plan: BlockPlan) -> None:
        self._stream = stream
        self.plan = plan

    def module(self, name: str) -> nn.Module:
        """The module that holds one of this block's sites."""
        return self._stream.skeleton.holder(self.site(name))

    def site(self, name: str) -> Site:
        """One of this block's sites."""
        return self._stream.skeleton.sites[name]

    def weight(self, name: str) -> torch.Tensor:
        """The values of a site ``[rows, columns]``, as batches meet them."""
        return self.site(name).value(self.module(name))

    @property
    def slots(self) -> Mapping[str, ExpertsSlot]:
        """The block's experts, by the name of the module that has them."""
        return self._stream.skeleton.experts[self.plan.index]

    def inputs(self, linear: str) -> Iterator[torch.Tensor]:
        """The input of a linear, batch after batch, as 2-D ``[tokens, columns]``.

        Linears must be asked for in the order of the plan's stops. Use each tensor before taking the next.
        Batches that don't call the linear are left out; an expert's may be empty.
        """
        if self._slot(linear) is not None:
            yield from self._expert_inputs(linear)
            return
        for _, value in self._arrivals(linear):
            yield value

    def arrivals(self, stop: Stop, like: BlockRun | None = None, *, everywhere: bool = False) -> Iterator[Arrival]:
        """The same for a stop's linears, with what their output is added to; the stream must keep ``residuals``.

        Args:
            stop: of this block.
            like: the block in another model, by whose routing tokens are sent to experts.
            everywhere: of an expert, what it would receive if every token were sent there.
        """
        index = self.plan.index
        if self._slot(stop.linears[0]) is not None:
            values = self._expert_inputs(stop.linears[0], like, everywhere=everywhere)
            yield from (Arrival(value) for value in values)
            return
        source = None if stop.residual is None else self._stream.skeleton.submodule(index, stop.residual)
        for coroutine, value in self._arrivals(stop.linears[0]):
            yield Arrival(value, None if source is None else coroutine.take_kept(source).flatten(0, -2))

    def outputs(self, stop: Stop) -> Iterator[Departure]:
        """What the linear of such a stop gives; batches go on to the next, and wait there with what is known of it."""
        assert stop.residual is not None
        source = self._stream.skeleton.submodule(self.plan.index, stop.residual)
        bias = getattr(self.module(stop.linears[0]), "bias", None)
        for coroutine, value in self._arrivals(stop.linears[0], behind=stop):
            yield Departure(value if bias is None else value - bias, coroutine.take_kept(source).flatten(0, -2))

    def experts(self, name: str) -> ExpertsRun:
        """All batches at the experts that one of this block's sites belongs to."""
        slot = self._slot(name)
        assert slot is not None
        self._pass_experts(name)
        return self._stream.experts(self.plan.index, slot)

    def _expert_inputs(
        self, name: str, like: BlockRun | None = None, *, everywhere: bool = False
    ) -> Iterator[torch.Tensor]:
        site, run = self.site(name), self.experts(name)
        if everywhere:
            return run.all_inputs(site.expert, site.projection)
        return run.inputs(site.expert, site.projection, None if like is None else like.experts(name))

    def _slot(self, name: str) -> ExpertsSlot | None:
        """The experts that a site belongs to, if it does."""
        module = self.module(name)
        return module if isinstance(module, ExpertsSlot) else None

    def _pass_experts(self, name: str) -> None:
        """Let all batches pass the experts of this block that come before a site."""
        own = self._slot(name)
        if all(slot is own for slot in self._stream.skeleton.experts[self.plan.index].values()):
            return
        for stop in self.plan.stops:
            if name in stop.linears:
                return
            slot = self._slot(stop.linears[0])
            if slot is not None and slot is not own:
                self._stream.experts(self.plan.index, slot).finish()

    def _arrivals(self, linear: str, behind: Stop | None = None) -> Iterator[tuple[Pass, torch.Tensor]]:
        """Inputs of a linear; or its outputs, if batches go on behind its stop."""
        self._pass_experts(linear)
        module = self.module(linear)
        for batch in range(len(self._stream.windows)):
            coroutine = self._stream.enter(self.plan.index, batch)
            value = coroutine.run_to_linear(self.plan.index, module, behind=behind is not None)
            if value is not None:
                yield coroutine, value.flatten(0, -2)
            del value
            if behind is not None:
                self._stream.go_on(coroutine, self.plan, batch, behind)
            self._stream.leave(coroutine)

    def joint_inputs(self, linears: Sequence[str]) -> Iterator[list[torch.Tensor | None]]:
        """The inputs of several linears, in the order of the plan's stops, batch after batch; None: not called.

        Every batch then leaves the block at once, neither waiting with all that it holds nor being run anew; so
        nothing else can be asked for or installed.
        """
        modules = [self.module(linear) for linear in linears]
        for batch in range(len(self._stream.windows)):
            coroutine = self._stream.enter(self.plan.index, batch)
            values = [coroutine.run_to_linear(self.plan.index, module) for module in modules]
            yield [value.flatten(0, -2) if value is not None else None for value in values]
            del values
            self._stream.pass_on(coroutine, self.plan.index, batch)
            self._stream.leave(coroutine)

    def entries(self, batches: Iterable[int]) -> Iterator[tuple[torch.Tensor, BlockCall]]:
        """What the given batches enter the block with: the hidden state, and the call that takes it.

        To be asked for before any of the block's :meth:`inputs` where the stream keeps no states. Calls and hidden
        states stay usable until the next block; whether they are kept, for every batch, is up to the caller.
        """
        for batch in batches:
            coroutine = self._stream.enter(self.plan.index, batch)
            assert coroutine.tensor is not None and coroutine.call is not None
            at_entry = coroutine.at == self.plan.index
            hidden = coroutine.tensor if at_entry else self._stream.state(self.plan.index, batch)
            entry = hidden.to(coroutine.tensor.device).view(coroutine.shape), coroutine.call
            self._stream.leave(coroutine)
            yield entry

    def install(self, name: str, weight: torch.Tensor) -> None:
        """Let all batches meet ``weight`` in place of a site's own from here on."""
        self.site(name).put(self.module(name), weight)


class Stream:
    """All batches and the model they run through.

    Args:
        skeleton: the model; its outer weights are loaded here, and its blocks one at a time.
        windows: token ids, each ``[1, length]``; one batch each.
        plans: of the longest window, from :func:`~llmconvert.engine.discovery.discover`.
        mode: lockstep or replay.
        states: keeps the block inputs; optional (for resuming) in lockstep. Replay keeps them for itself by default.
        start: first block to run; above 0, its inputs are taken from ``states``.
        head: whether :meth:`logits` will be asked for; loads the output head.
        residuals: whether :meth:`BlockRun.arrivals` will be asked for.
        answers: whether experts are gone through once for all batches, or for each batch on the spot.
        phases: where the time spent reading weights is counted.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        windows: Sequence[torch.Tensor],
        plans: Sequence[BlockPlan],
        *,
        mode: Mode,
        states: States | None = None,
        start: int = 0,
        head: bool = False,
        residuals: bool = False,
        answers: bool = True,
        phases: Phases | None = None,
    ) -> None:
        self.skeleton = skeleton
        self.windows, self.plans = tuple(windows), tuple(plans)
        self._mode, self._phases = mode, phases or Phases()
        self._own_states = None
        if states is None and mode == "replay":
            lengths = [window.shape[1] for window in windows]
            self._own_states = passing_states(lengths, skeleton.hidden_size, skeleton.dtype)
        self._states: States | None = self._own_states if states is None else states
        self._start, self._crossed = start, start - 1
        self._keeps_residuals, self._answers = residuals, answers
        self._passes: list[Pass] = []
        self._experts: dict[ExpertsSlot, ExpertsRun] = {}  # of the current block
        self._carried: dict[int, Carried] = {}  # by batch, into the current block
        self._ahead: set[int] = set()  # batches that have left the current block
        self._moved = 0  # bytes of hidden states since freed memory was released
        check_start(skeleton, start)
        skeleton.restore_buffers()
        with self._phases.measure("reading"):
            skeleton.load_outer(head=head)
        for slot in skeleton.slots:
            slot.gate = gate

    def blocks(self) -> Iterator[BlockRun]:
        """Block after block, each loaded while it is the current one.

        When the caller asks for the next block, all batches run through the rest of the current one.

        Raises:
            CalibrationError: a hidden state is not finite.
        """
        self._depart()
        for index in range(self._start, self.skeleton.block_count):
            with self._phases.measure("reading"):
                self.skeleton.load_block(index)
                self.skeleton.prefetch_block(index + 1)
            hooks = hook_block(self.skeleton, self.plans[index], residuals=self._keeps_residuals)
            yield BlockRun(self, self.plans[index])
            remove_hooks(hooks)
            if index + 1 < self.skeleton.block_count:
                self.cross(index)
                self._experts.clear()
                self.skeleton.drop_block(index)
                release_freed_memory()

    def logits(self) -> Iterator[torch.Tensor]:
        """After the last block of :meth:`blocks`: logits of each batch, ``[1, length, vocabulary]``, all finite."""
        last = self.skeleton.block_count - 1
        for batch, coroutine in enumerate(self.departures(max(last, self._crossed + 1))):
            yield self._end(coroutine, last, batch)  # under no name, which would hold it beside the next batch's

    def _end(self, coroutine: Pass, last: int, batch: int) -> torch.Tensor:
        logits = coroutine.run_to_end()
        coroutine.kill()
        require_finite(logits, self.skeleton, last, batch)
        return logits

    def departures(self, start: int) -> Iterator[Pass]:
        """After the last block of :meth:`blocks`: each batch, where it is, or at the entry of ``start`` if not kept."""
        last = self.skeleton.block_count - 1
        if self._crossed < last and self._answers:
            self._finish_experts(last)
        for batch in range(len(self.windows)):
            coroutine = self.enter(start, batch)
            yield coroutine
            coroutine.kill()

    def close(self) -> None:
        """Drop all batches and all weights."""
        while self._passes:
            self._passes.pop().kill()
        for slot in self.skeleton.slots:
            slot.gate = slot.run_block
        self.skeleton.drop_block(self.skeleton.block_count - 1)
        if self._own_states is not None:
            self._own_states.close()

    def enter(self, index: int, batch: int) -> Pass:
        """The coroutine of ``batch``, at the entry of block ``index`` or wherever in it lockstep has left it."""
        if self._mode == "lockstep":
            return self._passes[batch]
        return self._pass(batch, index, self.state(index, batch), answers=self._answers)

    def state(self, index: int, batch: int) -> torch.Tensor:
        """The hidden state, ``[1, length, hidden size]``, with which ``batch`` enters the current block; if kept."""
        assert self._states is not None
        return self._states.get(index, batch)

    def try_block(self, index: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """What block ``index``, the current one, makes of ``hidden`` in place of what ``batch`` brings to it.

        Raises:
            CalibrationError: that is not finite.
        """
        coroutine = self._pass(batch, index, hidden, answers=False)
        left = coroutine.run_to_next_block(index)
        coroutine.kill()
        require_finite(left, self.skeleton, index, batch)
        return left

    def pass_on(self, coroutine: Pass, index: int, batch: int) -> None:
        """Let ``batch`` leave block ``index`` before others do; the last one is not left."""
        if index + 1 < self.skeleton.block_count and batch not in self._ahead:
            self._leave_block(coroutine, index, batch)
            self._ahead.add(batch)

    def go_on(self, coroutine: Pass, plan: BlockPlan, batch: int, stop: Stop) -> None:
        """Let ``batch`` come to the next stop, or leave the block; not where it is dropped, or waits for experts."""
        later = plan.stops[plan.stops.index(stop) + 1 :]
        if self._mode == "replay" or self.skeleton.experts[plan.index]:
            return
        if later:
            coroutine.run_to_linear(plan.index, self.skeleton.holder(self.skeleton.sites[later[0].linears[0]]))
        else:
            self.pass_on(coroutine, plan.index, batch)

    def leave(self, coroutine: Pass) -> None:
        """Done with a coroutine from :meth:`enter` for now."""
        if self._mode == "replay":
            coroutine.kill()
        self._moved += coroutine.tokens * self.skeleton.hidden_size * self.skeleton.dtype.itemsize
        if self._moved >= _RELEASE_NBYTES:
            release_freed_memory()
            self._moved = 0

    def experts(self, index: int, slot: ExpertsSlot) -> ExpertsRun:
        """All batches at a layer's experts in block ``index``, the current one; brings them there when first asked."""
        if slot not in self._experts:
            visits = {}
            for batch in range(len(self.windows)):
                coroutine = self.enter(index, batch)
                visit = coroutine.run_to_experts(index, slot)
                if visit is not None:
                    visits[batch] = visit
                self.leave(coroutine)
            self._experts[slot] = ExpertsRun(slot, visits)
        return self._experts[slot]

    def _finish_experts(self, index: int) -> None:
        for slot in self.skeleton.experts[index].values():
            self.experts(index, slot).finish()

    def _pass(self, batch: int, start: int, hidden: torch.Tensor | None, *, answers: bool) -> Pass:
        window, number = self.windows[batch].to(self.skeleton.device), batch if answers else None
        return Pass(self.skeleton, self.plans, window, start, hidden, number, self._carried.get(batch, {}))

    def _depart(self) -> None:
        """Bring every batch to the entry of the first block."""
        for batch in range(len(self.windows)):
            hidden = self._states.get(self._start, batch) if self._states is not None and self._start else None
            if self._mode == "replay" and hidden is not None:
                continue
            coroutine = self._pass(batch, self._start, hidden, answers=True)
            if self._states is not None and not self._start:
                assert coroutine.tensor is not None
                self._states.put(0, batch, coroutine.tensor)
            if self._mode == "lockstep":
                self._passes.append(coroutine)
            else:
                coroutine.kill()

    def cross(self, index: int) -> None:
        """Run every batch from where it is to the exit of block ``index``, unless that was done before.

        What leaves the block is in the states then, as the input of the block after it.

        Raises:
            CalibrationError: a hidden state is not finite.
        """
        if self._crossed >= index:
            return
        self._crossed = index
        self._finish_experts(index)
        for batch in range(len(self.windows)):
            if batch not in self._ahead:
                self._leave_block(coroutine := self.enter(index, batch), index, batch)
                self.leave(coroutine)
        self._ahead.clear()

    def _leave_block(self, coroutine: Pass, index: int, batch: int) -> None:
        hidden = coroutine.run_to_next_block(index)
        require_finite(hidden, self.skeleton, index, batch)
        if self._states is not None:
            self._states.put(index + 1, batch, hidden)
        if self.skeleton.architecture.hands_over and index + 1 < self.skeleton.block_count:
            self._carried[batch] = coroutine.carried
