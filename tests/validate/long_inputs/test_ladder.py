"""What a model needs, by arithmetic of its own, and how that is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_architectures import tiny_model
from support.tiny_models import tiny_llama_dir

from llmconvert.engine.memory import BASE_NBYTES
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.report.report import Check
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.validate.long_inputs import ladder
from llmconvert.validate.long_inputs.attention import AttentionOptions
from llmconvert.validate.long_inputs.attention_check import AttentionCheck
from llmconvert.validate.long_inputs.ladder import MemoryLadder, Rung, memory_needs, rungs_section
from llmconvert.validate.measurement import Subject
from llmconvert.validate.render.section_plot import section_plot
from llmconvert.validate.runtimes.isolated import UnmeasuredError

FOUND = {"seconds": 1.0, "loaded_bytes": 6 * 10**8, "peak_bytes": 7 * 10**8, "extra_bytes": 10**8}


@pytest.fixture
def mha(tmp_path: Path) -> Path:
    return tiny_llama_dir(tmp_path / "mha", num_key_value_heads=4, dtype=torch.bfloat16)


def measure(directory: Path, check: MemoryLadder, reference: Path | None = None, checks: Any = ()) -> Check:
    with SafetensorsCheckpoint(directory) as stored:
        original = SafetensorsCheckpoint(reference) if reference is not None else None
        dense = open_dense(stored)
        subject = Subject(directory, stored, dense, original, original, None, torch.device("cpu"), checks=checks)
        (found,) = check.measure(subject)
        return found


def test_needs_are_weights_cache_and_activations(mha: Path) -> None:
    with SafetensorsCheckpoint(mha) as stored:
        needs = {need.weights: need for need in memory_needs(stored)}
        fewer = {need.weights: need for need in memory_needs(stored, 1)}
    parameters = sum(info.nbytes for info in SafetensorsCheckpoint(mha).infos.values()) // 2
    cache = 2 * 2 * 4 * 16 * 100 * 2
    assert needs["bfloat16"].running(100) == BASE_NBYTES + 2 * parameters + cache + 100 * 2 * (8 * 64 + 6 * 128)
    assert needs["float32"].weight_bytes == 2 * needs["bfloat16"].weight_bytes
    assert needs["bfloat16"].running(100) - fewer["bfloat16"].running(100) == cache * 3 // 4
    longest = needs["bfloat16"].longest(BASE_NBYTES + 2 * parameters + 10**6, 10**6)
    assert needs["bfloat16"].running(longest) <= BASE_NBYTES + 2 * parameters + 10**6
    assert needs["bfloat16"].running(longest + 1) > BASE_NBYTES + 2 * parameters + 10**6
    assert needs["bfloat16"].longest(10**6, 10**6) == 0


def test_scores_that_flash_cannot_avoid_are_counted(tmp_path: Path, mha: Path) -> None:
    """Of a model with soft-capping; without it there are none."""
    with SafetensorsCheckpoint(tiny_model(tmp_path / "gemma2", "gemma2")) as stored:
        heads = stored.config["num_attention_heads"]
        for need in memory_needs(stored):
            linear = need.running(2000) - need.running(1000)
            curved = need.running(3000) - 2 * need.running(2000) + need.running(1000)
            assert curved >= 2 * 1000**2 * heads * 2 * need.itemsize
            assert linear > 0
        check = measure(tmp_path / "gemma2", MemoryLadder(memory=10**6))
    sections = {section.name: section for section in check.sections}
    assert "flash can't run this model" in sections["memory-computed"].text
    sections = {section.name: section for section in measure(mha, MemoryLadder(memory=10**6)).sections}
    assert "read in one piece with flash attention" in sections["memory-computed"].text


def test_before_and_after_fewer_heads(mha: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(function: str, arguments: dict[str, Any], timeout: float) -> Any:
        asked.append((arguments["dtype"], arguments["length"], arguments["backend"]))
        return {**FOUND, "cache_bytes": 5, "method": "resident memory, exact"}

    monkeypatch.setattr(ladder, "run_isolated", run)
    mqa = tiny_llama_dir(tmp_path / "mqa", num_key_value_heads=1, dtype=torch.bfloat16)
    perplexity = Check(name="perplexity", value=12.0, reference=11.0)
    check = measure(mqa, MemoryLadder(measured_contexts=(64,)), mha, (perplexity,))
    assert asked == [("float32", 64, "flash"), ("bfloat16", 64, "flash")], "the artifact is what runs"
    sections = {section.name: section for section in check.sections}
    heads = [row[1] for row in sections["memory-computed"].rows]
    assert heads == [4.0] * 4 + [1.0] * 4
    assert [row[0] for row in sections["memory-fits"].rows][:4] == [
        "float32",
        "bfloat16",
        "w8a16-channel-sym",
        "w4a16-g128-sym",
    ]
    rungs = check.detail["rungs"]
    assert [(rung["label"], rung["perplexity"]) for rung in rungs] == [
        ("float32", None),
        ("original", 11.0),
        ("artifact", 12.0),
    ]
    assert (
        rungs[2]["cache_bytes"] * 4 == rungs[1]["cache_bytes"]
        and rungs[0]["cache_bytes"] == 2 * rungs[1]["cache_bytes"]
    )
    assert sections["memory-measured"].rows[0][4] == 7e8
    assert section_plot(sections["memory-ladder"], "svg") is not None


def test_what_does_not_fit_is_not_started(mha: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "run_isolated", lambda *a, **k: pytest.fail("must not start"))
    check = measure(mha, MemoryLadder(memory=10**6))
    assert check.ok and "may be used" in check.detail["not_measured"][0]


def test_a_process_that_fails_is_a_reason(mha: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise UnmeasuredError("out of memory")

    monkeypatch.setattr(ladder, "run_isolated", fail)
    check = measure(mha, MemoryLadder(measured_contexts=(64,)))
    assert check.detail["not_measured"] == ["float32, 64 tokens: out of memory", "bfloat16, 64 tokens: out of memory"]


def test_the_picture_says_what_was_not_measured() -> None:
    section = rungs_section("memory-ladder", [Rung("float32", 400, 8, None), Rung("W4", 100, 4, 12.5)], 8192)
    assert section.rows[1] == ("W4", 100.0, 4.0, "12.50")
    picture = section_plot(section, "svg")
    assert picture is not None and b"not measured" in picture and b"12.50" in picture and b"400 B" in picture


def test_a_gguf_artifact_is_computed_and_not_run(mha: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Subject, "unloadable", property(lambda self: "the artifact is GGUF"))
    check = measure(mha, MemoryLadder(measured_contexts=(64,)))
    assert check.ok and check.value and "GGUF" in check.detail["not_measured"][0]
    with SafetensorsCheckpoint(mha) as stored:
        subject = Subject(mha, stored, stored, None, None, None, torch.device("cpu"))
        (attention,) = AttentionCheck(AttentionOptions()).measure(subject)
    assert not attention.ok and attention.value is None and "GGUF" in attention.text


def test_a_process_that_breaks_is_a_failure(mha: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that doesn't suffice is a finding; a process that could not do its work is none."""

    def run(*_: object, **__: object) -> None:
        raise UnmeasuredError("No module named 'x'", by_limit=False)

    monkeypatch.setattr(ladder, "run_isolated", run)
    check = measure(mha, MemoryLadder(measured_contexts=(64,)))
    assert not check.ok and "No module named 'x'" in check.text
