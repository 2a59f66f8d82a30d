"""The recipe's quantize section: a stage that quantizes, and the pieces that repair quantizes anew with."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmconvert.context import Context
from llmconvert.gguf.checkpoint import GgufCheckpoint, open_artifact
from llmconvert.gguf.ggml.mix import FLOATS
from llmconvert.gguf.split import read_model_header
from llmconvert.quantize.formats.dense_view import QuantizedView, open_dense
from llmconvert.quantize.job import plan_quantize
from llmconvert.quantize.methods.base import load_method
from llmconvert.quantize.passes.results import LayerResult, read_layers
from llmconvert.quantize.passes.run import QuantizePlan, QuantizeResult
from llmconvert.quantize.plan import QuantizeRequest, Statistics
from llmconvert.quantize.requantize import Assignment, RequantizeRequest, plan_requantize
from llmconvert.quantize.rotate import rotate_checkpoint
from llmconvert.recipes.forecast import Forecast, foresee_quantization, served_by
from llmconvert.recipes.schema.recipe import QuantizeSettings, Recipe
from llmconvert.recipes.stages.artifact import model_stem
from llmconvert.recipes.stages.budget import (
    ChosenReport,
    choose_within,
    chosen_report,
    forget_sensitivity,
    layer_overrides,
)
from llmconvert.recipes.stages.expert_report import expert_counts, expert_sections
from llmconvert.recipes.stages.quantized_sections import coarse_section, serving_section, types_section
from llmconvert.recipes.stages.stage import Place, Stage, Work
from llmconvert.recipes.stages.windows import CALIBRATION
from llmconvert.report.steps import LinearReport, QuantizeReport
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.directory import is_projector
from llmconvert.storage.writer import write_file, write_json
from llmconvert.validate.size import measure_sizes

__all__ = [
    "QUANTIZE",
    "Planned",
    "build_quantized",
    "change_schemes",
    "keep_report",
    "plan_stage",
    "quantize",
    "quantize_stage",
    "recovered",
    "statistics_of",
    "text_of",
]

#: The name of the stage.
QUANTIZE = "quantize"
# Kept beside a stage's model, for one that is killed between its artifact and its own record: what came of each
# linear, what a budget chose, and what there is to note.
_LAYERS_FILE = "layers.json"
_BUDGET_FILE = "budget.json"
_NOTES_FILE = "notes.json"
_SERVING_FILE = "serving.json"
# Of one that was made in one pass with others: all that there is to say.
_REPORT_FILE = "report.json"


def statistics_of(recipe: Recipe) -> Statistics:
    """In which model the recipe's method measures activations."""
    return recipe.calibrate.statistics if recipe.calibrate is not None else "sequential"


def text_of(recipe: Recipe) -> str:
    """The names of the calibration texts."""
    return ", ".join(recipe.calibrate.names) if recipe.calibrate is not None else ""


def quantize_stage(
    settings: QuantizeSettings, after: str, statistics: Statistics = "sequential"
) -> Stage[QuantizeReport]:
    """Quantize the model of the stage ``after``."""

    def build(work: Work, place: Place) -> QuantizeReport:
        return build_quantized(work, place, settings, after, statistics)

    def forecast(work: Work, output: Path) -> Forecast:
        with work.open(after) as checkpoint:
            return foresee_quantization(
                checkpoint,
                output,
                settings,
                tuple(layer_overrides(settings)),
                name=model_stem(work.source.origin),
                windows=work.windows(CALIBRATION) if settings.calibrates else (),
                context=work.context_of(after),
                statistics=statistics,
                repaired=work.recipe.validation is not None and work.recipe.validation.repair is not None,
                build=work.skeletons,
            )

    def inputs(work: Work) -> Mapping[str, Any]:
        own: dict[str, Any] = {"statistics": statistics} if statistics != "sequential" else {}
        if settings.method == "imatrix" and settings.options.get("file"):
            own["importance"] = repr(load_method(settings.method, settings.options))
        return {"device": work.context.device.type, **settings.model_dump(mode="json", exclude={"distil"}), **own}

    order = {"model": after, "calibration": CALIBRATION}
    read = QuantizeReport.model_validate
    return Stage(QUANTIZE, order, read, build, inputs, resumable=True, forecast=forecast, together=True)


