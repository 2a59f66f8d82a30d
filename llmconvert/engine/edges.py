"""Edges for scale migration (AWQ, SmoothQuant): norms and linears that feed a linear channel by channel.

A scale can be moved from the input columns of linears to the module that produces them where every column is
proportional to one channel of that module and nobody else sees it: a norm before q, k and v, ``up_proj`` before
``down_proj``, ``v_proj`` before ``o_proj``. Which these are is not looked up per architecture. A block with random
weights runs on random inputs, the channels of one module at a time are multiplied by powers of two, and whatever is
proportional to them shows it exactly: multiplying by a power of two commutes with the rounding of products and sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from llmconvert.engine.coroutine import AnsweredCall, record_inputs
from llmconvert.engine.discovery import BlockPlan
from llmconvert.engine.experts import ExpertsSlot, Visit
from llmconvert.engine.skeleton import BlockCall, BlockSlot, Skeleton
from llmconvert.engine.synthetic import SyntheticCheckpoint

__all__ = ["Edge", "MixtureEdge", "edge_holds", "find_edges", "find_mixture_edges", "stand_in"]

F = TypeVar("F")
# Batch rows and tokens of a probe. Channels are recognized at the first token, which attends to itself alone; with this
# many rows no channel behind a ReLU is zero in all of them.
_ROWS, _TOKENS = 32, 3
# Exponents 0 … 7: a channel's number is spelled out in base 8, one digit per run.
_DIGIT_BITS = 3
_VERIFY_BITS = 2


@dataclass(frozen=True, slots=True)
class Edge:
    """A module whose channels only the linears behind it see, each column of theirs proportional to one channel.

    Attributes:
        producer: its name inside the block, ``input_layernorm``.
        kind: a linear, a norm that multiplies by its weight, or one that multiplies by one plus its weight.
        linears: names inside the block of the linears behind it, which share their input.
        channels: int64 ``[columns]``, the producer's channel behind each of their columns.
        across: whether what the linears get at a token comes from the producer at other tokens too: attention lies
            between them.
    """

    producer: str
    kind: Literal["linear", "norm", "offset norm"]
    linears: tuple[str, ...]
    channels: torch.Tensor
    across: bool = False


@dataclass(frozen=True, slots=True)
class MixtureEdge:
    """A norm whose channels the experts of a layer see, the router that sends tokens there, and linears beside them.

    Attributes:
        producer: the norm's name inside the block.
        experts: the name of the module that has the experts.
        linears: names of linears that see it too; shared experts, and routers where a class has linears for these.
        routers: names of modules of other classes that multiply it by their ``weight [*, columns]``.
    """

    producer: str
    experts: str
    linears: tuple[str, ...]
    routers: tuple[str, ...]


def find_edges(skeleton: Skeleton, plans: Sequence[BlockPlan]) -> tuple[tuple[Edge, ...], ...]:
    """The edges of every block; blocks of the same modules and shapes are taken to be alike.

    Takes the memory of one block, and reads no weights. Experts are not run: something stands in for what they give.

    Args:
        skeleton: the model; it is not touched.
        plans: from :func:`~llmconvert.engine.discovery.discover`.
    """
    return _probe(skeleton, plans, _Prober.edges)


def find_mixture_edges(skeleton: Skeleton, plans: Sequence[BlockPlan]) -> tuple[tuple[MixtureEdge, ...], ...]:
    """Of every block the norms before experts, where all that sees them is known; see :func:`find_edges`.

    Norms that multiply by one plus their weight are none: divided by a power of two, their weights would be rounded,
    and tokens might go elsewhere.
    """
    return _probe(skeleton, plans, _Prober.mixture_edges)


def stand_in(slot: ExpertsSlot, visit: Visit) -> torch.Tensor:
    """In place of what a layer's experts give: of the same shape, and changed by all that would change it."""
    routing = (visit.weights.float() * (visit.index + 1)).sum(-1, keepdim=True)
    return visit.hidden * routing.to(visit.hidden.dtype)


