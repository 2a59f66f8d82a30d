"""Running a recipe: fetch, convert, calibrate, rewrite attention, heal, quantize, validate, write up, publish.

Each step is a stage (:mod:`llmconvert.storage.stages`) keyed by what determines its output, so a run that was stopped
or changed repeats only what it must. Text, formats and the publishing target are checked before the long work begins.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmconvert.convert.source import Source, open_source, source_fingerprint
from llmconvert.device import open_device
from llmconvert.errors import GateError
from llmconvert.interrupt import interruptible
from llmconvert.memory import PeakMemory, release_freed_memory
from llmconvert.progress import SILENT, Progress
from llmconvert.recipes.publishing import check_target, fill_target, publish_artifact
from llmconvert.recipes.schema.recipe import Recipe
from llmconvert.recipes.stages.artifact import REPORT_FILE, assemble_artifact, model_info, model_stem
from llmconvert.recipes.stages.attention import require_mergeable, rewrite_attention
from llmconvert.recipes.stages.budget import forget_sensitivity
from llmconvert.recipes.stages.gguf import calibrates
from llmconvert.recipes.stages.healing import heal_request, heal_settings, heal_stage
from llmconvert.recipes.stages.measurements import measurements, require_measurable
from llmconvert.recipes.stages.original import Original
from llmconvert.recipes.stages.repair import RepairTools, repair
from llmconvert.recipes.stages.steps import LAYERS_FILE, convert, measure, quantize, recorded_layers
from llmconvert.recipes.stages.streaming import open_remote, stream_model
from llmconvert.recipes.stages.windows import WindowRequest, load_windows, save_windows
from llmconvert.report.report import Check, Report, Step, environment, require_passed
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.storage.dense import require_dense
from llmconvert.storage.stages import StageResult, StageRun, StageStore, stage_key
from llmconvert.text.tokens import TokenWindows, check_disjoint
from llmconvert.validate.render.blame import blame

__all__ = ["RunResult", "run_recipe"]

_MODEL = "model"
# Steps whose details the report holds.
_DETAILED = ("convert", "attention", "heal", "quantize", "repair")


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run made.

    Attributes:
        artifact: the artifact's directory in the work directory.
        published: where it was published, or None.
    """

    recipe: Recipe
    report: Report
    artifact: Path
    published: str | None


def run_recipe(
    recipe: Recipe,
    *,
    work_dir: Path | None = None,
    store: StageStore | None = None,
    fresh: bool = False,
    publish: bool = True,
    progress: Progress = SILENT,
) -> RunResult:
    """Run a recipe, or what is left of it.

    Args:
        work_dir: where stages are kept; the recipe's own by default.
        store: an open work directory, to share among several recipes, instead.
        fresh: forget what earlier runs of this recipe did.
        publish: false leaves the artifact in the work directory.

    Raises:
        GateError: the artifact misses a limit; it is kept and not published.
        RunInterruptedError: the process was asked to stop; the same call continues.
        LlmconvertError: anything else that is wrong with the recipe, its sources or this machine.
    """
    with interruptible(), ExitStack() as stack:
        if store is None:
            store = stack.enter_context(StageStore(work_dir or Path(recipe.work_dir), progress=progress))
        return _Run(fill_target(recipe), store.begin(recipe.name, fresh=fresh), publish, progress).run()


