"""Perplexity by position, held against a calculation of its own, for every kind of positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_llama_dir, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.report.report import Check
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.validate.long_inputs import positions
from llmconvert.validate.long_inputs.positions import PositionCurve, PositionsCheck, score_positions
from llmconvert.validate.measurement import Subject
from llmconvert.validate.runtimes.isolated import UnmeasuredError


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(function: str, arguments: dict[str, Any], timeout: float) -> Any:
        return score_positions(**{**arguments, "limit": None})

    monkeypatch.setattr(positions, "run_isolated", call)


def model_dir(directory: Path, model_type: str, **settings: Any) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=320, bos_token_id=0, eos_token_id=0, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def measure(directory: Path, check: PositionsCheck, reference: Path | None = None) -> Check:
    with SafetensorsCheckpoint(directory) as stored:
        original = SafetensorsCheckpoint(reference) if reference is not None else None
        subject = Subject(directory, stored, open_dense(stored), original, original, None, torch.device("cpu"))
        (found,) = check.measure(subject)
        return found


def test_the_score_at_each_position(tmp_path: Path) -> None:
    directory = tiny_llama_dir(tmp_path / "m")
    ids = torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    with torch.inference_mode():
        predicted = model(ids).logits.log_softmax(-1)[:, :-1]
    expected = -predicted.gather(-1, ids[:, 1:, None])[..., 0].mean(0)
    found = score_positions(str(directory), ids.tolist(), device="cpu")
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-4)


def test_twice_the_trained_length(tmp_path: Path) -> None:
    directory = tiny_llama_dir(tmp_path / "m", max_position_embeddings=128)
    check = measure(directory, PositionsCheck("pydoc-topics:test", windows=2))
    assert check.ok and check.detail["window"] == 256 and check.detail["trained"] == 128
    assert check.detail["positions"] == "RoPE, θ = 10,000" and check.detail["beyond"] is not None
    section = check.sections[0]
    assert len(section.rows) == 16 and section.rows[0][:2] == (0.0, 16.0) and section.rows[-1][1] == 255.0


def test_the_scaled_model_beside_the_one_it_was(tmp_path: Path) -> None:
    plain = tiny_llama_dir(tmp_path / "plain", max_position_embeddings=64)
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    scaled = tiny_llama_dir(tmp_path / "scaled", max_position_embeddings=128, rope_parameters=rope)
    check = measure(scaled, PositionsCheck("pydoc-topics:test", 128, 2), plain)
    assert check.detail["trained"] == 64 and "yarn ×2" in check.detail["positions"]
    assert set(check.detail["curves"]) == {"artifact", "original"}
    assert check.sections[0].plot is not None and len(check.sections[0].plot.series) == 2


def test_alibi_has_no_end(tmp_path: Path) -> None:
    directory = model_dir(tmp_path / "m", "bloom", hidden_size=64, n_head=4, n_layer=2)
    check = measure(directory, PositionsCheck("pydoc-topics:test", 256, 1))
    assert check.detail["positions"] == "ALiBi" and check.value is not None and check.detail["window"] == 256


def test_learned_positions_end_with_their_table(tmp_path: Path) -> None:
    directory = model_dir(tmp_path / "m", "gpt2", n_embd=64, n_head=4, n_layer=2, n_positions=96)
    check = measure(directory, PositionsCheck("pydoc-topics:test", 256, 1))
    assert check.detail["window"] == 96 and "beyond 96 tokens there are no learned positions" in check.text


def test_windows_larger_than_memory_or_text(tmp_path: Path) -> None:
    directory = tiny_llama_dir(tmp_path / "m")
    check = measure(directory, PositionsCheck("pydoc-topics:test", 2048, 1, memory=2 * 512 * 320 * 4))
    assert check.detail["window"] == 512 and "bytes for their logits" in check.text
    (tmp_path / "short.txt").write_text("The library opens at eight in the morning. " * 40)
    check = measure(directory, PositionsCheck(str(tmp_path / "short.txt"), 4096, 1))
    assert check.detail["window"] < 4096 and "does not fill a window" in check.text
    (tmp_path / "tiny.txt").write_text("Hello.")
    check = measure(directory, PositionsCheck(str(tmp_path / "tiny.txt"), 4096, 1))
    assert not check.ok and check.value is None and "not measured" in check.text


def test_a_failure_in_its_process_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise UnmeasuredError("out of memory")

    monkeypatch.setattr(positions, "run_isolated", fail)
    check = measure(tiny_llama_dir(tmp_path / "m"), PositionsCheck("pydoc-topics:test", 128, 1))
    assert not check.ok and check.value is None and check.text.startswith("not measured: out of memory")


def test_trained_length_before_scaling(tmp_path: Path) -> None:
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    for name, rope, context in (("linear", linear, 512), ("dynamic", dynamic, 128)):
        directory = tiny_llama_dir(tmp_path / name, max_position_embeddings=context, rope_parameters=rope)
        with SafetensorsCheckpoint(directory) as stored:
            assert Architecture.of(stored.config).trained_length == 128


def test_a_curve_between_two_positions() -> None:
    curve = PositionCurve((0, 10, 20, 30), (2.0, 8.0, 32.0), 1)
    assert curve.between(0, 20) == pytest.approx(4.0) and curve.between(20, 30) == pytest.approx(32.0)
    assert curve.between(1, 9) is None
