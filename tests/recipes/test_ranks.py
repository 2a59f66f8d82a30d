"""Recipes run by several processes: the same artifacts but for a few codes, killed and continued by another number."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.ranks_jobs import JOBS, quantize_all, run_and_kill
from support.ranks_process import run_ranks
from support.tiny_mixtures import tiny_mixture
from support.tiny_models import tiny_llama_dir, tiny_tokenizer

from llmconvert.gguf.checkpoint import open_artifact
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.recipes.loading import load_recipe
from llmconvert.recipes.runner import run_recipe

pytestmark = pytest.mark.slow

RECIPE = """
name: job
model: {model}
work_dir: {work}
calibrate: {{dataset: {text}, samples: 5, length: 48}}
convert: {{dtype: float32}}
quantize: {{method: gptaq, scheme: w4a16-g32}}
validate: {{perplexity: {{dataset: {other}, window: 64, max_windows: 4}}}}
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and texts, and what one process makes of them."""
    made = tmp_path_factory.mktemp("ranks")
    tiny_llama_dir(made / "llama", num_hidden_layers=4, num_key_value_heads=4)
    tiny_llama_dir(made / "small", num_hidden_layers=1, num_key_value_heads=4)
    tiny_llama_dir(made / "block", num_hidden_layers=1, hidden_size=128, intermediate_size=128)
    tiny_llama_dir(made / "wide", num_hidden_layers=1, hidden_size=256, intermediate_size=256)
    tiny_tokenizer(256).save_pretrained(tiny_mixture(made / "mixture", "mixtral", vocab_size=256))
    words = [f"word{number * number % 97}" for number in range(3000)]
    (made / "text.txt").write_text(" ".join(words))
    (made / "other.txt").write_text(" ".join(reversed(words)))
    quantize_all(made, "single", None)
    return made


def tensors(artifact: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an artifact: codes where it has any, values of a GGUF file."""
    if artifact.suffix == ".gguf":
        with open_artifact(artifact) as stored, open_dense(stored) as dense:
            return {name: dense[name] for name in dense}
    return load_file(artifact / "model.safetensors")


def changed(one: Path, other: Path, part: str = "layers.0.") -> float:
    """The share of numbers in the first block that differ, by more than last bits where they are floats.

    In models as small as these one code that falls the other way changes most of what comes behind it.

    Args:
        part: of the names that are looked at.
    """
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    differing = total = 0
    for name, tensor in first.items():
        assert (tensor.dtype, tensor.shape) == (second[name].dtype, second[name].shape)
        if part not in name:
            continue
        ours, theirs = (each[name].contiguous().reshape(-1) for each in (first, second))
        if tensor.is_floating_point():
            far = (ours.float() - theirs.float()).abs() > 1e-4 * ours.float().abs()
        else:
            far = ours.view(torch.uint8) != theirs.view(torch.uint8)
        differing, total = differing + int(far.sum()), total + len(far)
    assert total
    return differing / total


def test_several_processes_make_what_one_makes_but_for_a_few_codes(directory: Path, tmp_path: Path) -> None:
    ended = run_ranks(3, tmp_path, partial(quantize_all, directory, "three"))
    assert ended.codes == (0, 0, 0), ended.errors
    for name in JOBS:
        if JOBS[name][1]["method"] in ("rtn", "hqq"):
            assert changed(directory / "single" / name, directory / "three" / name) == 0, name
        elif name == "fp8":  # of so many codes some fall the other way at once; these linears are the first
            assert changed(directory / "single" / name, directory / "three" / name, "layers.0.self_attn.v") < 0.005
        elif not name.endswith(".gguf"):  # whose scales of super-blocks are integers that fall the other way as well
            assert changed(directory / "single" / name, directory / "three" / name) < 0.005, name
        ours, theirs = (json.loads((directory / where / f"{name}.json").read_text()) for where in ("single", "three"))
        assert ours.keys() == theirs.keys()
        known = [linear for linear in ours if ours[linear] is not None]
        assert sum(theirs[name] for name in known) == pytest.approx(sum(ours[name] for name in known), rel=0.02)
    alone, *reports = (
        json.loads((directory / where / f"{rank}.json").read_text())["checks"]
        for where, rank in (("single", 0), ("three", 0), ("three", 1), ("three", 2))
    )
    measured = {check["name"]: check for check in alone}
    assert {"perplexity", "kl_mean", "block_divergence"} <= measured.keys()
    for checks in reports:  # windows are computed and put together as by one: the same to the bit
        for check in checks:
            if check["name"] in ("perplexity", "kl_mean", "kl_p99", "top1_agreement", "block_divergence"):
                assert check == measured[check["name"]]


