"""Tracing a forward pass on fake tensors: the order of linears, which share an input, and what a batch keeps alive.

The model runs once on fake tensors (shapes and dtypes, no data). That tells in which order every block calls its
linears, which of them receive the very same tensor (and so share statistics), which add to the residual stream, what a
block returns, and how many bytes a batch keeps alive wherever it may have to wait. An architecture that the engine
cannot run fails here, before any work.
"""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from llmconvert.engine.architecture.boundary import WHOLE, foreign_settings
from llmconvert.engine.architecture.config import build_config
from llmconvert.engine.architecture.experts import ExpertsLayout, expert_parameter, find_experts
from llmconvert.engine.architecture.model import build_meta_model, fix_frequencies
from llmconvert.engine.architecture.reach import Reach, on_shapes
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import UnsupportedError

__all__ = ["PROBE_LENGTH", "BlockPlan", "Stop", "discover"]

#: Tokens that suffice where no batch will run: which linears share an input doesn't depend on the length.
PROBE_LENGTH = 16
# Traces that are kept for who asks the same again.
_KEPT = 16


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


def discover(skeleton: Skeleton, length: int = PROBE_LENGTH) -> tuple[BlockPlan, ...]:
    """Run a batch of shape ``[1, length]`` through the model's shapes; bytes hold for batches up to that length.

    Planning, calibration and evaluation ask the same of one model; it is run once in a process.

    Raises:
        UnsupportedError: the forward does not run this way, or does not pass its blocks once each and in order.
    """
    return _trace(
        _Question(
            json.dumps(skeleton.checkpoint.config),
            frozenset(type(module).forward for module in skeleton.model.modules()),
            skeleton.dtype,
            skeleton.attention,
            skeleton.device,
            skeleton.reach,
            tuple(name for slots in skeleton.experts for name in slots),
            tuple(tuple(linears) for linears in skeleton.linears),
            length,
        )
    )


@dataclass(frozen=True, slots=True)
class _Question:
    """All that a trace depends on.

    Attributes:
        config: ``config.json``.
        forwards: what its modules do.
        dtype, attention, device: what the model computes in, how it attends, and where.
        reach: what text reaches of it.
        experts: names of the modules that hold experts.
        linears: names of each block's linears.
        length: tokens.
    """

    config: str
    forwards: frozenset[Callable[..., Any]]
    dtype: torch.dtype
    attention: str
    device: torch.device
    reach: Reach
    experts: tuple[str, ...]
    linears: tuple[tuple[str, ...], ...]
    length: int


@lru_cache(maxsize=_KEPT)
def _trace(asked: _Question) -> tuple[BlockPlan, ...]:
    config = build_config(json.loads(asked.config))
    kind = config.model_type
    # Built outside the fake mode, which does not take the constants that some modules turn into buffers.
    model = build_meta_model(config, asked.dtype, asked.attention)
    fix_frequencies(model)
    taken = set(asked.experts)
    for name, _, layout in [found for found in find_experts(model) if found[0] in taken]:
        model.set_submodule(name, _ExpertShapes(layout))
    # Fake, but on the real device, whose attention kernels decide what is alive.
    with on_shapes(model, asked.device):
        listed: Any = model.get_submodule(asked.reach.blocks)
        blocks = [listed[position] for position in asked.reach.positions]
        tracker = _Tracker(model)
        recorders = [_BlockRecorder(index, tracker) for index in range(len(blocks))]
        order: list[int] = []
        for recorder, block, linears in zip(recorders, blocks, asked.linears, strict=True):
            recorder.attach(block, asked.reach.prefix(recorder.index), linears, order)
        ids = torch.zeros((1, asked.length), dtype=torch.long, device=asked.device)
        with foreign_settings(f"architecture {kind!r} cannot be traced on shapes alone", WHOLE), tracker:
            model(input_ids=ids, use_cache=False)
    handed = next((recorder.handed for recorder in recorders if recorder.handed), "")
    if handed:
        raise UnsupportedError(
            f"architecture {kind!r}: its blocks hand each other more than hidden states ({handed}), and a pass that "
            f"begins at a block has nothing else; {WHOLE}"
        )
    if order != list(range(len(blocks))):
        raise UnsupportedError(
            f"architecture {kind!r}: its forward passes the blocks in the order {order[:8]}…, expected each once, "
            f"in order, with the hidden state as first argument, to be run block by block; {WHOLE}"
        )
    *before, last = (recorder.plan() for recorder in recorders)
    return (*before, replace(last, behind_nbytes=tracker.peak))


