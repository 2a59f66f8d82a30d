"""GGUF from a recipe and from the command line: what goes together, and what comes out."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from support.tiny_models import tiny_llama_dir

from llmconvert.cli import main
from llmconvert.errors import RecipeError
from llmconvert.gguf.checkpoint import open_gguf
from llmconvert.recipes.loading import parse_recipe
from llmconvert.recipes.runner import run_recipe

CALIBRATE = 'calibrate: {dataset: "pydoc-topics:train", samples: 4, length: 64}\n'


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        (
            "{method: rtn, scheme: q4_k_m, format: gptq}",
            r"quantize.scheme: q4_k_m is a GGUF type; it needs format: gguf",
        ),
        (
            "{method: signround, scheme: q4_k_m, format: gguf}",
            r"signround chooses int and float codes only; methods for GGUF types are rtn, gptq, gptaq, awq, imatrix",
        ),
        ("{method: imatrix, scheme: w4a16-g64}", r"imatrix chooses GGUF's codes only; methods for int are rtn, gptq"),
        ("{method: rtn, scheme: w4a16-g64, format: gguf}", r"w4a16-g64-sym: no GGUF type holds its codes; .*q4_k_m"),
        ("{method: rtn, scheme: q4_k_x, format: gguf}", r"'q4_k_x'.*or a GGUF type: f32, f16"),
        (
            "{method: rtn, scheme: w4a16-g64, head: q8_0}",
            r"quantize.head: scheme q8_0: .*; formats that hold q8_0: gguf",
        ),
        (
            "{method: rtn, scheme: w4a16-g64, overrides: [{match: '*', scheme: q6_k}]}",
            r"quantize.overrides.0.scheme: .*; formats that hold q6_k: gguf",
        ),
        (
            "{method: rtn, scheme: q4_k_m, format: gguf, overrides: [{match: '*', scheme: q5_k_m}]}",
            r"quantize.overrides.0.scheme: .*type: q5_k_m is a mix of several types for a whole file; q8_0, q6_k",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(quantize: str, message: str) -> None:
    text = "" if "rtn" in quantize else CALIBRATE
    with pytest.raises(RecipeError, match=message):
        parse_recipe(f"model: m\n{text}quantize: {quantize}\n", "x.yaml")


def test_an_importance_matrix_needs_text() -> None:
    with pytest.raises(RecipeError, match=r"imatrix needs calibration text"):
        parse_recipe("model: m\nquantize: {method: imatrix, scheme: q4_k_m, format: gguf}\n", "x.yaml")


def test_a_recipe_makes_a_measured_gguf_artifact(tmp_path: Path) -> None:
    tiny_llama_dir(tmp_path / "Tiny-1M", hidden_size=256, intermediate_size=256)
    text = (
        f"model: {tmp_path / 'Tiny-1M'}\n{CALIBRATE}"
        "quantize: {method: imatrix, scheme: q4_k_m, format: gguf, embedding: q5_k}\n"
        'validate: {perplexity: {dataset: "pydoc-topics:test", window: 64, max_windows: 2}}\n'
    )
    result = run_recipe(parse_recipe(text, "x.yaml"), work_dir=tmp_path / "work")
    (file,) = result.artifact.glob("*.gguf")
    assert file.name == "Tiny-1M-Q4_K_M.gguf"
    assert result.report["size_bytes"].value == file.stat().st_size
    assert 4 < (result.report["bits_per_weight"].value or 0) < 8
    assert result.report["inventory"].ok and result.report["perplexity"].value
    card = (result.artifact / "README.md").read_text()
    assert f"llama-server -m {file.name}" in card and "AutoModelForCausalLM" not in card
    assert "library_name: gguf" in card


@pytest.mark.parametrize(("output", "file"), [("out.gguf", "out.gguf"), ("out", "out/Tiny-1M-Q8_0.gguf")])
def test_the_command_line_writes_a_file_or_a_directory(output: str, file: str, tmp_path: Path) -> None:
    tiny_llama_dir(tmp_path / "Tiny-1M")
    command = ["quantize", str(tmp_path / "Tiny-1M"), str(tmp_path / output), "--format", "gguf", "--scheme", "q8_0"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    with open_gguf(tmp_path / file) as checkpoint:
        assert vars(checkpoint)["general"]["general.file_type"] == 7
    converted = CliRunner().invoke(main, ["convert", str(tmp_path / output), str(tmp_path / "back")])
    assert converted.exit_code == 0, converted.output
    assert (tmp_path / "back" / "model.safetensors").exists() and (tmp_path / "back" / "tokenizer.json").exists()
