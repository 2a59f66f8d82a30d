"""``--plan`` of every command that works says what the command then does, and leaves nothing behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from support.header_only import make_header_only, qwen3_moe
from support.tiny_models import tiny_llama_dir

from llmconvert.cli import main
from llmconvert.errors import CapacityError
from llmconvert.needs import Needs
from llmconvert.recipes.batch.jobs import Settings, load_job
from llmconvert.recipes.planning.history import Seconds
from llmconvert.recipes.planning.plan import RunPlan, StepPlan
from llmconvert.recipes.planning.render import plan_lines
from llmconvert.recipes.plans.batch import BatchPlan, batch_lines, plan_jobs
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
    assert max(map(len, result.stdout.splitlines()[1:])) <= 80
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
    assert plan["needs"] == {"memory": 0, "device_memory": 0, "disk": 0, "disk_left": 0, "download": 0}


def test_several_recipes_are_planned_together(write_recipe: Writer, tmp_path: Path) -> None:
    """What one of them leaves for the next is counted once, and one that can't be run is left out."""
    quick = {"validate": None, "calibrate": None}
    first = write_recipe("first", quantize={"method": "rtn", "scheme": "w4a16-g32"}, **quick)
    second = write_recipe("second", quantize=None, **quick)
    result = call("run", first, second, "--plan", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    one, two = plan["recipes"].values()
    assert [one["name"], two["name"]] == ["first", "second"]
    assert plan["needs"]["memory"] == max(one["needs"]["memory"], two["needs"]["memory"])
    assert plan["needs"]["disk"] == one["needs"]["disk"], "the second's conversion is the first's"
    assert call("run", first, second, "--plan").stdout.count("plan: ") == 2

    unfit = write_recipe("unfit", quantize={"method": "rtn", "scheme": "w4a16-g48"}, **quick)
    own = [
        write_recipe(f"own{number}", quantize=None, work_dir=str(tmp_path / str(number)), **quick)
        for number in range(2)
    ]
    result = call("run", first, unfit, second, *own, "--plan")
    assert result.exit_code == 2 and "group size 48" in result.stdout and "batch: 5 recipes" in result.stdout
    rows = [line for line in result.stdout.splitlines() if line.endswith(".yaml")]
    assert len(rows) == 4 and rows[1].split()[0] == "there" and "plan: " not in result.stdout


def test_a_batch_of_a_thousand_is_a_queue_on_several_machines() -> None:
    """Against a queue that goes second by second."""

    def job(seconds: int) -> RunPlan:
        step = StepPlan("quantize", needs=Needs(memory=seconds, disk=10), seconds=Seconds(seconds, 2 * seconds))
        return RunPlan("r", "m", "", (step,), 1, 1, "", memory=10**12)

    lengths = [7 + 13 * number % 29 for number in range(1000)]
    plans = {f"{number}.yaml": job(seconds) for number, seconds in enumerate(lengths)}
    batch = BatchPlan(plans, {}, dict.fromkeys(plans, Path("work")))
    assert batch.whole.needs == Needs(memory=max(lengths), disk=10_000)
    for machines in (1, 4, 8):
        left, waiting, now = [0] * machines, list(lengths), 0
        while waiting or any(left):
            for machine in range(machines):
                if not left[machine] and waiting:
                    left[machine] = waiting.pop(0)
            now += 1
            left = [max(0, one - 1) for one in left]
        assert batch.seconds(machines) == Seconds(now, 2 * now)
    lines = list(batch_lines(batch))
    last = " ".join(map(str.strip, lines[-2:]))
    assert last.startswith("time on machines like this one: 5.8 h to ") and " on 8" in last
    assert max(map(len, lines)) <= 80
    untimed = replace(plans["3.yaml"], steps=(StepPlan("quantize"),))
    assert BatchPlan({**plans, "3.yaml": untimed}, {}, batch.work_dirs).seconds(4) is None


def test_what_runtimes_are_known_to_load_wrongly_or_not_at_all_is_said(here: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    }
    model = tiny_llama_dir(here / "model", dtype=torch.bfloat16, tie_word_embeddings=False, **sizes)
    rtn = ("--method", "rtn", "--plan", "--scheme")
    head = call("quantize", model, "head", *rtn, "w4a16-g32", "--override", "head=w8a16-g32")
    assert head.exit_code == 0 and "SGLang" in head.output and "issue 35358" in head.output
    blocks = call("quantize", model, "blocks", *rtn, "fp8-block")
    assert blocks.exit_code == 0 and "vLLM can't load it, on one device neither: it joins k_proj" in blocks.output
    assert "SGLang" not in blocks.output and "issue 35358" not in blocks.output


@pytest.mark.slow
def test_mixtures_of_400_and_1000_billion_are_planned_from_headers(tmp_path: Path) -> None:
    """Sizes are sums over the shapes, and memory is a fraction of a layer's experts."""
    jobs = []
    sizes = {}
    for name, config in (("big", qwen3_moe(52, 160, 6144, 2560)), ("huge", qwen3_moe(61, 384, 7168, 2048))):
        sizes[name] = make_header_only(tmp_path / name, config), config
        quantize = {"method": "rtn", "scheme": "w4a16-g64"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"model": str(tmp_path / name), "quantize": quantize}))
        jobs.append(load_job(str(tmp_path / f"{name}.yaml"), Settings(work_dir=tmp_path / "work")))
    batch = plan_jobs(jobs)
    assert not batch.problems and not (tmp_path / "work").exists()
    for plan, (numel, config) in zip(batch.jobs.values(), sizes.values(), strict=True):
        assert plan.parameters == numel > 4e11
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        dense = 2 * config["vocab_size"] * hidden + layers * config["num_experts"] * hidden
        dense += layers * (2 * hidden + 2 * 128) + hidden
        converted, quantized = plan.steps[-2:]
        assert 2 * numel < converted.nbytes < 2 * numel * 1.0001
        packed = 2 * dense + (numel - dense) * (4 + 16 / 64) / 8
        assert packed < quantized.nbytes < packed * 1.002
        experts = 2 * 3 * config["num_experts"] * hidden * config["moe_intermediate_size"]
        assert plan.needs.memory < experts / 3
        lines = list(plan_lines(plan))[1:]
        assert max(map(len, lines)) <= 80
        assert f"  {quantized.tensors:,} tensors in {len(quantized.files or {})} files" in lines
    disk = sum(job.needs.disk for job in batch.jobs.values())
    assert batch.whole.needs.disk == disk > 3.5e12
    with pytest.raises(CapacityError, match="of disk in"):
        batch.require_room()
