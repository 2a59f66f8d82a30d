"""Weights in training as a file stores them: codes and scales of quantized ones, values of others, rounded on the way.

What is learned is a factor on every scale, a shift of what a group's values are added to where there is such, and,
where codes may move, the place of every weight between codes. Forward passes see what a runtime would: the nearest
code times the scale in the number that it is stored in. Gradients pass all roundings straight through (Bengio et al.
2013, arXiv 1308.3432), as in EfficientQAT (Chen et al. 2024, arXiv 2407.11062).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from llmconvert.memory import row_slices
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.training.adam import adam_step, corrections_of

__all__ = ["LearnedValue", "LearnedWeight", "Trained", "begin_steps", "step_by"]

# A step takes slices of about this many weights, whose float32 copies stay in the cache.
_WEIGHTS_AT_ONCE = 1 << 17
# How far a code may move. Weights start in the middle of their code but for a share of the way to what they were
# before: at the code's edge, where that is often, the first step moved so many that the model was lost.
_REACH, _LEAN, _LEAST, _EDGE = 1, 0.5, 0.25, 0.49


class Trained(Protocol):
    """Something that is trained.

    Attributes:
        value: what the model multiplies by, which has the gradient.
    """

    value: nn.Parameter

    def begin(self) -> dict[str, torch.Tensor]:
        """What training remembers of it, at the start."""

    def move(self, state: Mapping[str, torch.Tensor], rate: float, code_rate: float, step: int) -> None:
        """One step by the gradient of :attr:`value`."""

    def write(self, state: Mapping[str, torch.Tensor]) -> None:
        """Bring :attr:`value` up to date."""

    def stored(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What would be stored of it now."""


