"""Mixed-precision job: sensitivity measured, schemes chosen for a mean number of bits per weight, and recorded."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from llmconvert.context import Context
from llmconvert.engine.discovery import discover
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import CalibrationError, SchemeError
from llmconvert.gguf.ggml.mix import FLOATS, MIXES, GgmlMix
from llmconvert.needs import Needs
from llmconvert.quantize.formats.base import FileFormat, Format, load_format
from llmconvert.quantize.job import plan_quantize
from llmconvert.quantize.methods.base import load_method, load_quantizer
from llmconvert.quantize.mixed_precision.budget import Budget, Choice, Options, allocate, candidates
from llmconvert.quantize.mixed_precision.sensitivity import (
    Subject,
    enough_windows,
    measure_sensitivity,
    sensitivity_needs,
)
from llmconvert.quantize.mixed_precision.units import FusedUnit, Storage, units_of
from llmconvert.quantize.plan import Override, QuantizeRequest
from llmconvert.quantize.scheme import Scheme, SchemeOrMix
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.dense import require_dense
from llmconvert.version import __version__

# A tensor's entry in a file's header, and what it is padded with, may grow by as much.
_HEADER_NBYTES = 32

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
    def scheme(self) -> SchemeOrMix:
        """The one that most weights have; of GGML's types the mix that is most of it."""
        weights: dict[Scheme, int] = {}
        for choice in self.choices:
            weights[choice.scheme] = weights.get(choice.scheme, 0) + choice.unit.weights
        most = max(weights, key=lambda scheme: weights[scheme])
        if most.block is None:
            return most
        return next(mix for mix in MIXES.values() if mix.base == most.block)


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
    _rest: int
    _source: Checkpoint
    _work: Path
    _context: Context

    @property
    def nbytes(self) -> tuple[int, int]:
        """The least and the most that the weight files can come to."""
        counted = sum(unit.weights for unit in self.subject.schemes) + sum(count for count, _ in self._fixed)
        given = self._rest + sum(size for _, size in self._fixed)
        sizes = [
            [_nbytes(unit, scheme, self._storage) for scheme in schemes]
            for unit, schemes in self.subject.schemes.items()
        ]
        least, most = given + sum(map(min, sizes)), given + sum(map(max, sizes))
        return least, min(most, self.budget.limit(counted, self._rest) + self._rest)

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
        choices = allocate(every, self.budget, self._fixed, self._rest)
        weights = sum(unit.weights for unit in subject.schemes) + sum(count for count, _ in self._fixed)
        nbytes = sum(choice.nbytes for choice in choices) + sum(size for _, size in self._fixed)
        return Allocation(
            choices,
            tuple(_chosen(request, self._outer, {one.unit: one.scheme for one in choices})),
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
    layout = load_format(request.format, request.runtime)
    mixed = isinstance(layout, FileFormat)
    adjustable = scheme.base not in FLOATS if isinstance(scheme, GgmlMix) else scheme.adjustable
    if mixed != isinstance(scheme, GgmlMix) or not adjustable:
        wanted = "GGUF's types (q4_k_m)" if mixed else "integer weights with 16-bit activations (w4a16)"
        raise SchemeError(f"scheme {scheme}: a budget chooses among {wanted}")
    if not windows:
        raise CalibrationError("a budget measures sensitivity on calibration text and was given none")
    quantizer = (load_method if mixed else load_quantizer)(request.method, request.options)
    skeleton = Skeleton(source, context.device, products="fast")
    blocks = discover(skeleton, max(window.shape[1] for window in windows))
    storage = Storage(quantizer, layout, skeleton.dtype)
    units, given = _split(units_of(skeleton, blocks, layout), overrides)
    if any(unit.experts for unit in units):
        raise SchemeError(
            f"architecture {skeleton.architecture.model_type!r}: runtimes read one scheme for all experts, so "
            "a budget chooses for what is no expert; say what experts have with an override, for example "
            "match: '*.experts.*', scheme: w4a16-g64, which counts into the mean"
        )
    if not units:
        raise SchemeError("the overrides leave no linear for the budget to choose for")
    schemes: dict[FusedUnit, tuple[Scheme, ...]] = {}
    for unit in units:
        try:
            schemes[unit] = candidates(unit, scheme, budget, storage)
        except SchemeError:
            if not mixed:
                raise  # a mix has a type for every tensor, floats if need be
    output = work.with_name(f"{work.name}.artifact")
    # Everything that can be refused is refused now: the smallest schemes stand for those to come.
    smallest = {unit: min(found, key=lambda option: _nbytes(unit, option, storage)) for unit, found in schemes.items()}
    first = next(iter(smallest.values()))
    outside = _outside(skeleton, layout, scheme, overrides)
    trial = replace(request, scheme=scheme if mixed else first, overrides=tuple(_chosen(request, outside, smallest)))
    plan = plan_quantize(source, output, trial, windows=windows, context=context)
    least_layout, settled = plan.container.layout, plan.decisions
    fixed = tuple((unit.weights, _nbytes(unit, fixed_scheme, storage)) for unit, fixed_scheme in given.items())
    fixed += tuple((site.weights, storage.nbytes(site.shape, settled.schemes[site.name])) for site in settled.outer)
    least = [Options(unit, {option: (_nbytes(unit, option, storage), 0.0)}) for unit, option in smallest.items()]
    chosen_nbytes = sum(nbytes for option in least for nbytes, _ in option.costs.values())
    # Headers grow with the names of types and with padding, by less than this for each tensor.
    rest = (
        least_layout.nbytes - chosen_nbytes - sum(size for _, size in fixed) + _HEADER_NBYTES * len(least_layout.specs)
    )
    allocate(least, budget, fixed, rest)
    taken = enough_windows(windows, units)
    subject = Subject(skeleton, blocks, schemes, quantizer, layout.scale_dtype(first, skeleton.dtype), taken)
    needs = sensitivity_needs(subject, context.memory)
    return ChoicePlan(budget, subject, needs, request, storage, fixed, outside, rest, source, work, context)


def _outside(
    skeleton: Skeleton, layout: Format, scheme: SchemeOrMix, overrides: Sequence[Override]
) -> tuple[Override, ...]:
    """The scheme of what lies outside the blocks and no override names, where the format has it quantized."""
    if layout.outer != "always" or isinstance(scheme, GgmlMix):
        return ()
    named = [override.match for override in overrides]
    free = (
        site
        for site in skeleton.outer.values()
        if not any(fnmatchcase(name, match) for match in named for name in site.called)
    )
    return tuple(Override(glob.escape(site.name), scheme) for site in free)


def _split(
    units: Sequence[FusedUnit], overrides: Sequence[Override]
) -> tuple[tuple[FusedUnit, ...], dict[FusedUnit, Scheme]]:
    """The units that no override names, and those that one gives a scheme."""
    free: list[FusedUnit] = []
    given: dict[FusedUnit, Scheme] = {}
    for unit in units:
        named = [next((o for o in overrides if fnmatchcase(name, o.match)), None) for name in unit.linears]
        if not all(named):
            free.append(unit)  # where only some are named, the plan refuses it
        elif named[0] is not None and named[0].scheme is not None:
            given[unit] = named[0].scheme
    return tuple(free), given


def _chosen(
    request: QuantizeRequest, outside: Sequence[Override], schemes: Mapping[FusedUnit, Scheme]
) -> list[Override]:
    """What was given, what was chosen, and nothing for the rest; a mix has types for it."""
    own = [Override(glob.escape(name), scheme) for unit, scheme in schemes.items() for name in unit.linears]
    rest = [] if isinstance(request.scheme, GgmlMix) else [Override("*", None)]
    return [*request.overrides, *outside, *own, *rest]


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