def build_quantized(
    work: Work, place: Place, settings: QuantizeSettings, after: str, statistics: Statistics
) -> QuantizeReport:
    """Quantize the model of the stage ``after`` by these settings, and by the texts of the recipe."""
    if place.notes is not None and place.model.exists():  # complete, and killed just then
        forget_sensitivity(place.model)
        return recovered(place)
    with work.open(after) as checkpoint:
        return quantize(
            checkpoint,
            place,
            settings,
            name=model_stem(work.source.origin),
            text=text_of(work.recipe),
            windows=work.windows(CALIBRATION),
            context=work.context_of(after),
            statistics=statistics,
        )


@dataclass(frozen=True, slots=True)
class Planned:
    """A quantization that is settled, with what a budget chose for it.

    Attributes:
        place: where it is built.
        plan: of the job.
        chosen: by the budget; None without one.
    """

    place: Place
    plan: QuantizePlan
    chosen: ChosenReport | None = None

    def report(self, result: QuantizeResult) -> QuantizeReport:
        """What the report says of what was made."""
        chosen, experts = self.chosen, expert_counts(result.layers)
        sections = chosen.sections if chosen is not None else ()
        return QuantizeReport(
            budget=chosen.budget if chosen is not None else None,
            experts=experts,
            sections=(
                *sections,
                *expert_sections(experts),
                *coarse_section(result.layers),
                *types_section(result.types, result.notes),
                *serving_section(served_by(self.plan)),
            ),
            file=result.files[0] if result.types else None,
            projector=next(filter(is_projector, result.files), None),
            layers=result.quantized,
            linears=_linears(result.layers),
            types=result.types,
            notes=result.notes,
            bytes=result.nbytes,
            seconds=round(result.seconds, 3),
            phases={name: round(seconds, 3) for name, seconds in result.phases.items()},
            mode=result.memory.mode,
            resumed_blocks=result.resumed_blocks,
            runtime=self.plan.request.runtime,
        )


def quantize(
    source: Checkpoint,
    place: Place,
    settings: QuantizeSettings,
    *,
    name: str = "model",
    text: str = "",
    windows: Sequence[torch.Tensor] = (),
    context: Context,
    statistics: Statistics = "sequential",
) -> QuantizeReport:
    """Quantize ``source``, or go on where an earlier call was stopped; see
    :func:`llmconvert.quantize.job.plan_quantize`.

    Args:
        name: of the model, for formats that store it.
        text: what the windows are of, likewise.
        windows: calibration token ids, ``[1, length]`` each.
        statistics: in which model activations are measured.
    """
    planned = plan_stage(
        source, place, settings, name=name, text=text, windows=windows, context=context, statistics=statistics
    )
    context.progress.log(f"{settings.format}: {planned.plan.readers}")
    for note in served_by(planned.plan):
        context.progress.log(note)
    result = planned.plan.run()
    forget_sensitivity(place.model)
    return planned.report(result)


def plan_stage(
    source: Checkpoint,
    place: Place,
    settings: QuantizeSettings,
    *,
    name: str = "model",
    text: str = "",
    windows: Sequence[torch.Tensor] = (),
    context: Context,
    statistics: Statistics = "sequential",
) -> Planned:
    """Settle what :func:`quantize` does; what a budget chooses from is measured for it."""
    if settings.rotate is not None:
        source = rotate_checkpoint(source, **settings.rotate.model_dump())
        context = replace(context, identity=f"{context.identity} rotated {settings.rotate.model_dump_json()}")
    scheme, overrides = settings.scheme, layer_overrides(settings)
    chosen: ChosenReport | None = None
    if settings.budget is not None:
        allocation = choose_within(settings, settings.budget, source, place.model, windows, context)
        scheme, overrides = allocation.scheme, list(allocation.overrides)
        chosen = chosen_report(settings.budget, allocation)
        if place.notes is not None:
            write_file(place.notes / _BUDGET_FILE, chosen.model_dump_json().encode())
    plan = plan_quantize(
        source,
        place.model,
        QuantizeRequest(
            settings.method,
            scheme,
            settings.format,
            tuple(overrides),
            settings.options,
            name=name,
            statistics=statistics,
            experts=settings.experts or "routed",
            min_tokens_per_expert=settings.min_tokens_per_expert or 0,
            kv_cache=settings.kv_cache,
            runtime=settings.runtime,
            split_nbytes=settings.split_max_size,
            text=text,
        ),
        windows=windows,
        context=context,
        record=place.notes / _LAYERS_FILE if place.notes is not None else None,
    )
    if place.notes is not None:
        write_json(place.notes / _NOTES_FILE, list(plan.notes))
        write_json(place.notes / _SERVING_FILE, list(served_by(plan)))
    return Planned(place, plan, chosen)


