"""What there is, from the registries; and what this machine has."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llmconvert.cli import main
from llmconvert.gguf.ggml.mix import MIXES
from llmconvert.quantize.catalog.formats import FORMATS
from llmconvert.quantize.catalog.methods import METHODS, method_settings
from llmconvert.recipes.loading import parse_recipe
from llmconvert.recipes.shipped import shipped_recipes


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.mark.parametrize(
    ("command", "expected"),
    [("methods", METHODS), ("formats", FORMATS), ("schemes", MIXES), ("recipes", shipped_recipes())],
)
def test_lists_have_a_line_for_everything_there_is(command: str, expected: dict[str, object]) -> None:
    result = call(command)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80
    told = re.sub(r"\n {3,}", " ", result.output)  # what goes on under itself, in one line
    listed = {line.split()[0]: line for line in told.splitlines()}
    assert set(expected) <= set(listed)
    assert all(len(line.split()) > 2 and "``" not in line for line in listed.values())
    assert set(json.loads(call(command, "--json").output)) == set(listed)


def test_a_method_is_shown_with_its_options() -> None:
    lines = call("methods", "gptq").output.splitlines()
    assert "sweeps: int = 0" in lines and "    how often codes and scales are then refined in turn (refine)." in lines
    assert max(map(len, lines[1:])) <= 80
    values = json.loads(call("methods", "gptq", "--json").output)
    assert values["calibrated"] and list(values["options"]) == [setting.name for setting in method_settings("gptq")]
    assert "file: str = ''" in call("methods", "imatrix").output
    wrong = call("methods", "gtpq")
    assert wrong.exit_code == 2 and "did you mean gptq?" in wrong.stderr


def test_one_scheme_and_one_format_are_told() -> None:
    assert "3-bit integers, one scale per 48 columns" in call("schemes", "w3a16-g48").output
    assert list(json.loads(call("formats", "gguf", "--json").output)) == ["gguf"]


def test_a_shipped_recipe_can_be_printed_and_read_again() -> None:
    text = call("recipes", "hub-w4").output
    assert parse_recipe(text, "printed").quantize is not None
    wrong = call("recipes", "hub-w5")
    assert wrong.exit_code == 2 and "did you mean hub-w4?" in wrong.stderr


def test_the_doctor_looks_at_everything(tmp_path: Path) -> None:
    result = call("doctor", "--offline", "--work-dir", str(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    found = {finding["topic"]: finding for finding in json.loads(result.output)}
    assert {"versions", "processor", "kernels", "gpu", "memory", "disk", "attention", "readers", "hub"} <= set(found)
    assert "torch" in found["versions"]["found"] and "GB free" in found["memory"]["found"]
    assert "eager" in found["attention"]["found"] and "not asked" in found["hub"]["found"]
    assert found["format compressed-tensors"]["advice"] == ""
    assert not os.listdir(tmp_path)


def test_the_doctor_says_when_the_hub_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    found = call("doctor").output
    assert "http://127.0.0.1:9 can't be used" in found and "→ check the network" in found
