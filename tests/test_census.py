"""The census over a few classes of different kinds, and that it notices what is wrong."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def census() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
        yield importlib.import_module("census")


def case(census: ModuleType, key: str) -> Any:
    return next(one for one in census.CLASSES if one.key == key)


@pytest.mark.slow
@pytest.mark.parametrize(
    "key",
    [
        "causal/qwen3_moe",  # experts
        "causal/llama4_text",  # experts in one tensor, and one by one in the artifact
        "causal/zamba2",  # weights that blocks share
        "causal/bart",  # linears that text never meets
        "causal/deepseek_v4",  # several hidden states for a token
        "causal/falcon",  # a class that sets weights by name while it loads
        "causal/gemma3n_text",  # linears called twice, keys and values of earlier blocks
        "causal/kimi_linear",  # tensors that transformers joins, beside experts
        "causal/mllama",  # a decoder by itself, with blocks for images
        "image-text/qwen3_5",  # a vision tower beside linear attention
    ],
)
def test_classes_of_several_kinds_work(census: ModuleType, tmp_path: Path, key: str) -> None:
    finding = census.examine(case(census, key), tmp_path)
    assert finding.verdict == "works", finding
    assert 0 < finding.quantized < finding.weights


@pytest.mark.slow
def test_what_a_refusal_advises_is_tried(census: ModuleType, tmp_path: Path) -> None:
    finding = census.examine(case(census, "causal/gpt_oss"), tmp_path)
    assert finding.verdict == "as advised" and "leave them dense" in finding.detail
    assert 0 < finding.quantized < finding.weights / 2


@pytest.mark.slow
def test_an_engine_that_computes_something_else_is_wrong(
    census: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = census.stream_logits

    def stream_logits(*args: Any, **kwargs: Any) -> Any:
        for logits in original(*args, **kwargs):
            yield logits + 0.1

    monkeypatch.setattr(census, "stream_logits", stream_logits)
    finding = census.examine(case(census, "causal/llama"), tmp_path)
    assert finding.verdict == "wrong"
    assert "what the engine computes" in finding.detail


@pytest.mark.slow
def test_an_artifact_with_another_weight_is_wrong(
    census: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = census.open_dense

    class Changed(dict[str, torch.Tensor]):
        infos: Any

    def open_dense(checkpoint: Any) -> Any:
        view = original(checkpoint)
        changed = Changed({name: view[name] for name in view})
        changed.infos = view.infos
        norm = next(name for name in changed if "norm" in name)
        changed[norm] = 2 * changed[norm]
        return changed

    monkeypatch.setattr(census, "open_dense", open_dense)
    finding = census.examine(case(census, "causal/llama"), tmp_path)
    assert finding.verdict == "wrong"
    assert "norm.weight is another than it was" in finding.detail


def test_what_is_refused_is_said_with_the_model_the_cause_and_what_to_do() -> None:
    """Of every refusal that the page has."""
    page = (Path(__file__).parent.parent / "docs" / "families.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \| refused[^|]*\| (.*) \|$", page, re.MULTILINE)
    assert len(rows) > 10
    for model_type, name, said in rows:
        assert re.search(rf"architecture '[^']+'|model type '[^']+'|{name}", said), model_type
        assert re.search(r"\b(convert|use|take|save it anew|override|mend|install)\b", said, re.IGNORECASE), said


def test_the_page_counts_and_says_why(census: ModuleType) -> None:
    findings = {
        "causal/llama": census.Finding("works"),
        "causal/xlm": census.Finding("refused", "it has | no *blocks*", "gptq"),
        "image-text/blip": census.Finding("not built", "TypeError"),
    }
    page = census.markdown_page(findings, "2030-01-01")
    assert "on 2030-01-01" in page
    assert "| Causal language models | 1 | 0 | 0 | 1 | 0 | 0 | 0 | 1 of 2 |" in page
    assert "| `xlm` | `XLMWithLMHeadModel` | refused (gptq) | it has \\| no \\*blocks\\* |" in page
    assert "Work: `llama`." in page


def test_the_page_says_which_code_its_readings_are_of(census: ModuleType) -> None:
    readings = {key: census.Finding("works", code="abc") for key in ("causal/llama", "causal/bart")}
    page = census.markdown_page(readings, "2026-01-02")
    assert "All 2 readings are of one code, abc." in page
    assert f"Not read: {len(census.CLASSES) - 2} classes." in page
    other = census.markdown_page({**readings, "causal/bart": census.Finding("works", code="def")}, "2026-01-02")
    assert "not of one code: 1 of abc, 1 of def." in other
