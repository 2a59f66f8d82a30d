"""Quantized weights in training as a file stores them: codes and scales, rounded on the way.

What is learned is a factor on every scale, a shift of what a group's values are added to where there is such, and,
where codes may move, the place of every weight between codes. Forward passes see what a runtime would: the nearest
code times the scale in the number that it is stored in. Gradients pass all roundings straight through (Bengio et al.
2013, arXiv 1308.3432), as in EfficientQAT (Chen et al. 2024, arXiv 2407.11062).

Of GGML's super-blocks the two float16 are learned, factors of all scales and of all minima in them. The small integers
that these are multiplied by stay, as codes do: 2 % (of 63) to all of itself lies between one and the next, and what is
right for a super-block is then found by one number instead of by many roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from llmconvert.memory import row_slices
from llmconvert.quantize.distil.trained import begin_steps, step_by
from llmconvert.quantize.tensor import QuantizedTensor, SuperBlockScales
from llmconvert.training.adam import adam_step, corrections_of

__all__ = ["LearnedParts", "LearnedWeight"]

# A step takes slices of about this many weights, whose float32 copies stay in the cache.
_WEIGHTS_AT_ONCE = 1 << 17
# How far a code may move. Weights start in the middle of their code but for a share of the way to what they were
# before: at the code's edge, where that is often, the first step moved so many that the model was lost.
_REACH, _LEAN, _LEAST, _EDGE = 1, 0.5, 0.25, 0.49


class LearnedWeight:
    """A quantized weight, or rows of one.

    Args:
        start: as it was quantized.
        value: where its dequantized values go, ``[rows, columns]``.
        dtype: that a runtime dequantizes it to.
        scale_dtype: in which its scales are chosen.
        own: the weight before it was quantized, shaped and ordered as ``value``; None if codes don't move.
        order: the rows of ``value`` that those of ``start`` are; all of them, as they come, by default.
        transposed: whether ``value`` is ``[columns, rows]``.
    """

    def __init__(
        self,
        start: QuantizedTensor,
        value: nn.Parameter,
        dtype: torch.dtype,
        scale_dtype: torch.dtype,
        own: torch.Tensor | None,
        order: torch.Tensor | None = None,
        *,
        transposed: bool = False,
    ) -> None:
        self.start, self.value = start, value
        self._dtype, self._scale_dtype = dtype, scale_dtype
        self._own = own
        self._order, self._transposed = order, transposed
        rows, groups = start.scale.shape
        self._shape = (rows, groups, start.codes.shape[1] // groups)
        self._codes = start.codes.view(self._shape)
        self._nested = start.nested if isinstance(start.nested, SuperBlockScales) else None
        # What is learned: scales ``[rows, scales]``, each of one group or of those of a super-block.
        self._scale = (start.scale if self._nested is None else self._nested.scale).float()
        self._divisor = 1.0 if start.divisor is None else float(start.divisor)
        # What one level is worth at the start.
        self._unit = start.factors.unsqueeze(-1)
        self._offset = None if start.offset is None else start.offset.float().unsqueeze(-1)
        self._zero = None if start.zero is None else start.zero.float().unsqueeze(-1)
        self._learned = ("factor",) if self._offset is None else ("factor", "shift")

    def begin(self) -> dict[str, torch.Tensor]:
        state = begin_steps(self._learned, self._scale.shape, self._scale.device)
        if self._own is not None:
            place = torch.empty(self._shape, device=self._scale.device)
            own = self._grouped(self._own)
            for part in self._slices():
                code = self._codes[part].float()
                exact = own[self._rows(part)].float()
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
        """The gradients of what is learned of the scales, ``[rows, scales]``, by that of :attr:`value`."""
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
        gradient = self._grouped(self.value.grad)
        found = {name: torch.empty(self._shape[:2], device=self._scale.device) for name in self._learned}
        for part in self._slices():
            towards = gradient[self._rows(part)].float()
            found["factor"][part] = towards.mul(self._levels(state, part)).sum(-1)
            if "shift" in found:
                found["shift"][part] = towards.sum(-1)
            then(part, towards)
        units = {"factor": self._unit, "shift": self._shift_unit}
        scales = self._scale.shape[1]
        return {
            name: slope.mul_(units[name].squeeze(-1)).unflatten(1, (scales, -1)).sum(-1)
            for name, slope in found.items()
        }

    def write(self, state: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            value = self._grouped(self.value)
            for part in self._slices():
                found = self._levels(state, part).mul_(self._current(state, part))
                if self._offset is not None:
                    found += self._added(state, part)
                value[self._rows(part)] = found.to(self._dtype).to(value.dtype)

    def stored(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {"scale": self._stored_scale(state, slice(None))}
        if self._offset is not None:
            found["offset"] = self._stored_offset(state, slice(None))
        if "place" in state:  # others stay the start's
            found["codes"] = codes = torch.empty_like(self.start.codes)
            for part in self._slices():
                codes.view(self._shape)[part] = self._moved(state, part).to(codes.dtype)
        return found

    def moved(self, stored: Mapping[str, torch.Tensor]) -> int:
        codes = stored.get("codes")
        return 0 if codes is None else int((codes != self.start.codes.to(codes.device)).sum())

    def tensor(self, stored: Mapping[str, torch.Tensor]) -> QuantizedTensor:
        """The canonical tensor of what :meth:`stored` gave."""
        scale, offset = stored["scale"], stored.get("offset")
        codes = stored.get("codes", self.start.codes.to(scale.device))
        if self._nested is None:
            return replace(self.start, codes=codes, scale=scale, offset=offset)
        minima = self._nested.sub_minima
        nested = replace(
            self._nested,
            scale=scale,
            subs=self._nested.subs.to(scale.device),
            minimum=offset,
            sub_minima=None if minima is None else minima.to(scale.device),
        )
        return replace(self.start, codes=codes, scale=nested.steps, offset=nested.offsets, nested=nested)

    def _slices(self) -> Iterator[slice]:
        return row_slices(self._shape, _WEIGHTS_AT_ONCE)

    def _grouped(self, values: torch.Tensor) -> torch.Tensor:
        """A view ``[rows, groups, group size]`` of what is shaped as the value."""
        found: torch.Tensor = (values.T if self._transposed else values).unflatten(1, self._shape[1:])
        return found

    def _rows(self, part: slice) -> slice | torch.Tensor:
        """Where the value has rows."""
        return part if self._order is None else self._order[part]

    def _moved(self, state: Mapping[str, torch.Tensor], part: slice) -> torch.Tensor:
        return state["place"][part].round().clamp_(*self.start.scheme.number.limits)

    def _levels(self, state: Mapping[str, torch.Tensor], part: slice) -> torch.Tensor:
        """What scales are multiplied by, float32 ``[rows, groups, group size]``."""
        if "place" not in state:
            found = self.start.scheme.number.values(self._codes[part]).clone()
        else:
            found = self._moved(state, part)
        return found if self._zero is None else found.sub_(self._zero[part])

    @property
    def _shift_unit(self) -> torch.Tensor:
        """What a shift of one adds, ``[rows, groups, 1]``: a scale; of super-blocks, whose minima are products, once
        more what is added."""
        return self._unit if self._nested is None or self._offset is None else self._offset

    def _stored_scale(self, state: Mapping[str, torch.Tensor], part: slice) -> torch.Tensor:
        """Scales ``[rows, scales]`` as they will be stored."""
        scale = self._scale[part] * (1 + state["factor"][part])
        return self.start.scheme.number.round_scale(scale, self._scale_dtype)

    def _stored_offset(self, state: Mapping[str, torch.Tensor], part: slice) -> torch.Tensor:
        """What is added to values, or of super-blocks the minima's scale, ``[rows, scales]``, as it will be stored."""
        assert self._offset is not None
        if self._nested is not None and self._nested.minimum is not None:
            offset = self._nested.minimum[part].float() * (1 + state["shift"][part])
        else:
            offset = self._offset[part].squeeze(-1) + self._unit[part].squeeze(-1) * state["shift"][part]
        return offset.to(self._scale_dtype)

    def _current(self, state: Mapping[str, torch.Tensor], part: slice) -> torch.Tensor:
        """What levels are multiplied by, ``[rows, groups, 1]``."""
        scale = self._stored_scale(state, part).float()
        return self._spread(scale, None if self._nested is None else self._nested.subs, part) / self._divisor

    def _added(self, state: Mapping[str, torch.Tensor], part: slice) -> torch.Tensor:
        """What is added then, likewise."""
        offset = self._stored_offset(state, part).float()
        return self._spread(offset if self._nested is None else -offset, self._sub_minima, part)

    @property
    def _sub_minima(self) -> torch.Tensor | None:
        return None if self._nested is None else self._nested.sub_minima

    def _spread(self, scale: torch.Tensor, subs: torch.Tensor | None, part: slice) -> torch.Tensor:
        """Scales of groups from those of super-blocks, in the order of operations that decides the last bit."""
        if subs is not None:
            scale = scale.repeat_interleave(self._shape[1] // scale.shape[1], 1) * subs[part].float()
        return scale.unsqueeze(-1)


class LearnedParts:
    """A tensor of the model that a file has in several, each of which is trained by itself.

    Args:
        value: what the model multiplies by.
        parts: whose values go into it.
    """

    def __init__(self, value: nn.Parameter, parts: Sequence[LearnedWeight]) -> None:
        self.value, self.parts = value, tuple(parts)

    def begin(self) -> dict[str, torch.Tensor]:
        return self._joined(lambda _, part: part.begin())

    def move(self, state: Mapping[str, torch.Tensor], rate: float, code_rate: float, step: int) -> None:
        for number, part in enumerate(self.parts):
            part.move(self.of(state, number), rate, code_rate, step)

    def slopes(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self._joined(lambda number, part: part.slopes(self.of(state, number)))

    def write(self, state: Mapping[str, torch.Tensor]) -> None:
        for number, part in enumerate(self.parts):
            part.write(self.of(state, number))

    def stored(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self._joined(lambda number, part: part.stored(self.of(state, number)))

    def moved(self, stored: Mapping[str, torch.Tensor]) -> int:
        return sum(part.moved(self.of(stored, number)) for number, part in enumerate(self.parts))

    def of(self, values: Mapping[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
        """What of a state, or of what is stored, is one part's."""
        prefix = f"{number}:"
        return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}

    def _joined(self, values: Callable[[int, LearnedWeight], Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {
            f"{number}:{name}": value
            for number, part in enumerate(self.parts)
            for name, value in values(number, part).items()
        }
