"""Cards of artifacts: about the artifact whichever command made it, at the address that it is published to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.multimodal_families import save_family
from support.tiny_models import tiny_llama_dir
from transformers import AutoModelForCausalLM

import llmconvert
from llmconvert.errors import SourceError
from llmconvert.recipes.stages.artifact import card_for
from llmconvert.report.report import Report
from llmconvert.validate.render.card import Address
from llmconvert.validate.render.html import render_html

SOURCE = """---
license: [mit, apache-2.0]
language: en
tags: [maker-tag, 4-bit]
base_model: maker/Base
---
# The original, by its maker
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tiny_llama_dir(tmp_path / "maker")
    (directory / "README.md").write_text(SOURCE)
    return directory


def front(card: str) -> dict[str, Any]:
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def planned(directory: Path, repository: str = "me/published", **options: str) -> str:
    card = llmconvert.plan_push(directory, repository, **options).card
    assert card is not None
    return card


@pytest.fixture
def quantized(model: Path, tmp_path: Path) -> Path:
    return llmconvert.quantize_model(model, tmp_path / "w4", method="rtn", scheme="w4a16-g32").path


def test_a_single_step_writes_a_card_about_what_it_made(quantized: Path) -> None:
    card = (quantized / "README.md").read_text()
    assert "by its maker" not in card
    assert "quantized to `w4a16-g32" in card and "scheme: w4a16-g32" in card
    found = front(card)
    assert (found["license"], found["language"], found["base_model"]) == (["mit", "apache-2.0"], "en", ["maker/Base"])
    assert found["tags"][0] == "llmconvert" and {"rtn", "w4a16", "maker-tag"} <= set(found["tags"])
    report = json.loads((quantized / "llmconvert" / "report.json").read_text())
    assert (report["checks"], report["model"]["method"]) == ([], "rtn")
    assert AutoModelForCausalLM.from_pretrained(quantized) is not None


def test_what_is_published_says_where_it_is(quantized: Path) -> None:
    card = planned(quantized, "me/published", folder="w4", revision="dev")
    assert '"me/published", revision="dev", subfolder="w4"' in card and "# published" in card
    assert '"."' not in card and '"."' in (quantized / "README.md").read_text()
    assert planned(quantized, revision="main") == planned(quantized)


def test_numbers_that_were_measured_later_are_on_the_card(quantized: Path, model: Path) -> None:
    assert "| Weights on disk |" not in planned(quantized)
    report = llmconvert.validate_model(quantized, model, max_bytes="1GB")
    report.write(quantized / "llmconvert" / "report.json")
    card = planned(quantized)
    assert "| Weights on disk |" in card and "quantized to `w4a16-g32" in card
    assert front(card)["base_model"] == ["maker/Base"]


def test_what_somebody_wrote_stays(quantized: Path, model: Path) -> None:
    card = quantized / "README.md"
    edited = card.read_text().replace("## Limitations", "## Thanks\n\nTo all.\n\n## Limitations")
    for text in (edited, "# entirely my own\n", card.read_text().replace("maker-tag", "my-tag")):
        card.write_text(text)
        assert planned(quantized) == text
    assert planned(model) == SOURCE, "a copy of somebody's model is published as it is"
    card.unlink()
    assert llmconvert.plan_push(quantized, "me/published").card is None


def test_steps_one_after_the_other_keep_where_it_all_came_from(model: Path, tmp_path: Path) -> None:
    half = llmconvert.convert_model(model, tmp_path / "half", dtype="float16").path
    merged = llmconvert.convert_model(half, tmp_path / "mqa", kv_heads=1, gqa_method="mean", refit=False).path
    last = llmconvert.quantize_model(merged, tmp_path / "w4", method="rtn", scheme="w4a16-g32").path
    back = llmconvert.convert_model(last, tmp_path / "dense").path
    for directory in (half, merged, last, back):
        found = front(planned(directory))
        assert (found["license"], found["base_model"]) == (["mit", "apache-2.0"], ["maker/Base"])
        assert ("w4a16" in found["tags"], "rtn" in found["tags"]) == (directory == last,) * 2
        assert "maker-tag" in found["tags"]


def test_front_matter_of_the_source_that_is_no_yaml_is_said(model: Path, tmp_path: Path) -> None:
    class Log:
        lines: list[str] = []  # noqa: RUF012

        def log(self, message: str) -> None:
            self.lines.append(message)

        task = llmconvert.SILENT.task

    (model / "README.md").write_text("---\nlicense: [mit\n---\n")
    llmconvert.convert_model(model, tmp_path / "half", dtype="float16", progress=Log())
    assert any("line 2: the front matter is no YAML" in line and "not carried over" in line for line in Log.lines)


def test_a_damaged_report_beside_an_untouched_card_is_named(quantized: Path) -> None:
    (quantized / "llmconvert" / "report.json").write_text("{")
    with pytest.raises(SourceError, match=r"report\.json"):
        card_for(quantized, Address("me/published"))


def test_of_a_multimodal_model_the_card_says_what_text_cannot_show(tmp_path: Path) -> None:
    source = save_family(tmp_path / "llava", "llava")
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        (source / name).write_text('{"a": 1}')
    made = llmconvert.quantize_model(source, tmp_path / "w4", method="rtn", scheme="w4a16-g32", dtype="float32").path
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        assert json.loads((made / name).read_text()) == {"a": 1}
    card = (made / "README.md").read_text()
    assert front(card)["pipeline_tag"] == "image-text-to-text"
    assert 'model = AutoModelForImageTextToText.from_pretrained("."' in card and "AutoModelForCausalLM" not in card
    assert "30,208 of the original's 163,776 parameters, its parts for images or sound, are carried over" in card
    report = Report.read(made / "llmconvert" / "report.json")
    assert (report.model.beside, report.model.loader) == (30_208, "AutoModelForImageTextToText")
    assert "Measured on text alone" in render_html(report)
