"""The model card: Hub metadata, measured numbers, how to load it, how it was made.

Metadata as the Hub documents it (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from llmconvert.errors import HubError, SchemeError
from llmconvert.hub.card import CARD, front_matter, mark_card, state_of_card
from llmconvert.quantize.catalog.formats import FORMATS
from llmconvert.quantize.catalog.methods import METHODS
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.matrix import Readership, readership
from llmconvert.quantize.runtimes import runtimes_of
from llmconvert.quantize.scheme import Scheme, SchemeOrMix, parse_scheme
from llmconvert.report.report import ModelInfo, Report
from llmconvert.report.steps import QuantizeReport
from llmconvert.validate.render.display import label_of, printable_report, rows, section_table
from llmconvert.validate.render.html import template_environment

__all__ = ["Address", "card_metadata", "inherited_metadata", "is_untouched", "render_card", "runtime_of"]

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


# What an original's card says of the model itself, and so of every artifact made from it.
_INHERITED = ("license", "license_name", "license_link", "language", "tags")
# The Hub's word for what a model does, by the class that loads it.
_PIPELINES = {"AutoModelForImageTextToText": "image-text-to-text", "AutoModelForMultimodalLM": "any-to-any"}
# What reports call a matrix of a single expert.
_EXPERT = re.compile(r"\.experts\.\d+\.")
# What the mark of a card that is written here calls it.
_KIND = "model card"
_OF_SCHEMES = re.compile(r"\d+-bit|w\d+(a\d+)?")


@dataclass(frozen=True, slots=True)
class Address:
    """Where users load an artifact from.

    Attributes:
        repository: ``user/name`` on the Hub, or a directory; ``.`` is the one that the card itself lies in.
        folder: of the repository, for one of several variants.
        revision: branch or tag, where it is not the main branch.
    """

    repository: str
    folder: str | None = None
    revision: str | None = None

    @property
    def hub(self) -> bool:
        """Whether that is a repository on the Hub, which runtimes fetch by its name."""
        return _REPOSITORY.fullmatch(self.repository) is not None

    def arguments(self, *, folder: bool = True) -> str:
        """What ``from_pretrained`` gets: ``"user/name", revision="w4"``."""
        given = {"revision": self.revision, "subfolder": self.folder if folder else None}
        return ", ".join([f'"{self.repository}"', *(f'{key}="{value}"' for key, value in given.items() if value)])


def render_card(
    report: Report,
    *,
    address: Address,
    recipe: str,
    inherited: Mapping[str, Any] | None = None,
    chat: bool = False,
    plots: Sequence[tuple[str, str]] = (),
    section_plots: Mapping[str, str] | None = None,
    limitations: Sequence[str] = (),
) -> str:
    """``README.md`` of an artifact, with a mark that tells whether anybody has touched it since (:func:`is_untouched`).

    Args:
        address: where users will load it from.
        recipe: the resolved recipe as YAML.
        inherited: what the original's card says of the model (:func:`inherited_metadata`).
        chat: whether the tokenizer has a chat template, for the example.
        plots: (caption, path inside the repository).
        section_plots: name of a section → path of its plot.
        limitations: sentences to add to the standing ones.

    Raises:
        HubError: the card's metadata would not be valid on the Hub.
    """
    report = printable_report(report)
    model = report.model
    base = model.base_model
    section_plots = section_plots or {}
    schemes = _schemes(report)
    template = template_environment(escape=False).get_template("card.md.j2")
    body = template.render(
        title=model.name,
        model=model,
        base=base,
        address=address,
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
        measured=report.outcome != "not measured",
        unmeasured=[check for check in report.unmeasured if check.ok],
        label_of=label_of,
        recipe=recipe.strip(),
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0)),
        chat=chat,
        library=_library(model.format, runtime_of(report)),
        gguf=_file(report),
        projector=_projector(report),
        readers=_readers(report, schemes),
        schemes=len(schemes),
        # Zero points are packed, which transformers' kernel path refuses to read.
        unpacked=model.format == "compressed-tensors"
        and any(isinstance(scheme, Scheme) and not scheme.symmetric for scheme in schemes),
        vllm=model.format is None
        or runtime_of(report) == "vllm"
        or any(
            runtime.script == "vllm" and runtime.outer_read(_outer(report)) for runtime in runtimes_of(model.format)
        ),
        plots=plots,
        limitations=limitations,
        environment=report.environment,
    )
    return mark_card(card_metadata(model, inherited or {}, runtime_of(report)), f"\n{body}", _KIND)


def is_untouched(card: str) -> bool:
    """Whether :func:`render_card` wrote it, and nobody has touched it since."""
    return state_of_card(card, _KIND) == "ours"


def card_metadata(model: ModelInfo, inherited: Mapping[str, Any], runtime: str | None = None) -> str:
    """The front matter of an artifact's card, fences included.

    Args:
        model: what it is of.
        inherited: what the original's card says.
        runtime: the one that it was written for alone.

    Raises:
        HubError: ``huggingface_hub`` would not read it.
    """
    tags = ["llmconvert"]
    if model.scheme:
        bits = re.match(r"w(\d+)a(\d+)", model.scheme)
        tags += [tag for tag in (model.method, model.format, bits and f"{bits[1]}-bit", bits and bits[0]) if tag]
    fields: dict[str, Any] = {
        **{key: inherited[key] for key in _INHERITED if key in inherited and key != "tags"},
        "library_name": _library(model.format, runtime),
        "pipeline_tag": _PIPELINES.get(model.loader, "text-generation"),
        "tags": list(dict.fromkeys([*tags, *inherited.get("tags", ())])),
    }
    if model.license and "license" not in fields:
        fields["license"] = model.license
    if model.base_model is not None:
        fields["base_model"] = [model.base_model]
        fields["base_model_relation"] = "quantized" if model.scheme else "finetune"
    elif model.parents:
        # The artifact is not a quantization of these; how it relates to them is more than anyone has said.
        fields["base_model"] = list(model.parents)
    written = f"---\n{ModelCardData(**fields).to_yaml()}\n---\n"
    front_matter(written, f"the card of {model.name}")
    return written


def _schemes(report: Report) -> tuple[SchemeOrMix, ...]:
    """What the artifact's linears are stored in at last: a budget, overrides and repairs may have chosen by linear."""
    by_linear: dict[str, str] = {}
    for step in report.steps:
        if isinstance(step.details, QuantizeReport):
            by_linear |= {linear.name: linear.scheme for linear in step.details.linears}
    mixes = _library(report.model.format) == "gguf"
    names = [report.model.scheme or ""] if mixes or not by_linear else by_linear.values()
    found: dict[SchemeOrMix, None] = {}
    for name in dict.fromkeys(names):
        with contextlib.suppress(SchemeError):  # a linear that a repair left dense
            found[parse_scheme(name)] = None
    return tuple(found)


