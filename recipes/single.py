"""The single steps, from a model named in any of its four forms: convert, rewrite attention, quantize, validate.

Each is a run of few stages: the same builders, put straight into the output. Only healing and distillation, which
need a model beside the original, keep their stages in a hidden directory beside the output until they are done.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.context import Context
from llmconvert.convert.inspection import describe_model
from llmconvert.convert.source import Source, open_source
from llmconvert.device import open_device
from llmconvert.errors import DatasetError, OutputError, SourceError, UsageError
from llmconvert.interrupt import interruptible
from llmconvert.memory import PeakMemory
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.formats.base import FileFormat, load_format
from llmconvert.recipes.papers.single_steps import Papers, tell_steps, told_step
from llmconvert.recipes.ranks import agree, follow
from llmconvert.recipes.runner import perform
from llmconvert.recipes.schema.measuring import ValidateSettings
from llmconvert.recipes.schema.recipe import QuantizeSettings, Recipe
from llmconvert.recipes.stages.artifact import REPORT_FILE, public_name
from llmconvert.recipes.stages.attention import attention_stage, require_mergeable
from llmconvert.recipes.stages.conversion import (
    convert_stage,
    stream_stage,
)
from llmconvert.recipes.stages.measurements import (
    measure,
    measurements,
    require_accepted,
    require_measurable,
    require_served_as,
)
from llmconvert.recipes.stages.opening import opened_work, put_papers
from llmconvert.recipes.stages.quantization import quantize_stage, statistics_of
from llmconvert.recipes.stages.run import require_texts
from llmconvert.recipes.stages.stage import ORIGINAL, Place, Stage, Work
from llmconvert.recipes.stages.training.distillation import distil_stage
from llmconvert.recipes.stages.training.healing import heal_stage
from llmconvert.recipes.stages.training.settings import (
    distil_request,
    distil_settings,
    heal_request,
    heal_settings,
)
from llmconvert.recipes.stages.windows import (
    CALIBRATION,
    DISTIL_TEXT,
    HEALING_TEXT,
    WindowRequest,
    draw_text,
    text_stage,
)
from llmconvert.report.report import ModelInfo, Report, environment
from llmconvert.report.steps import (
    AttentionReport,
    DistilReport,
    DtypeReport,
    HealReport,
    QuantizeReport,
    StepDetails,
)
from llmconvert.storage.stages import StageStore
from llmconvert.storage.writer import check_output_directory, publish_directory
from llmconvert.text.tokens import TokenWindows
from llmconvert.validate.measurement import Measurement

__all__ = [
    "convert_model",
    "quantize_model",
    "require_comparable",
    "require_output",
    "rewrite_model",
    "validate_model",
]

D = TypeVar("D", bound=StepDetails)

_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth")
_NOTHING = "nothing was written; run the same command again"


def _built(stage: Stage[D], work: Work, output: Path) -> D:
    """Build a stage's model in ``output``, and tell there what it did."""
    begin = time.perf_counter()
    with PeakMemory() as memory:
        made = work.build(stage, Place(output))
    tell_steps(output, [told_step(stage.name, made, time.perf_counter() - begin, memory)])
    return made


def convert_model(recipe: Recipe, output: Path, *, progress: Progress = SILENT) -> DtypeReport:
    """Convert ``recipe.model`` to ``recipe.convert.dtype`` in the directory ``output``.

    Where it streams, a Hub model is converted while it downloads: disk need is the output and two source shards, and
    a call that was stopped continues.

    Raises:
        LlmconvertError: see :func:`llmconvert.convert.source.open_source` and
            :func:`llmconvert.convert.dtype.convert_dtype`.
    """
    require_output(recipe, output)
    recipe = recipe.model_copy(update={"quantize": None})
    with interruptible(), opened_work(recipe, progress) as work:
        put_papers(work)
        made = (
            _built(stream_stage(recipe), work, output) if recipe.stream else _built(convert_stage(recipe), work, output)
        )
    assert isinstance(made, DtypeReport)
    return made


def rewrite_model(
    recipe: Recipe, output: Path, *, progress: Progress = SILENT
) -> tuple[AttentionReport, HealReport | None]:
    """Merge the key-value heads of ``recipe.model`` into the directory ``output``, by its attention section.

    Weights are written in ``recipe.convert.dtype``; without a calibrate section the weights alone decide. Where the
    section heals, a call that was stopped continues from what waits in a hidden directory beside the output.

    Returns:
        What the merge reports, and what healing does; None without healing.

    Raises:
        UsageError: the recipe has no attention section.
        LlmconvertError: see :func:`llmconvert.convert.gqa.job.convert_attention` and
            :func:`llmconvert.convert.heal.job.heal_attention`.
    """
    settings = recipe.attention
    if settings is None:
        raise UsageError("nothing to rewrite: the recipe has no attention section")
    require_output(recipe, output)
    request, healing = heal_request(recipe), heal_settings(recipe)
    with (
        interruptible(),
        opened_work(recipe, progress) as work,
    ):
        with work.original.open() as checkpoint:
            require_mergeable(checkpoint, settings)
        if recipe.calibrate is not None:
            draw_text(work, CALIBRATION, WindowRequest.calibration(recipe.calibrate))
        put_papers(work)
        merge = attention_stage(settings)
        if healing is None or request is None:
            return _built(merge, work, output), None
        with StageStore(output.with_name(f".{output.name}.healing"), progress=progress) as store:
            stages = store.begin("convert")
            perform(stages, work, text_stage(HEALING_TEXT, request))
            merged = perform(stages, work, merge)
            healed = perform(stages, work, heal_stage(healing, after=merge.name))
            publish_directory(healed.model, output)
        shutil.rmtree(store.work_dir)
        return merged.details, healed.details


