"""Recipes run on a Hub model while it downloads: the same artifact, the same numbers, and no original on disk."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.disk_use import DiskUse
from support.hub_server import WRITE_TOKEN, Fault, HubServer
from support.tiny_models import tiny_llama_dir

from llmconvert.errors import RecipeError, UsageError
from llmconvert.recipes.loading import load_recipe
from llmconvert.recipes.runner import run_recipe

QUANTIZE = {"method": "rtn", "scheme": "w4a16-g32"}
# A shard from its start on; not its header, and not the ranges that validation reads.
SHARD = r"GET /org/llama/.*safetensors$"
RANGE = r"GET /org/llama/.*safetensors bytes=[1-9]\d*-\d*$"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 3 MB in float32, in more than six shards."""
    directory = tmp_path_factory.mktemp("model") / "llama"
    return tiny_llama_dir(directory, hidden_size=128, intermediate_size=512, max_shard_size="400KB")


@pytest.fixture
def hub(model: Path) -> Iterator[HubServer]:
    with HubServer().running() as server:
        files = {path.name: path.read_bytes() for path in model.iterdir()}
        server.add_repo("org/llama", {**files, "README.md": b"---\nlicense: apache-2.0\n---\n# Llama\n"})
        yield server


def run(hub: HubServer, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "llmconvert.cli", "run", *arguments],
        env={
            **environment,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_TOKEN": WRITE_TOKEN,
            "OMP_NUM_THREADS": "1",
        },
        cwd=home.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def checks(report: bytes) -> dict[str, Any]:
    return {check["name"]: check for check in json.loads(report)["checks"]}


@pytest.mark.slow
def test_it_ends_with_what_a_run_on_the_whole_model_ends_with(
    hub: HubServer, model: Path, write_recipe: Any, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    validate = {
        "perplexity": {"dataset": str(texts[1]), "window": 64, "max_windows": 4, "max_increase": "50%"},
        "generation": {"max_new_tokens": 4},
    }
    settings: dict[str, Any] = {"quantize": QUANTIZE, "calibrate": None, "validate": validate}
    recipe = write_recipe(
        "streamed", model="org/llama@main", publish={"to": "me/{model}-{scheme}", "verify_download": True}, **settings
    )
    shards = sorted(path.stat().st_size for path in model.glob("*.safetensors"))
    # Killed by a lost connection in the midst of the download, the same command goes on with what is missing.
    third = sorted(path.name for path in model.glob("*.safetensors"))[2]
    hub.faults.append(Fault(f"GET .*{third}$", 403, "blocked"))
    with DiskUse(tmp_path / "work") as disk:
        failed = run(hub, tmp_path / "home", str(recipe), "--stream")
        assert (failed.returncode, "HTTP 403" in failed.stderr) == (4, True), failed.stderr
        assert "me/llama-w4a16-g32-sym" not in hub.repos
        hub.faults[:] = [Fault(RANGE, drop_after=3000, times=2), Fault(SHARD, slow_seconds=0.01)]
        done = run(hub, tmp_path / "home", str(recipe), "--stream")
    assert done.returncode == 0, done.stderr
    came = [line.rsplit("/")[-1] for line in hub.log if re.search(SHARD, line)]
    assert len(came) == len(shards) + 1, f"each shard came once, the one that was refused twice: {came}"
    said = re.search(r"is not on this disk and is read from the Hub again, ([0-9,]+) bytes in all", done.stderr)
    assert said is not None, done.stderr
    assert int(said[1].replace(",", "")) == pytest.approx(3 * sum(shards), rel=0.05)

    whole_recipe = write_recipe("whole", model=str(model), work_dir=str(tmp_path / "whole"), **settings)
    assert run(hub, tmp_path / "home", str(whole_recipe)).returncode == 0
    (whole,) = (tmp_path / "whole").glob("artifact-*/model")
    published = hub.files("me/llama-w4a16-g32-sym")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert published[name] == (whole / name).read_bytes(), name
    found = checks(published["llmconvert/report.json"])
    expected = checks((whole / "llmconvert" / "report.json").read_bytes())
    for name in ("perplexity", "kl_mean", "kl_p99", "kl_p999", "top1_agreement", "block_divergence", "bits_per_weight"):
        assert (found[name]["value"], found[name]["reference"]) == (
            expected[name]["value"],
            expected[name]["reference"],
        )
    tensors = [
        {tensor["name"]: tensor for tensor in each["inventory"]["detail"]["tensors"]} for each in (found, expected)
    ]
    assert tensors[0] == tensors[1]
    assert found["perplexity"]["limit"] is not None
    assert found["generation.agreement"]["detail"]["judged_by"] == "scoring"
    resolved = published["llmconvert/recipe.yaml"].decode()
    assert f"model: org/llama@{hub.repos['org/llama'].branches['main']}" in resolved and "stream:" not in resolved

    card = published["README.md"].decode()
    assert "license: apache-2.0" in card and "- org/llama" in card

    room = 60 * 4096  # token windows, journal, report and plots are not weights, and sizes are rounded to blocks
    assert disk.most_in_shards <= sum(shards[-2:]) + room < sum(shards)
    output = sum(len(content) for name, content in published.items())
    assert disk.most <= output + sum(shards[-2:]) + room + 200_000
    assert not list((tmp_path / "work").glob("convert-*"))
    left = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.stat().st_size > 100_000]
    assert not [path for path in left if path.suffix == ".safetensors" or "blobs" in path.parts], left


@pytest.mark.slow
def test_a_dtype_alone_is_streamed_too(hub: HubServer, model: Path, write_recipe: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"quantize": None, "calibrate": None, "validate": {"max_bytes": "1GB"}}
    recipe = write_recipe("dense", model="org/llama", stream=True, publish={"to": f"file:{tmp_path}/out"}, **settings)
    done = run(hub, tmp_path / "home", str(recipe))
    assert done.returncode == 0, done.stderr
    whole = run_recipe(load_recipe(write_recipe("whole", model=str(model), **settings)))
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (whole.artifact / name).read_bytes()
    assert "read from the Hub again" not in done.stderr, "what was converted is on this disk"


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({}, "stream: gptq needs the activations of the whole model; leave out stream .--stream., or take .* rtn"),
        ({"quantize": QUANTIZE, "attention": {"kv_heads": 1}}, "stream: heads are merged in the whole model"),
    ],
)
def test_what_needs_the_whole_model_is_refused(write_recipe: Any, sections: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        load_recipe(write_recipe(model="org/llama", **sections), ["stream=true"])


def test_only_hub_models_are_streamed(write_recipe: Any, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(quantize=QUANTIZE, stream=True, calibrate=None))
    with pytest.raises(UsageError, match="only a Hub model"):
        run_recipe(recipe)
    assert not list((tmp_path / "work").glob("*"))
