"""Whole runs on a tiny model: what they make, what they reuse, how they fail."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmconvert.errors import DatasetError, GateError, OutputError, RunInterruptedError, SchemeError, UnsupportedError
from llmconvert.progress import SILENT
from llmconvert.recipes.loading import load_recipe
from llmconvert.recipes.runner import RunResult, run_recipe
from llmconvert.recipes.stages import quantization
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.storage.contents import listing
from llmconvert.storage.stage_record import STAGE_FILE


class Log:
    """Keeps the lines, and the names of tasks."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.tasks: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)

    def task(self, description: str, total: float) -> Any:
        self.tasks.append(description)
        return SILENT.task(description, total)


def run(path: Path, *overrides: str, **options: Any) -> tuple[RunResult, Log]:
    log = Log()
    return run_recipe(load_recipe(path, overrides), progress=log, **options), log


def weights(directory: Path) -> dict[str, bytes]:
    names = ("model.safetensors", "config.json")
    return {name: (directory / name).read_bytes() for name in names}


def test_a_run_ends_with_a_published_measured_model(write_recipe: Any, tmp_path: Path) -> None:
    path = write_recipe(publish={"to": f"file:{tmp_path}/out"}, validate=None, attention=None)
    text = path.read_text()
    evaluation = text.splitlines()[text.splitlines().index("calibrate:") + 1].split(": ")[1].replace("train", "test")
    overrides = [
        f"validate.perplexity.dataset={evaluation}",
        "validate.perplexity.window=64",
        "validate.perplexity.max_windows=4",
        "validate.generation.max_new_tokens=4",
    ]
    result, _ = run(path, *overrides)
    out = tmp_path / "out"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(out))
    assert {"recipe.yaml", "report.json", "report.html"} <= set(os.listdir(out / "llmconvert"))
    assert result.published == f"file:{out}"
    assert weights(out) == weights(result.artifact)

    report = json.loads((out / "llmconvert" / "report.json").read_text())
    assert [step["name"] for step in report["steps"]] == [
        "fetch",
        "convert",
        "calibrate",
        "evaluation-text",
        "quantize",
        "validate",
    ]
    assert all(step["seconds"] >= 0 and step["peak_rss_bytes"] > 1 << 20 for step in report["steps"])
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["perplexity"]["value"] > 1 and checks["perplexity"]["reference"] > 1
    assert 0 <= checks["generation.agreement"]["value"] <= 1
    assert checks["inventory"]["ok"] and checks["size_bytes"]["value"] < checks["size_bytes"]["reference"]

    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.isfinite(model(torch.arange(8).unsqueeze(0)).logits).all()


def test_the_resolved_recipe_repeats_the_run(write_recipe: Any, tmp_path: Path, tiny_llama: Path) -> None:
    path = write_recipe(publish={"to": f"file:{tmp_path}/out"})
    result, _ = run(path)
    resolved = result.artifact / "llmconvert" / "recipe.yaml"
    assert str(tmp_path) not in resolved.read_text() and str(tiny_llama.parent) not in resolved.read_text()
    original = load_recipe(path)
    assert original.calibrate is not None and original.validation is not None
    assert original.validation.perplexity is not None
    again, _ = run(
        resolved,
        f"model={tiny_llama}",
        f"calibrate.dataset={original.calibrate.dataset}",
        f"validate.perplexity.dataset={original.validation.perplexity.dataset}",
        work_dir=tmp_path / "elsewhere",
    )
    assert weights(again.artifact) == weights(result.artifact)


def test_no_path_of_this_machine_is_published(write_recipe: Any, tmp_path: Path, tiny_llama: Path) -> None:
    result, _ = run(write_recipe(publish={"to": f"file:{tmp_path}/out"}))
    assert result.published is not None
    for name in listing(tmp_path / "out"):
        content = (tmp_path / "out" / name).read_bytes()
        for private in (tmp_path, tiny_llama.parent, Path.home()):
            assert str(private).encode() not in content or private == Path("/"), f"{name} names {private}"


def test_nothing_is_done_twice(write_recipe: Any) -> None:
    path = write_recipe()
    first, _ = run(path)
    second, log = run(path)
    assert not log.tasks and all("unchanged, reusing" in line for line in log.lines)
    assert second.artifact == first.artifact and second.report == first.report


@pytest.mark.parametrize("stage", ["artifact", "quantize"])
@pytest.mark.parametrize("spoil", ["delete", "overwrite"])
def test_weights_that_are_not_as_they_were_written_are_never_published(
    write_recipe: Any, tmp_path: Path, stage: str, spoil: str
) -> None:
    path = write_recipe(publish={"to": f"file:{tmp_path}/out"})
    first, _ = run(path)
    expected = weights(tmp_path / "out")
    (file,) = (tmp_path / "work").glob(f"{stage}-*/model/model.safetensors")
    if spoil == "delete":
        file.unlink()
    else:
        status, content = file.stat(), bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    second, log = run(path)
    assert weights(tmp_path / "out") == weights(second.artifact) == expected
    assert second.report.checks == first.report.checks
    found = "is missing" if spoil == "delete" else "holds other bytes than were written"
    said = f"is not as it was written, model/model.safetensors {found}; building it anew"
    # The file is one and the same where the artifact links it, so both stages see what was written over it.
    spoiled = {stage} if spoil == "delete" else {"artifact", "quantize"}
    assert {line.split(":")[0] for line in log.lines if said in line} == spoiled


