"""SignRound (Cheng et al. 2023, arXiv 2309.05516; AutoRound): rounding and scales learned by signed gradients.

Every weight gets an offset that is added before rounding, and every group a factor on its scale. Both are trained to
bring the block's output on the quantized model's activations to the original block's output on the original's. The
rounding passes gradients straight through; steps have the size of the learning rate whatever the gradient, and the
learning rate falls linearly to zero.

The paper starts from round-to-nearest. Here training starts from GPTAQ's codes, which aim at the original's outputs
too: a weight that was moved to another code starts at that code's edge towards its own value, so that it can be moved
back. It takes far fewer steps to come further. What training did is judged on all batches before it is taken: a block
never ends with a larger error than it started with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn import functional

from llmconvert.compute.scale_numbers import E8M0
from llmconvert.engine.coroutine import record_inputs
from llmconvert.engine.skeleton import BlockCall
from llmconvert.engine.statistics import Aim, Arrival, Departure, Hessian, HessianSum
from llmconvert.memory import row_slices
from llmconvert.quantize.methods.base import BlockData, Calibration, Numbers, Solution, Target
from llmconvert.quantize.methods.gptaq import Gptaq
from llmconvert.quantize.methods.gptq import Gptq
from llmconvert.quantize.methods.rtn import Rtn
from llmconvert.quantize.tensor import QuantizedTensor

__all__ = ["SignRound"]

_STARTS: dict[str, Gptaq | Gptq | Rtn] = {"gptaq": Gptaq(), "gptq": Gptq(sweeps=2), "rtn": Rtn(search=True)}
# How far from the middle of a code a weight that was moved to it starts; half would be its neighbour's.
_EDGE = 0.49
# Bounds of the factor on a scale.
_NARROWEST, _WIDEST = 0.5, 1.2
# What takes a number next to itself, below.
_BELOW = 1 - 2.0**-10
# A step takes slices of about this many weights, whose float32 copies stay in the cache.
_WEIGHTS_AT_ONCE = 1 << 17


@dataclass(frozen=True, slots=True)
class SignRound:
    """The method and its settings.

    Attributes:
        steps: of training, for each block.
        batch: calibration windows in a step.
        learning_rate: first size of a step, in codes. If None, the paper's ``1 / steps`` from the nearest codes, and a
            tenth of it from better ones, which larger steps only make worse.
        scale_rate: first size of a step of the scales' factors; half the learning rate if None.
        start: where training starts: GPTAQ's or GPTQ's codes and scales, or the nearest codes on scales by least
            squares.
        seed: decides which windows a step gets.
    """

    steps: int = 200
    batch: int = 4
    learning_rate: float | None = None
    scale_rate: float | None = None
    start: Literal["gptaq", "gptq", "rtn"] = "gptaq"
    seed: int = 0

    calibration: ClassVar[Calibration] = "block"
    original: ClassVar[bool] = True
    numbers: ClassVar[Numbers] = "scaled"

    def quantize(
        self, targets: Sequence[Target], hessian: Hessian | None, scale_dtype: torch.dtype
    ) -> dict[str, Solution]:
        """What training starts from."""
        return _STARTS[self.start].quantize(targets, hessian, scale_dtype)

    def nbytes(self, rows: int, columns: int) -> int:
        return _STARTS[self.start].nbytes(rows, columns)

    def quantize_block(
        self, targets: Sequence[Target], data: BlockData, scale_dtype: torch.dtype
    ) -> dict[str, Solution]:
        return self.refine(targets, self._start(targets, data, scale_dtype), data)

    def refine(
        self, targets: Sequence[Target], started: Mapping[str, Solution], data: BlockData
    ) -> dict[str, Solution]:
        learned = [_Learned(target, started[target.name].tensor, data.parameters[target.name]) for target in targets]
        before = _relative_error(learned, data)
        kept = [weight.state() for weight in learned]
        self._train(learned, data)
        after = _relative_error(learned, data)
        if not after < before:
            for weight, state in zip(learned, kept, strict=True):
                weight.restore(state)
        error = min(before, after) if after == after else before
        return {
            target.name: Solution(weight.quantized(), error) for target, weight in zip(targets, learned, strict=True)
        }

    def block_nbytes(self, weights: int, batch: int) -> int:
        """Moments of one linear's inputs are counted with the weights, which are not there at the same time: the
        offsets twice, the values, their gradients and a float32 copy of both to multiply with, and of floats how far
        levels are from each other; and the activations of a step with gradients, each kept once more than in a plain
        pass, and in float32 as it is multiplied."""
        return weights * 4 * 9 + 4 * self.batch * batch

    def _start(self, targets: Sequence[Target], data: BlockData, scale_dtype: torch.dtype) -> dict[str, Solution]:
        """Solve linear after linear, each on what those before it give once they are quantized."""
        if self.start == "rtn":
            return self.quantize(targets, None, scale_dtype)
        start = _STARTS[self.start]
        aims = start.original
        every = range(len(data.tokens))
        solutions: dict[str, Solution] = {}
        weights: dict[str, torch.Tensor] = {}
        by_name = {target.name: target for target in targets}
        for stop in data.stops:
            group = [by_name[name] for name in stop.linears]
            name, weight = group[0].name, group[0].weight
            watched = [name.removeprefix(data.prefix)]
            aim = None
            if isinstance(start, Gptaq) and stop.residual is not None:
                watched.append(stop.residual.removeprefix(data.prefix))
                aim = Aim(len(weight), start.residual)
            total = HessianSum(name, stop.columns, weight.device, original=aims, aim=aim)
            there = _arrivals(watched, data.originals(every), {}) if aims else itertools.repeat(None, len(every))
            for here, original in zip(_arrivals(watched, data.entries(every), weights), there, strict=True):
                if aim is not None and original is not None and original.residual is not None:
                    total.add(here, Departure(functional.linear(original.inputs, weight), original.residual))
                else:
                    total.add(here, original)
            solved = self.quantize(group, total.hessian(), scale_dtype)
            for target in group:
                values = solved[target.name].tensor.dequantize(weight.dtype)
                weights[data.parameters[target.name]] = values
            solutions |= solved
        return solutions

    def _train(self, learned: Sequence[_Learned], data: BlockData) -> None:
        rate = self.learning_rate or (1.0 if self.start == "rtn" else 0.1) / max(1, self.steps)
        scale_rate = self.scale_rate if self.scale_rate is not None else rate / 2
        generator = torch.Generator().manual_seed(self.seed)
        count = len(data.tokens)
        order: list[int] = []
        weights = {weight.parameter: weight.value for weight in learned}
        for step in range(self.steps):
            if len(order) < self.batch:
                order += torch.randperm(count, generator=generator).tolist()
            chosen, order = order[: self.batch], order[self.batch :]
            tokens = sum(data.tokens[batch] for batch in chosen)
            entries, outputs = data.entries(chosen), data.outputs(chosen)
            for (hidden, call), output in zip(entries, outputs, strict=True):
                loss = _loss(call.output(hidden, weights), output) / tokens
                loss.backward()
            falling = 1 - step / self.steps
            for weight in learned:
                weight.step(rate * falling, scale_rate * falling)


class _Learned:
    """A weight in training: offsets before rounding, factors on its scales, and the values they come to.

    ``weight / (scale · factor) + zero + offset`` is what gets rounded; of floats the offset counts in distances between
    levels where the weight lies. Gradients through rounding and clamping are worked out by hand, a slice of rows at a
    time that stays in the cache; autograd kept a dozen copies of the weights. Scales that rows share, and powers of
    two, of which none is near another, stay as they are.
    """

    def __init__(self, target: Target, start: QuantizedTensor, parameter: str) -> None:
        self.parameter = parameter
        self.start = start
        self._number = start.scheme.number
        scale = _scales_by_row(start)
        rows, groups = scale.shape
        self._moves = start.scheme.rows == 1 and start.scheme.number.scales is not E8M0
        self._weight = target.weight.view(rows, groups, -1)
        self._scale = scale.unsqueeze(-1)
        self._zero = torch.zeros_like(self._scale) if start.zero is None else start.zero.float().unsqueeze(-1)
        if start.offset is not None:  # a zero point that is a float, and grows with the scale as others do
            self._zero = -start.offset.float().unsqueeze(-1) / self._scale
        codes = start.codes.view(rows, groups, -1)
        self.factor = torch.ones_like(self._scale)
        self.offset = torch.empty(codes.shape, device=codes.device)
        self._spacing = None if self._number.parts is None else torch.empty_like(self.offset)
        #: The dequantized weight in its own dtype, ``[rows, columns]``; its gradient is what a step takes.
        self.value = torch.empty_like(target.weight)
        for part in self._slices():
            own = self._weight[part] / self._scale[part] + self._zero[part]
            code = self._number.values(codes[part])
            if self._number.parts is None or self._spacing is None:
                self.offset[part] = code + (own - code).clamp_(-_EDGE, _EDGE) - own
            else:
                spacing = self._spacing[part].copy_(self._number.parts.spacing(own))
                # Below a power of two levels are nearer to it than above.
                edge = self._number.parts.spacing(code * _BELOW).mul_(_EDGE)
                self.offset[part] = (code + (own - code).clamp(-edge, edge) - own).div_(spacing)
            self._write(part)
        self.value.requires_grad_()

    def state(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.offset.clone(), self.factor.clone()

    def restore(self, state: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.offset, self.factor = state

    def step(self, rate: float, scale_rate: float) -> None:
        """One signed step, from the gradient of the loss with respect to :attr:`value`, which is taken away."""
        assert self.value.grad is not None
        gradient = self.value.grad.view_as(self.offset)
        self.value.grad = None
        low, high = self._number.limits
        with torch.no_grad():
            for part in self._slices():
                towards = gradient[part].float()
                factor, scale = self.factor[part], self._scale[part]
                raw = self._raw(part)
                if self._number.parts is None:
                    raw.round_()
                inside = (raw >= low) & (raw <= high)
                level = self._levels(raw).sub_(self._zero[part])
                # Rounding passes gradients straight through, clamping those of codes inside their range.
                passed = towards * inside
                by_factor = (towards * level).sum(-1, keepdim=True).mul_(scale)
                by_factor -= (passed * self._weight[part]).sum(-1, keepdim=True).div_(factor)
                self.offset[part] -= passed.sign_() * scale.sign() * rate
                if self._moves:
                    self.factor[part] = (factor - by_factor.sign_() * scale_rate).clamp_(_NARROWEST, _WIDEST)
                self._write(part)

    def quantized(self) -> QuantizedTensor:
        """The weight as it stands."""
        start = self.start
        codes = torch.empty(self.offset.shape, dtype=self._number.code_dtype, device=self.offset.device)
        for part in self._slices():
            raw = self._raw(part)
            codes[part] = self._levels(raw).to(codes.dtype) if self._number.even else self._number.nearest(raw)
        scale, bias = self._stored(slice(None)) if self._moves else start.scale, self._bias(slice(None))
        return QuantizedTensor(codes.flatten(1), scale, start.zero, start.scheme, divisor=start.divisor, offset=bias)

    def _slices(self) -> Iterator[slice]:
        return row_slices(self._weight.shape, _WEIGHTS_AT_ONCE)

    def _raw(self, part: slice) -> torch.Tensor:
        """What gets rounded, float32 ``[rows, groups, group size]``."""
        scaled = self._weight[part] / (self._scale[part] * self.factor[part])
        scaled.add_(self._zero[part])
        offset = self.offset[part]
        return scaled.add_(offset if self._spacing is None else offset * self._spacing[part])

    def _levels(self, raw: torch.Tensor) -> torch.Tensor:
        """What that is rounded to, float32; integers are codes."""
        parts = self._number.parts
        return raw.round_().clamp_(*self._number.limits) if parts is None else parts.round(raw)

    def _stored(self, part: slice) -> torch.Tensor:
        """Scales ``[rows, groups]`` as they will be stored."""
        scale = (self._scale[part] * self.factor[part]).squeeze(-1)
        divisor = self.start.divisor
        return self._number.round_scale(scale if divisor is None else scale * divisor, self.start.scale.dtype)

    def _factors(self, part: slice) -> torch.Tensor:
        """What levels are multiplied by then, ``[rows, groups, 1]``."""
        if not self._moves:
            return self._scale[part]
        stored, divisor = self._stored(part), self.start.divisor
        return (stored if divisor is None else stored / divisor).unsqueeze(-1)

    def _bias(self, part: slice) -> torch.Tensor | None:
        """Biases ``[rows, groups]`` as they will be stored; None where zero points are integers, or there are none."""
        if self.start.offset is None:
            return None
        exact = -self._zero[part] * self._scale[part] * self.factor[part]
        return exact.squeeze(-1).to(self.start.offset.dtype)

    def _write(self, part: slice) -> None:
        """Bring :attr:`value` up to date."""
        level, bias = self._levels(self._raw(part)), self._bias(part)
        if bias is None:
            level.sub_(self._zero[part])
        level.mul_(self._factors(part))
        if bias is not None:
            level.add_(bias.unsqueeze(-1))
        with torch.no_grad():
            self.value[part] = level.flatten(1)


def _scales_by_row(tensor: QuantizedTensor) -> torch.Tensor:
    """What a weight's codes are multiplied by, float32 ``[rows, groups]``, in groups of one size."""
    scheme, (rows, columns) = tensor.scheme, tensor.shape
    if scheme.rows == 1:
        return tensor.factors
    size = math.gcd(columns, scheme.columns_per_group(columns))
    wide = tensor.factors.repeat_interleave(scheme.columns_per_group(columns) // size, 1)[:, : columns // size]
    return wide.repeat_interleave(scheme.rows or rows, 0)[:rows]


def _loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error over squared target per token, summed: tokens count alike however large their states are."""
    difference = (output.float() - target.float()).square().sum(-1)
    return (difference / target.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)).sum()


def _relative_error(learned: Sequence[_Learned], data: BlockData) -> float:
    """Mean over all tokens of the block's relative squared error with the weights as they stand."""
    with torch.no_grad():
        weights = {weight.parameter: weight.value for weight in learned}
        every = range(len(data.tokens))
        losses = (
            float(_loss(call.output(hidden, weights), output))
            for (hidden, call), output in zip(data.entries(every), data.outputs(every), strict=True)
        )
        return sum(losses) / sum(data.tokens)


class _ReachedError(Exception):
    """Ends a pass through a block once the inputs that it was for are known."""


def _arrivals(
    modules: Sequence[str], entries: Iterable[tuple[torch.Tensor, BlockCall]], weights: Mapping[str, torch.Tensor]
) -> Iterator[Arrival]:
    """What batches bring to a linear, with ``weights`` in the place of the block's own.

    ``modules`` are the linear and, if it is wanted, the one before it whose input its output is added to.
    """
    for hidden, call in entries:
        found: dict[str, torch.Tensor] = {}

        def note(name: str, inputs: torch.Tensor, found: dict[str, torch.Tensor] = found) -> None:
            found[name] = inputs.flatten(0, -2)
            if name == modules[0]:
                raise _ReachedError

        with torch.no_grad(), suppress(_ReachedError), record_inputs(call.block, modules, note):
            call.output(hidden, weights)
        yield Arrival(*(found[name] for name in modules))