def test_a_run_that_lost_a_process_is_continued_by_another_number(directory: Path, tmp_path: Path) -> None:
    recipe, work = tmp_path / "job.yaml", tmp_path / "work"
    text, other = directory / "text.txt", directory / "other.txt"
    recipe.write_text(RECIPE.format(model=directory / "llama", work=work, text=text, other=other))
    ended = run_ranks(2, tmp_path / "killed", partial(run_and_kill, recipe))
    assert ended.codes[1] < 0 and ended.errors[1] == ""
    assert ended.errors[0].splitlines()[-1].endswith("rank 1 of 2 has died; run the same command to continue")
    shutil.copytree(work, tmp_path / "again")
    ended = run_ranks(3, tmp_path / "three", ["run", str(recipe), "--no-publish"])
    assert ended.codes == (0, 0, 0), ended.errors
    assert "continuing an interrupted run: block" in ended.errors[0] and not any(ended.errors[1:])
    assert "llama-w4a16-g32" in ended.outputs[0] and not any(ended.outputs[1:])
    continued = run_recipe(load_recipe(str(recipe)), work_dir=tmp_path / "again", publish=False)
    assert next(step.resumed for step in continued.report.steps if step.name == "quantize")
    (three,) = (path / "model" for path in work.glob("quantize-*"))
    (one,) = (path / "model" for path in (tmp_path / "again").glob("quantize-*"))
    assert changed(directory / "single" / "gptaq", three) < 0.005
    assert changed(directory / "single" / "gptaq", one) < 0.005


def test_what_several_processes_do_not_do_is_refused_before_the_work(directory: Path, tmp_path: Path) -> None:
    model, text = str(directory / "llama"), str(directory / "text.txt")
    calibrated = ["--calibration", text, "--samples", "5", "--length", "48", "--scheme", "w4a16-g32"]
    quantize = ["quantize", model, str(tmp_path / "out"), *calibrated]
    refused: tuple[tuple[list[str] | list[list[str]], str], ...] = (
        (
            [quantize, [*quantize[:-1], "w4a16-g16"]],
            "quantize.scheme: w4a16-g32",
        ),
        ([*quantize, "--method", "signround"], "method 'signround' with 2 processes"),
        ([*quantize[:-1], "w4a16-g32", "--samples", "1"], "2 processes have 1 windows of calibration text"),
        (["convert", model, str(tmp_path / "out")], "convert: 2 processes were started"),
    )
    for number, (command, said) in enumerate(refused):
        ended = run_ranks(2, tmp_path / str(number), command)
        assert ended.codes == (2, 2)
        assert len(ended.errors[0].splitlines()) == 1 and said in ended.errors[0]
        assert not ended.errors[1] and not any(ended.outputs)
    ended = run_ranks(2, tmp_path / "plan", [*quantize, "--plan"])
    assert ended.codes == (0, 0) and "2 processes share calibration" in ended.outputs[0] and not ended.outputs[1]
    assert not (tmp_path / "out").exists()


def test_torchrun_starts_them(directory: Path, tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "llmconvert", "quantize", "--json"]
    done = subprocess.run(
        [
            sys.executable,
            *command,
            directory / "llama",
            tmp_path / "out",
            "--method",
            "rtn",
            "--scheme",
            "w4a16-g32",
            "--dtype",
            "float32",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,  # a checkout's own folder of that name is not the package
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["layers"] == 28
    ours, theirs = tensors(directory / "single" / "rtn"), tensors(tmp_path / "out")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
