"""Repairing an artifact that missed the gate: more bits where they tell most, measured again, within a size limit."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch

from llmconvert.engine.sites import Site
from llmconvert.engine.skeleton import Skeleton
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.methods.base import load_quantizer
from llmconvert.quantize.mixed_precision.units import Storage, fused_units
from llmconvert.quantize.plan import Override, plan_quantization
from llmconvert.quantize.requantize import Assignment, trace
from llmconvert.quantize.scheme import Scheme
from llmconvert.recipes.forecast import require_repairable
from llmconvert.recipes.schema.measuring import RepairSettings
from llmconvert.recipes.schema.recipe import QuantizeSettings
from llmconvert.recipes.stages.budget import layer_overrides
from llmconvert.recipes.stages.measurements import Measured
from llmconvert.recipes.stages.quantization import change_schemes
from llmconvert.recipes.stages.repair_report import repair_check
from llmconvert.recipes.stages.run import RunStages
from llmconvert.recipes.stages.stage import Finished, Place, Stage, Work
from llmconvert.recipes.stages.windows import CALIBRATION
from llmconvert.report.report import Check, ModelInfo, Report
from llmconvert.report.section import Value
from llmconvert.report.steps import QuantizeReport
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.validate.render.display import format_bytes
from llmconvert.validate.repair import (
    Unit,
    Upgrade,
    choose_upgrades,
    needed_share,
    sensitivities,
    unit_error,
)

__all__ = ["Perform", "repair", "repair_stage"]

# A tensor's entry in a file's header may grow by as much.
_HEADER_NBYTES = 32
_NO_MODEL = ModelInfo(name="", source="")
D = TypeVar("D", bound=Value)


class Perform(Protocol):
    """Runs a stage in the run's work directory, or takes it over."""

    def __call__(self, stage: Stage[D]) -> Finished[D]: ...


def repair(
    work: Work, ways: RunStages, settings: RepairSettings, measured: Finished[Measured], perform: Perform
) -> tuple[str, Finished[Measured], Sequence[Check]]:
    """Give layers more bits or smaller groups until the artifact passes, or nothing more can be done.

    Args:
        ways: the stages that made the artifact.
        settings: how far to go.
        measured: the artifact's checks.
        perform: runs the stages of the repair.

    Returns:
        The stage of the last artifact, its checks, and a check on the repair itself; none if there was nothing to
        repair.
    """
    recipe = work.recipe
    model = ways.model
    if recipe.quantize is None or recipe.validation is None or _report(measured).verdict:
        return model, measured, ()
    with work.open(ways.dense) as source:
        state = _State.begin(source, recipe.quantize, work.finished[model].details, work.context.device)
        limit = settings.max_bytes or recipe.validation.max_bytes or source.nbytes
    limit = min(limit, recipe.validation.max_bytes or limit)
    state.learn(work.finished[model].details)
    state.weigh(_report(measured))
    rounds: list[Sequence[Upgrade]] = []
    trail = [_report(measured)]
    reason = ""
    while not reason and not trail[-1].verdict:
        upgrades, reason = _next_round(state, trail[-1], limit, settings.rounds - len(rounds))
        if reason:
            break
        changes = {name: upgrade.after for upgrade in upgrades for name in upgrade.linears}
        number = len(rounds) + 1
        made = perform(repair_stage(recipe.quantize, ways.dense, model, state.assignment, changes, number))
        model = made.name
        again = ways.measuring(model, f"validate-{number}")
        assert again is not None
        measured = perform(again)
        state = replace(state, assignment={**state.assignment, **changes})
        state.learn(made.details)
        rounds.append(upgrades)
        trail.append(_report(measured))
    return model, measured, (repair_check(rounds, trail, reason, limit),)


def repair_stage(
    settings: QuantizeSettings, dense: str, last: str, before: Assignment, changes: Assignment, number: int
) -> Stage[QuantizeReport]:
    """Write the artifact of the stage ``last`` anew with other schemes for some linears, from the weights of
    ``dense``."""

    def build(work: Work, place: Place) -> QuantizeReport:
        with work.open(dense) as source:
            return change_schemes(
                work.finished[last].model,
                source,
                place,
                settings,
                before=before,
                changes=changes,
                windows=work.windows(CALIBRATION),
                context=work.context_of(last),
            )

    wanted = {linear: str(scheme) for linear, scheme in changes.items()}
    return Stage(
        f"repair-{number}",
        {"model": last},
        QuantizeReport.model_validate,
        build,
        lambda work: {"changes": wanted},
        resumable=True,
    )


