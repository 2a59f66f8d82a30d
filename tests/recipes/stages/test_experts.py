"""Mixtures in runs: tokens per expert in the report, and what is asked of experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.tiny_mixtures import tiny_mixture
from support.tiny_models import VOCABULARY, tiny_tokenizer

from llmconvert.cli import main


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tiny_mixture(tmp_path / "mixture", "qwen3_moe", vocab_size=VOCABULARY)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def quantize(source: Path, output: Path, *options: str) -> Any:
    text = ("--calibration", "pydoc-topics:train", "--samples", "2", "--length", "48")
    words = ("--scheme", "w4a16-g16", "--method", "gptq", *text, *options)
    return CliRunner().invoke(main, ["quantize", str(source), str(output), *words])


def test_the_report_counts_the_tokens_of_each_expert(source: Path, tmp_path: Path, write_recipe: Any) -> None:
    settings = {"method": "gptq", "scheme": "w4a16-g16", "experts": "all", "min_tokens_per_expert": 200}
    recipe = write_recipe(model=str(source), quantize=settings, publish={"to": f"file:{tmp_path}/out"})
    done = CliRunner().invoke(main, ["run", str(recipe)])
    assert done.exit_code == 0, done.output
    folder = tmp_path / "out" / "llmconvert"
    (step,) = [step for step in json.loads((folder / "report.json").read_text())["steps"] if step["name"] == "quantize"]
    for layer, found in enumerate(step["details"]["experts"]):
        assert found["layer"] == f"model.layers.{layer}.mlp.experts" and found["columns"] == 64
        assert sum(found["tokens"]) == 4 * 64 * 3 and len(found["tokens"]) == 6
    assert "Tokens per expert" in (tmp_path / "out" / "README.md").read_text()
    assert "Tokens per expert" in (folder / "report.html").read_text()
    assert "experts: all" in (folder / "recipe.yaml").read_text()


def test_too_few_tokens_for_an_expert_end_the_command_before_the_work(source: Path, tmp_path: Path) -> None:
    failed = quantize(source, tmp_path / "out", "--min-tokens-per-expert", "96")
    assert failed.exit_code != 0 and not (tmp_path / "out").exists()
    assert "min_tokens_per_expert is 96" in failed.output and "experts: all" in failed.output
    refused = quantize(source, tmp_path / "out", "--method", "rtn", "--experts", "all")
    assert refused.exit_code == 2 and "--experts: rtn sees no calibration text" in refused.output


def test_repair_of_a_mixture_is_refused_before_the_work(source: Path, tmp_path: Path, write_recipe: Any) -> None:
    recipe = write_recipe(model=str(source), quantize={"method": "gptq", "scheme": "w4a16-g16"})
    limits = ("--set", "validate.max_kl=1e-9", "--set", "validate.repair.rounds=1")
    refused = CliRunner().invoke(main, ["run", str(recipe), *limits])
    assert refused.exit_code == 2 and "validate.repair: the model is a mixture of experts" in refused.output
    assert not list((tmp_path / "work").glob("quantize-*/model"))