def quantize_model(
    recipe: Recipe, output: Path, *, progress: Progress = SILENT, ranks: Ranks = ALONE
) -> tuple[QuantizeReport, DistilReport | None]:
    """Quantize ``recipe.model`` to the directory ``output``, by the recipe's quantize and calibrate sections.

    What stays unquantized is written in ``recipe.convert.dtype``. A call that was stopped continues. Where it streams,
    a Hub model is quantized while it downloads, by a method without calibration: disk need is the output and two
    source shards.

    Where the section distils, a call that was stopped continues from what waits in a hidden directory beside the
    output.

    Args:
        ranks: the processes that quantize it together; each gets the same reports.

    Returns:
        What quantization reports, and what distillation does; None without one.

    Raises:
        UsageError: the recipe has no quantize section, or can't be streamed.
        LlmconvertError: see :func:`llmconvert.quantize.job.quantize_checkpoint`.
    """
    settings = recipe.quantize
    if settings is None:
        raise UsageError("nothing to quantize: the recipe has no quantize section")
    require_output(recipe, output)
    agree(ranks, "quantize", recipe, output=output)
    if not ranks.leads:
        with interruptible():
            follow(recipe, ranks)
        return _told(ranks)
    made, distilled = _quantize(recipe, settings, output, progress, ranks)
    ranks.tell()  # no one is needed any more
    return _told(ranks, made, distilled)


def _told(
    ranks: Ranks, made: QuantizeReport | None = None, distilled: DistilReport | None = None
) -> tuple[QuantizeReport, DistilReport | None]:
    """The reports of the first process."""
    if made is not None and ranks.alone:
        return made, distilled
    own = [None if one is None else one.model_dump(mode="json", by_alias=True) for one in (made, distilled)]
    first, second = ranks.tell(own)
    return QuantizeReport.model_validate(first), None if second is None else DistilReport.model_validate(second)


def _quantize(
    recipe: Recipe, settings: QuantizeSettings, output: Path, progress: Progress, ranks: Ranks
) -> tuple[QuantizeReport, DistilReport | None]:
    lessons, distilling = distil_request(recipe), distil_settings(recipe)
    with interruptible(), opened_work(recipe, progress, ranks) as work:
        if recipe.stream:
            put_papers(work)
            streamed = _built(stream_stage(recipe), work, output)
            assert isinstance(streamed, QuantizeReport)
            return streamed, None
        if recipe.calibrate is not None and settings.calibrates:
            draw_text(work, CALIBRATION, WindowRequest.calibration(recipe.calibrate))
        put_papers(work)
        stage = quantize_stage(settings, after=ORIGINAL, statistics=statistics_of(recipe))
        if distilling is None or lessons is None:
            return _built(stage, work, output), None
        distillation = distil_stage(distilling, stage.name, settings.scheme)
        distillation.forecast(work, output)  # refuses what does not fit before anything is quantized
        with StageStore(output.with_name(f".{output.name}.distilling"), progress=progress) as store:
            stages = store.begin("quantize")
            perform(stages, work, text_stage(DISTIL_TEXT, lessons))
            with PeakMemory() as memory:
                quantized = perform(stages, work, stage)
                distilled = perform(stages, work, distillation)
            publish_directory(distilled.model, output)
        done = ((made.name, made.details, made.details.seconds, memory) for made in (quantized, distilled))
        tell_steps(output, [told_step(*one) for one in done])
        shutil.rmtree(store.work_dir)
        return quantized.details, distilled.details