def edge_holds(edge: Edge, call: BlockCall, hidden: torch.Tensor, output: torch.Tensor) -> bool:
    """Whether scaling the producer's channels and unscaling the linears' columns leaves the block's output as it is.

    Args:
        edge: the claim.
        call: the block.
        hidden: what enters it.
        output: what it gives for that.
    """
    producer = call.block.get_submodule(edge.producer)
    width = _width(producer)
    generator = torch.Generator().manual_seed(width)
    exponents = torch.randint(1 << _VERIFY_BITS, (width,), generator=generator)
    used = torch.zeros(width, dtype=torch.bool)
    used[edge.channels.cpu()] = True
    factors = torch.where(used, 2.0**exponents, 1.0).to(output)
    inverse = 1 / factors[edge.channels.to(factors.device)]
    with ExitStack() as stack:
        stack.enter_context(_scaled_output(producer, factors))
        for name in edge.linears:
            stack.enter_context(_scaled_input(call.block.get_submodule(name), inverse))
        changed = call.output(hidden)
    return _same(changed, output)


def _probe(skeleton: Skeleton, plans: Sequence[BlockPlan], look: Callable[[_Prober], F]) -> tuple[F, ...]:
    """What is found in each block; the same in blocks that are alike."""
    # Halving and doubling would meet the narrow range of float16.
    dtype = torch.bfloat16 if skeleton.dtype == torch.float16 else skeleton.dtype
    random = Skeleton(SyntheticCheckpoint(skeleton), skeleton.device, dtype)
    random.restore_buffers()
    random.load_outer(head=False)
    known: dict[Any, F] = {}
    found: list[F] = []
    for plan in plans:
        block = random.blocks[plan.index]
        shapes = tuple((name, tuple(value.shape)) for name, value in block.named_parameters())
        signature = (tuple((name, type(module)) for name, module in block.named_modules()), shapes)
        if signature not in known:
            random.load_block(plan.index)
            known[signature] = look(_Prober(_call_of(random, plans, plan.index), plan, random))
            random.drop_block(plan.index)
        found.append(known[signature])
    return tuple(found)


class _ReachedError(Exception):
    """Carries the call of a block out of the model's forward."""

    def __init__(self, hidden: torch.Tensor, call: BlockCall) -> None:
        super().__init__()
        self.hidden, self.call = hidden, call


def _call_of(skeleton: Skeleton, plans: Sequence[BlockPlan], index: int) -> tuple[torch.Tensor, BlockCall]:
    """A block with what the model calls it with, and a random hidden state in place of the one it would get."""

    def gate(slot: BlockSlot, hidden: torch.Tensor, call: BlockCall) -> Any:
        if slot.index == index:
            raise _ReachedError(hidden, call)
        returned = plans[slot.index].returned
        return (hidden, *[None] * (returned - 1)) if returned else hidden

    before = [slot.gate for slot in skeleton.slots]
    for slot in skeleton.slots:
        slot.gate = gate
    ids = torch.zeros((_ROWS, _TOKENS), dtype=torch.long, device=skeleton.device)
    try:
        skeleton.model(input_ids=ids, use_cache=False)
    except _ReachedError as reached:
        generator = torch.Generator().manual_seed(index)
        hidden = torch.randn(reached.hidden.shape, generator=generator)
        return hidden.to(reached.hidden), AnsweredCall.of(reached.call, stand_in)
    finally:
        for slot, gate_before in zip(skeleton.slots, before, strict=True):
            slot.gate = gate_before
    raise AssertionError(f"the forward did not come to block {index}, which it was traced to pass")


