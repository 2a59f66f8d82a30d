"""What tracing a forward pass tells of a decoder block: its stops, and the bytes that a batch keeps alive."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["BlockPlan", "Stop"]


@dataclass(frozen=True, slots=True)
class Stop:
    """Linears of a block that receive one and the same input tensor, in calling order; or matrices of an expert.

    Attributes:
        linears: module names, e.g. ``model.layers.0.self_attn.q_proj``.
        columns: size of the input's last dimension.
        held_nbytes: bytes that one batch keeps alive while it waits here, before the first of them.
        residual: the first module of the block whose first input is the tensor that the output of the stop's only
            linear gets added to as it is, ``model.layers.0.input_layernorm``; None if there is no such tensor, or none
            before the linear.
    """

    linears: tuple[str, ...]
    columns: int
    held_nbytes: int
    residual: str | None = None


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """One decoder block as a sequence of stops.

    Attributes:
        index: position in the list of blocks.
        stops: in the order in which a batch reaches them.
        unreached: linears of the block that the forward never calls.
        repeated: those that it calls more than once. Batches don't stand still there.
        returned: values in the tuple ``(hidden, …)`` that the block returns; 0 if it returns the hidden state itself.
        peak_nbytes: most bytes one batch has alive anywhere inside the block.
        entering: numbers in the hidden state that enters it, of a batch of the length that was traced.
        behind_nbytes: most bytes one batch has alive behind the last block: the logits, and what they are made from.
    """

    index: int
    stops: tuple[Stop, ...]
    unreached: tuple[str, ...]
    returned: int
    peak_nbytes: int
    repeated: tuple[str, ...] = ()
    entering: int = 0
    behind_nbytes: int = 0

    def moved(self, index: int, before: str, after: str) -> BlockPlan:
        """The same of a block that does the same, the names of whose modules begin with ``after``."""

        def renamed(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(after + name[len(before) :] for name in names)

        stops = []
        for stop in self.stops:
            residual = None if stop.residual is None else after + stop.residual[len(before) :]
            stops.append(Stop(renamed(stop.linears), stop.columns, stop.held_nbytes, residual))
        unreached, repeated = renamed(self.unreached), renamed(self.repeated)
        return replace(self, index=index, stops=tuple(stops), unreached=unreached, repeated=repeated)
