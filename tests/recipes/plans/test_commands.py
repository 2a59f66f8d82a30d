"""``--plan`` of every command that works says what the command then does, and leaves nothing behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from llmconvert.cli import main
from llmconvert.storage.directory import is_weight_file

Writer = Callable[..., Path]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def planned(*arguments: object) -> dict[str, Any]:
    result = call(*arguments, "--plan", "--json")
    assert result.exit_code == 0, result.output
    values: dict[str, Any] = json.loads(result.stdout)
    return values


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights_of(path: Path) -> dict[str, int]:
    files = [path] if path.is_file() else [file for file in path.iterdir() if is_weight_file(file.name)]
    return {file.name: file.stat().st_size for file in files}


def test_files_are_those_that_the_command_makes(tiny_llama: Path, texts: tuple[Path, Path], here: Path) -> None:
    windows = ("--calibration", texts[0], "--samples", 2, "--length", 32)
    calls: list[tuple[str, Path, list[str], tuple[object, ...]]] = [
        ("convert", Path("half"), ["convert"], ("--dtype", "float16")),
        ("convert", Path("merged"), ["attention"], ("--kv-heads", 1)),
        ("quantize", Path("w4"), ["quantize"], ("--scheme", "w4a16-g32", "--method", "rtn")),
        ("quantize", Path("q8.gguf"), ["quantize"], ("--scheme", "q8_0")),
    ]
    for command, output, names, options in calls:
        plan = planned(command, tiny_llama, output, *options)
        assert os.listdir(here) == [], "a plan writes nothing"
        assert [step["name"] for step in plan["steps"]] == names
        done = call(command, tiny_llama, output, *options)
        assert done.exit_code == 0, done.output
        assert plan["steps"][-1]["files"] == weights_of(output)
        output.rename(here.parent / output.name)
    healed = planned("convert", tiny_llama, "out", "--kv-heads", 1, "--heal-steps", 2, *windows)
    assert [step["name"] for step in healed["steps"]] == ["attention", "heal"]


def test_what_can_not_be_is_refused(tiny_llama: Path, texts: tuple[Path, Path], here: Path) -> None:
    cases: list[tuple[int, str, tuple[object, ...]]] = [
        (2, "group size 48", ("quantize", tiny_llama, "out", "--scheme", "w4a16-g48", "--method", "rtn")),
        (5, "memory", ("quantize", tiny_llama, "out", "--scheme", "w4a16-g32", "--memory", "400MB", "--method", "rtn")),
        (2, "is named like a file", ("convert", tiny_llama, "out.gguf")),
        (2, "--max-kl", ("validate", tiny_llama, "--text", texts[1], "--max-kl", 1)),
        (4, "no such", ("validate", "./gone", "--text", texts[1])),
    ]
    for code, message, arguments in cases:
        result = call(*arguments, "--plan")
        assert (result.exit_code, message in result.stderr) == (code, True), result.output
    assert os.listdir(here) == []


def test_measuring_is_planned(tiny_llama: Path, texts: tuple[Path, Path]) -> None:
    scored = ("--text", texts[1], "--window", 64, "--max-windows", 2)
    alone, beside = (
        planned("validate", tiny_llama, *scored),
        planned("validate", tiny_llama, "--reference", tiny_llama, *scored),
    )
    assert [step["name"] for step in beside["steps"]] == ["validate"]
    assert 0 < alone["needs"]["memory"] < beside["needs"]["memory"]


def test_a_sweep_counts_what_is_shared_once(write_recipe: Writer, tmp_path: Path) -> None:
    path = write_recipe()
    matrix = {"quantize.scheme": ["w4a16-g32", "w3a16-g32", "w4a16-g48"]}
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "matrix": matrix}))
    result = call("plan", path)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.split("in one pass")[0].splitlines()[1:])) <= 80
    plan = planned("run", path)
    assert list(plan["variants"]) == ["tiny-w4a16-g32", "tiny-w3a16-g32"]
    assert "group size 48" in plan["left_out"]["tiny-w4a16-g48"]
    assert {one["name"]: one["variants"] for one in plan["shared"]} == {
        "convert": 2,
        "calibrate": 2,
        "evaluation-text": 2,
    }
    assert plan["in_one_pass"] == [["tiny-w4a16-g32", "tiny-w3a16-g32"]]
    alone = [one["needs"]["disk"] for one in plan["variants"].values()]
    assert max(alone) < plan["needs"]["disk"] < sum(alone)
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_what_a_sweep_has_made_is_reused(write_recipe: Writer) -> None:
    path = write_recipe(validate=None)
    path.write_text(
        yaml.safe_dump({**yaml.safe_load(path.read_text()), "matrix": {"quantize.method": ["gptq", "rtn"]}})
    )
    assert call("run", path, "-q").exit_code == 0
    plan = planned("run", path)
    assert all(step["reused"] for one in plan["variants"].values() for step in one["steps"])
    assert plan["needs"] == {"memory": 0, "device_memory": 0, "disk": 0, "download": 0}


def test_several_recipes_are_planned_one_after_the_other(write_recipe: Writer) -> None:
    first, second = write_recipe("first", validate=None), write_recipe("second", quantize=None, validate=None)
    result = call("run", first, second, "--plan", "--json")
    assert result.exit_code == 0, result.output
    assert [one["name"] for one in json.loads(result.stdout)] == ["first", "second"]
    assert call("run", first, second, "--plan").stdout.count("plan: ") == 2
