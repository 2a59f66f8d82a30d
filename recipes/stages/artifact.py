"""The artifact directory: the model's files, the card, and under ``llmconvert/`` what is needed to check and repeat it.

::

    config.json, *.safetensors, tokenizer files     as the last stage wrote them
    README.md                                       the model card
    llmconvert/recipe.yaml                          resolved: commit, versions, every default written out
    llmconvert/report.json, report.html, *.png      everything measured
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmconvert.convert.adapter.files import Adapter
from llmconvert.convert.inspection import describe_model
from llmconvert.convert.quantized import StoredAs
from llmconvert.convert.source import Source
from llmconvert.gguf.split import without_part
from llmconvert.hub.card import CARD
from llmconvert.recipes.schema.recipe import Recipe
from llmconvert.recipes.stages.provenance import REPORT_FILE, provenance
from llmconvert.recipes.stages.stage import Place, Stage, Work
from llmconvert.recipes.stages.windows import CALIBRATION
from llmconvert.report.report import CalibrationSource, Check, ModelInfo, Report, environment
from llmconvert.report.steps import StepDetails
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.contents import listing
from llmconvert.storage.directory import is_weight_file
from llmconvert.storage.disk import disk_error
from llmconvert.storage.writer import write_file
from llmconvert.text.tokens import TokenWindows
from llmconvert.validate.render.card import (
    Address,
    card_metadata,
    inherited_metadata,
    is_untouched,
    render_card,
)
from llmconvert.validate.render.html import render_html
from llmconvert.validate.render.plots import divergence_plot, layer_error_plot, quality_plot
from llmconvert.validate.render.section_plot import section_plot

__all__ = [
    "RECIPE_FILE",
    "REPORT_FILE",
    "address_of",
    "artifact_name",
    "artifact_stage",
    "assemble_artifact",
    "card_for",
    "front_matter_of",
    "model_info",
    "model_stem",
    "names_in",
    "public_name",
    "render_for",
    "resolved_recipe",
    "with_papers",
    "write_up",
]

_GGUF_TYPE = re.compile(r"[.-](?:I?Q\d\w*|BF16|F16|F32)$", re.IGNORECASE)
_PLOTS = (
    ("quality", "Size on disk and perplexity, original and artifact, with 95 % intervals.", quality_plot),
    (
        "divergence",
        "Drift of the hidden state after each block, and after the block alone, entered with the original's state.",
        divergence_plot,
    ),
    ("layers", "Relative error of each quantized weight.", layer_error_plot),
)
#: Where an artifact has the recipe that repeats it.
RECIPE_FILE = "llmconvert/recipe.yaml"
_LINK_REFUSED = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)


def public_name(text: str) -> str:
    """A model or dataset as it may be published: of a path outside the working directory, the last part alone."""
    return Path(text).name if text.startswith(("/", "~", "..")) else text


def model_stem(origin: str) -> str:
    """What a model is called without where it lies and which GGUF type it was stored in."""
    return _GGUF_TYPE.sub("", without_part(Path(origin.rstrip("/")).name))


def artifact_name(recipe: Recipe, source: Source) -> str:
    """What the artifact calls itself: its repository's name on the Hub, with the folder or branch that holds this
    variant; else the model's with the key-value heads it was rewritten to, and the scheme."""
    target = recipe.publish
    if target is not None and not target.to.startswith("file:"):
        branch = target.revision if (target.revision or "main") != "main" else None
        parts = [target.to.split("/")[1], *filter(None, (branch, target.folder))]
        return "-".join(parts).replace("/", "-")
    heads = [f"kv{recipe.attention.kv_heads}"] if recipe.attention is not None else []
    suffix = recipe.quantize.label if recipe.quantize is not None else recipe.convert.dtype
    return "-".join((model_stem(source.origin), *heads, suffix))