def validate_model(
    recipe: Recipe,
    reference: str | None = None,
    more: Sequence[Measurement] = (),
    *,
    card: bool = False,
    progress: Progress = SILENT,
    ranks: Ranks = ALONE,
) -> Report:
    """Measure ``recipe.model``, by the recipe's validate section, against the model that ``reference`` names.

    Args:
        more: measurements that no section has.
        card: write what is found into the artifact as a run does: report, page, plots and card.
        ranks: the processes that measure it together; each gets the same report.

    Raises:
        UsageError: the recipe has no validate section, or limits that need a reference where none is named; or the
            model is no directory.
        DatasetError: the text is what the model was calibrated on, as its own report says.
        LlmconvertError: see :func:`llmconvert.validate.artifact.validate_artifact`.
    """
    settings = recipe.validation
    if settings is None:
        raise UsageError("nothing to measure: the recipe has no validate section")
    require_comparable(settings, reference)
    require_measurable(settings)
    require_texts(recipe)
    for measurement in more:
        measurement.require()
    agree(ranks, "validate", recipe, reference=reference)
    device = open_device(recipe.device, None if ranks.alone else ranks.local_rank)
    context = Context(device, recipe.memory, progress=progress, ranks=ranks)
    with interruptible(_NOTHING):
        source = open_source(recipe.model, decoder_alone=True, progress=progress)
        papers = _papers(source) if card and ranks.leads else None
        original = open_source(reference, progress=progress) if reference is not None else None
        with source.checkpoint as checkpoint:
            if not source.path.is_dir() and settings.generation is not None:
                raise UsageError(f"{recipe.model}: transformers generates from directories only; leave out generation")
            summary = describe_model(checkpoint)
            for note in require_served_as(settings, checkpoint):
                progress.log(note)
            require_accepted(settings, checkpoint)
            windows = None
            if settings.perplexity is not None:
                request = WindowRequest.evaluation(settings.perplexity)
                windows = request.draw(checkpoint, request.corpus())
                if short := request.shortfall(windows):
                    progress.log(f"note: {short}")
                _require_other_text(source.path, windows)
        against = original.checkpoint if original is not None else None
        if against is not None:
            for measurement in more:
                measurement.accept(against)
        checks = measure(source.path, against, [*measurements(settings), *more], windows, context=context)
    info = ModelInfo(
        name=public_name(source.origin),
        source=public_name(original.origin if original is not None else source.origin),
        revision=(original or source).revision,
        architecture=summary.architecture,
        parameters=summary.parameters,
        beside=summary.beside,
        loader=summary.loader,
    )
    with suppress(SourceError):  # an artifact that was made here knows more of itself
        info = Report.read(source.path / REPORT_FILE).model.model_copy(update={"name": info.name})
    report = Report(model=info, environment=environment(), checks=tuple(checks))
    if not ranks.alone:
        report = Report.model_validate(ranks.tell(report.model_dump(mode="json", by_alias=True)))
    if papers is not None:
        papers.write(report)
    return report


def _papers(source: Source) -> Papers:
    if source.kind == "hub":
        raise UsageError(
            f"{source.origin}: lies on the Hub, and --card writes into the directory of an artifact; name one"
        )
    return Papers.of(source.path)


def require_output(recipe: Recipe, output: Path) -> None:
    """Refuse, before any work, an output that could not be made.

    Raises:
        OutputError: it is there already, can't be written, or is named like what it won't be.
    """
    layout = load_format(recipe.quantize.format) if recipe.quantize is not None else None
    if not isinstance(layout, FileFormat):
        _refuse_file_name(output)
    elif output.suffix in _FILES and distil_settings(recipe) is not None:
        raise OutputError(f"{output}: a file that is distilled is made in a directory; name one, without .gguf")
    if layout is not None:
        layout.check_output(output)
    else:
        check_output_directory(output)


def _refuse_file_name(output: Path) -> None:
    """A directory named like a file is not what anyone means."""
    if output.suffix in _FILES:
        raise OutputError(
            f"{output}: is named like a file, and what is written is a directory; name one, or for a GGUF file say "
            "--format gguf with one of its types (--scheme q8_0, f16)"
        )


def require_comparable(settings: ValidateSettings, reference: str | None) -> None:
    """Refuse limits that compare with an original where none is named.

    Raises:
        UsageError: naming the limit.
    """
    if reference is not None:
        return
    perplexity, generation, tasks = settings.perplexity, settings.generation, settings.tasks
    limits = {
        "max_increase": perplexity.max_increase if perplexity is not None else None,
        "max_kl": settings.max_kl,
        "min_top1": settings.min_top1,
        "min_agreement": generation.min_agreement if generation is not None else None,
        "max_drop": tasks.max_drop if tasks is not None else None,
    }
    for name, limit in limits.items():
        if limit is not None:
            raise UsageError(
                f"{name} (--{name.replace('_', '-')}) compares with the original, which is not named: "
                "give it (--reference), or leave the limit out"
            )


def _require_other_text(artifact: Path, windows: TokenWindows) -> None:
    report = artifact / REPORT_FILE
    model = Report.read(report).model if report.is_file() else None
    known = (model.calibration_digest, *(source.digest for source in model.calibration_sources)) if model else ()
    if windows.corpus_digest in known:
        raise DatasetError(
            f"dataset {public_name(windows.dataset)}: {artifact.name} was calibrated on this very text, which would "
            "flatter it; name another split or another dataset"
        )