def keep_report(place: Place, report: QuantizeReport) -> None:
    """Leave what there is to say of a model for the stage's own builder, which then finds both."""
    assert place.notes is not None
    forget_sensitivity(place.model)
    write_file(place.notes / _REPORT_FILE, report.model_dump_json(by_alias=True).encode())


def recovered(place: Place) -> QuantizeReport:
    """What a call that was killed after its artifact appeared had to say, from its notes and from the artifact."""
    nbytes, notes = measure_sizes(place.model).weights, place.notes
    if notes is not None and (notes / _REPORT_FILE).exists():
        return QuantizeReport.model_validate_json((notes / _REPORT_FILE).read_bytes())
    noted = notes is not None and (notes / _LAYERS_FILE).exists()
    layers = read_layers(notes / _LAYERS_FILE) if notes is not None and noted else ()
    linears, experts = _linears(layers), expert_counts(layers)
    with open_artifact(place.model) as stored:
        if isinstance(stored, GgufCheckpoint):
            types = Counter(tensor.qtype.name for tensor in read_model_header(stored.path).tensors.values())
            count = sum(number for kind, number in types.items() if kind not in FLOATS)
            name = stored.path.name
            said = notes is not None and (notes / _NOTES_FILE).exists()
            remarks = tuple(json.loads((notes / _NOTES_FILE).read_bytes())) if notes is not None and said else ()
            chosen = _chosen(notes)
            return QuantizeReport(
                budget=chosen.budget if chosen is not None else None,
                sections=(*(chosen.sections if chosen is not None else ()), *types_section(types, remarks)),
                file=name,
                layers=count,
                linears=linears,
                types=types,
                notes=remarks,
                bytes=nbytes,
                seconds=0.0,
            )
        linears = linears if noted else _stored_linears(stored)
    facts = notes / _SERVING_FILE if notes is not None else None
    served = tuple(json.loads(facts.read_bytes())) if facts is not None and facts.exists() else ()
    counted = (*expert_sections(experts), *coarse_section(layers), *serving_section(served))
    found = QuantizeReport(
        layers=len(linears), linears=linears, experts=experts, sections=counted, bytes=nbytes, seconds=0.0
    )
    chosen = _chosen(notes) if noted else None
    if chosen is None:
        return found
    return found.model_copy(update={"budget": chosen.budget, "sections": (*chosen.sections, *counted)})


def _chosen(notes: Path | None) -> ChosenReport | None:
    """What a budget has chosen, from a stage's notes."""
    if notes is None or not (notes / _BUDGET_FILE).exists():
        return None
    return ChosenReport.model_validate_json((notes / _BUDGET_FILE).read_bytes())


def _stored_linears(stored: Checkpoint) -> tuple[LinearReport, ...]:
    dense = open_dense(stored)
    if not isinstance(dense, QuantizedView):
        return ()
    schemes = {name: dense.scheme_of(name) for name in dense}
    return tuple(
        LinearReport(name=name.removesuffix(".weight"), scheme=str(scheme), error=None)
        for name, scheme in schemes.items()
        if scheme is not None
    )


def _linears(layers: Iterable[LayerResult]) -> tuple[LinearReport, ...]:
    return tuple(
        LinearReport(
            name=layer.name, scheme=layer.scheme, error=layer.error, outer=layer.outer, coarse=layer.coarse or None
        )
        for layer in layers
    )


def change_schemes(
    artifact: Path,
    source: Checkpoint,
    place: Place,
    settings: QuantizeSettings,
    *,
    before: Assignment,
    changes: Assignment,
    windows: Sequence[torch.Tensor] = (),
    context: Context,
) -> QuantizeReport:
    """Write an artifact anew with other schemes for some linears; see
    :func:`llmconvert.quantize.requantize.plan_requantize`.

    Returns:
        what came of the linears that were quantized anew.
    """
    assert place.notes is not None
    if place.model.exists():  # complete, and killed just then
        return recovered(place)
    begin = time.perf_counter()
    plan = plan_requantize(
        artifact,
        source,
        place.model,
        RequantizeRequest(settings.method, settings.format, before, changes, settings.options),
        record=place.notes / _LAYERS_FILE,
        windows=windows,
        context=context,
    )
    context.progress.log(f"{settings.format}: {plan.readers}")
    layers = plan.run()
    return QuantizeReport(
        layers=len(layers),
        linears=_linears(layers),
        bytes=measure_sizes(place.model).weights,
        seconds=round(time.perf_counter() - begin, 3),
    )