class _Run:
    """One run of one recipe; its methods are the steps."""

    def __init__(self, recipe: Recipe, stages: StageRun, publish: bool, progress: Progress) -> None:
        self._recipe = recipe
        self._stages = stages
        self._progress = progress
        self._device = open_device(recipe.device)
        self._steps: list[Step] = []
        self._publish = recipe.publish if publish else None

    def run(self) -> RunResult:
        recipe = self._recipe
        require_measurable(recipe.measured)
        if self._publish is not None:
            check_target(self._publish, recipe.name)
        source = self._fetch()
        if recipe.quantize is not None:
            require_dense(source.checkpoint, source.origin)
        if recipe.attention is not None:
            require_mergeable(source.checkpoint, recipe.attention)
        if recipe.stream:
            original = Original.on_the_hub(stage_key("convert", self._convert_inputs(source)), source, recipe)
            calibration, evaluation = self._draw(original)
            model = self._stream(source, original)
            if recipe.quantize is None:
                original = Original.on_disk(model.key, model.path / _MODEL)
        else:
            converted = self._convert(source)
            original = Original.on_disk(converted.key, converted.path / _MODEL)
            calibration, evaluation = self._draw(original)
            lessons = self._draw_lessons(original, evaluation)
            rewritten = self._rewrite(converted, calibration)
            healed = self._heal(converted, rewritten, lessons)
            model = self._quantize(healed, calibration)
        measured = self._measure(original, model, calibration, evaluation)
        more: Sequence[Check] = ()
        if measured is not None and not recipe.stream:
            tools = RepairTools(
                calibration.windows if calibration is not None else (),
                partial(self._stage, resumable=True),
                lambda name, last: self._measure(original, last, calibration, evaluation, name),
                self._progress,
            )
            model, measured, more = repair(recipe, healed.path / _MODEL, model, measured, tools)
        artifact = self._assemble(source, original, model, calibration, measured, more)
        report = Report.read(artifact / REPORT_FILE)
        try:
            require_passed(report.checks, blame(report))
        except GateError as error:
            raise GateError(f"{error}; the artifact is in {artifact}") from error
        published = None
        if self._publish is not None:
            published = publish_artifact(artifact, self._publish, recipe.name, progress=self._progress)
        return RunResult(recipe, report, artifact, published)

    def _fetch(self) -> Source:
        begin = time.perf_counter()
        with PeakMemory() as memory:
            source = (
                open_remote(self._recipe)
                if self._recipe.stream
                else open_source(self._recipe.model, allow_pickle=self._recipe.allow_pickle, progress=self._progress)
            )
        seconds = round(time.perf_counter() - begin, 3)
        self._steps.append(Step(name="fetch", seconds=seconds, peak_rss_bytes=memory.nbytes))
        return source

    def _convert(self, source: Source) -> StageResult:
        settings = self._recipe.convert

        def build(path: Path) -> Mapping[str, Any]:
            shutil.rmtree(path / _MODEL, ignore_errors=True)  # complete, and killed before it could report
            return asdict(convert(source.checkpoint, path / _MODEL, settings, progress=self._progress))

        with source.checkpoint:
            return self._stage("convert", self._convert_inputs(source), build, resumable=True)

    def _convert_inputs(self, source: Source) -> Mapping[str, Any]:
        return {"source": source_fingerprint(source), **self._recipe.convert.model_dump(mode="json")}

    def _stream(self, source: Source, original: Original) -> StageResult:
        """Convert and quantize while the model downloads."""
        settings = self._recipe.quantize

        def build(path: Path) -> Mapping[str, Any]:
            if (path / _MODEL).exists():  # complete, and killed just then
                return {}
            found = stream_model(source, path / _MODEL, self._recipe, device=self._device, progress=self._progress)
            return {**found, "streamed": True}

        inputs = {"model": original.key, "streamed": True, **(settings.model_dump(mode="json") if settings else {})}
        return self._stage("quantize" if settings is not None else "convert", inputs, build, resumable=True)

    def _draw(self, original: Original) -> tuple[TokenWindows | None, TokenWindows | None]:
        """Both texts, before the long work: a missing one, or one used twice, must not be found out after it."""
        recipe = self._recipe
        calibration = evaluation = None
        if recipe.calibrate is not None and (recipe.quantize is not None or recipe.attention is not None):
            if recipe.attention is not None or recipe.quantize is None or calibrates(recipe.quantize):
                calibration = self._windows("calibrate", WindowRequest.calibration(recipe.calibrate), original)
            else:
                self._progress.log(f"calibrate: {recipe.quantize.method} needs no calibration, skipped")
        if recipe.validation is not None and recipe.validation.perplexity is not None:
            request = WindowRequest.evaluation(recipe.validation.perplexity)
            evaluation = self._windows("evaluation-text", request, original)
        if calibration is not None and evaluation is not None:
            check_disjoint(calibration, evaluation)
        return calibration, evaluation

    def _draw_lessons(self, original: Original, evaluation: TokenWindows | None) -> TokenWindows | None:
        """The text that healing learns from."""
        request = heal_request(self._recipe)
        lessons = self._windows("heal-text", request, original) if request is not None else None
        if lessons is not None and evaluation is not None:
            check_disjoint(lessons, evaluation)
        return lessons

    def _windows(self, name: str, request: WindowRequest, original: Original) -> TokenWindows:
        corpus = request.corpus()

        def build(path: Path) -> Mapping[str, Any]:
            with original.open() as checkpoint:
                return save_windows(request.draw(checkpoint, corpus), path)

        settings = {key: value for key, value in asdict(request).items() if key != "setting"}
        result = self._stage(name, {"tokenizer of": original.key, "text": corpus.digest, **settings}, build)
        return load_windows(result.path, result.details)

    def _rewrite(self, converted: StageResult, calibration: TokenWindows | None) -> StageResult:
        settings = self._recipe.attention
        if settings is None:
            return converted

        def build(path: Path) -> Mapping[str, Any]:
            shutil.rmtree(path / _MODEL, ignore_errors=True)  # complete, and killed before it could report
            with SafetensorsCheckpoint(converted.path / _MODEL) as checkpoint:
                return rewrite_attention(
                    checkpoint,
                    path / _MODEL,
                    settings,
                    windows=calibration.windows if calibration is not None else (),
                    device=self._device,
                    progress=self._progress,
                )

        inputs = {
            "model": converted.key,
            "calibration": calibration.digest if calibration is not None else None,
            "device": self._device.type,
            **settings.model_dump(mode="json", exclude={"heal"}),
        }
        return self._stage("attention", inputs, build, resumable=True)

    def _heal(self, converted: StageResult, rewritten: StageResult, lessons: TokenWindows | None) -> StageResult:
        settings = heal_settings(self._recipe)
        if settings is None or lessons is None:
            return rewritten

        def build(path: Path) -> Mapping[str, Any]:
            about: dict[str, Any] = {"identity": rewritten.key, "device": self._device, "progress": self._progress}
            return heal_stage(converted.path, rewritten.path, path, settings, windows=lessons.windows, **about)

        inputs = {
            "original": converted.key,
            "model": rewritten.key,
            "text": lessons.digest,
            "device": self._device.type,
            **settings.model_dump(mode="json"),
        }
        return self._stage("heal", inputs, build, resumable=True)

    def _quantize(self, converted: StageResult, calibration: TokenWindows | None) -> StageResult:
        settings = self._recipe.quantize
        if settings is None:
            return converted

        def build(path: Path) -> Mapping[str, Any]:
            if (path / _MODEL).exists():  # complete, and killed just then
                forget_sensitivity(path / _MODEL)
                return recorded_layers(path / LAYERS_FILE)
            with SafetensorsCheckpoint(converted.path / _MODEL) as checkpoint:
                return quantize(
                    checkpoint,
                    path / _MODEL,
                    settings,
                    name=model_stem(self._recipe.model.partition("@")[0]),
                    windows=calibration.windows if calibration is not None else (),
                    identity=converted.key,
                    device=self._device,
                    memory=self._recipe.memory,
                    record=path / LAYERS_FILE,
                    progress=self._progress,
                )

        inputs = {
            "model": converted.key,
            "calibration": calibration.digest if calibration is not None else None,
            "device": self._device.type,
            **settings.model_dump(mode="json"),
        }
        return self._stage("quantize", inputs, build, resumable=True)

    def _measure(
        self,
        original: Original,
        model: StageResult,
        calibration: TokenWindows | None,
        evaluation: TokenWindows | None,
        name: str = "validate",
    ) -> StageResult | None:
        settings = self._recipe.measured
        if settings is None:
            return None
        overlap = None
        if calibration is not None and evaluation is not None:
            overlap = check_disjoint(calibration, evaluation).fraction

        steps = [stage for stage in self._stages.results if stage.name in ("attention", "heal") and stage != model]
        between = {stage.name: stage.path / _MODEL for stage in steps}

        def build(path: Path) -> Mapping[str, Any]:
            if original.note:
                self._progress.log(f"validate: {original.note}")
            with original.open() as reference:
                wanted = measurements(settings, overlap=overlap, between=between, last=model.name)
                checks = measure(
                    model.path / _MODEL, reference, wanted, evaluation, device=self._device, progress=self._progress
                )
            return {"checks": [check.model_dump(mode="json") for check in checks]}

        inputs = {
            "original": original.key,
            "artifact": model.key,
            "between": [stage.key for stage in steps],
            "text": evaluation.digest if evaluation is not None else None,
            "calibration": calibration.digest if calibration is not None else None,
            "device": self._device.type,
            **settings.model_dump(mode="json", exclude={"repair"}),
        }
        return self._stage(name, inputs, build)

    def _assemble(
        self,
        source: Source,
        original: Original,
        model: StageResult,
        calibration: TokenWindows | None,
        measured: StageResult | None,
        more: Sequence[Check],
    ) -> Path:
        checks = measured.details["checks"] if measured is not None else ()

        def build(path: Path) -> Mapping[str, Any]:
            with original.open() as checkpoint:
                info = model_info(self._recipe, source, checkpoint, calibration)
            report = Report(
                model=info,
                environment=environment(),
                steps=tuple(self._steps),
                checks=(*map(Check.model_validate, checks), *more),
            )
            assemble_artifact(model.path / _MODEL, path / _MODEL, self._recipe, source, report)
            return {}

        inputs = {
            "model": model.key,
            "measured": measured.key if measured is not None else None,
            "more": [check.model_dump(mode="json") for check in more],
            "recipe": self._recipe.to_mapping(),
            "source": f"{source.origin}@{source.revision}",
        }
        return self._stages.run("artifact", inputs, build).path / _MODEL

    def _stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        build: Callable[[Path], Mapping[str, Any]],
        *,
        resumable: bool = False,
    ) -> StageResult:
        result = self._stages.run(name, inputs, build, resumable=resumable)
        details = {key: value for key, value in result.details.items() if key != "sections"}
        release_freed_memory()
        self._steps.append(
            Step.model_validate(
                {
                    "name": name,
                    "seconds": result.seconds,
                    "peak_rss_bytes": result.peak_rss_bytes,
                    "peak_rss_method": result.peak_rss_method,
                    "reused": result.reused,
                    "resumed": result.resumed,
                    "sections": result.details.get("sections", ()),
                    "details": details if name.startswith(_DETAILED) else {},
                }
            )
        )
        return result