def _readers(report: Report, schemes: Sequence[SchemeOrMix]) -> Readership | None:
    """Which runtimes read all of these; None where nothing is quantized, or in a format of another version."""
    format = report.model.format
    known = format in FORMATS and format is not None and schemes
    runtime = runtime_of(report)
    if not known or format is None:
        return None
    details = [step.details for step in report.steps if isinstance(step.details, QuantizeReport)]
    experts = any(_EXPERT.search(linear.name) for found in details for linear in found.linears)
    return readership(format, schemes, _outer(report), runtime, experts=experts)


def _outer(report: Report) -> set[str]:
    """What is quantized outside the blocks."""
    details = [step.details for step in report.steps if isinstance(step.details, QuantizeReport)]
    return {linear.outer for found in details for linear in found.linears if linear.outer}


def _file(report: Report) -> str:
    """The artifact's only weight file, where its format has one and a step says its name; empty otherwise."""
    files = (step.details.file for step in report.steps if isinstance(step.details, QuantizeReport))
    return next((file for file in files if file is not None), "")


def _projector(report: Report) -> str:
    """The file with the model's part for images, where there is one; empty otherwise."""
    files = (step.details.projector for step in report.steps if isinstance(step.details, QuantizeReport))
    return next((file for file in files if file is not None), "")


def runtime_of(report: Report) -> str | None:
    """The runtime that it was written for alone; None for all that read the format."""
    details = [step.details for step in report.steps if isinstance(step.details, QuantizeReport)]
    return next((found.runtime for found in details if found.runtime is not None), None)


def _library(format: str | None, runtime: str | None = None) -> str:
    """What loads the model, by the Hub's name for it; formats that other versions wrote are taken for transformers'."""
    known = format is not None and format in FORMATS
    return load_format(format, runtime).library if known and format is not None else "transformers"


def inherited_metadata(readme: bytes | str | None) -> dict[str, Any]:
    """What an original's card says of the model in its front matter: licence (one or several), languages and tags.

    Empty without a card, or with one whose front matter can't be parsed.
    """
    if readme is None:
        return {}
    text = readme.decode("utf-8", errors="replace") if isinstance(readme, bytes) else readme
    try:
        fields = front_matter(text, CARD)
    except HubError:
        return {}
    found: dict[str, Any] = {}
    for key in _INHERITED:
        value = fields.get(key)
        names = [name for name in value if isinstance(name, str)] if isinstance(value, list) else value
        if names and isinstance(names, str | list):
            found[key] = names
    tags = found.pop("tags", ())
    tags = [tags] if isinstance(tags, str) else tags
    if "llmconvert" in tags:  # of those, some tell how an earlier artifact was made
        tags = [tag for tag in tags if tag not in (*METHODS, *FORMATS) and _OF_SCHEMES.fullmatch(tag) is None]
    return {**found, **({"tags": tags} if tags else {})}


def _detail(report: Report, name: str) -> Mapping[str, Any]:
    check = report.check(name)
    return {} if check is None else check.detail