def model_info(
    recipe: Recipe,
    source: Source,
    original: Checkpoint,
    calibration: TokenWindows | None,
    stored: StoredAs | None = None,
    adapter: Adapter | None = None,
) -> ModelInfo:
    """What was made of what, for the report. ``original`` is the converted model, ``stored`` what it came in."""
    summary = describe_model(original)
    settings = recipe.quantize
    origin = provenance(source)
    words = None
    if calibration is not None:
        named = public_name(calibration.dataset)
        if calibration.sources:
            named = " and ".join(f"{public_name(one.dataset)} ({one.samples})" for one in calibration.sources)
        words = f"{named}, {calibration.drawn} × {calibration.length} tokens"
        if settings is not None and recipe.calibrate is not None and recipe.calibrate.statistics == "original":
            words += ", activations of the original"
    return ModelInfo(
        name=artifact_name(recipe, source),
        source=public_name(source.origin),
        revision=source.revision,
        architecture=summary.architecture,
        parameters=summary.parameters,
        beside=summary.beside,
        loader=summary.loader,
        license=origin.license,
        base_model=recipe.card.base_model or origin.base_model,
        parents=origin.parents,
        adapter=_named(adapter) if adapter is not None else None,
        stored=str(stored) if stored is not None else None,
        requantized=stored is not None and not stored.released and settings is not None and recipe.requantize,
        method=settings.method if settings is not None else None,
        scheme=settings.label if settings is not None else None,
        format=settings.format if settings is not None else None,
        calibration=words,
        calibration_digest=calibration.corpus_digest if calibration is not None else None,
        calibration_sources=tuple(
            CalibrationSource(
                dataset=public_name(one.dataset), digest=one.corpus_digest, samples=one.samples, tokens=one.tokens
            )
            for one in (calibration.sources if calibration is not None else ())
        ),
    )


def _named(adapter: Adapter) -> str:
    return public_name(adapter.origin) + (f"@{adapter.revision}" if adapter.revision else "")


def resolved_recipe(recipe: Recipe, source: Source, report: Report) -> str:
    """The recipe as YAML that repeats the run: the model at its commit, every default, versions as comments.

    Where and under which names this run worked and published is left out, and of local paths all but the last part.
    """
    values: dict[str, Any] = recipe.to_mapping()
    for key in ("publish", "work_dir", "memory", "stream"):
        values.pop(key, None)
    values["model"] = public_name(source.origin) + (f"@{source.revision}" if source.revision else "")
    if report.model.adapter is not None:
        values["adapter"] = report.model.adapter
    measured, quantized = values.get("validate") or {}, values.get("quantize") or {}
    trained = (quantized.get("distil"), (values.get("attention") or {}).get("heal"))
    for section in (values.get("calibrate"), measured.get("perplexity"), *trained):
        if section and (found := section.get("dataset")):
            section["dataset"] = (
                public_name(found)
                if isinstance(found, str)
                else [{**source, "name": public_name(source["name"])} for source in found]
            )
    for section, key in ((measured.get("tasks"), "include"), (quantized.get("options"), "file")):
        if section and isinstance(section.get(key), str):
            section[key] = public_name(section[key])
    if serve := measured.get("serve"):  # each with the Python that has it on this machine
        serve["runtimes"] = [served.partition("=")[0].strip() for served in serve["runtimes"]]
    versions = ", ".join(f"{name} {version}" for name, version in report.environment.items())
    return f"# Made with {versions}.\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def assemble_artifact(model: Path, artifact: Path, recipe: Recipe, source: Source, report: Report) -> None:
    """Make the directory ``artifact`` from a finished model and its report.

    Weight files are linked rather than copied where the file system can: they are never written to again.

    Raises:
        MachineError: the disk fails or is full.
    """
    folder = artifact / "llmconvert"
    path = folder
    try:
        folder.mkdir(parents=True)
        for name in listing(model):
            path = artifact / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _take(model / name, path)
    except OSError as error:
        raise disk_error(error, path) from error
    text = resolved_recipe(recipe, source, report)
    write_file(artifact / RECIPE_FILE, text.encode())
    write_up(artifact, report, text, provenance(source).inherited, address_of(recipe))


def write_up(artifact: Path, report: Report, recipe: str, inherited: Mapping[str, Any], address: Address) -> None:
    """Write what is told of an artifact into its directory: report, page, plots and card.

    Args:
        recipe: the resolved recipe as YAML.
        inherited: what the original's card says of the model.
        address: where users will load it from.

    Raises:
        MachineError: the disk fails or is full.
    """
    folder = artifact / "llmconvert"
    report.write(artifact / REPORT_FILE)
    write_file(folder / "report.html", render_html(report, recipe=recipe).encode())
    for name, _, draw in _PLOTS:
        picture = draw(report, "png")
        if picture is not None:
            write_file(folder / f"{name}.png", picture)
    for section in report.sections:
        picture = section_plot(section, "png") if "card" in section.shown else None
        if picture is not None:
            write_file(folder / f"{section.name}.png", picture)
    card = render_for(report, recipe, inherited, address, names_in(artifact))
    write_file(artifact / CARD, card.encode())


