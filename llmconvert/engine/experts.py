"""Experts of a layer, one at a time: tokens of all batches go through the one that is in memory.

Where a model's class has its experts, batches hand over hidden states and routing, and get the layer's output back.
In between each expert's weights are read, meet the tokens that are routed to them, and leave the memory; so a mixture
takes no more of it than its hidden states and one expert, however many there are. What an expert computes is computed
by the class's own eager forward, reduced to this one expert, and added up in the order in which that adds: the result
is the resident model's to the bit.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from greenlet import getcurrent
from torch import nn

from llmconvert.compute.precision import WideProducts, operand_sizes
from llmconvert.engine.architecture.expert_forward import Interrupt, Product, Sum, with_own_parameters
from llmconvert.engine.architecture.experts import ExpertsLayout

__all__ = ["ExpertsRun", "ExpertsSlot", "Learn", "Visit", "Visitor"]

#: Of an expert's number, and gradients ``[rows, columns]`` by the names of its matrices.
Learn = Callable[[int, Mapping[str, torch.Tensor]], None]


@dataclass(frozen=True, slots=True)
class Visit:
    """What a batch brings to the experts of a layer.

    Attributes:
        hidden: ``[tokens, hidden size]``.
        index: int64 ``[tokens, k]``, the experts that each token goes to.
        weights: ``[tokens, k]``, what their outputs are multiplied by.
    """

    hidden: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor

    def routed(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that go to an expert, int64 ``[n]``, and their weights ``[n]``, in the eager forward's order."""
        place, token = torch.where((self.index == number).T)
        return token, self.weights[token, place]


@runtime_checkable
class Visitor(Protocol):
    """A coroutine that carries a batch through the model."""

    def visit(self, slot: ExpertsSlot, visit: Visit) -> torch.Tensor | None:
        """What the layer gives for the batch; None if that is to be computed on the spot."""


