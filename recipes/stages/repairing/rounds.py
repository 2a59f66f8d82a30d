"""Repairing an artifact that missed the gate: more bits where they tell most, measured again, within a size limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from llmconvert.quantize.requantize import Assignment
from llmconvert.recipes.schema.measuring import RepairSettings
from llmconvert.recipes.stages.measurements import Measured
from llmconvert.recipes.stages.quantization import build_quantized, change_schemes, statistics_of
from llmconvert.recipes.stages.repairing.report import repair_check
from llmconvert.recipes.stages.repairing.state import State
from llmconvert.recipes.stages.run import RunStages
from llmconvert.recipes.stages.stage import Finished, Place, Stage, Work
from llmconvert.recipes.stages.windows import CALIBRATION
from llmconvert.report.report import Check, ModelInfo, Report
from llmconvert.report.section import Value
from llmconvert.report.steps import QuantizeReport
from llmconvert.validate.render.display import format_bytes
from llmconvert.validate.repair import Upgrade, choose_upgrades, needed_share

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
    """Give layers more bits, smaller groups or larger types until the artifact passes, or nothing more can be done.

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
        state = State.begin(source, recipe.quantize, work.finished[model], work.context.device)
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
        made = perform(repair_stage(state, ways.dense, model, changes, number))
        model = made.name
        again = ways.measuring(model, f"validate-{number}")
        assert again is not None
        measured = perform(again)
        state = state.after(changes)
        state.learn(made.details)
        rounds.append(upgrades)
        trail.append(_report(measured))
    return model, measured, (repair_check(rounds, trail, reason, limit),)


def repair_stage(state: State, dense: str, last: str, changes: Assignment, number: int) -> Stage[QuantizeReport]:
    """Write the artifact of the stage ``last`` anew with other schemes for some linears, from the weights of ``dense``.

    A file, whose tensors are not exchanged one by one, is quantized again with overrides for them.
    """

    def build(work: Work, place: Place) -> QuantizeReport:
        if not state.in_place:
            return build_quantized(work, place, state.settings_with(changes), dense, statistics_of(work.recipe))
        with work.open(dense) as source:
            return change_schemes(
                work.finished[last].model,
                source,
                place,
                state.settings,
                before=state.assignment,
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


def _next_round(state: State, report: Report, limit: int, left: int) -> tuple[list[Upgrade], str]:
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
    upgrades = choose_upgrades(
        state.units_now(report), share, budget, nbytes=state.storage.nbytes, accepts=state.accepts
    )
    if not upgrades:
        taken = format_bytes(size.value)
        return [], f"no better scheme fits into {format_bytes(limit)}, of which {taken} are taken"
    changes = {name: upgrade.after for upgrade in upgrades for name in upgrade.linears}
    if not any({**state.assignment, **changes}.values()):
        return [], "only the original would pass"
    return upgrades, ""


def _report(measured: Finished[Measured]) -> Report:
    return Report(model=_NO_MODEL, checks=measured.details.checks)
