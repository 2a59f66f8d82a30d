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
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from greenlet import getcurrent
from torch import nn
from torch.overrides import TorchFunctionMode

from llmconvert.engine.architecture.experts import PROJECTIONS, expert_parameter, expert_sizes

__all__ = ["ExpertsRun", "ExpertsSlot", "Visit", "Visitor"]


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
        read: gives a weight by the name of :func:`~llmconvert.engine.architecture.experts.expert_parameter`,
            ``[rows, columns]``, on the device and in the dtype that is computed in.
    """

    def __init__(self, experts: nn.Module, name: str, read: Callable[[str], torch.Tensor]) -> None:
        super().__init__()
        self.name = name
        self.count, self.inner_size, self.hidden_size = expert_sizes(experts)
        self._read = read
        # The class's module with one expert. Kept in a list, so that its parameters are not the model's.
        one = copy.copy(experts)
        one._parameters = dict(experts._parameters)
        one.num_experts = 1  # type: ignore[assignment]
        self._one = [one]
        # The forward that the class has of its own, whatever implementation its config asks for.
        self._forward = inspect.unwrap(type(one).forward)
        #: The expert that is loaded.
        self.number: int | None = None
        #: What the input columns of gate and up are multiplied by as they are read: powers of two ``[hidden size]``.
        self.scale: torch.Tensor | None = None
        #: What the layer gives, by batch, as far as that is known.
        self.answers: dict[int, torch.Tensor] = {}

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        visit, current = Visit(hidden, index, weights), getcurrent()
        answer = current.visit(self, visit) if isinstance(current, Visitor) else None
        if answer is not None:
            return answer
        output = torch.zeros_like(hidden)
        for number in index.unique().tolist():
            self.load(number)
            output = self.add(output, visit)
        self.clear()
        return output

    def load(self, number: int) -> None:
        """Read an expert's weights into fresh memory, in place of the one that is there."""
        if self.number == number:
            return
        self.clear()
        gate, up, down = (self._read(expert_parameter(self.name, number, part)) for part in PROJECTIONS)
        self._set(torch.cat([gate, up]).unsqueeze(0), down.unsqueeze(0))
        self.number = number
        if self.scale is not None:
            for projection in ("gate_proj", "up_proj"):
                self.value(number, projection).mul_(self.scale)

    def clear(self) -> None:
        """Free the weights."""
        if self.number is not None:
            self.number = None
            self._set(*(torch.empty(0, device="meta") for _ in range(2)))

    def value(self, number: int, projection: str) -> torch.Tensor:
        """One matrix ``[rows, columns]`` of the expert that is loaded, in the model's own memory."""
        assert self.number == number
        gate_up, down = (self._one[0]._parameters[leaf] for leaf in ("gate_up_proj", "down_proj"))
        assert gate_up is not None and down is not None
        if projection == "down_proj":
            return down.data[0]
        half = slice(0, self.inner_size) if projection == "gate_proj" else slice(self.inner_size, None)
        return gate_up.data[0, half]

    def add(self, output: torch.Tensor, visit: Visit) -> torch.Tensor:
        """``output [tokens, hidden size]`` and what the loaded expert adds to it, in place where no gradient flows."""
        assert self.number is not None
        token, weights = visit.routed(self.number)
        if not len(token):
            return output
        part = self._call(visit.hidden[token], weights)
        if torch.is_grad_enabled() and part.requires_grad:
            return output.index_add(0, token, part)
        return output.index_add_(0, token, part)

    def inner(self, rows: torch.Tensor) -> torch.Tensor:
        """What reaches the loaded expert's down projection for inputs ``[tokens, hidden size]``."""
        down = self._one[0]._parameters["down_proj"]
        assert down is not None
        try:
            with _Interception(down):
                self._call(rows, rows.new_ones(len(rows)))
        except _Interrupt as found:
            return found.value
        raise AssertionError(f"{type(self._one[0]).__name__}: its forward does not multiply by down_proj")

    def _call(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        index = torch.zeros((len(rows), 1), dtype=torch.long, device=rows.device)
        result: torch.Tensor = self._forward(self._one[0], rows, index, weights[:, None])
        return result

    def _set(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        parameters = self._one[0]._parameters
        parameters["gate_up_proj"] = nn.Parameter(gate_up, requires_grad=False)
        parameters["down_proj"] = nn.Parameter(down, requires_grad=False)


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
        return self.current == self.slot.count

    def reach(self, number: int) -> None:
        """Let all batches pass the experts before this one, and load it."""
        assert number >= self.current, "experts are gone through in order"
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
        return outputs

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
        counts = torch.zeros(self.slot.count, dtype=torch.long)
        for visit in self.visits.values():
            counts += torch.bincount(visit.index.flatten().cpu(), minlength=self.slot.count)[: self.slot.count]
        return [int(count) for count in counts]

    def _at(self, projection: str, rows: torch.Tensor) -> torch.Tensor:
        if projection != "down_proj":
            return rows
        return self.slot.inner(rows) if len(rows) else rows.new_empty((0, self.slot.inner_size))

    def _pass(self) -> None:
        """Add what the current expert gives, and leave it."""
        if any(bool((visit.index == self.current).any()) for visit in self.visits.values()):
            self.slot.load(self.current)
            for batch, visit in self.visits.items():
                self._outputs[batch] = self.slot.add(self._outputs[batch], visit)
        self.current += 1


class _Interrupt(BaseException):
    """Carries a tensor out of a forward that need not be finished."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value


class _Interception(TorchFunctionMode):
    """Ends a forward where something is multiplied by a parameter, with what that was."""

    def __init__(self, parameter: torch.Tensor) -> None:
        super().__init__()
        self._storage = parameter.untyped_storage().data_ptr()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        factor = args[1] if len(args) > 1 else None
        if isinstance(factor, torch.Tensor) and factor.dim() > 1 and self._is_part(factor):
            raise _Interrupt(args[0])
        return func(*args, **(kwargs or {}))

    def _is_part(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() == self._storage
