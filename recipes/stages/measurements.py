"""The recipe's validate section: the list of what is measured, and the stage that measures it.

A measurement of its own is a file under ``validate/`` and a line in :func:`measurements`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmconvert.context import Context
from llmconvert.engine.memory import BASE_NBYTES, LOADED_NBYTES
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import UnsupportedError
from llmconvert.gguf.checkpoint import open_artifact
from llmconvert.quantize.formats.base import FileFormat, load_format
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.scheme import SchemeOrMix
from llmconvert.recipes.forecast import Forecast, parameters
from llmconvert.recipes.schema.measuring import BackendSettings, PerplexitySettings, PositionSettings, ValidateSettings
from llmconvert.recipes.schema.named import engine_scheme
from llmconvert.recipes.schema.recipe import Recipe
from llmconvert.recipes.stages.artifact import public_name
from llmconvert.recipes.stages.stage import ORIGINAL, Place, Stage, Work
from llmconvert.recipes.stages.windows import CALIBRATION, EVALUATION_TEXT
from llmconvert.report.report import Check
from llmconvert.report.section import Value
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.text.files import local_path
from llmconvert.text.tokens import TokenWindows, check_disjoint
from llmconvert.validate.artifact import plan_validation
from llmconvert.validate.generation.behaviour import BehaviourCheck, GenerationOptions
from llmconvert.validate.generation.greedy import PROMPTS
from llmconvert.validate.inventory import InventoryCheck
from llmconvert.validate.long_inputs.attention import AttentionOptions
from llmconvert.validate.long_inputs.attention_check import AttentionCheck
from llmconvert.validate.long_inputs.cache_cost import CacheCostCheck
from llmconvert.validate.long_inputs.cache_size import CacheCheck
from llmconvert.validate.long_inputs.decoding import DecodingCheck
from llmconvert.validate.long_inputs.ladder import MemoryLadder
from llmconvert.validate.long_inputs.positions import PositionsCheck
from llmconvert.validate.measurement import Measurement
from llmconvert.validate.predictions.compared import Compared
from llmconvert.validate.predictions.quality import QualityCheck
from llmconvert.validate.predictions.step_losses import StepLossesCheck
from llmconvert.validate.runtimes.vllm import VllmCheck
from llmconvert.validate.serving.check import ServingCheck, stored_as
from llmconvert.validate.serving.runtimes import ServedBy, require_readers
from llmconvert.validate.size import SizeCheck
from llmconvert.validate.tasks import Tasks
from llmconvert.validate.vocabulary import VocabularyCheck

__all__ = [
    "COMPARED_FILE",
    "Measured",
    "foresee_measuring",
    "measure",
    "measurements",
    "require_accepted",
    "require_loader",
    "require_measurable",
    "require_served",
    "require_served_as",
    "validate_stage",
]


#: What :func:`~llmconvert.recipes.sweep.comparing.compare_variants` leaves in a stage's directory for its builder.
COMPARED_FILE = "compared.json"


class Measured(Value):
    """What a measuring stage has to say."""

    checks: tuple[Check, ...]


def validate_stage(
    settings: ValidateSettings, model: str, between: Sequence[str], name: str = "validate"
) -> Stage[Measured]:
    """Measure the model of a stage against the original.

    Args:
        model: the stage that made it.
        between: stages on the way to it whose dense models are scored as well, for what each step cost.
    """

    def build(work: Work, place: Place) -> Measured:
        if work.original.note:
            work.context.progress.log(f"validate: {work.original.note}")
        calibration, evaluation = work.texts.get(CALIBRATION), work.texts.get(EVALUATION_TEXT)
        overlap = None
        if calibration is not None and evaluation is not None:
            overlap = check_disjoint(calibration, evaluation).fraction
        kept = place.notes / COMPARED_FILE if place.notes is not None else None
        compared = Compared.read(kept) if kept is not None and kept.exists() else None
        passed = {step: work.finished[step].model for step in between}
        wanted = measurements(settings, overlap=overlap, compared=compared, between=passed, last=model)
        with work.original.open() as reference:
            checks = measure(work.finished[model].model, reference, wanted, evaluation, context=work.context)
        if kept is not None:
            kept.unlink(missing_ok=True)
        return Measured(checks=tuple(checks))

    def forecast(work: Work, output: Path) -> Forecast:
        with work.original.open() as reference:
            text, made = work.texts.get(EVALUATION_TEXT), work.recipe.quantize
            layout = None if made is None else load_format(made.format)
            loadable = layout is None or "generation" not in layout.lacks  # which is measured with transformers
            stored = work.sizes.get(model)
            known: dict[str, Any] = {"loadable": loadable, "stored": stored, "build": work.skeletons}
            known["cached"] = made is not None and made.kv_cache is not None
            before = work.recipe.calibrate is not None or work.recipe.attention is not None
            known["compiled"] = isinstance(layout, FileFormat) or before
            foreseen = foresee_measuring(settings, output, reference, text, work.context, **known)
            return replace(foreseen, notes=(*foreseen.notes, *require_served(work.recipe)))

    def inputs(work: Work) -> Mapping[str, Any]:
        own = {"between": [work.key(step) for step in between], "device": work.context.device.type}
        return {**own, **settings.model_dump(mode="json", exclude={"repair"})}

    after = {"original": ORIGINAL, "artifact": model, "text": EVALUATION_TEXT, "calibration": CALIBRATION}
    return Stage(name, after, Measured.model_validate, build, inputs, forecast=forecast, together=True)


def foresee_measuring(
    settings: ValidateSettings,
    artifact: Path,
    reference: Checkpoint | None,
    windows: TokenWindows | None,
    context: Context,
    *,
    loadable: bool | None = None,
    stored: int | None = None,
    cached: bool | None = None,
    build: Callable[..., Skeleton] = Skeleton,
    compiled: bool = False,
) -> Forecast:
    """What :func:`measure` would need, of an artifact that may be still to be made where there is a reference.

    Args:
        loadable: whether it will be a directory that transformers reads, where it is still to be made.
        stored: bytes of its weight files, likewise.
        cached: whether it will have scales for its key-value cache, likewise.
        build: builds a model on shapes.
        compiled: whether an earlier step of the process has kernels compiled, which stay.
    """
    wanted = measurements(settings)
    known: dict[str, Any] = {"reference": reference, "windows": windows, "loadable": loadable}
    plan = plan_validation(artifact, wanted, **known, stored=stored, cached=cached, context=context, build=build)
    with nullcontext(reference) if reference is not None else open_artifact(artifact) as model:
        weights = parameters(model)
    tokens = windows.drawn * windows.length if windows is not None else 0
    asked = [name for name in type(settings).model_fields if getattr(settings, name) is not None]
    written = settings.generation.max_new_tokens if settings.generation is not None else 0
    shared = "" if context.ranks.alone else f" by {context.ranks.count}"
    less = 0 if compiled else BASE_NBYTES - LOADED_NBYTES
    return Forecast(
        replace(plan.needs, memory=plan.needs.memory - less),
        kind=f"validate {' '.join(asked)} {context.device.type}{shared}",
        work=float(weights * (tokens + 64 * written + 1)),
    )


def measure(
    artifact: Path,
    reference: Checkpoint | None,
    wanted: Sequence[Measurement],
    windows: TokenWindows | None,
    *,
    context: Context,
) -> list[Check]:
    """Measure an artifact; see :func:`llmconvert.validate.artifact.plan_validation`."""
    return plan_validation(
        artifact,
        wanted,
        reference=reference,
        windows=replace(windows, dataset=public_name(windows.dataset)) if windows is not None else None,
        context=context,
    ).run()


def measurements(
    settings: ValidateSettings,
    *,
    overlap: float | None = None,
    compared: Compared | None = None,
    between: Mapping[str, Path] | None = None,
    last: str = "quantize",
) -> list[Measurement]:
    """Everything that is measured, in the order of the report.

    Args:
        overlap: share of the evaluation text found in the calibration text.
        compared: artifact and original on the evaluation text, where a pass with other artifacts has compared them.
        between: directories of the dense models between the original and the artifact, by step, in order.
        last: the step that made the artifact.
    """
    found: list[Measurement] = [
        VocabularyCheck(),
        SizeCheck(settings.max_bytes),
        InventoryCheck(),
        QualityCheck(
            settings.perplexity.max_increase if settings.perplexity is not None else None,
            settings.max_kl,
            settings.min_top1,
            overlap,
            compared,
            settings.max_saturated,
            settings.activations,
        ),
        BehaviourCheck(_generation(settings)),
        VllmCheck(),
    ]
    if settings.attention is not None:
        found.append(_attention(settings.attention))
    if settings.positions is not None:
        found.append(_positions(settings.positions, settings.perplexity))
    if settings.perplexity is not None:
        found.append(CacheCostCheck(settings.perplexity.dataset))
    if settings.memory is not None:
        memory = settings.memory
        found.append(CacheCheck(memory.contexts, memory.batches))
        found.append(MemoryLadder(memory.contexts, memory.measured, memory.measured_contexts))
    if settings.decoding is not None:
        decoding = settings.decoding
        asked = "decoding" in settings.model_fields_set
        found.append(DecodingCheck(decoding.context, decoding.tokens, decoding.rounds, asked))
    if settings.serve is not None:
        serve = settings.serve
        served = tuple(ServedBy.parse(name) for name in serve.runtimes)
        found.append(ServingCheck(served, serve.contexts, serve.tokens, serve.rounds))
    if settings.tasks is not None:
        tasks = settings.tasks
        include = local_path(tasks.include) if tasks.include is not None else None
        found.append(Tasks(tasks.names, tasks.samples, tasks.fewshot, include, tasks.max_drop))
    if between:
        found.append(StepLossesCheck(between, last))
    return found


def require_measurable(settings: ValidateSettings | None) -> None:
    """Refuse, before any work, a measurement that can't be made in this environment.

    Raises:
        UnsupportedError: with what is missing.
    """
    for measurement in measurements(settings) if settings is not None else ():
        measurement.require()


def require_loader(recipe: Recipe) -> None:
    """Refuse, before any work, continuations by an artifact that nothing here can load.

    Raises:
        UnsupportedError: with the packages that are missing.
    """
    settings = recipe.measured
    if settings is None or settings.generation is None or recipe.quantize is None:
        return
    loaders = load_format(recipe.quantize.format).loaders
    missing = [package for package in loaders if importlib.util.find_spec(package) is None]
    if missing:
        raise UnsupportedError(
            f"validate.generation: transformers loads format {recipe.quantize.format} with {' and '.join(missing)}, "
            f"not installed here; pip install {' '.join(missing)}, or leave the key out"
        )


def require_served(recipe: Recipe) -> tuple[str, ...]:
    """Refuse, before any work, an artifact that none of the runtimes can run which it is to be served by.

    Returns:
        What is left out of them, since others can, and why.

    Raises:
        UnsupportedError: with the runtimes that can.
    """
    settings, made = recipe.measured, recipe.quantize
    if settings is None:
        return ()
    if made is None:
        return _served(settings, None, ())
    wanted = [made.head, made.embedding, *(override.scheme for override in made.overrides)]
    schemes: set[SchemeOrMix] = {scheme for one in wanted if (scheme := engine_scheme(one)) is not None}
    if made.budget is None:
        schemes.add(made.scheme)
    return _served(settings, made.format, schemes)


def require_served_as(settings: ValidateSettings, stored: Checkpoint) -> tuple[str, ...]:
    """The same of an artifact that is there."""
    return _served(settings, *stored_as(stored, open_dense(stored))) if settings.serve is not None else ()


def _served(settings: ValidateSettings, format: str | None, schemes: Collection[SchemeOrMix]) -> tuple[str, ...]:
    if settings.serve is None:
        return ()
    asked = [ServedBy.parse(name) for name in settings.serve.runtimes]
    lacking = require_readers(asked, format, schemes, accelerated=torch.cuda.is_available())
    return tuple(f"validate.serve: {name} is left out; it {lack}" for name, lack in lacking.items())


def require_accepted(settings: ValidateSettings | None, original: Checkpoint) -> None:
    """Refuse, before any work, a model on whose artifact something could not be measured.

    Raises:
        LlmconvertError: with what the model lacks or what fails.
    """
    for measurement in measurements(settings) if settings is not None else ():
        measurement.accept(original)


def _generation(settings: ValidateSettings) -> GenerationOptions | None:
    generation = settings.generation
    if generation is None:
        return None
    return GenerationOptions(generation.max_new_tokens, generation.min_agreement, generation.prompts or PROMPTS)


def _attention(settings: BackendSettings) -> AttentionCheck:
    options = AttentionOptions(settings.backends, seconds=settings.seconds)
    if settings.lengths is not None:
        options = replace(options, lengths=settings.lengths)
    named = frozenset(settings.backends) if "backends" in settings.model_fields_set else frozenset()
    return AttentionCheck(options, named)


def _positions(settings: PositionSettings, perplexity: PerplexitySettings | None) -> PositionsCheck:
    dataset = settings.dataset or (perplexity.dataset if perplexity is not None else "pydoc-topics:test")
    return PositionsCheck(dataset, settings.window, settings.windows)
