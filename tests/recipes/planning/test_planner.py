"""What a plan says is what a run does: bytes of every file, what is reused, what is refused, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support.tiny_mixtures import tiny_mixture
from support.tiny_models import tiny_tokenizer

from llmconvert.cli import main
from llmconvert.compute.ranks.group import Ranks
from llmconvert.engine.memory import BASE_NBYTES, LOADED_NBYTES
from llmconvert.errors import CapacityError, LlmconvertError, UnsupportedError
from llmconvert.phases import LOADING_KERNELS
from llmconvert.recipes.loading import load_recipe
from llmconvert.recipes.planning.plan import RunPlan, StepPlan
from llmconvert.recipes.planning.planner import plan_recipe
from llmconvert.recipes.planning.render import plan_lines
from llmconvert.recipes.runner import run_recipe
from llmconvert.report.report import Step
from llmconvert.report.steps import QuantizeReport
from llmconvert.storage.directory import is_weight_file

Writer = Callable[..., Path]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def step_of(plan: RunPlan, name: str) -> StepPlan:
    return next(step for step in plan.steps if step.name == name)


def weights_in(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in directory.iterdir() if is_weight_file(path.name)}


@pytest.mark.parametrize(
    ("format", "scheme", "method"),
    [
        ("compressed-tensors", "w4a16-g32", "rtn"),
        ("compressed-tensors", "fp8", "rtn"),
        ("gptq", "w4a16-g32", "rtn"),
        ("awq", "w4a16-g32-asym", "rtn"),
        ("bitsandbytes", "nf4-dq", "rtn"),
        ("gguf", "q8_0", "rtn"),
    ],
)
def test_sizes_are_exact_in_every_format(
    write_recipe: Writer, tmp_path: Path, format: str, scheme: str, method: str
) -> None:
    quantize = {"format": format, "scheme": scheme, "method": method}
    recipe = load_recipe(write_recipe(quantize=quantize, validate=None))
    plan = plan_recipe(recipe)
    assert not (tmp_path / "work").exists(), "a plan writes nothing"
    result = run_recipe(recipe)
    made = weights_in(result.artifact)
    step = step_of(plan, "quantize")
    assert step.files == made and step.least is None
    assert step_of(plan, "convert").nbytes > step.nbytes
    taken = sum(path.stat().st_size for path in (tmp_path / "work").rglob("model/*") if path.is_file())
    assert plan.needs.disk >= taken - sum(path.stat().st_size for path in result.artifact.rglob("*") if path.is_file())


@pytest.mark.parametrize("sizes", [[32], [32, 128], [16, 48]], ids=str)
def test_a_budget_has_bounds_that_hold(write_recipe: Writer, sizes: list[int]) -> None:
    """Of groups that don't divide every layer (64 and 128 columns), too."""
    quantize = {"method": "gptq", "budget": {"bits_per_weight": 6, "bits": [3, 4, 8], "group_sizes": sizes}}
    recipe = load_recipe(write_recipe(quantize=quantize, validate=None))
    step = step_of(plan_recipe(recipe), "quantize")
    assert step.least is not None and step.least < step.nbytes
    made = sum(weights_in(run_recipe(recipe).artifact).values())
    assert step.least <= made <= step.nbytes


def test_heads_are_merged_and_healed_on_paper(write_recipe: Writer) -> None:
    heal = {"steps": 2, "batch": 1, "length": 32, "held_out": 1}
    recipe = load_recipe(write_recipe(attention={"kv_heads": 1, "heal": heal}, validate=None))
    plan = plan_recipe(recipe)
    assert [step.name for step in plan.steps] == ["convert", "calibrate", "heal-text", "attention", "heal", "quantize"]
    made = weights_in(run_recipe(recipe).artifact)
    assert step_of(plan, "quantize").files == made
    assert step_of(plan, "attention").nbytes < step_of(plan, "convert").nbytes


def test_what_is_there_is_reused_and_what_follows_a_change_is_not(write_recipe: Writer, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe())
    run_recipe(recipe)
    plan = plan_recipe(recipe)
    assert all(step.reused for step in plan.steps), [step for step in plan.steps if not step.reused]
    assert "nothing is left to do" in list(plan_lines(plan))
    changed = load_recipe(tmp_path / "tiny.yaml", ["quantize.scheme=w8a16-g32"])
    again = {step.name: step.reused for step in plan_recipe(changed).steps}
    assert again == {
        "convert": True,
        "calibrate": True,
        "evaluation-text": True,
        "quantize": False,
        "validate": False,
    }
    assert not any(step.reused for step in plan_recipe(recipe, fresh=True).steps)


