"""What happens in a block while a model runs on fake tensors: stops, shared inputs, sums, and bytes that are alive."""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from llmconvert.engine.architecture.experts import ExpertsLayout, expert_parameter
from llmconvert.engine.tracing.blocks import BlockPlan, Stop

__all__ = ["BlockRecorder", "ExpertShapes", "Tracker"]


class ExpertShapes(nn.Module):
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


class Tracker(TorchDispatchMode):
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


class BlockRecorder:
    """Hooks that write down what happens in one block."""

    def __init__(self, index: int, tracker: Tracker) -> None:
        self.index = index
        self._tracker = tracker
        self._groups: list[_Group] = []
        self._seen: set[str] = set()
        self._repeated: dict[str, None] = {}
        self._linears: tuple[str, ...] = ()
        self._prefix = ""
        self._order: list[int] = []
        self._returned = 0
        self._entering = 0
        self._peak = 0
        self._call: Hashable = None
        self._live = 0
        # Whether it gives a new hidden state like the one that came in, and leaves nothing else behind.
        self._plain = False
        self._like: BlockRecorder | None = None
        self._planned: BlockPlan | None = None
        #: The argument by which the block uses more of the one before it than its hidden state; empty without.
        self.handed = ""

    def attach(self, block: nn.Module, prefix: str, linears: tuple[str, ...], order: list[int]) -> None:
        self._linears, self._prefix, self._order = linears, prefix, order
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        called = [one.name for one in inspect.signature(block.forward).parameters.values() if one.kind in positional]

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if args and isinstance(args[0], torch.Tensor):
                order.append(self.index)
                self._entering = args[0].numel()
            names = [*called, *(f"argument {place}" for place in range(len(called) + 1, len(args) + 1))]
            given = {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
            self._tracker.watch(given)
            self._tracker.peak = self._live = self._tracker.live
            self._call = _call_of(args, kwargs)

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._returned = len(output) if isinstance(output, tuple) else 0
            self.handed = self._tracker.used
            self._tracker.hand(output[1:] if isinstance(output, tuple) else ())
            self._peak, self._tracker.peak = self._tracker.peak, self._tracker.live
            if isinstance(output, torch.Tensor) and self._call is not None:
                added = self._tracker.live - self._live
                self._plain = _kind_of(output) == _kind_of(args[0]) and added == output.untyped_storage().nbytes()

        block.register_forward_pre_hook(enter, with_kwargs=True)
        block.register_forward_hook(leave)
        modules = {prefix + name: module for name, module in block.named_modules() if name}
        for name, module in modules.items():
            module.register_forward_pre_hook(self._entry_recorder(name))
        for name, module in modules.items():
            if isinstance(module, ExpertShapes):
                module.register_forward_pre_hook(self._expert_recorder(name, module))
        for name in linears:
            modules[name].register_forward_pre_hook(self._recorder(name))
            modules[name].register_forward_hook(self._output_recorder(name))

    def follows(self, like: BlockRecorder, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether this block, called so, does what one of its kind did; what is alive must be the same as well."""
        if not like._plain or like.handed or self._tracker.live != like._live:
            return False
        sums = (self._tracker.sums.residuals.get(name) for group in like._groups for name in group.linears)
        inside = all(name.startswith(like._prefix) for name in sums if name is not None)
        return inside and _call_of(args, kwargs) == like._call

    def pass_by(self, like: BlockRecorder, output: torch.Tensor) -> None:
        """The block has given ``output`` without being run, as :meth:`follows` allows."""
        self._like = like
        self._order.append(self.index)
        self._tracker.hand(())
        self._tracker.peak = self._tracker.live

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

    def _expert_recorder(self, name: str, experts: ExpertShapes) -> Any:
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
        if self._planned is None:  # many others may ask the first of a kind
            self._planned = self._plan()
        return self._planned

    def _plan(self) -> BlockPlan:
        if self._like is not None:
            return self._like.plan().moved(self.index, self._like._prefix, self._prefix)
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


def _call_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """What a block is called with, by kinds of tensors; None if that is more than tensors and plain values, of which
    a block could make something for the next."""
    if not args or not isinstance(args[0], torch.Tensor):
        return None
    found: list[Hashable] = []
    for name, value in (*enumerate(args), *kwargs.items()):
        parts = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(part, torch.Tensor | bool | int | float | str | None) for part in parts):
            return None
        kinds = (_kind_of(part) if isinstance(part, torch.Tensor) else part for part in parts)
        found.append((name, type(value), *kinds))
    return tuple(found)


def _kind_of(tensor: torch.Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


@dataclass(slots=True)
class _Group:
    """A stop while it is being recorded; the input is referenced weakly, so that it dies when the forward drops it.

    Without an input: an expert's, which is a part of what the layer's experts receive.
    """

    tensor: weakref.ref[torch.Tensor] | None
    linears: list[str]
    columns: int
    held: int