class ExpertsSlot(nn.Module):
    """Stands where a class has the experts of a layer; holds the weights of one of them, or of none.

    Args:
        experts: the class's own module, on the meta device.
        name: of it in the model.
        layout: of it.
        read: gives what one of its parameters has of an expert (:attr:`ExpertsLayout.parts`), on the device and in the
            dtype that is computed in.
    """

    def __init__(
        self, experts: nn.Module, name: str, layout: ExpertsLayout, read: Callable[[int, str], torch.Tensor]
    ) -> None:
        super().__init__()
        self.name = name
        self.layout = layout
        self._read = read
        # The class's module with one expert. Kept in a list, so that its parameters are not the model's; what else it
        # has (a norm behind the experts) is.
        self._one = [with_own_parameters(experts, layout)]
        one = self._one[0]
        for counter, number in layout.counters.items():
            setattr(one, counter, number)
        holding = {leaf.rpartition(".")[0] for leaf in layout.parts}
        for child, module in experts.named_children():
            if child not in holding:
                self.add_module(child, module)
        # The forward that the class has of its own, whatever implementation its config asks for.
        self._forward = inspect.unwrap(type(one).forward)
        #: The expert that is loaded.
        self.number: int | None = None
        #: What the input columns of gate and up are multiplied by as they are read: powers of two ``[hidden size]``.
        self.scale: torch.Tensor | None = None
        #: Whether products of 16 bits are made in float32.
        self.wide = False
        #: Gets what :meth:`gradients` finds by the loaded expert's own matrices; None: nobody asks for it.
        self.learn: Learn | None = None
        #: What the layer gives, by batch, as far as that is known.
        self.answers: dict[int, torch.Tensor] = {}

    def forward(self, hidden: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        if not self.layout.stacked:
            index, weights = routing
            return self._answer(Visit(hidden.flatten(0, -2), index, weights)).view(hidden.shape)
        number, _ = torch.where(hidden.view(self.layout.count, -1, self.layout.hidden_size).any(-1))
        (row,) = torch.where(hidden.any(-1))
        rows = hidden[row]
        given = self._answer(Visit(rows, number[:, None], rows.new_ones((len(row), 1))))
        return torch.zeros_like(hidden).index_copy(0, row, given)

    def _answer(self, visit: Visit) -> torch.Tensor:
        current = getcurrent()
        answer = current.visit(self, visit) if isinstance(current, Visitor) else None
        if answer is not None:
            return answer
        output: torch.Tensor = _OnTheSpot.apply(self, visit.hidden, visit.index, visit.weights)
        return output

    def compute(self, visit: Visit) -> torch.Tensor:
        """What the layer gives ``[tokens, hidden size]``, one expert after the other."""
        output = torch.zeros_like(visit.hidden)
        for number in self._met(visit.index):
            self.load(number)
            output = self.add(output, visit)
        self.clear()
        return output.to(visit.hidden.dtype)

    def gradients(self, visit: Visit, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of what :meth:`compute` gives, by hidden states and by weights; each expert is read and run once more.

        Those by its own matrices go to :attr:`learn` while it is loaded, and are forgotten with it.
        """
        by_hidden, by_weights = torch.zeros_like(visit.hidden), torch.zeros_like(visit.weights)
        for number in self._met(visit.index):
            self.load(number)
            own = self._learned(number)
            place, token = torch.where((visit.index == number).T)
            with torch.enable_grad():
                rows = visit.hidden[token].detach().requires_grad_()
                weights = visit.weights[token, place].detach().requires_grad_()
                part = self._call(Sum(), rows, weights)
            leaves = rows, weights, *own.values()
            along = gradient[token].to(part.dtype)
            first, second, *others = torch.autograd.grad(part, leaves, along, materialize_grads=True, allow_unused=True)
            by_hidden.index_add_(0, token, first)
            by_weights[token, place] = second
            if self.learn is not None and own:
                found = dict(zip(own, others, strict=True))
                matrices = self.layout.matrices.items()
                self.learn(number, {projection: matrix.of(found[matrix.leaf]) for projection, matrix in matrices})
        self.clear()
        return by_hidden, by_weights

    def _learned(self, number: int) -> dict[str, torch.Tensor]:
        """The loaded expert's parameters that have matrices, to be differentiated by; none where nobody asks."""
        if self.learn is None or number >= self.layout.count:
            return {}
        assert self.scale is None  # gradients would be by other values than those that were read
        leaves = {matrix.leaf for matrix in self.layout.matrices.values()}
        return {leaf: self._parameter(leaf).requires_grad_() for leaf in self.layout.parts if leaf in leaves}

    def _met(self, index: torch.Tensor) -> list[int]:
        return [number for number in index.unique().tolist() if number < self.ends]

    def product_nbytes(self, tokens: int) -> int:
        """Bytes of the float32 operands of its largest product, where products are made so, for so many tokens."""
        if not self.wide:
            return 0
        matrices = (shape[-2:] for shape in self.layout.parts.values() if len(shape) > 1)
        return 4 * max(sum(operand_sizes(tokens, *shape)) for shape in matrices)

    @property
    def ends(self) -> int:
        """The number behind the last expert, those without weights included."""
        return self.layout.count + self.layout.passing

    def load(self, number: int) -> None:
        """Read an expert's weights into fresh memory, in place of the one that is there."""
        if self.number == number:
            return
        self.clear()
        self.number = number
        if self.layout.passing:  # by the first counter the class tells which experts have weights
            setattr(self._one[0], next(iter(self.layout.counters)), int(number < self.layout.count))
        if number >= self.layout.count:
            return
        for leaf in self.layout.parts:
            self._set(leaf, self._read(number, leaf))
        if self.scale is not None:
            for projection in self.layout.stops()[0]:
                self.value(number, projection).mul_(self.scale)

    def clear(self) -> None:
        """Free the weights."""
        if self.number is not None:
            self.number = None
            for leaf in self.layout.parts:
                self._set(leaf, torch.empty(0, device="meta"))

    def value(self, number: int, projection: str) -> torch.Tensor:
        """One matrix ``[rows, columns]`` of the expert that is loaded, in the model's own memory."""
        assert self.number == number
        matrix = self.layout.matrices[projection]
        return matrix.of(self._parameter(matrix.leaf).data)

    def add(self, output: torch.Tensor, visit: Visit) -> torch.Tensor:
        """``output [tokens, hidden size]`` and what the loaded expert adds to it, in place where no gradient flows.

        In the dtype that the class adds in, whatever it gives in the end.
        """
        assert self.number is not None
        token, weights = visit.routed(self.number)
        if not len(token):
            return output
        part = self._call(Sum(), visit.hidden[token], weights)
        output = output.to(part.dtype)
        if torch.is_grad_enabled() and part.requires_grad:
            return output.index_add(0, token, part)
        return output.index_add_(0, token, part)

    def inner(self, rows: torch.Tensor) -> torch.Tensor:
        """What reaches the loaded expert's down projection for inputs ``[tokens, hidden size]``."""
        down = self._parameter(self.layout.matrices["down_proj"].leaf)
        return self._call(Product(down), rows, rows.new_ones(len(rows)))

    def output(self, rows: torch.Tensor, matrices: Mapping[str, torch.Tensor] = MappingProxyType({})) -> torch.Tensor:
        """What the loaded expert gives for inputs ``[tokens, hidden size]``, before it is weighted.

        Args:
            rows: the inputs.
            matrices: stand in for its own ``[rows, columns]``, by projection; they may require gradients.
        """
        own = copy.copy(self)
        own._one = [with_own_parameters(self._one[0], self.layout)]
        for leaf in self.layout.parts if matrices else ():
            value = self._parameter(leaf).detach().clone()
            for projection, values in matrices.items():
                if (matrix := self.layout.matrices[projection]).leaf == leaf:
                    matrix.of(value).copy_(values)
            owner, _, name = leaf.rpartition(".")
            own._one[0].get_submodule(owner)._parameters[name] = value  # type: ignore[assignment]
        return own._call(Sum(), rows, rows.new_ones(len(rows)))

    @cached_property
    def is_proportional(self) -> bool:
        """Whether what reaches a down projection is proportional, neuron by neuron, to what the up projection gives.

        Tried out on random weights and inputs so large that a class with limits meets them.
        """
        if len(self.layout.parts) > len({matrix.leaf for matrix in self.layout.matrices.values()}):
            return False  # biases
        tried = copy.copy(self)
        tried._one = [with_own_parameters(self._one[0], self.layout)]
        generator = torch.Generator().manual_seed(0)
        for leaf, shape in self.layout.parts.items():
            tried._set(leaf, torch.randn(shape, generator=generator))
        rows = 16 * torch.randn((8, self.layout.hidden_size), generator=generator)
        up, before = self.layout.matrices["up_proj"], tried.inner(rows)
        factors = 2.0 ** torch.randint(-3, 4, (self.layout.inner_size,), generator=generator)
        up.of(tried._parameter(up.leaf).data).mul_(factors[:, None])
        return torch.equal(tried.inner(rows), before * factors)

    def _call(self, end: Sum | Product, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Run the class's forward with the loaded expert alone up to where it meets its end; gives what is there."""
        choices = max(self.layout.counters.values())
        index = torch.arange(choices, device=rows.device).expand(len(rows), choices)
        routing = () if self.layout.stacked else (index, weights[:, None].expand_as(index))
        try:
            with WideProducts() if self.wide else nullcontext(), end:
                result: torch.Tensor = self._forward(self._one[0], rows, *routing)
        except Interrupt as found:
            return found.value.flatten(0, -2)
        if self.layout.stacked and isinstance(end, Sum):
            return result
        raise AssertionError(f"{type(self._one[0]).__name__}: its forward has no {end.what}")

    def _parameter(self, leaf: str) -> torch.Tensor:
        return self._one[0].get_parameter(leaf)

    def _set(self, leaf: str, value: torch.Tensor) -> None:
        owner, _, name = leaf.rpartition(".")
        self._one[0].get_submodule(owner)._parameters[name] = nn.Parameter(value, requires_grad=False)


@dataclass(slots=True)
class ExpertsRun:
    """All batches at the experts of a layer, which are gone through in order.

    Attributes:
        slot: of the layer.
        visits: what each batch has brought, by its number.
        current: the expert that batches are at; those before it have given what they give.
    """

    slot: ExpertsSlot
    visits: Mapping[int, Visit]
    current: int = 0
    _outputs: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._outputs = {batch: torch.zeros_like(visit.hidden) for batch, visit in self.visits.items()}

    @property
    def complete(self) -> bool:
        """Whether batches can go on."""
        return self.current == self.slot.ends

    def reach(self, number: int) -> None:
        """Let all batches pass the experts before this one, and load it; one that they have passed is read anew."""
        while self.current < number:
            self._pass()
        self.slot.load(number)

    def finish(self) -> None:
        """Let all batches pass the experts that are left; the slot has the answers then."""
        self.slot.answers.update(self.outputs())

    def outputs(self) -> dict[int, torch.Tensor]:
        """Let all batches pass the experts that are left, and give what each batch gets, by its number; once."""
        while not self.complete:
            self._pass()
        self.slot.clear()
        outputs, self._outputs = self._outputs, {}
        return {batch: output.to(self.visits[batch].hidden.dtype) for batch, output in outputs.items()}

    def inputs(self, number: int, projection: str, like: ExpertsRun | None = None) -> Iterator[torch.Tensor]:
        """What reaches a matrix of an expert, ``[tokens, columns]``, batch after batch; batches may bring no token.

        Args:
            number: of the expert.
            projection: of its matrices.
            like: a run of the same batches through another model, whose routing is taken instead of the own one.
        """
        self.reach(number)
        for batch, visit in self.visits.items():
            token, _ = (visit if like is None else like.visits[batch]).routed(number)
            yield self._at(projection, visit.hidden[token])

    def all_inputs(self, number: int, projection: str) -> Iterator[torch.Tensor]:
        """What would reach a matrix of an expert if every token were sent there, batch after batch."""
        self.reach(number)
        for visit in self.visits.values():
            yield self._at(projection, visit.hidden)

    def tokens(self) -> Sequence[int]:
        """How many tokens go to each expert."""
        count = self.slot.layout.count
        counts = torch.zeros(count, dtype=torch.long)
        for visit in self.visits.values():
            counts += torch.bincount(visit.index.flatten().cpu(), minlength=count)[:count]
        return [int(count) for count in counts]

    def _at(self, projection: str, rows: torch.Tensor) -> torch.Tensor:
        if projection != "down_proj":
            return rows
        return self.slot.inner(rows) if len(rows) else rows.new_empty((0, self.slot.layout.inner_size))

    def _pass(self) -> None:
        """Add what the current expert gives, and leave it."""
        if any(bool((visit.index == self.current).any()) for visit in self.visits.values()):
            self.slot.load(self.current)
            for batch, visit in self.visits.items():
                self._outputs[batch] = self.slot.add(self._outputs[batch], visit)
        self.current += 1


class _OnTheSpot(torch.autograd.Function):
    """A layer's experts for one batch, whose gradients keep none of them in memory."""

    @staticmethod
    def forward(
        ctx: Any, slot: ExpertsSlot, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.slot = slot
        ctx.save_for_backward(hidden, index, weights)
        return slot.compute(Visit(hidden, index, weights))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None, torch.Tensor]:
        by_hidden, by_weights = ctx.slot.gradients(Visit(*ctx.saved_tensors), gradient)
        return None, by_hidden, None, by_weights
