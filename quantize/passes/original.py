"""One pass of the original through calibration text, for any number of variants: moments once, codes for each.

Every linear sees what reaches it in the unquantized model, so its second moments are the same for whatever is made of
it, and are summed once. While they are in memory the linear is solved for every variant: methods with the same
settings factorize the moments once for all their schemes, and a scheme that several variants give a linear is solved
once. The sequential way (:mod:`llmconvert.quantize.steps`) shows a linear what those before it have become instead,
which makes up for a part of their errors and takes a pass for each variant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch

from llmconvert.compute.dot_products import load_dot_products
from llmconvert.engine.discovery import BlockPlan, Stop
from llmconvert.engine.memory import MemoryEstimate
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.states import DiskStates, states_present
from llmconvert.engine.statistics import Hessian, accumulate_hessian
from llmconvert.engine.stream import BlockRun, Stream
from llmconvert.memory import release_freed_memory
from llmconvert.phases import LOADING_KERNELS, Phases
from llmconvert.quantize.execute import Sink
from llmconvert.quantize.methods.base import InputSquares, Method, Quantizer, ScalingQuantizer, Solution, Target
from llmconvert.quantize.methods.imatrix import mean_squares
from llmconvert.quantize.methods.outer import head_hessian, head_squares, solve_outer
from llmconvert.quantize.plan import QuantizationPlan
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.solve.expert_moments import ExpertMoments
from llmconvert.quantize.solve.fixed_scales import LargestInput
from llmconvert.quantize.steps import Outcome, Step, round_unreached

__all__ = ["ForVariant", "OriginalSteps", "Variant", "VariantSink", "can_share"]


def can_share(method: Method) -> bool:
    """Whether all that a method wants to know of a linear are moments of its inputs in the original model."""
    return (
        method.calibration in ("inputs", "squares") and not method.original and not isinstance(method, ScalingQuantizer)
    )


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the artifacts that a pass makes: what is chosen how.

    Attributes:
        method: one that :func:`can_share`.
        plan: its linears and their schemes.
        scale_dtype: what its format stores scales as.
    """

    method: Method
    plan: QuantizationPlan
    scale_dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class ForVariant:
    """What comes of a name in a block for one of the variants, by its number."""

    variant: int
    outcome: Outcome


class VariantSink:
    """Takes what is for one variant; see :class:`llmconvert.quantize.execute.Sink`."""

    def __init__(self, variant: int, sink: Sink[Outcome]) -> None:
        self._variant, self._sink = variant, sink
        self.blocks = sink.blocks

    def take(self, name: str, outcome: ForVariant) -> None:
        if outcome.variant == self._variant:
            self._sink.take(name, outcome.outcome)

    def complete(self, index: int) -> None:
        self._sink.complete(index)

    def commit(self, index: int) -> None:
        self._sink.commit(index)
        self.blocks = self._sink.blocks


#: What is solved in one go for a linear: a method with its settings, and the dtype of scales.
_Way: TypeAlias = tuple[Method, torch.dtype]