def _next_round(state: _State, report: Report, limit: int, left: int) -> tuple[list[Upgrade], str]:
    """What to change next, or why nothing is."""
    failed = report.failed
    share = needed_share(failed)
    if share is None:
        return [], f"more bits don't mend {', '.join(check.name for check in failed)}"
    if left == 0:
        return [], "the rounds allowed did not suffice"
    size = report.check("size_bytes")
    assert size is not None and size.value is not None
    budget = limit - int(size.value) - _HEADER_NBYTES * state.tensors
    upgrades = choose_upgrades(state.units(report), share, budget, nbytes=state.storage.nbytes, accepts=state.accepts)
    if not upgrades:
        taken = format_bytes(size.value)
        return [], f"no better scheme fits into {format_bytes(limit)}, of which {taken} are taken"
    changes = {name: upgrade.after for upgrade in upgrades for name in upgrade.linears}
    if not any({**state.assignment, **changes}.values()):
        return [], "only the original would pass"
    return upgrades, ""


@dataclass(frozen=True)
class _State:
    """What the artifact is stored in now, and what is known about its linears: their errors, and what these cost."""

    storage: Storage
    assignment: Mapping[str, Scheme | None]
    sites: Mapping[str, Site]
    fused: tuple[tuple[str, ...], ...]
    tensors: int
    errors: dict[str, float] = field(default_factory=dict)
    costs: list[float] = field(default_factory=list)

    @classmethod
    def begin(
        cls, source: Checkpoint, settings: QuantizeSettings, made: QuantizeReport, device: torch.device
    ) -> _State:
        skeleton, blocks = trace(source, device)
        require_repairable(skeleton.sites.values(), settings.runtime)
        layout = load_format(settings.format)
        assert isinstance(settings.scheme, Scheme)  # recipes with another kind are refused
        quantizer, overrides = load_quantizer(settings.method, settings.options), layer_overrides(settings)
        if settings.budget is not None:
            overrides = _as_made(skeleton, made)
        plan = plan_quantization(skeleton, blocks, settings.scheme, overrides, quantizer, layout)
        return cls(
            Storage(quantizer, layout, skeleton.dtype),
            {name: plan.schemes.get(name) for name in plan.sites},
            plan.sites,
            tuple(unit.linears for unit in fused_units(skeleton, blocks)),
            len(plan.specs),
        )

    def learn(self, made: QuantizeReport) -> None:
        """Take note of the output errors that a stage reports."""
        names = {site.stored: site.name for site in self.sites.values()}
        for linear in made.linears:
            if linear.error is not None and linear.name in names:
                self.errors[names[linear.name]] = linear.error

    def weigh(self, report: Report) -> None:
        """Take note of what errors cost, from the report on the artifact before any repair."""
        self.costs.extend(sensitivities(report, self.fused, self._known_errors(report)))

    def units(self, report: Report) -> list[Unit]:
        """The units as they are stored now, ``report`` being the last."""
        errors = self._known_errors(report)
        return [
            Unit(
                unit,
                tuple(self.sites[name].shape for name in unit),
                self.assignment[unit[0]],
                cost * unit_error(unit, errors),
                fixed=self.sites[unit[0]].kind == "expert",
            )
            for unit, cost in zip(self.fused, self.costs, strict=True)
        ]

    def _known_errors(self, report: Report) -> Mapping[str, float]:
        """Squared relative errors of the linears: of their outputs, or else of their weights."""
        if self.errors:
            return self.errors
        inventory = report.check("inventory")
        tensors = inventory.detail.get("tensors", ()) if inventory is not None else ()
        by_weight = {record["name"]: (record["error"] or 0.0) ** 2 for record in tensors}
        return {name: by_weight.get(site.tensor, 0.0) for name, site in self.sites.items()}

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> bool:
        """Whether a linear of that shape can have the scheme beside what the others have."""
        others = {str(other): other for other in self.assignment.values() if other is not None}
        return self.storage.accepts(scheme, shape, tuple(others.values()))


def _as_made(skeleton: Skeleton, made: QuantizeReport) -> list[Override]:
    """What a budget has chosen, from what the artifact's stage reports of its linears."""
    schemes = {linear.name: Scheme.parse(linear.scheme) for linear in made.linears}
    return [Override(glob.escape(site.name), schemes.get(site.stored)) for site in skeleton.sites.values()]


def _report(measured: Finished[Measured]) -> Report:
    return Report(model=_NO_MODEL, checks=measured.details.checks)