def test_what_can_not_fit_is_refused_before_anything_is_read(
    write_recipe: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(memory="400MB", validate=None)
    refused = call("plan", path)
    assert refused.exit_code == 5 and "MB" in refused.stderr
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("llmconvert.recipes.planning.plan.shutil.disk_usage", lambda place: full)
    recipe = load_recipe(write_recipe())
    with pytest.raises(CapacityError, match=r"needs .* of disk in .*, 0 MB are free; .*work_dir, --work-dir"):
        run_recipe(recipe)
    full = full._replace(total=0, free=0)  # /proc
    with pytest.raises(CapacityError, match=r"has no room for files at all: .*work_dir, --work-dir"):
        run_recipe(recipe)
    assert not (tmp_path / "work").exists()


def test_measuring_behind_steps_that_compile_nothing_states_less(write_recipe: Writer) -> None:
    taken = []
    for method in ("rtn", "gptq"):
        quantize = {"method": method, "scheme": "w4a16-g32"}
        taken.append(plan_recipe(load_recipe(write_recipe(method, quantize=quantize))).steps[-1].needs.memory)
    assert taken[1] - taken[0] == BASE_NBYTES - LOADED_NBYTES


def test_a_step_that_needs_too_much_names_the_setting(write_recipe: Writer) -> None:
    plan = plan_recipe(load_recipe(write_recipe()))
    with pytest.raises(CapacityError, match=r"validate: needs .* of memory, 500 MB may be used; .*perplexity\.window"):
        replace(plan, memory=500_000_000, steps=plan.steps[-1:]).require_room()


def test_a_plan_refuses_what_a_run_would(write_recipe: Writer, tiny_llama: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"quantize": {"method": "gptq", "scheme": "w4a16-g48"}}, "group size 48 does not divide"),
        ({"publish": {"to": "user/name"}}, "needs a token"),
        ({"publish": {"to": f"file:{tiny_llama}"}}, "not empty and was not published"),
        ({"calibrate": {"dataset": "gone.txt", "samples": 4, "length": 64}}, "no such file"),
        ({"validate": {"tasks": ["arc_easy"]}}, "lm-eval|lm_eval"),
        ({"attention": {"kv_heads": 3}}, "3"),
    ]
    for sections, expected in cases:
        recipe = load_recipe(write_recipe(**sections))
        with pytest.raises(LlmconvertError, match=expected):
            plan_recipe(recipe)
    assert not (tmp_path / "work").exists()


def test_a_plan_refuses_what_several_processes_do_not_do(
    write_recipe: Writer, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """By its name, and with what to do instead; of what depends on the model as well."""
    text = {"dataset": str(texts[0]), "samples": 4, "length": 64}
    tiny_tokenizer(256).save_pretrained(tiny_mixture(tmp_path / "mixture", "mixtral", vocab_size=256))
    experts = {"model": str(tmp_path / "mixture"), "validate": None}
    budget = {"method": "gptq", "budget": {"bits_per_weight": 5, "group_sizes": [32]}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"quantize": budget}, "quantize.budget with 2 processes: .* give what it chose as quantize.overrides"),
        ({"quantize": {"method": "signround", "scheme": "w4a16-g32"}}, "method 'signround' with 2 processes"),
        ({"calibrate": {**text, "statistics": "original"}}, "statistics: original with 2 processes"),
        ({"calibrate": {**text, "samples": 1}}, "2 processes have 1 windows .* give more text"),
        ({"quantize": {"method": "awq", "scheme": "w4a16-g32-asym"}, **experts}, "moves no scales of experts"),
        ({"quantize": {"method": "smoothquant", "scheme": "w8a8"}, **experts}, "moves no scales of experts"),
    ]
    for sections, said in cases:
        recipe = load_recipe(write_recipe(**sections))
        with pytest.raises(UnsupportedError, match=said):
            plan_recipe(recipe, ranks=Ranks(count=2, local_count=2))


def test_the_command_prints_a_table_that_fits_or_json(write_recipe: Writer, tmp_path: Path) -> None:
    path = write_recipe(publish={"to": f"file:{tmp_path / 'out'}"})
    result = call("plan", path)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(len(line) for line in lines[1:] if "file:" not in line) <= 80
    assert lines[0].endswith("llama-w4a16-g32-sym") and lines[-1].startswith("time: nothing like it")
    assert [line.split()[0] for line in lines[3:] if not line.startswith(" ")][:6] == [
        *("convert", "calibrate", "evaluation-text", "quantize", "validate", "publish"),
    ]
    values = json.loads(call("plan", path, "--json").stdout)
    assert values["needs"]["memory"] > 500_000_000 and values["seconds"] is None
    assert os.listdir(tmp_path) == ["tiny.yaml"]


def test_a_run_says_its_plan_first(write_recipe: Writer) -> None:
    result = call("run", write_recipe(validate=None))
    assert result.exit_code == 0, result.output
    assert result.stderr.index("plan: ") < result.stderr.index("converting")


def test_a_probe_times_all_steps(write_recipe: Writer, tmp_path: Path) -> None:
    quantize = {"method": "rtn", "scheme": "w4a16-g32"}
    result = call("plan", write_recipe(quantize=quantize), "--probe", "--json", "-q")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["seconds"] is not None and all(step["seconds"] is not None for step in values["steps"])
    assert os.listdir(tmp_path) == ["tiny.yaml"]


def test_time_comes_from_earlier_runs(write_recipe: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = tmp_path / "cache" / "history.jsonl"
    monkeypatch.setenv("LLMCONVERT_HISTORY", str(history))
    publish = {"to": f"file:{tmp_path / 'out'}"}
    path = write_recipe(quantize={"method": "rtn", "scheme": "w4a16-g32"}, validate=None, publish=publish)
    run_recipe(load_recipe(path))
    kinds = [json.loads(line)["kind"] for line in history.read_text().splitlines()]
    assert kinds == ["convert", "quantize rtn cpu", "publish"]
    plan = plan_recipe(load_recipe(path, [f"work_dir={tmp_path / 'other'}"]))
    assert plan.seconds is not None and plan.seconds.least == plan.seconds.most > 0

    # With text for a cache it is other work, in other units.
    cached = {"method": "rtn", "scheme": "w4a16-g32", "kv_cache": "fp8"}
    other = plan_recipe(load_recipe(write_recipe("cached", quantize=cached, validate=None)))
    assert next(step.seconds for step in other.steps if step.name == "quantize") is None

    # Kernels were compiled, which happens once on a machine.
    report = QuantizeReport.model_construct(phases={LOADING_KERNELS: 10.0, "solving": 2.0})
    plan.remember([Step.model_construct(name="quantize", seconds=12.5, reused=None, resumed=None, details=report)])
    assert json.loads(history.read_text().splitlines()[-1])["seconds"] == 2.5