class LearnedWeight:
    """A quantized weight.

    Args:
        start: as it was quantized.
        value: where its dequantized values go, ``[rows, columns]``.
        dtype: that a runtime dequantizes it to.
        scale_dtype: in which its scales are chosen.
        own: the weight before it was quantized, in the same coordinates; None if codes don't move.
    """

    def __init__(
        self,
        start: QuantizedTensor,
        value: nn.Parameter,
        dtype: torch.dtype,
        scale_dtype: torch.dtype,
        own: torch.Tensor | None,
    ) -> None:
        self.start, self.value = start, value
        self._dtype, self._scale_dtype = dtype, scale_dtype
        self._own = own
        rows, groups = start.scale.shape
        self._shape = (rows, groups, start.codes.shape[1] // groups)
        self._codes = start.codes.view(self._shape)
        self._scale = start.scale.float().unsqueeze(-1)
        self._divisor = 1.0 if start.divisor is None else float(start.divisor)
        # What one level is worth at the start.
        self._unit = self._scale / self._divisor
        self._offset = None if start.offset is None else start.offset.float().unsqueeze(-1)
        self._zero = None if start.zero is None else start.zero.float().unsqueeze(-1)
        self._learned = ("factor",) if self._offset is None else ("factor", "shift")

    def begin(self) -> dict[str, torch.Tensor]:
        scale = self._scale.squeeze(-1)
        state = begin_steps(self._learned, scale.shape, scale.device)
        if self._own is not None:
            place = torch.empty(self._shape, device=scale.device)
            own = self._own.view(self._shape)
            for part in self._slices():
                code = self._codes[part].float()
                exact = own[part].float()
                if self._offset is not None:
                    exact = exact - self._offset[part]
                exact = exact / self._unit[part]
                if self._zero is not None:
                    exact += self._zero[part]
                place[part] = exact.sub_(code).nan_to_num_(0.0).mul_(_LEAN).clamp_(-_LEAST, _LEAST).add_(code)
            state["place"] = place
            state |= {name: torch.zeros_like(place, dtype=torch.bfloat16) for name in ("mean", "square")}
            self._own = None
        return state

    def move(self, state: Mapping[str, torch.Tensor], rate: float, code_rate: float, step: int) -> None:
        slopes = self._move_places(state, code_rate, step) if "place" in state else self.slopes(state)
        step_by(slopes, state, rate, step)

    def slopes(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The gradients of what is learned of the scales, ``[rows, groups]``, by that of :attr:`value`."""
        return self._slopes(state, lambda part, towards: None)

    def _move_places(self, state: Mapping[str, torch.Tensor], rate: float, step: int) -> dict[str, torch.Tensor]:
        """One step of the codes' places; gives the slopes as they were before it."""
        corrections = corrections_of(step)
        low, high = self.start.scheme.number.limits

        def move(part: slice, towards: torch.Tensor) -> None:
            code = self._codes[part].float()
            towards *= self._current(state, part)
            change = adam_step(towards, state["mean"][part], state["square"][part], corrections)
            place = state["place"][part].sub_(change, alpha=rate)
            least, most = code.sub(_REACH).clamp_(min=low), code.add_(_REACH).clamp_(max=high)
            place.clamp_(least.sub_(_EDGE), most.add_(_EDGE))

        return self._slopes(state, move)

    def _slopes(
        self, state: Mapping[str, torch.Tensor], then: Callable[[slice, torch.Tensor], None]
    ) -> dict[str, torch.Tensor]:
        """See :meth:`slopes`; ``then`` gets every slice and its gradient in float32, to do with as it likes."""
        assert self.value.grad is not None
        gradient = self.value.grad.view(self._shape)
        found = {name: torch.empty_like(state["factor"]) for name in self._learned}
        for part in self._slices():
            towards = gradient[part].float()
            found["factor"][part] = towards.mul(self._levels(state, part)).sum(-1)
            if "shift" in found:
                found["shift"][part] = towards.sum(-1)
            then(part, towards)
        return {name: slope.mul_(self._unit.squeeze(-1)) for name, slope in found.items()}

    def write(self, state: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            value = self.value.view(self._shape)
            for part in self._slices():
                found = self._levels(state, part).mul_(self._current(state, part))
                if self._offset is not None:
                    found += self._stored_offset(state, part).float().unsqueeze(-1)
                value[part] = found.to(self._dtype)

    def stored(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        codes = self.start.codes
        if "place" in state:
            codes = torch.empty_like(codes)
            for part in self._slices():
                codes.view(self._shape)[part] = self._moved(state, part).to(codes.dtype)
        found = {"codes": codes, "scale": self._stored_scale(state, slice(None))}
        return found if self._offset is None else found | {"offset": self._stored_offset(state, slice(None))}

    def tensor(self, stored: Mapping[str, torch.Tensor]) -> QuantizedTensor:
        """The canonical tensor of what :meth:`stored` gave."""
        return replace(self.start, codes=stored["codes"], scale=stored["scale"], offset=stored.get("offset"))

    def _slices(self) -> Iterator[slice]:
        return row_slices(self._shape, _WEIGHTS_AT_ONCE)

    def _moved(self, state: Mapping[str, torch.Tensor], part: slice) -> torch.Tensor:
        return state["place"][part].round().clamp_(*self.start.scheme.number.limits)

    def _levels(self, state: Mapping[str, torch.Tensor], part: slice) -> torch.Tensor:
        """What scales are multiplied by, float32 ``[rows, groups, group size]``."""
        if "place" not in state:
            found = self.start.scheme.number.values(self._codes[part]).clone()
        else:
            found = self._moved(state, part)
        return found if self._zero is None else found.sub_(self._zero[part])

    def _stored_scale(self, state: Mapping[str, torch.Tensor], part: slice) -> torch.Tensor:
        """Scales ``[rows, groups]`` as they will be stored."""
        scale = self._scale[part].squeeze(-1) * (1 + state["factor"][part])
        return self.start.scheme.number.round_scale(scale, self._scale_dtype)

    def _stored_offset(self, state: Mapping[str, torch.Tensor], part: slice) -> torch.Tensor:
        """What is added to values ``[rows, groups]``, as it will be stored; its shift is counted in scales."""
        assert self._offset is not None
        offset = self._offset[part] + self._unit[part] * state["shift"][part].unsqueeze(-1)
        return offset.squeeze(-1).to(self._scale_dtype)

    def _current(self, state: Mapping[str, torch.Tensor], part: slice) -> torch.Tensor:
        return self._stored_scale(state, part).float().unsqueeze(-1) / self._divisor


def begin_steps(learned: Iterable[str], shape: torch.Size, device: torch.device) -> dict[str, torch.Tensor]:
    """What Adam remembers of shares that are learned, and these themselves, by name, at the start."""
    return {f"{name}{kind}": torch.zeros(shape, device=device) for name in learned for kind in ("", "_mean", "_square")}


def step_by(slopes: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], rate: float, step: int) -> None:
    """One step of what is learned, by its gradients."""
    corrections = corrections_of(step)
    for name, slope in slopes.items():
        state[name].sub_(adam_step(slope, state[f"{name}_mean"], state[f"{name}_square"], corrections), alpha=rate)


class LearnedValue:
    """A tensor of floats: the weight of a norm.

    Args:
        start: as it is stored.
        value: where what it has become goes, of the same shape.
    """

    def __init__(self, start: torch.Tensor, value: nn.Parameter) -> None:
        self.start, self.value = start, value
        size = start.float().abs()
        # Some norms multiply by one more than their weight, which may be near zero.
        self._size = size.clamp_min(0.1 * float(size.mean()) or 1.0)

    def begin(self) -> dict[str, torch.Tensor]:
        return begin_steps(("factor",), self._size.shape, self._size.device)

    def move(self, state: Mapping[str, torch.Tensor], rate: float, code_rate: float, step: int) -> None:
        assert self.value.grad is not None
        step_by({"factor": self.value.grad.float() * self._size}, state, rate, step)

    def write(self, state: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            self.value.copy_(self.stored(state)["value"])

    def stored(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"value": (self.start.float() + self._size * state["factor"]).to(self.start.dtype)}
