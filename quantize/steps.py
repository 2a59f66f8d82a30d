"""The loop over blocks: true-sequential, with calibration text streaming through.

A step is one block: what quantizes its linears, and what makes the activations that enter it last on disk. The
sequential way shows each linear what those before it have become; methods that ask for it get a second stream beside
it, of the same text through the original weights. Several processes have a part of the text each, and solve together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat, zip_longest
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch

from llmconvert.compute.dot_products import load_dot_products
from llmconvert.compute.kv_cache import CacheQuantizer, CacheScales
from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.engine.discovery import BlockPlan, Stop
from llmconvert.engine.edges import Edge, MixtureEdge
from llmconvert.engine.memory import MemoryEstimate
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.states import DiskStates, PartOfStates, states_present
from llmconvert.engine.statistics import Aim, Arrival, Departure, Hessian, HessianSum, accumulate_hessian
from llmconvert.engine.stream import BlockRun, Stream
from llmconvert.memory import release_freed_memory
from llmconvert.phases import LOADING_KERNELS, Phases
from llmconvert.quantize.methods.base import (
    AimingQuantizer,
    BlockData,
    BlockQuantizer,
    InputSquares,
    Method,
    Quantizer,
    ScalingQuantizer,
    Solution,
    Target,
)
from llmconvert.quantize.methods.expert_blocks import OriginalAnswers, learn_experts
from llmconvert.quantize.methods.imatrix import mean_squares
from llmconvert.quantize.methods.outer import head_hessian, head_squares, solve_outer
from llmconvert.quantize.methods.ranks.together import solve_together
from llmconvert.quantize.methods.rescale import Rescaling, rescale_block
from llmconvert.quantize.methods.rescale_experts import down_scale
from llmconvert.quantize.methods.rtn import Rtn
from llmconvert.quantize.plan import QuantizationPlan
from llmconvert.quantize.solve.expert_moments import ExpertMoments
from llmconvert.quantize.solve.fixed_scales import LargestInput, cache_scales, largest_inputs
from llmconvert.quantize.solve.shared_scales import largest_magnitude
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["CalibratedSteps", "Outcome", "Step", "Steps", "round_unreached"]

#: What comes of a name in a block.
Outcome = Solution | InputSquares | CacheScales | torch.Tensor

T_co = TypeVar("T_co", covariant=True)

_STREAMS = ("states", "originals")
_AS_THEY_ARE = Rescaling({}, {}, {})


@dataclass(frozen=True, slots=True)
class Step(Generic[T_co]):
    """One block.

    Attributes:
        index: of the block.
        solve: quantizes its linears, one after the other; each is put into the running model before the next. Other
            parameters of the block that get new values come as tensors, under their names in the model. What an
            importance matrix says of a linear comes instead of a solution.
        sync: forces the activations that enter the block to disk.
    """

    index: int
    solve: Callable[[], Iterator[tuple[str, T_co]]]
    sync: Callable[[], None]


class Steps(Protocol[T_co]):
    """A way through the model."""

    def lost(self, work: Path, done: int) -> bool:
        """Whether ``work`` lacks what continuing behind the first ``done`` blocks takes."""

    def run(self, work: Path, done: int) -> Iterator[Step[T_co]]:
        """The blocks from ``done`` on; when the next one is asked for, the one before must be solved."""


@dataclass(frozen=True, slots=True)
class CalibratedSteps:
    """Text streams through the model while it is quantized.

    Attributes:
        blocks: what a forward pass does.
        windows: calibration batches.
        memory: what the pass may take, in lockstep or replay.
        original: the weights that the second stream runs; those that are quantized, if None.
        edges: of each block, for methods that move scales along them.
        mixtures: of each block the norms before experts, for such methods.
        every: whether every expert is shown all tokens of the text.
        caches: what looks at keys and values, by what the checkpoint calls attention modules; of those wanted.
        ranks: the processes, each of which has a part of the batches.
        leads: of linears with a fixed scale for their inputs, by name, what the solved ones have found
            (:attr:`~llmconvert.quantize.solve.fixed_scales.LargestInput.lead`).
    """

    skeleton: Skeleton
    method: Method
    plan: QuantizationPlan
    scale_dtype: torch.dtype
    phases: Phases
    blocks: Sequence[BlockPlan]
    windows: tuple[torch.Tensor, ...]
    memory: MemoryEstimate
    original: Checkpoint | None = None
    edges: Sequence[Sequence[Edge]] = ()
    mixtures: Sequence[Sequence[MixtureEdge]] = ()
    every: bool = False
    caches: Mapping[str, CacheQuantizer] = field(default_factory=dict)
    ranks: Ranks = ALONE
    leads: dict[str, float] = field(default_factory=dict)

    def lost(self, work: Path, done: int) -> bool:
        needed = _STREAMS if self.method.original else _STREAMS[:1]
        inside = 0 < done < self.skeleton.block_count
        if inside and self.skeleton.architecture.hands_over:
            return True  # what earlier blocks left for later ones is not on disk
        return inside and not all(states_present(work, done, *self._shape, name=name) for name in needed)

    def run(self, work: Path, done: int) -> Iterator[Step[Outcome]]:
        if done == self.skeleton.block_count:
            return
        if self.skeleton.device.type == "cpu":
            with self.phases.measure(LOADING_KERNELS):
                from llmconvert.quantize.solve.kernels import load_kernels

                load_kernels()
                load_dot_products()
        with ExitStack() as stack:
            states, stream = self._stream(stack, self.skeleton, work, _STREAMS[0], done)
            kept, original = [states], None
            other_runs: Iterator[BlockRun | None] = repeat(None)
            if self.method.original:
                weights = self.skeleton.checkpoint if self.original is None else self.original
                skeleton = Skeleton(weights, self.skeleton.device, self.skeleton.dtype, products="fast")
                other_states, original = self._stream(stack, skeleton, work, _STREAMS[1], done)
                kept.append(other_states)
                other_runs = original.blocks()
            for run in self.phases.pull("forward", stream.blocks()):
                with self.phases.measure("forward"):
                    other = next(other_runs)
                index = run.plan.index
                solve: Callable[[], Iterator[tuple[str, Outcome]]]
                solve = partial(self._solve_stops, run, other, _AS_THEY_ARE)
                if isinstance(self.method, ScalingQuantizer):
                    solve = partial(self._rescale, run, self.method)
                if self.method.calibration == "squares":
                    solve = partial(self._measure, run)
                if original is not None and other is not None and self.method.calibration == "block":
                    solve = partial(self._solve_block, run, other, original, kept[1])
                streams = [stream] if original is None else [stream, original]
                yield Step(index, partial(self._solve_all, run, solve, streams), partial(_sync_all, kept, index))

    @property
    def _shape(self) -> tuple[list[int], int, torch.dtype]:
        """Tokens of each batch, width and dtype of the hidden states."""
        return [window.shape[1] for window in self.windows], self.skeleton.hidden_size, self.skeleton.dtype

    def _stream(
        self, stack: ExitStack, skeleton: Skeleton, work: Path, name: str, start: int
    ) -> tuple[DiskStates, Stream]:
        states = stack.enter_context(closing(DiskStates(work, *self._shape, name=name)))
        self.ranks.wait()  # until their space is reserved, which may write to it
        own = self.ranks.share(len(self.windows))
        stream = Stream(
            skeleton,
            self.windows[own.start : own.stop],
            self.blocks,
            mode=self.memory.mode,
            states=PartOfStates(states, own.start),
            start=start,
            residuals=self.method.original and self.method.calibration == "inputs",
            phases=self.phases,
        )
        return states, stack.enter_context(closing(stream))

    def _solve_all(
        self, run: BlockRun, solve: Callable[[], Iterator[tuple[str, Outcome]]], streams: Sequence[Stream]
    ) -> Iterator[tuple[str, Outcome]]:
        """The linears that batches reach, those that none does, and behind the last block embedding and head."""
        # Behind what lets batches stand at a linear: they go on from there with what has been fixed meanwhile.
        own = ((site.name, self.plan.schemes.get(site.name)) for site in self.skeleton.sites_of(run.plan.index))
        fixed = {name: scheme.input_kind for name, scheme in own if scheme is not None and scheme.fixes_inputs}
        self.skeleton.quantize_inputs({name: kind for name, kind in fixed.items() if kind is not None})
        yield from solve()
        with self.phases.measure("forward"):
            yield from cache_scales(run, self.caches, self.skeleton, self.ranks, by_head=self.plan.cache_by_head)
        with self.phases.measure("solving"):
            yield from round_unreached(run, self.plan, self.scale_dtype)
        if run.plan.index < self.skeleton.block_count - 1:
            return
        if self.plan.head is not None:
            yield self.plan.head, head_squares(streams[0], self.phases, self.ranks)
        outer = self.plan.outer
        if outer:
            assert isinstance(self.method, Quantizer)
            other = streams[1] if len(streams) > 1 else None
            hessian = head_hessian(outer, streams[0], other, self.phases, self.ranks)
            for site in outer:
                with self.phases.measure("solving"):
                    weight = site.read(self.skeleton.checkpoint).to(self.skeleton.device)
                    scheme = self.plan.schemes[site.name]
                    found = solve_outer(site, weight, scheme, self.method, hessian, self.scale_dtype, self.ranks)
                    yield site.name, found

    def _measure(self, run: BlockRun) -> Iterator[tuple[str, InputSquares]]:
        """The importance matrix of a block, which keeps its weights."""
        for stop in run.plan.stops:
            inputs = self.phases.pull("forward", run.inputs(stop.linears[0]))
            with self.phases.measure("importance"):
                mean = mean_squares(stop.linears[0], inputs, stop.columns, self.ranks)
            for name in stop.linears:
                yield name, InputSquares(mean)

    def _rescale(self, run: BlockRun, method: ScalingQuantizer) -> Iterator[tuple[str, Outcome]]:
        """Move scales along the edges of a block, and quantize its linears then."""
        index, own = run.plan.index, self.ranks.share(len(self.windows))
        block, prefix = self.skeleton.blocks[index], self.skeleton.prefix(index)
        mixtures = self.mixtures[index] if self.mixtures else ()
        with self.phases.measure("scaling"):
            scaling = rescale_block(
                run,
                block,
                len(own),
                self.edges[index],
                prefix,
                self.plan.schemes,
                method,
                self.scale_dtype,
                mixtures,
                self.ranks,
                before=[window.shape[1] for window in self.windows[: own.start]],
            )
        yield from scaling.changed.items()
        yield from self._solve_stops(run, None, scaling)

    def _solve_stops(
        self, run: BlockRun, original: BlockRun | None, scaling: Rescaling
    ) -> Iterator[tuple[str, Outcome]]:
        """Quantize the linears of a block in the order the batches reach them, each on what the ones before give."""
        assert isinstance(self.method, Quantizer)
        dtype = self.skeleton.dtype
        experts = ExpertMoments(run, original, self.skeleton.device, every=self.every, ranks=self.ranks)
        for stop, following in zip_longest(run.plan.stops, run.plan.stops[1:]):
            for name in stop.linears:
                if name in scaling and name not in self.plan.schemes:
                    run.install(name, scaling.apply(name, run.weight(name)))
                    yield run.site(name).parameter, run.weight(name)
            names = [name for name in stop.linears if name in self.plan.schemes]
            if not names:
                continue
            seen = LargestInput((self.plan.schemes[name] for name in names), self.ranks)
            is_expert = run.site(names[0]).kind == "expert"
            if is_expert:
                slot = run.slots[run.site(names[0]).layer]
                if self.mixtures and run.site(names[0]).projection != "down_proj" and slot.is_proportional:
                    scaling = self._scale_expert(run, stop, following, experts)
                with self.phases.measure("Hessians"):
                    hessian: Hessian | None = experts.hessian(stop)
            else:
                hessian = self._hessian(stop, names[0], run, original, seen)
            targets = self._targets(run, names, scaling)
            with self.phases.measure("releasing"):
                release_freed_memory()
            with self.phases.measure("solving"):
                solutions = solve_together(self.method, targets, hessian, self.scale_dtype, self.ranks)
            del hessian, targets
            for name, found in solutions.items():
                solution = self._with_inputs(name, found, seen)
                yield name, replace(solution, tokens=experts.tokens(name)) if is_expert else solution
                run.install(name, solution.tensor.dequantize(dtype))
            del solution, found, solutions

    def _scale_expert(self, run: BlockRun, inputs: Stop, down: Stop, experts: ExpertMoments) -> Rescaling:
        """Between an expert's up projection and its down projection."""
        assert isinstance(self.method, ScalingQuantizer)
        with self.phases.measure("scaling"):
            scale = down_scale(run, down, experts, self.plan.schemes, self.method, self.scale_dtype)
        up = next(name for name in inputs.linears if run.site(name).projection == "up_proj")
        return Rescaling({down.linears[0]: scale}, {up: 1 / scale}, {})

    def _with_inputs(self, name: str, solution: Solution, seen: LargestInput) -> Solution:
        """With what is fixed for the linear's inputs, which batches meet from here on."""
        scale = seen.scale(name, self.plan.schemes[name], self.skeleton.dtype)
        if scale is None:
            return solution
        self.skeleton.input_quantizers[name].fix(scale)
        self.leads[name] = seen.lead
        return replace(solution, tensor=replace(solution.tensor, input_scale=scale))

    def _hessian(
        self, stop: Stop, name: str, run: BlockRun, original: BlockRun | None, seen: LargestInput
    ) -> Hessian | None:
        """What a method wants to know of a stop's inputs; ``seen`` gets what their quantization does."""
        device = self.skeleton.device
        if original is None:
            inputs = seen.watch(self.phases.pull("forward", run.inputs(stop.linears[0])))
            if self.method.calibration == "none":
                for _ in inputs if seen.wanted or self.caches else ():
                    pass
                return None
            with self.phases.measure("Hessians"):
                return accumulate_hessian(name, inputs, stop.columns, device, ranks=self.ranks)
        with self.phases.measure("Hessians"):
            aim = None
            others: Iterator[Arrival | Departure] = original.arrivals(stop)
            if stop.residual is not None:
                assert isinstance(self.method, AimingQuantizer)
                aim, others = Aim(run.site(name).rows, self.method.residual), original.outputs(stop)
            total = HessianSum(name, stop.columns, device, original=True, aim=aim, ranks=self.ranks)
            arrivals, others = self.phases.pull("forward", run.arrivals(stop)), self.phases.pull("forward", others)
            for here, there in zip(arrivals, others, strict=True):
                seen.look(here.inputs)
                total.add(here, there)
            return total.hessian()

    def _solve_block(
        self, run: BlockRun, other: BlockRun, original: Stream, targets: DiskStates
    ) -> Iterator[tuple[str, Solution]]:
        """Quantize all linears of a block together, against what the original block gives for its own input."""
        method, index = self.method, run.plan.index
        assert isinstance(method, BlockQuantizer)
        ordinary = [stop for stop in run.plan.stops if run.site(stop.linears[0]).kind == "linear"]
        chosen = [tuple(name for name in stop.linears if name in self.plan.schemes) for stop in ordinary]
        stops = tuple(replace(stop, linears=names) for stop, names in zip(ordinary, chosen, strict=True) if names)
        names = [name for stop in stops for name in stop.linears]
        with self.phases.measure("forward"):
            answers = OriginalAnswers(other) if run.slots else None

        def outputs(batches: Iterable[int]) -> Iterator[torch.Tensor]:
            with self.phases.measure("forward"):
                original.cross(index)
            return (targets.get(index + 1, batch).to(self.skeleton.device) for batch in batches)

        data = BlockData(
            prefix=self.skeleton.prefix(index),
            parameters={name: self.skeleton.inside(index, run.site(name).parameter) for name in names},
            stops=stops,
            tokens=tuple(window.shape[1] for window in self.windows),
            entries=run.entries if answers is None else answers.entries(run),
            originals=other.entries if answers is None else answers.entries(other),
            outputs=outputs,
        )
        with self.phases.measure("solving"):
            targets_here = self._targets(run, names, _AS_THEY_ARE)
            solutions = method.quantize_block(targets_here, data, self.scale_dtype) if stops else {}
        with self.phases.measure("forward"):
            tensors = {name: solution.tensor for name, solution in solutions.items()}
            seen = largest_inputs(tensors, data.parameters, data.entries(range(len(self.windows))))
        for name, solution in solutions.items():
            yield name, self._with_inputs(name, solution, seen[name]) if name in seen else solution
            run.install(name, solution.tensor.dequantize(self.skeleton.dtype))
        if run.slots:
            moments = ExpertMoments(run, other, self.skeleton.device, every=self.every)
            learned = learn_experts(run, other, moments, method, self.plan.schemes, self.scale_dtype)
            yield from self.phases.pull("solving", learned)

    def _targets(self, run: BlockRun, names: Sequence[str], scaling: Rescaling) -> list[Target]:
        weights = {name: scaling.apply(name, run.weight(name)) for name in names}
        return [Target(name, weight, self.plan.schemes[name]) for name, weight in weights.items()]


def round_unreached(run: BlockRun, plan: QuantizationPlan, scale_dtype: torch.dtype) -> Iterator[tuple[str, Solution]]:
    """The linears of a block that no batch stands at but which get a scheme, rounded to nearest."""
    for name in (*run.plan.unreached, *run.plan.repeated):
        if name in plan.schemes:
            scheme = plan.schemes[name]
            shared = plan.sharing.get(name, ())
            reach = largest_magnitude((other, run.weight(other)) for other in shared) if shared else 0.0
            found = Rtn().quantize([Target(name, run.weight(name), scheme, reach)], None, scale_dtype)[name]
            inputs = LargestInput([scheme]).scale(name, scheme, scale_dtype)
            yield name, replace(found, tensor=replace(found.tensor, input_scale=inputs))


def _sync_all(kept: Sequence[DiskStates], index: int) -> None:
    for states in kept:
        states.sync(index)
