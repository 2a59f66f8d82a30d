"""The model card: metadata the Hub accepts, the measured numbers, and snippets that run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from llmconvert.report.report import Check, Report
from llmconvert.report.section import Column, Section
from llmconvert.report.steps import LinearReport, QuantizeReport, Step
from llmconvert.validate.render.card import Address, inherited_metadata, render_card

RECIPE = "model: maker/Tiny\nquantize: {method: gptq, scheme: w4a16-g64}\n"


def front_matter(card: str) -> dict[str, object]:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match is not None
    found = yaml.safe_load(match[1])
    assert isinstance(found, dict)
    return found


def test_metadata(report: Report) -> None:
    card = render_card(report, address=Address("user/Tiny-W4A16"), recipe=RECIPE)
    found = front_matter(card)
    assert found == {
        "base_model": ["maker/Tiny"],
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llmconvert", "gptq", "compressed-tensors", "4-bit", "w4a16"],
    }
    data = ModelCard(card).data
    assert (data.get("base_model"), data.get("license")) == (["maker/Tiny"], "apache-2.0")


def test_what_is_for_vllm_alone_is_not_shown_in_transformers(report: Report) -> None:
    expert = LinearReport(name="layers.0.mlp.experts.0.up_proj", scheme="w4a16-g64", error=None)
    details = QuantizeReport(layers=1, bytes=1, seconds=1.0, runtime="vllm", linears=(expert,))
    steps = (*report.steps, Step(name="quantize", seconds=1.0, details=details))
    card = render_card(report.model_copy(update={"steps": steps}), address=Address("user/x"), recipe=RECIPE)
    assert front_matter(card)["library_name"] == "vllm" and "from vllm import" in card
    assert "from transformers import" not in card and "were run with" not in card
    assert "**vLLM on CPU** was never seen to run quantized experts" in card


def test_what_was_not_measured_is_said(report: Report) -> None:
    told = render_card(report, address=Address("user/x"), recipe=RECIPE)
    assert "Every number below was measured" in told and "not measured" not in told
    silent = report.model_copy(update={"checks": ()})
    card = render_card(silent, address=Address("user/x"), recipe=RECIPE)
    assert "**How well it predicts was not measured**" in card
    assert "Every number below" not in card and "What it costs" not in card
    unread = Check.unmeasured("runtime", "it does not fit", asked=False)
    card = render_card(
        report.model_copy(update={"checks": (*report.checks, unread)}), address=Address("user/x"), recipe=RECIPE
    )
    assert "Tensors the runtime could not load: not measured: it does not fit." in card


def test_names_of_others_are_text(report: Report) -> None:
    """Neither HTML nor pictures nor another table come from what tensors, files and prompts are called."""
    evil = "<script>alert(1)</script>\x1b[2J|![x](http://x.example/)\n\n# `more`"
    section = Section(
        name="s", title=evil, text=evil, columns=(Column(heading=evil),), rows=((evil,),), shown=("card",)
    )
    checks = (
        *report.checks,
        Check(name=evil, label=evil, value=1.0, sections=(section,)),
        Check(name="kl_mean", ok=False, detail={"text": evil}),
    )
    model = report.model.model_copy(update={"source": evil, "base_model": None, "calibration": evil})
    recipe = "model: a\nprompts: ['```', '<b>']\n"
    card = render_card(
        report.model_copy(update={"checks": checks, "model": model}), address=Address("user/x"), recipe=recipe
    )
    prose = card.split("````yaml")[0]
    assert "<script" not in prose and "\x1b" not in card and "![x](" not in prose
    assert card.count("````") == 2 and recipe.strip() in card
    cells = [line for line in card.splitlines() if line.startswith("| ") and "&lt;script>" in line]
    assert [cell.replace("\\|", "").count("|") for cell in cells] == [5, 2, 2]
    assert not any(line.startswith("# `more`") for line in card.splitlines())


def test_the_originals_licence_is_kept(report: Report) -> None:
    readme = b"---\nlicense: other\nlicense_name: tiny-community\nlicense_link: LICENSE.txt\ntags: [x]\n---\n# Tiny\n"
    fields = inherited_metadata(readme)
    assert fields == {
        "license": "other",
        "license_name": "tiny-community",
        "license_link": "LICENSE.txt",
        "tags": ["x"],
    }
    found = front_matter(render_card(report, address=Address("user/x"), recipe=RECIPE, inherited=fields))
    assert {key: found[key] for key in fields if key != "tags"} == {k: v for k, v in fields.items() if k != "tags"}
    tags = found["tags"]
    assert isinstance(tags, list) and tags[-1] == "x" and "4-bit" in tags


def test_several_licences_languages_and_a_blank_line_before_them_are_kept(report: Report) -> None:
    readme = "\n---\nlicense: [mit, apache-2.0]\nlanguage:\n- en\n- de\n---\n# Tiny\n"
    fields = inherited_metadata(readme)
    assert fields == {"license": ["mit", "apache-2.0"], "language": ["en", "de"]}
    found = front_matter(render_card(report, address=Address("user/x"), recipe=RECIPE, inherited=fields))
    assert (found["license"], found["language"]) == (["mit", "apache-2.0"], ["en", "de"])


@pytest.mark.parametrize(
    "readme", [None, "# No front matter", "---\n- a list\n---\n", "---\n{: broken\n---\n", b"\xff"]
)
def test_no_licence_is_invented(readme: str | bytes | None) -> None:
    assert inherited_metadata(readme) == {}


def test_numbers_and_how_they_were_measured(report: Report) -> None:
    card = render_card(
        report, address=Address("user/x"), recipe=RECIPE, plots=[("Size and quality.", "llmconvert/quality.png")]
    )
    assert "| Perplexity | 12.11 (11.02 to 13.38) | 13.42 (12.21 to 14.93) | +10.8 % (+9.7 % to +12.1 %) |" in card
    assert "| Weights on disk | 269.1 MB | 113.2 MB | \N{MINUS SIGN}57.9 % |" in card
    assert "made:up, 16 windows of 512 tokens" in card and "(8,176 predictions)" in card
    assert "![Size and quality.](llmconvert/quality.png)" in card
    assert RECIPE.strip() in card and "Calibrated on other:text, 32 × 512 tokens." in card
    # A table is one block: no empty line may split it.
    assert re.search(r"\|---\|---:\|---:\|---:\|\n\| Weights", card)


def card_of(report: Report, **model: object) -> dict[str, object]:
    changed = report.model_copy(update={"model": report.model.model_copy(update=model)})
    return front_matter(render_card(changed, address=Address("x"), recipe=RECIPE))


def test_a_base_model_is_only_what_somebody_said(report: Report) -> None:
    found = card_of(report, source="out/copy", base_model=None, scheme=None, format=None)
    assert "base_model" not in found and found["tags"] == ["llmconvert"]
    assert card_of(report, source="x.gguf", scheme=None)["base_model_relation"] == "finetune"
    parent = card_of(report, base_model=None, parents=("maker/Parent",))
    assert parent["base_model"] == ["maker/Parent"] and "base_model_relation" not in parent
    both = card_of(report, parents=("maker/Parent",))
    assert both["base_model"] == ["maker/Tiny"] and both["base_model_relation"] == "quantized"


def test_failed_checks_are_not_hidden(report: Report) -> None:
    failed = Check(name="kl_mean", value=0.5, limit=0.1, ok=False, detail={"text": "KL is 0.5"})
    card = render_card(report.model_copy(update={"checks": (failed,)}), address=Address("x"), recipe=RECIPE)
    assert "**It did not pass all checks:** KL is 0.5." in card
    about = {"dataset": "d", "windows": 1, "window": 4, "text": "not finite"}
    nan = Check(name="perplexity", ok=False, detail=about)
    assert "not finite" in render_card(
        report.model_copy(update={"checks": (nan,)}), address=Address("x"), recipe=RECIPE
    )


@pytest.mark.parametrize("chat", [True, False])
def test_the_transformers_snippet_runs(
    chat: bool, report: Report, quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = render_card(report, address=Address(str(quantized)), recipe=RECIPE, chat=chat)
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert [("vllm" in snippet, "transformers" in snippet) for snippet in snippets] == [(False, True), (True, False)]
    exec(compile(snippets[0], "README.md", "exec"), {})
    assert capsys.readouterr().out
    compile(snippets[1], "README.md", "exec")


def with_schemes(report: Report, *schemes: str, scheme: str = "w4a16-g64-sym") -> Report:
    """The report of an artifact whose linears have these schemes."""
    linears = tuple(LinearReport(name=f"l{number}", scheme=name, error=None) for number, name in enumerate(schemes))
    made = Step(
        name="quantize", seconds=0.0, details=QuantizeReport(layers=len(schemes), linears=linears, bytes=1, seconds=0.0)
    )
    return report.model_copy(update={"steps": (made,), "model": report.model.model_copy(update={"scheme": scheme})})


def test_the_card_says_which_runtimes_read_the_schemes_that_were_chosen(report: Report) -> None:
    """By linear, whatever the recipe's scheme was: a budget may have chosen others, and a repair left some dense."""
    seen = "were run with {}, and computed"
    address = Address("user/x")
    card = render_card(with_schemes(report, "w4a16-g64-sym", "none"), address=address, recipe=RECIPE)
    assert seen.format("transformers, vLLM on CPU") in card and "never seen" not in card
    card = render_card(with_schemes(report, "w4a16-g64-sym", "w8a16-g64-sym"), address=address, recipe=RECIPE)
    assert seen.format("transformers") in card
    assert "**vLLM on CPU** does not load `w8a16-g64-sym`, which this model has layers in." in card
    card = render_card(with_schemes(report, "w4a16-g64-sym", "w5a16-g64-sym"), address=address, recipe=RECIPE)
    assert "**vLLM on CPU** was never seen to run `w5a16-g64-sym`, which this model has layers in." in card


def test_the_snippet_of_an_asymmetric_artifact_loads_it(report: Report) -> None:
    """As README does; the plain one is refused by transformers."""
    card = render_card(with_schemes(report, "w4a16-g64-asym"), address=Address("user/x"), recipe=RECIPE)
    assert 'dtype="auto", quantization_config=CompressedTensorsConfig(dequantize=True))' in card
    assert "import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig" in card
    plain = render_card(with_schemes(report, "w4a16-g64-sym"), address=Address("user/x"), recipe=RECIPE)
    assert "CompressedTensorsConfig" not in plain
