"""Mixtures in runs: tokens per expert in the report, and what is asked of experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from support.tiny_mixtures import tiny_mixture
from support.tiny_models import VOCABULARY, tiny_tokenizer

from llmconvert.cli import main
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import UnsupportedError
from llmconvert.recipes.forecast import require_repairable
from llmconvert.storage.checkpoint import SafetensorsCheckpoint


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
    beyond = quantize(source, tmp_path / "out", "--min-tokens-per-expert", "97")
    assert beyond.exit_code == 2 and "found 97, and the calibration text has 2 × 48 = 96 tokens in" in beyond.output
    refused = quantize(source, tmp_path / "out", "--method", "rtn", "--experts", "all")
    assert refused.exit_code == 2 and "--experts: rtn sees no calibration text" in refused.output


@pytest.mark.slow
def test_repair_gives_more_bits_to_what_is_no_expert(source: Path, tmp_path: Path, write_recipe: Any) -> None:
    """transformers loads what comes of it with the logits of our reader, which validation compares; experts stay."""
    recipe = write_recipe(model=str(source), quantize={"method": "gptq", "scheme": "w4a16-g16"})
    command = ["run", str(recipe), "--set", "validate.max_kl=1e-9"]
    assert CliRunner().invoke(main, command).exit_code == 3
    (first,) = (tmp_path / "work").glob("artifact-*/model")
    size = int(reported(first)["size_bytes"]["value"]) + 10_000
    repair = ("--set", f"validate.repair.max_bytes={size}", "--set", "validate.repair.rounds=1")
    found = CliRunner().invoke(main, [*command, *repair])
    assert found.exit_code == 3 and "the rounds allowed did not suffice" in " ".join(found.output.split())
    second = Path(found.output.rsplit("the artifact is in ", 1)[1].strip().replace("\n", ""))
    checks = reported(second)
    assert checks["kl_mean"]["value"] < reported(first)["kl_mean"]["value"]
    assert checks["fidelity.max_abs_diff"]["ok"] and checks["inventory"]["value"] == 0
    old, new = (load_file(directory / "model.safetensors") for directory in (first, second))
    changed = {name for name in new if name not in old or not torch.equal(old[name], new[name])}
    assert changed and all(".self_attn." in name for name in changed)
    assert any(name.endswith("weight_packed") for name in changed), "some were quantized anew"


def test_repair_is_refused_where_experts_cannot_be_left_out(tmp_path: Path) -> None:
    skeleton = Skeleton(SafetensorsCheckpoint(tiny_mixture(tmp_path, "llama4_text")), torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=r"validate.repair: .* are no linears where transformers loads dense"):
        require_repairable(skeleton.sites.values(), None)


def reported(directory: Path) -> dict[str, Any]:
    report = json.loads((directory / "llmconvert" / "report.json").read_text())
    return {check["name"]: check for check in report["checks"]}