@dataclass(frozen=True, slots=True)
class OriginalSteps:
    """The pass; see :class:`llmconvert.quantize.steps.Steps`.

    Attributes:
        skeleton: the original model.
        variants: what is made of it.
        phases: where time is counted.
        blocks: what a forward pass does.
        windows: calibration batches.
        memory: what the pass may take, in lockstep or replay.
        every: whether every expert is shown all tokens of the text.
    """

    skeleton: Skeleton
    variants: Sequence[Variant]
    phases: Phases
    blocks: Sequence[BlockPlan]
    windows: tuple[torch.Tensor, ...]
    memory: MemoryEstimate
    every: bool = False

    def lost(self, work: Path, done: int) -> bool:
        inside = 0 < done < self.skeleton.block_count
        if inside and self.skeleton.architecture.hands_over:
            return True  # what earlier blocks left for later ones is not on disk
        return inside and not states_present(work, done, *self._shape)

    def run(self, work: Path, done: int) -> Iterator[Step[ForVariant]]:
        if done == self.skeleton.block_count:
            return
        if self.skeleton.device.type == "cpu":
            with self.phases.measure(LOADING_KERNELS):
                from llmconvert.quantize.solve.kernels import load_kernels

                load_kernels()
                load_dot_products()
        with closing(DiskStates(work, *self._shape)) as states:
            stream = Stream(
                self.skeleton,
                self.windows,
                self.blocks,
                mode=self.memory.mode,
                states=states,
                start=done,
                phases=self.phases,
            )
            with closing(stream):
                for run in self.phases.pull("forward", stream.blocks()):
                    index = run.plan.index
                    yield Step(index, partial(self._solve_all, run, stream), partial(states.sync, index))

    @property
    def _shape(self) -> tuple[list[int], int, torch.dtype]:
        """Tokens of each batch, width and dtype of the hidden states."""
        return [window.shape[1] for window in self.windows], self.skeleton.hidden_size, self.skeleton.dtype

    def _solve_all(self, run: BlockRun, stream: Stream) -> Iterator[tuple[str, ForVariant]]:
        """The linears of a block, and behind the last one the embedding and the head."""
        yield from self._solve(run)
        if run.plan.index < self.skeleton.block_count - 1:
            return
        heads = {number: one.plan.head for number, one in enumerate(self.variants) if one.plan.head is not None}
        squares = head_squares(stream, self.phases) if heads else None
        for number, name in heads.items():
            assert squares is not None
            yield name, ForVariant(number, squares)
        hessian = head_hessian([site for one in self.variants for site in one.plan.outer], stream, None, self.phases)
        for number, one in enumerate(self.variants):
            for site in one.plan.outer:
                assert isinstance(one.method, Quantizer)
                with self.phases.measure("solving"):
                    weight = site.read(self.skeleton.checkpoint).to(self.skeleton.device)
                    scheme = one.plan.schemes[site.name]
                    solution = solve_outer(site, weight, scheme, one.method, hessian, one.scale_dtype)
                yield site.name, ForVariant(number, solution)

    def _solve(self, run: BlockRun) -> Iterator[tuple[str, ForVariant]]:
        experts = ExpertMoments(run, None, self.skeleton.device, every=self.every)
        for stop in run.plan.stops:
            yield from self._squares(run, stop)
            wanted = self._wanted(stop)
            if not wanted:
                continue
            seen = LargestInput(scheme for schemes in wanted.values() for scheme in schemes)
            hessian = self._hessian(run, stop, experts, seen)
            with self.phases.measure("releasing"):
                release_freed_memory()
            for number, (way, schemes) in enumerate(wanted.items()):
                # Solvers overwrite what they are given; the last one may have the sum itself.
                own = hessian if number == len(wanted) - 1 else Hessian(hessian.matrix.clone(), hessian.tokens)
                solutions = self._solutions(run, way, schemes, own)
                del own
                for (name, scheme), found in solutions.items():
                    counted = run.site(name).kind == "expert"
                    solution = replace(found, tokens=experts.tokens(name)) if counted else found
                    fixed = seen.scale(name, scheme, self.skeleton.dtype)
                    solution = replace(solution, tensor=replace(solution.tensor, input_scale=fixed))
                    for variant in self._of(way):
                        if self.variants[variant].plan.schemes.get(name) == scheme:
                            yield name, ForVariant(variant, solution)
                del solutions
            del hessian
        for number, one in enumerate(self.variants):
            with self.phases.measure("solving"):
                for name, solution in round_unreached(run, one.plan, one.scale_dtype):
                    yield name, ForVariant(number, solution)

    def _squares(self, run: BlockRun, stop: Stop) -> Iterator[tuple[str, ForVariant]]:
        """Mean squares of the inputs, for the variants that want these."""
        wanting = [number for number, one in enumerate(self.variants) if one.method.calibration == "squares"]
        if not wanting:
            return
        inputs = self.phases.pull("forward", run.inputs(stop.linears[0]))
        with self.phases.measure("importance"):
            mean = mean_squares(stop.linears[0], inputs, stop.columns)
        for name in stop.linears:
            for variant in wanting:
                yield name, ForVariant(variant, InputSquares(mean))

    def _wanted(self, stop: Stop) -> dict[_Way, dict[Scheme, list[str]]]:
        """Which of a stop's linears are solved in which way, into which schemes."""
        wanted: dict[_Way, dict[Scheme, list[str]]] = {}
        for variant in self.variants:
            if variant.method.calibration == "squares":
                continue
            for name in stop.linears:
                scheme = variant.plan.schemes.get(name)
                if scheme is not None:
                    names = wanted.setdefault((variant.method, variant.scale_dtype), {}).setdefault(scheme, [])
                    if name not in names:
                        names.append(name)
        return wanted

    def _of(self, way: _Way) -> list[int]:
        return [number for number, one in enumerate(self.variants) if (one.method, one.scale_dtype) == way]

    def _hessian(self, run: BlockRun, stop: Stop, experts: ExpertMoments, seen: LargestInput) -> Hessian:
        name = stop.linears[0]
        if run.site(name).kind == "expert":
            with self.phases.measure("Hessians"):
                return experts.hessian(stop)
        inputs = seen.watch(self.phases.pull("forward", run.inputs(name)))
        with self.phases.measure("Hessians"):
            return accumulate_hessian(name, inputs, stop.columns, self.skeleton.device)

    def _solutions(
        self, run: BlockRun, way: _Way, schemes: dict[Scheme, list[str]], hessian: Hessian
    ) -> dict[tuple[str, Scheme], Solution]:
        """What comes of linears in each of their schemes, by name and scheme."""
        method, scale_dtype = way
        assert isinstance(method, Quantizer)
        # A method tells its targets apart by name, and a linear is one in each scheme.
        targets = {f"{name} in {scheme}": (name, scheme) for scheme, names in schemes.items() for name in names}
        with self.phases.measure("solving"):
            weights = {name: run.weight(name) for name, _ in targets.values()}
            found = method.quantize(
                [Target(label, weights[name], scheme) for label, (name, scheme) in targets.items()],
                hessian,
                scale_dtype,
            )
        return {targets[label]: solution for label, solution in found.items()}
