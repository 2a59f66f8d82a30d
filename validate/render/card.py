"""The model card: Hub metadata, measured numbers, how to load it, how it was made.

Metadata as the Hub documents it (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from llmconvert.errors import HubError
from llmconvert.quantize.formats.base import FORMATS, load_format
from llmconvert.quantize.runtimes import runtimes_of
from llmconvert.report.report import Report
from llmconvert.validate.render.display import rows, section_table
from llmconvert.validate.render.html import template_environment

__all__ = ["inherited_license", "render_card"]


def render_card(
    report: Report,
    *,
    repository: str,
    recipe: str,
    license_fields: Mapping[str, str] | None = None,
    chat: bool = False,
    plots: Sequence[tuple[str, str]] = (),
    section_plots: Mapping[str, str] | None = None,
    limitations: Sequence[str] = (),
) -> str:
    """``README.md`` of an artifact, parsed once by ``huggingface_hub`` before it is returned.

    Args:
        repository: where users will load it from: ``user/name``, or a directory.
        recipe: the resolved recipe as YAML.
        license_fields: ``license``, ``license_name``, ``license_link`` of the original (:func:`inherited_license`).
        chat: whether the tokenizer has a chat template, for the example.
        plots: (caption, path inside the repository).
        section_plots: name of a section → path of its plot.
        limitations: sentences to add to the standing ones.

    Raises:
        HubError: the card's metadata would not be valid on the Hub.
    """
    model = report.model
    base = model.base_model
    section_plots = section_plots or {}
    template = template_environment(escape=False).get_template("card.md.j2")
    body = template.render(
        title=model.name,
        model=model,
        base=base,
        repository=repository,
        rows=[row for row in rows(report) if row.value and not row.quiet],
        sections=[
            (section, section_table(section), section_plots.get(section.name, ""))
            for section in report.sections
            if "card" in section.shown
        ],
        about=_detail(report, "perplexity"),
        fidelity=report.check("fidelity.max_abs_diff"),
        vllm_fidelity=report.check("fidelity.vllm_mean_abs_diff"),
        failed=report.failed,
        recipe=recipe.strip(),
        chat=chat,
        library=_library(model.format),
        vllm=model.format is None or any(runtime.script == "vllm" for runtime in runtimes_of(model.format)),
        plots=plots,
        limitations=limitations,
        environment=report.environment,
    )
    card = f"---\n{_metadata(report, license_fields or {}).to_yaml()}\n---\n\n{body}"
    try:
        ModelCard(card)
    except (ValueError, yaml.YAMLError) as error:
        raise HubError(f"the model card's metadata is not valid: {error}") from error
    return card


def _metadata(report: Report, license_fields: Mapping[str, str]) -> ModelCardData:
    model = report.model
    tags = ["llmconvert"]
    if model.scheme:
        bits = re.match(r"w(\d+)a(\d+)", model.scheme)
        tags += [tag for tag in (model.method, model.format, bits and f"{bits[1]}-bit", bits and bits[0]) if tag]
    fields: dict[str, Any] = {
        **{key: license_fields[key] for key in ("license", "license_name", "license_link") if key in license_fields},
        "library_name": _library(model.format),
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(tags)),
    }
    if model.license and "license" not in fields:
        fields["license"] = model.license
    if model.base_model is not None:
        fields["base_model"] = [model.base_model]
        fields["base_model_relation"] = "quantized" if model.scheme else "finetune"
    elif model.parents:
        # The artifact is not a quantization of these; how it relates to them is more than anyone has said.
        fields["base_model"] = list(model.parents)
    return ModelCardData(**fields)


def _library(format: str | None) -> str:
    """What loads the model, by the Hub's name for it; formats that other versions wrote are taken for transformers'."""
    return load_format(format).library if format is not None and format in FORMATS else "transformers"


def inherited_license(readme: bytes | str | None) -> dict[str, str]:
    """The licence fields of an original's card: ``license``, and ``license_name`` and ``license_link`` if it has them.

    Empty without a card, or with one that can't be parsed.
    """
    if readme is None:
        return {}
    text = readme.decode("utf-8", errors="replace") if isinstance(readme, bytes) else readme
    match = re.match(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", text, re.DOTALL)
    try:
        fields = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    if not isinstance(fields, dict):
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: fields[key] for key in keys if isinstance(fields.get(key), str)}


def _detail(report: Report, name: str) -> Mapping[str, Any]:
    check = report.check(name)
    return {} if check is None else check.detail