def test_only_what_changed_is_done_again(write_recipe: Any) -> None:
    path = write_recipe()
    first, _ = run(path)
    second, log = run(path, "quantize.scheme=w8a16-g32")
    assert "quantize: scheme w4a16-g32-sym → w8a16-g32-sym, starting anew" in log.lines
    reused = {line.split(":")[0] for line in log.lines if "unchanged" in line}
    assert reused == {"convert", "calibrate", "evaluation-text"}
    assert weights(second.artifact) != weights(first.artifact)
    _, log = run(path, "quantize.scheme=w8a16-g32", "validate.perplexity.max_windows=2")
    assert {line.split(":")[0] for line in log.lines if "unchanged" in line} == {"convert", "calibrate", "quantize"}


def test_fresh_runs_give_the_same_bytes(write_recipe: Any) -> None:
    path = write_recipe()
    first, _ = run(path)
    before = weights(first.artifact)
    second, log = run(path, fresh=True)
    assert not any("unchanged" in line for line in log.lines)
    assert weights(second.artifact) == before


def test_a_missed_limit_keeps_the_artifact_and_publishes_nothing(write_recipe: Any, tmp_path: Path) -> None:
    path = write_recipe(publish={"to": f"file:{tmp_path}/out"})
    with pytest.raises(GateError, match=r"the weights take .* bytes, allowed are 1,000") as caught:
        run(path, "validate.max_bytes=1kB")
    artifact = Path(str(caught.value).rsplit("the artifact is in ", 1)[1])
    assert (artifact / "model.safetensors").is_file() and (artifact / "README.md").is_file()
    assert not (tmp_path / "out").exists()


def test_methods_without_calibration_need_no_text(write_recipe: Any) -> None:
    result, _ = run(write_recipe(), "quantize.method=rtn", "calibrate=null")
    assert result.report.model.calibration is None


def test_converting_alone(write_recipe: Any) -> None:
    result, _ = run(write_recipe(calibrate=None, quantize=None, validate=None))
    with SafetensorsCheckpoint(result.artifact) as checkpoint:
        assert {info.dtype for info in checkpoint.infos.values()} == {torch.bfloat16}
    assert (result.artifact / "README.md").is_file()


@pytest.mark.parametrize(
    ("overrides", "error", "reason"),
    [
        (["quantize.scheme=w4a16-g48"], SchemeError, "48"),
        (["attention.kv_heads=3"], UnsupportedError, "cannot be merged to 3: .*possible: 1"),
        (["calibrate.dataset=missing.txt"], DatasetError, "missing.txt"),
        (["validate.perplexity.dataset=missing.txt"], DatasetError, "missing.txt"),
        (["publish.to=file:."], OutputError, "not empty"),
    ],
)
def test_bad_input_is_found_before_the_long_work(
    write_recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, overrides: list[str], error: Any, reason: str
) -> None:
    path = write_recipe()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=reason):
        run(path, *overrides)
    left = [entry.name for entry in (tmp_path / "work").iterdir()] if (tmp_path / "work").exists() else []
    assert not [name for name in left if "quantize" in name or "validate" in name or name.endswith(".partial")]


def test_the_same_text_under_another_name_is_refused(write_recipe: Any, tmp_path: Path, texts: Any) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_bytes(texts[0].read_bytes())
    with pytest.raises(DatasetError, match="same text"):
        run(write_recipe(), f"validate.perplexity.dataset={copy}")


def test_windows_longer_than_the_model_allows(write_recipe: Any) -> None:
    with pytest.raises(Exception, match=r"calibrate: windows of 4,096 tokens don't fit the model's 2,048 positions"):
        run(write_recipe(), "calibrate.length=4096")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_says_how_to_go_on(
    write_recipe: Any, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    path = write_recipe()
    expected, _ = run(path, work_dir=path.parent / "other")
    before = signal.getsignal(number)
    original = quantization.quantize

    def stopped(*arguments: Any, **options: Any) -> Any:
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
        time.sleep(5)
        raise AssertionError("the signal did not arrive")

    monkeypatch.setattr(quantization, "quantize", stopped)
    with pytest.raises(RunInterruptedError, match=f"stopped by {number.name}; run the same command to continue"):
        run(path)
    assert signal.getsignal(number) is before
    monkeypatch.setattr(quantization, "quantize", original)
    result, log = run(path)
    assert "quantize: was interrupted, continuing" in log.lines
    assert weights(result.artifact) == weights(expected.artifact)


def test_stages_say_what_they_were_made_from(write_recipe: Any) -> None:
    result, _ = run(write_recipe())
    work = result.artifact.parent.parent
    inputs = {
        (record := json.loads((path / STAGE_FILE).read_text()))["name"]: record["inputs"]
        for path in work.iterdir()
        if (path / STAGE_FILE).exists()
    }
    assert inputs["quantize"]["scheme"] == "w4a16-g32-sym" and inputs["convert"]["dtype"] == "bfloat16"
    assert inputs["calibrate"]["seed"] == 0 and inputs["calibrate"]["samples"] == 4


def test_layers_left_alone_stay_dense(write_recipe: Any) -> None:
    overrides = [{"match": "*.down_proj", "scheme": "none"}, {"match": "*.mlp.*", "scheme": "w8a16-g32"}]
    quantize = {"method": "rtn", "scheme": "w4a16-g32", "overrides": overrides}
    result, _ = run(write_recipe(calibrate=None, validate=None, quantize=quantize))
    with SafetensorsCheckpoint(result.artifact) as checkpoint:
        assert "model.layers.0.mlp.down_proj.weight" in checkpoint
        packed = {name.split(".")[-2] for name in checkpoint if name.endswith(".weight_packed")}
    assert packed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    text = (result.artifact / "llmconvert" / "recipe.yaml").read_text()
    assert load_recipe(result.artifact / "llmconvert" / "recipe.yaml").quantize is not None and "scheme: none" in text