class _Prober:
    """One block in which edges are looked for."""

    def __init__(self, call: tuple[torch.Tensor, BlockCall], plan: BlockPlan, skeleton: Skeleton) -> None:
        self._hidden, self._call = call
        self._block = self._call.block
        stops = (stop.linears for stop in plan.stops if skeleton.sites[stop.linears[0]].kind == "linear")
        self._stops = [tuple(skeleton.inside(plan.index, name) for name in linears) for linears in stops]
        slots = [name for name, module in self._block.named_modules() if isinstance(module, ExpertsSlot)]
        self._slots = {len(self._stops) + number: name for number, name in enumerate(slots)}
        self._order: list[str] = []
        self._arguments: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._inputs, self._output = self._run_watched()

    def edges(self) -> tuple[Edge, ...]:
        """For every stop the last module called that feeds it."""
        found: dict[int, Edge] = {}
        for name in self._order:
            producer = self._block.get_submodule(name)
            kind = self._kind(name, producer)
            if kind is None:
                continue
            for stop, channels in self._channels(producer).items():
                if stop in self._slots:
                    continue
                edge = Edge(name, kind, self._stops[stop], channels, self._mixes(name, stop))
                if edge_holds(edge, self._call, self._hidden, self._output):
                    found[stop] = edge
        return tuple(found[stop] for stop in sorted(found))

    def mixture_edges(self) -> tuple[MixtureEdge, ...]:
        """For each layer's experts the norm that feeds them, if all else that sees it is known."""
        found: dict[str, MixtureEdge] = {}
        for name in self._order if self._slots else ():
            producer = self._block.get_submodule(name)
            width = _width(producer)
            if self._kind(name, producer) != "norm":
                continue
            same = [
                stop
                for stop, channels in self._channels(producer).items()
                if torch.equal(channels, torch.arange(width))
            ]
            experts = [self._slots[stop] for stop in same if stop in self._slots]
            if len(experts) == 1:
                linears = tuple(linear for stop in same if stop not in self._slots for linear in self._stops[stop])
                edge = MixtureEdge(name, experts[0], linears, self._routers(width))
                if self._mixture_holds(edge):
                    found[experts[0]] = edge
        return tuple(found.values())

    def _routers(self, width: int) -> tuple[str, ...]:
        """Modules that have one matrix of as many columns, and are no linears."""
        return tuple(
            name
            for name, module in self._block.named_modules()
            if not isinstance(module, nn.Linear | nn.Embedding)
            and isinstance(weight := getattr(module, "weight", None), nn.Parameter)
            and weight.dim() == 2
            and weight.shape[1] == width
        )

    def _mixture_holds(self, edge: MixtureEdge) -> bool:
        """Whether the block's output stays as it is, to the bit, when channels grow and all that sees them shrinks."""
        producer = self._block.get_submodule(edge.producer)
        factors = 2.0 ** (torch.arange(_width(producer), device=self._output.device) % 3)
        routers = [self._block.get_parameter(f"{name}.weight") for name in edge.routers]
        with ExitStack() as stack:
            stack.enter_context(_scaled_output(producer, factors.to(self._output)))
            for name in (*edge.linears, edge.experts):
                stack.enter_context(_scaled_input(self._block.get_submodule(name), (1 / factors).to(self._output)))
            for weight in routers:
                weight.data.div_(factors)
            try:
                return torch.equal(self._call.output(self._hidden), self._output)
            finally:
                for weight in routers:
                    weight.data.mul_(factors)

    def _run(self, token: int = 0) -> tuple[Mapping[int, torch.Tensor], torch.Tensor]:
        """Inputs of all stops at one token, ``[rows, columns]``, and the block's output."""
        places = {names[0]: stop for stop, names in enumerate(self._stops)}
        places |= {name: stop for stop, name in self._slots.items()}
        inputs: dict[int, torch.Tensor] = {}

        def record(name: str, value: torch.Tensor) -> None:
            inputs[places[name]] = value.reshape(_ROWS, -1, value.shape[-1])[:, token].float().clone()

        with record_inputs(self._block, tuple(places), record):
            output = self._call.output(self._hidden)
        return inputs, output

    def _run_watched(self) -> tuple[Mapping[int, torch.Tensor], torch.Tensor]:
        """As :meth:`_run`, and notes the order of the modules that may be producers, and what they make of what."""
        handles = []
        for name, module in self._block.named_modules():
            if not any(True for _ in module.children()) and _width(module):

                def note(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                    if len(args) == 1 and isinstance(output, torch.Tensor) and output.shape[-1] == _width(module):
                        self._order.append(name)
                        self._arguments[name] = (args[0], output)

                handles.append(module.register_forward_hook(note))
        result = self._run()
        for handle in handles:
            handle.remove()
        return result

    def _channels(self, producer: nn.Module) -> dict[int, torch.Tensor]:
        """For each stop whose columns are all proportional to one channel of the producer: these channels.

        A linear may be several in one: where not all of it feeds a stop so, its halves are looked at (gate and up).
        """
        width = _width(producer)
        numbers = torch.arange(1, width + 1)
        parts = [torch.ones(width, dtype=torch.bool)]
        if isinstance(producer, nn.Linear) and width % 2 == 0:
            parts += [numbers > width // 2, numbers <= width // 2]
        for part in parts:
            doubled = self._grown(producer, part.long())
            read = {stop: torch.zeros_like(found) for stop, found in doubled.items() if bool((found == 1).all())}
            for shift in range(0, width.bit_length() if read else 0, _DIGIT_BITS):
                digits = torch.where(part, numbers >> shift, 0) & ((1 << _DIGIT_BITS) - 1)
                grown = self._grown(producer, digits)
                read = {stop: found | grown[stop] << shift for stop, found in read.items() if stop in grown}
            valid = {stop: found - 1 for stop, found in read.items() if bool(((found > 0) & (found <= width)).all())}
            if valid:
                return valid
        return {}

    def _mixes(self, name: str, stop: int) -> bool:
        """Whether the inputs of a stop at the last token change when the producer's output does at the first."""
        output = self._arguments[name][1]
        factors = torch.ones((_ROWS, _TOKENS, 1)).to(output)
        factors[:, 0] = 2
        plain, _ = self._run(token=-1)
        with _scaled_output(self._block.get_submodule(name), factors.reshape(*output.shape[:-1], 1)):
            last, _ = self._run(token=-1)
        return not torch.equal(last[stop], plain[stop])

    def _grown(self, producer: nn.Module, exponents: torch.Tensor) -> dict[int, torch.Tensor]:
        """By which powers of two the columns of each stop grow when a producer's channels do; without other stops."""
        with _scaled_output(producer, (2.0**exponents).to(self._output)):
            inputs, _ = self._run()
        grown = {stop: _exponents(values, self._inputs[stop]) for stop, values in inputs.items()}
        return {stop: found.cpu() for stop, found in grown.items() if found is not None}

    def _kind(self, name: str, module: nn.Module) -> Literal["linear", "norm", "offset norm"] | None:
        """How the module's parameters scale its output; None if they don't."""
        if isinstance(module, nn.Linear):
            return "linear"
        argument, output = self._arguments[name]
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, nn.Parameter) and (bias is None or isinstance(bias, nn.Parameter))
        factors = 2.0 ** (torch.arange(len(weight), device=weight.device) % 3)
        expected = output * factors.to(output)
        before = {parameter: parameter.data.clone() for parameter in (weight, bias) if parameter is not None}
        try:
            if bias is not None:
                bias.data.mul_(factors)
            for offset in (0.0, 1.0):
                weight.data.copy_((before[weight] + offset) * factors - offset)
                if _same(module(argument), expected):
                    return "offset norm" if offset else "norm"
        finally:
            for parameter, value in before.items():
                parameter.data.copy_(value)
        return None


def _exponents(scaled: torch.Tensor, plain: torch.Tensor) -> torch.Tensor | None:
    """The power of two by which each column grew, int64 ``[columns]``; None unless all did so in every row."""
    mantissas, exponents = torch.frexp(scaled)
    mantissas_before, exponents_before = torch.frexp(plain)
    known = plain != 0
    grown = torch.where(known, exponents - exponents_before, -1).long()
    power = grown.amax(0)
    exact = (mantissas == mantissas_before) & ((grown == power) | ~known)
    return power if bool(exact.all()) and bool((power >= 0).all()) else None


def _width(module: nn.Module) -> int:
    """Channels of a module that may be a producer: its weight's first dimension; 0 for others."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return 0
    return len(weight) if weight.dim() == 1 or isinstance(module, nn.Linear) else 0


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to a few roundings: what is wrong is wrong by factors."""
    tolerance = 8 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    return bool(((found.float() - expected.float()).abs() <= tolerance).all())


@contextmanager
def _scaled_output(module: nn.Module, factors: torch.Tensor) -> Iterator[None]:
    """Multiply what a module gives, channel by channel."""
    handle = module.register_forward_hook(lambda _, args, output: output * factors)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _scaled_input(linear: nn.Module, factors: torch.Tensor) -> Iterator[None]:
    """Multiply what a linear gets, column by column, before anything else happens to it."""

    def scale(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * factors, *args[1:])

    handle = linear.register_forward_pre_hook(scale, prepend=True)
    try:
        yield
    finally:
        handle.remove()
