"""Repairing an artifact that missed the gate: more bits where they tell most, measured again, within a size limit."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llmconvert.device import open_device
from llmconvert.engine.skeleton import Skeleton
from llmconvert.progress import Progress
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.methods.base import load_quantizer
from llmconvert.quantize.mixed_precision.units import Storage, fused_units
from llmconvert.quantize.plan import Override, plan_quantization
from llmconvert.quantize.requantize import Assignment, trace
from llmconvert.quantize.scheme import Scheme
from llmconvert.recipes.schema.recipe import QuantizeSettings, Recipe
from llmconvert.recipes.stages.repair_report import repair_check
from llmconvert.recipes.stages.steps import LAYERS_FILE, change_schemes, layer_overrides, recorded_layers
from llmconvert.report.report import Check, ModelInfo, Report
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.storage.stages import StageResult
from llmconvert.validate.render.display import format_bytes
from llmconvert.validate.repair import (
    Unit,
    Upgrade,
    choose_upgrades,
    needed_share,
    sensitivities,
    unit_error,
)

__all__ = ["RepairTools", "repair"]

# A tensor's entry in a file's header may grow by as much.
_HEADER_NBYTES = 32
_MODEL = "model"
_NO_MODEL = ModelInfo(name="", source="")


@dataclass(frozen=True, slots=True)
class RepairTools:
    """What a run lends to its repair.

    Attributes:
        windows: calibration token ids.
        stage: runs a stage, or takes it over: its name, its inputs, what builds it.
        measure: measures a stage's model in a stage of the name.
        progress: where long work is shown.
    """

    windows: Sequence[torch.Tensor]
    stage: Callable[[str, Mapping[str, Any], Callable[[Path], Mapping[str, Any]]], StageResult]
    measure: Callable[[str, StageResult], StageResult | None]
    progress: Progress


def repair(
    recipe: Recipe, original: Path, model: StageResult, measured: StageResult, tools: RepairTools
) -> tuple[StageResult, StageResult, Sequence[Check]]:
    """Give layers more bits or smaller groups until the artifact passes, or nothing more can be done.

    Args:
        recipe: its limits, and whether it wants a repair at all.
        original: directory of the dense model that was quantized.
        model, measured: the artifact, and its checks.

    Returns:
        The last artifact, its checks, and a check on the repair itself; none if there was nothing to repair.
    """
    settings, validation = recipe.quantize, recipe.validation
    if settings is None or validation is None or validation.repair is None or _checks(measured).verdict:
        return model, measured, ()
    with SafetensorsCheckpoint(original) as source:
        state = _State.begin(source, settings, model, open_device(recipe.device))
        limit = validation.repair.max_bytes or validation.max_bytes or source.nbytes
    limit = min(limit, validation.max_bytes or limit)
    state.learn(model)
    state.weigh(_checks(measured))
    rounds: list[Sequence[Upgrade]] = []
    trail = [_checks(measured)]
    reason = ""
    while not reason and not trail[-1].verdict:
        upgrades, reason = _next_round(state, trail[-1], limit, validation.repair.rounds - len(rounds))
        if reason:
            break
        changes = {name: upgrade.after for upgrade in upgrades for name in upgrade.linears}
        number = len(rounds) + 1
        model = _requantize(recipe, original, model, state.assignment, changes, f"repair-{number}", tools)
        again = tools.measure(f"validate-{number}", model)
        assert again is not None
        measured = again
        state = replace(state, assignment={**state.assignment, **changes})
        state.learn(model)
        rounds.append(upgrades)
        trail.append(_checks(measured))
    return model, measured, (repair_check(rounds, trail, reason, limit),)


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


def _requantize(
    recipe: Recipe,
    original: Path,
    last: StageResult,
    before: Assignment,
    changes: Assignment,
    name: str,
    tools: RepairTools,
) -> StageResult:
    settings = recipe.quantize
    assert settings is not None

    def build(path: Path) -> Mapping[str, Any]:
        if (path / _MODEL).exists():  # complete, and killed just then
            return recorded_layers(path / LAYERS_FILE)
        with SafetensorsCheckpoint(original) as source:
            return change_schemes(
                last.path / _MODEL,
                source,
                path / _MODEL,
                settings,
                before=before,
                changes=changes,
                record=path / LAYERS_FILE,
                windows=tools.windows,
                identity=last.key,
                device=open_device(recipe.device),
                memory=recipe.memory,
                progress=tools.progress,
            )

    wanted = {linear: str(scheme) for linear, scheme in changes.items()}
    return tools.stage(name, {"model": last.key, "changes": wanted}, build)


@dataclass(frozen=True)
class _State:
    """What the artifact is stored in now, and what is known about its linears: their errors, and what these cost."""

    storage: Storage
    assignment: Mapping[str, Scheme | None]
    stored: Mapping[str, str]
    shapes: Mapping[str, tuple[int, int]]
    fused: tuple[tuple[str, ...], ...]
    tensors: int
    errors: dict[str, float] = field(default_factory=dict)
    costs: list[float] = field(default_factory=list)

    @classmethod
    def begin(
        cls, source: SafetensorsCheckpoint, settings: QuantizeSettings, model: StageResult, device: torch.device
    ) -> _State:
        skeleton, blocks = trace(source, device)
        layout = load_format(settings.format)
        assert isinstance(settings.scheme, Scheme)  # recipes with another kind are refused
        quantizer, overrides = load_quantizer(settings.method, settings.options), layer_overrides(settings)
        if settings.budget is not None:
            overrides = _as_made(skeleton, model)
        plan = plan_quantization(skeleton, blocks, settings.scheme, overrides, quantizer, layout)
        shapes = {name: source.infos[f"{stored}.weight"].shape for name, stored in plan.stored.items()}
        return cls(
            Storage(quantizer, layout, skeleton.dtype),
            {name: plan.schemes.get(name) for name in plan.stored},
            plan.stored,
            {name: (shape[0], shape[1]) for name, shape in shapes.items()},
            tuple(unit.linears for unit in fused_units(skeleton, blocks)),
            len(plan.specs),
        )

    def learn(self, model: StageResult) -> None:
        """Take note of the output errors that a stage reports."""
        names = {stored: name for name, stored in self.stored.items()}
        for linear in model.details.get("linears", ()):
            if linear["error"] is not None and linear["name"] in names:
                self.errors[names[linear["name"]]] = linear["error"]

    def weigh(self, report: Report) -> None:
        """Take note of what errors cost, from the report on the artifact before any repair."""
        self.costs.extend(sensitivities(report, self.fused, self._known_errors(report)))

    def units(self, report: Report) -> list[Unit]:
        """The units as they are stored now, ``report`` being the last."""
        errors = self._known_errors(report)
        return [
            Unit(
                unit,
                tuple(self.shapes[name] for name in unit),
                self.assignment[unit[0]],
                cost * unit_error(unit, errors),
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
        return {name: by_weight.get(f"{stored}.weight", 0.0) for name, stored in self.stored.items()}

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> bool:
        """Whether a linear of that shape can have the scheme beside what the others have."""
        others = {str(other): other for other in self.assignment.values() if other is not None}
        return self.storage.accepts(scheme, shape, tuple(others.values()))


def _as_made(skeleton: Skeleton, model: StageResult) -> list[Override]:
    """What a budget has chosen, from what the artifact's stage reports of its linears."""
    made = {f"{linear['name']}.weight": Scheme.parse(linear["scheme"]) for linear in model.details["linears"]}
    names = (name for linears in skeleton.linears for name in linears)
    return [Override(glob.escape(name), made.get(skeleton.names[f"{name}.weight"])) for name in names]


def _checks(measured: StageResult) -> Report:
    return Report(model=_NO_MODEL, checks=tuple(Check.model_validate(check) for check in measured.details["checks"]))