class _ExpertShapes(nn.Module):
    """Stands in for the experts of a layer, whose forward asks for values; most of its memory is one expert's."""

    def __init__(self, layout: ExpertsLayout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, hidden: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        # At worst all tokens go to one expert: they are copied, go up and down, are weighted and added.
        output = torch.zeros_like(hidden)
        inside = hidden.new_empty((len(hidden), 4 * self.layout.inner_size + 3 * self.layout.hidden_size))
        del inside
        return output


class _Tracker(TorchDispatchMode):
    """Sees every operator.

    Counts the bytes of all storages that operators have made and that are still referenced, except the model's; and
    notes which linears' outputs are added to what.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.sums = _Sums()
        #: The argument of the block under way, returned by the one before it, that an operator has read.
        self.used = ""
        self._handed: dict[int, weakref.ref[torch.Tensor]] = {}
        self._watched: dict[int, str] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def hand(self, values: Sequence[object]) -> None:
        """A block returns these beside its hidden state."""
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        self._handed = {value.untyped_storage()._cdata: weakref.ref(value) for value in tensors}
        self._watched = {}

    def watch(self, given: Mapping[str, object]) -> None:
        """A block gets these arguments beside its hidden state."""
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        keys = {value.untyped_storage()._cdata: name for name, value in tensors.items()}
        alive = {key for key, one in self._handed.items() if one() is not None}
        self._watched = {key: name for key, name in keys.items() if key in alive}
        self.used = ""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self._watched:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata in self._watched:
                    self.used = self._watched[value.untyped_storage()._cdata]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        if func is torch.ops.aten.add.Tensor and not kwargs:
            self.sums.add(*args)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        nbytes = storage.nbytes()
        self._known.add(key)
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, nbytes)

    def _release(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes


class _Sums:
    """Which linear's output is added to which module's first input, by storages: views of a tensor are the tensor.

    ``residuals`` has the module by the linear.
    """

    def __init__(self) -> None:
        self.residuals: dict[str, str] = {}
        self._time = itertools.count()
        self._inputs: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._outputs: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._called: dict[str, int] = {}

    def enter(self, name: str, value: object) -> None:
        """A module is called with ``value`` as its first argument."""
        self._called[name] = next(self._time)
        if isinstance(value, torch.Tensor):
            self._inputs.setdefault(value.untyped_storage(), name)

    def leave(self, linear: str, output: torch.Tensor) -> None:
        """A linear gives its output."""
        self._outputs[output.untyped_storage()] = linear

    def add(self, first: object, second: object) -> None:
        """Two values are added."""
        if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor) and first.shape == second.shape):
            return
        for output, other in ((first, second), (second, first)):
            linear = self._outputs.get(output.untyped_storage())
            module = self._inputs.get(other.untyped_storage())
            if linear is not None and module is not None and self._called[module] < self._called[linear]:
                self.residuals.setdefault(linear, module)


class _BlockRecorder:
    """Hooks that write down what happens in one block."""

    def __init__(self, index: int, tracker: _Tracker) -> None:
        self.index = index
        self._tracker = tracker
        self._groups: list[_Group] = []
        self._seen: set[str] = set()
        self._repeated: dict[str, None] = {}
        self._linears: tuple[str, ...] = ()
        self._returned = 0
        self._entering = 0
        self._peak = 0
        #: The argument by which the block uses more of the one before it than its hidden state; empty without.
        self.handed = ""

    def attach(self, block: nn.Module, prefix: str, linears: tuple[str, ...], order: list[int]) -> None:
        self._linears = linears

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if args and isinstance(args[0], torch.Tensor):
                order.append(self.index)
                self._entering = args[0].numel()
            given = {**{f"argument {place}": value for place, value in enumerate(args[1:], 2)}, **kwargs}
            self._tracker.watch(given)
            self._tracker.peak = self._tracker.live

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._returned = len(output) if isinstance(output, tuple) else 0
            self.handed = self._tracker.used
            self._tracker.hand(output[1:] if isinstance(output, tuple) else ())
            self._peak, self._tracker.peak = self._tracker.peak, self._tracker.live

        block.register_forward_pre_hook(enter, with_kwargs=True)
        block.register_forward_hook(leave)
        modules = {prefix + name: module for name, module in block.named_modules() if name}
        for name, module in modules.items():
            module.register_forward_pre_hook(self._entry_recorder(name))
        for name, module in modules.items():
            if isinstance(module, _ExpertShapes):
                module.register_forward_pre_hook(self._expert_recorder(name, module))
        for name in linears:
            modules[name].register_forward_pre_hook(self._recorder(name))
            modules[name].register_forward_hook(self._output_recorder(name))

    def _entry_recorder(self, name: str) -> Any:
        return lambda module, args: self._tracker.sums.enter(name, args[0] if args else None)

    def _output_recorder(self, name: str) -> Any:
        return lambda module, args, output: self._tracker.sums.leave(name, output)

    def _recorder(self, name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            if name in self._seen:
                self._repeated[name] = None
                return
            self._seen.add(name)
            tensor, held = args[0], self._tracker.live
            for group in self._groups:
                if group.tensor is not None and group.tensor() is tensor:
                    group.linears.append(name)
                    return
            self._groups.append(_Group(weakref.ref(tensor), [name], tensor.shape[-1], held))

        return record

    def _expert_recorder(self, name: str, experts: _ExpertShapes) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            if name in self._seen:
                raise ValueError(f"{name} is called more than once")
            held, layout = self._tracker.live, experts.layout
            for number in range(layout.count):
                for stop in layout.stops():
                    names = [expert_parameter(name, number, part).removesuffix(".weight") for part in stop]
                    self._groups.append(_Group(None, names, layout.matrices[stop[0]].columns, held))
            self._seen.add(name)

        return record

    def plan(self) -> BlockPlan:
        residuals = self._tracker.sums.residuals
        stops: list[Stop] = []
        for group in self._groups:
            linears = tuple(name for name in group.linears if name not in self._repeated)
            if linears:
                residual = residuals.get(linears[0]) if len(linears) == 1 else None
                stops.append(Stop(linears, group.columns, group.held, residual))
        unreached = tuple(name for name in self._linears if name not in self._seen)
        repeated = tuple(self._repeated)
        return BlockPlan(self.index, tuple(stops), unreached, self._returned, self._peak, repeated, self._entering)


@dataclass(slots=True)
class _Group:
    """A stop while it is being recorded; the input is referenced weakly, so that it dies when the forward drops it.

    Without an input: an expert's, which is a part of what the layer's experts receive.
    """

    tensor: weakref.ref[torch.Tensor] | None
    linears: list[str]
    columns: int
    held: int