def with_papers(work: Work) -> None:
    """Put a card, a report and a recipe of the artifact to be in place of the source's card, which would be copied.

    Nothing has been measured when they are written.
    """
    source = work.source
    with work.original.open() as checkpoint:
        info = model_info(work.recipe, source, checkpoint, work.texts.get(CALIBRATION), work.stored, work.adapter)
    report = Report(model=info, environment=environment())
    text = resolved_recipe(work.recipe, source, report)
    files = source.checkpoint.files
    card = render_for(report, text, provenance(source).inherited, address_of(work.recipe), files)
    papers = {CARD: card.encode(), REPORT_FILE: report.to_json().encode(), RECIPE_FILE: text.encode()}
    source.checkpoint.files = {**files, **papers}


def card_for(directory: Path, address: Address) -> bytes | None:
    """The card of the artifact in ``directory`` as it should be at another address; None if it has none that was
    written here, or somebody has touched it since.

    Raises:
        SourceError: its report can't be read.
    """
    try:
        card, text = (directory / CARD).read_text(), (directory / RECIPE_FILE).read_text()
    except (OSError, UnicodeDecodeError):
        return None
    if not is_untouched(card):
        return None
    report = Report.read(directory / REPORT_FILE)
    name = address.repository.split("/")[1] if address.hub else report.model.name
    report = report.model_copy(update={"model": report.model.model_copy(update={"name": name})})
    return render_for(report, text, inherited_metadata(card), address, names_in(directory)).encode()


def render_for(
    report: Report, recipe: str, inherited: Mapping[str, Any], address: Address, names: Collection[str]
) -> str:
    """The card of an artifact that has files of these names."""
    plots = {name: f"llmconvert/{name}.png" for name in (*(name for name, _, _ in _PLOTS), *_shown(report))}
    drawn = {name: path for name, path in plots.items() if path in names}
    return render_card(
        report,
        address=address,
        recipe=recipe,
        inherited=inherited,
        chat=any(name.startswith("chat_template") for name in names),
        plots=[(caption, drawn[name]) for name, caption, _ in _PLOTS if name in drawn],
        section_plots={name: drawn[name] for name in _shown(report) if name in drawn},
    )


def _shown(report: Report) -> list[str]:
    return [section.name for section in report.sections if "card" in section.shown]


def names_in(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def front_matter_of(recipe: Recipe, source: Source, original: Checkpoint) -> str:
    """What the card of the artifact to be will begin with; ``original`` is the converted model."""
    runtime = recipe.quantize.runtime if recipe.quantize is not None else None
    return card_metadata(model_info(recipe, source, original, None), provenance(source).inherited, runtime)


def artifact_stage(
    model: str, measured: str | None, checks: Sequence[Check], more: Sequence[Check]
) -> Stage[StepDetails]:
    """Write up the model of a stage: its report, its card, and the recipe that repeats it.

    Args:
        measured: the stage that measured it, with ``checks``; None without one.
        more: what else was found out on the way.
    """

    def build(work: Work, place: Place) -> StepDetails:
        with work.original.open() as checkpoint:
            info = model_info(
                work.recipe, work.source, checkpoint, work.texts.get(CALIBRATION), work.stored, work.adapter
            )
        report = Report(model=info, environment=environment(), steps=tuple(work.steps), checks=(*checks, *more))
        assemble_artifact(work.finished[model].model, place.model, work.recipe, work.source, report)
        return StepDetails()

    def inputs(work: Work) -> Mapping[str, Any]:
        return {
            "measured": work.key(measured) if measured is not None else None,
            "more": [check.model_dump(mode="json") for check in more],
            "recipe": work.recipe.to_mapping(),
            "source": f"{work.source.origin}@{work.source.revision}",
        }

    return Stage("artifact", {"model": model}, StepDetails.model_validate, build, inputs, reported=False)


def address_of(recipe: Recipe) -> Address:
    """Where users will load the artifact from; from a directory that may be moved, as the one that the card lies in."""
    target = recipe.publish
    if target is None or target.to.startswith("file:"):
        return Address(".")
    revision = target.revision if (target.revision or "main") != "main" else None
    return Address(target.to, target.folder, revision)


def _take(source: Path, target: Path) -> None:
    if is_weight_file(source.name):
        try:
            os.link(source, target)
            return
        except OSError as error:
            if error.errno not in _LINK_REFUSED:
                raise
    shutil.copyfile(source, target)
