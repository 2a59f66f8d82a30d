"""Mixed-precision job: sensitivity measured, schemes chosen for a mean number of bits per weight, and recorded."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from llmconvert.context import Context
from llmconvert.engine.discovery import discover
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import CalibrationError, SchemeError
from llmconvert.needs import Needs
from llmconvert.quantize.formats.base import Format, load_format
from llmconvert.quantize.methods.base import load_quantizer
from llmconvert.quantize.mixed_precision.budget import Budget, Choice, Options, allocate, candidates
from llmconvert.quantize.mixed_precision.sensitivity import (
    Subject,
    enough_windows,
    measure_sensitivity,
    sensitivity_needs,
)
from llmconvert.quantize.mixed_precision.units import FusedUnit, Storage, fused_units
from llmconvert.quantize.plan import Override, QuantizeRequest, plan_quantization
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.dense import require_dense
from llmconvert.version import __version__

__all__ = ["Allocation", "ChoicePlan", "plan_choice"]


@dataclass(frozen=True, slots=True)
class Allocation:
    """What was chosen.

    Attributes:
        choices: unit after unit, in model order.
        overrides: to quantize with: those that were given, then what was chosen, by name.
        bits_per_weight: what all quantized weights come to, given ones included.
        divergence: what all of them are expected to bring, in nats per token; given ones are not counted.
        uniform: for comparison, the scheme that all units could have for no more bytes and with the least expected
            divergence, and this divergence; None if there is none.
        tokens: of calibration text that were used.
    """

    choices: tuple[Choice, ...]
    overrides: tuple[Override, ...]
    bits_per_weight: float
    divergence: float
    uniform: tuple[Scheme, float] | None
    tokens: int

    @property
    def scheme(self) -> Scheme:
        """The one that most weights have."""
        weights: dict[Scheme, int] = {}
        for choice in self.choices:
            weights[choice.scheme] = weights.get(choice.scheme, 0) + choice.unit.weights
        return max(weights, key=lambda scheme: weights[scheme])


@dataclass(frozen=True, slots=True)
class ChoicePlan:
    """A choice of schemes that was settled from headers; :func:`plan_choice` makes one.

    Attributes:
        budget: what is asked for.
        subject: what is measured.
        needs: what running it takes.
    """

    budget: Budget
    subject: Subject
    needs: Needs
    _request: QuantizeRequest
    _storage: Storage
    _fixed: tuple[tuple[int, int], ...]
    _outer: tuple[Override, ...]
    _source: Checkpoint
    _work: Path
    _context: Context

    def run(self) -> Allocation:
        """Measure how sensitive the model is where, and choose.

        Raises:
            CalibrationError: the text is unusable.
            CapacityError: memory or disk does not suffice.
        """
        request, subject, context, storage = self._request, self.subject, self._context, self._storage
        key = _key(self._source, subject, {"identity": context.identity, "format": request.format})
        divergences = measure_sensitivity(
            subject, self._work, key, memory_budget=context.memory, progress=context.progress
        )
        every = [
            Options(
                unit, {option: (_nbytes(unit, option, storage), found) for option, found in divergences[unit].items()}
            )
            for unit in subject.schemes
        ]
        choices = allocate(every, self.budget, self._fixed)
        weights = sum(unit.weights for unit in subject.schemes) + sum(count for count, _ in self._fixed)
        nbytes = sum(choice.nbytes for choice in choices) + sum(size for _, size in self._fixed)
        return Allocation(
            choices,
            tuple(_chosen((*request.overrides, *self._outer), {one.unit: one.scheme for one in choices})),
            8 * nbytes / weights,
            sum(choice.divergence for choice in choices),
            _uniform(every, sum(choice.nbytes for choice in choices)),
            sum(window.shape[1] for window in subject.windows),
        )


def plan_choice(
    source: Checkpoint,
    work: Path,
    budget: Budget,
    request: QuantizeRequest,
    *,
    windows: Sequence[torch.Tensor] = (),
    context: Context | None = None,
) -> ChoicePlan:
    """Settle measuring sensitivity and choosing schemes by it; nothing but headers is read, nothing written.

    Args:
        source: dense weights.
        work: a directory of this job's own. What an interrupted run left there is continued, what a finished one
            found is taken over; to be removed when the artifact is there.
        budget: what is asked for.
        request: its scheme gives what is not chosen: symmetry, and the scheme of the embedding and the head where the
            format has them quantized; its overrides name linears that are not up for choice: quantized ones count into
            the mean, dense ones don't.
        windows, context: as for :func:`llmconvert.quantize.job.plan_quantize`.

    Raises:
        SchemeError: the schemes to choose from don't fit the model, or the budget is too small for them.
        CalibrationError: there is no text.
        CapacityError: memory does not suffice.
    """
    context = context or Context()
    require_dense(source, "the source")
    scheme, overrides = request.scheme, request.overrides
    if not isinstance(scheme, Scheme) or not scheme.adjustable:
        raise SchemeError(f"scheme {scheme}: a budget chooses among integer weights with 16-bit activations (w4a16)")
    if not windows:
        raise CalibrationError("a budget measures sensitivity on calibration text and was given none")
    quantizer, layout = load_quantizer(request.method, request.options), load_format(request.format)
    skeleton = Skeleton(source, context.device, fast_products=True)
    blocks = discover(skeleton, max(window.shape[1] for window in windows))
    storage = Storage(quantizer, layout, skeleton.dtype)
    units, given = _split(fused_units(skeleton, blocks), overrides)
    if any(unit.experts for unit in units):
        raise SchemeError(
            f"architecture {skeleton.architecture.model_type!r}: runtimes read one scheme for all experts, so "
            "a budget chooses for what is no expert; say what experts have with an override, for example "
            "match: '*.experts.*', scheme: w4a16-g64, which counts into the mean"
        )
    if not units:
        raise SchemeError("the overrides leave no linear for the budget to choose for")
    schemes = {unit: candidates(unit, scheme, budget, storage) for unit in units}
    # Everything that can be refused is refused now: the smallest schemes stand for those to come.
    smallest = {unit: min(found, key=lambda option: _nbytes(unit, option, storage)) for unit, found in schemes.items()}
    first = next(iter(smallest.values()))
    outside = _outside(skeleton, layout, scheme, overrides)
    plan = plan_quantization(skeleton, blocks, first, _chosen((*overrides, *outside), smallest), quantizer, layout)
    fixed = tuple((unit.weights, _nbytes(unit, fixed_scheme, storage)) for unit, fixed_scheme in given.items())
    fixed += tuple((site.weights, storage.nbytes(site.shape, plan.schemes[site.name])) for site in plan.outer)
    least = [Options(unit, {option: (_nbytes(unit, option, storage), 0.0)}) for unit, option in smallest.items()]
    allocate(least, budget, fixed)
    taken = enough_windows(windows, units)
    subject = Subject(skeleton, blocks, schemes, quantizer, layout.scale_dtype(first, skeleton.dtype), taken)
    needs = sensitivity_needs(subject, context.memory)
    return ChoicePlan(budget, subject, needs, request, storage, fixed, outside, source, work, context)


def _outside(skeleton: Skeleton, layout: Format, scheme: Scheme, overrides: Sequence[Override]) -> tuple[Override, ...]:
    """The scheme of what lies outside the blocks and no override names, where the format has it quantized."""
    names = skeleton.outer if layout.outer else ()
    free = (name for name in names if not any(fnmatchcase(name, override.match) for override in overrides))
    return tuple(Override(glob.escape(name), scheme) for name in free)


def _split(
    units: Sequence[FusedUnit], overrides: Sequence[Override]
) -> tuple[list[FusedUnit], dict[FusedUnit, Scheme]]:
    """The units that no override names, and those that one gives a scheme."""
    free: list[FusedUnit] = []
    given: dict[FusedUnit, Scheme] = {}
    for unit in units:
        named = [next((o for o in overrides if fnmatchcase(name, o.match)), None) for name in unit.linears]
        if not all(named):
            free.append(unit)  # where only some are named, the plan refuses it
        elif named[0] is not None and named[0].scheme is not None:
            given[unit] = named[0].scheme
    return free, given


def _chosen(overrides: Sequence[Override], schemes: Mapping[FusedUnit, Scheme]) -> list[Override]:
    """What was given, what was chosen, and nothing for the rest."""
    own = [Override(glob.escape(name), scheme) for unit, scheme in schemes.items() for name in unit.linears]
    return [*overrides, *own, Override("*", None)]


def _nbytes(unit: FusedUnit, scheme: Scheme, storage: Storage) -> int:
    return sum(storage.nbytes(shape, scheme) for shape in unit.shapes)


def _uniform(options: Sequence[Options], nbytes: int) -> tuple[Scheme, float] | None:
    common = set.intersection(*(set(option.costs) for option in options))
    found: list[tuple[float, str, Scheme]] = []
    for scheme in common:
        size = sum(option.costs[scheme][0] for option in options)
        # Slightly larger is level: a budget is filled up to less than one step.
        if size <= 1.002 * nbytes:
            found.append((sum(option.costs[scheme][1] for option in options), str(scheme), scheme))
    return (min(found)[2], min(found)[0]) if found else None


def _key(source: Checkpoint, subject: Subject, settings: Mapping[str, Any]) -> str:
    """Hash of all that decides the divergences, besides the contents of the source's weights."""
    digest = hashlib.sha256()
    values = {
        "version": __version__,
        "torch": torch.__version__,
        "config": source.config,
        "method": repr(subject.quantizer),
        "device": subject.skeleton.device.type,
        "schemes": [[*unit.linears, *map(str, schemes)] for unit, schemes in subject.schemes.items()],
        **settings,
    }
    digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    for window in subject.windows:
        digest.update(window.cpu().numpy().tobytes())
    return digest.hexdigest()
