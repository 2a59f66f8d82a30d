"""How fast original and artifact write with a long context: the cache is as long as asked for, and turns alternate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_llama_dir

from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.report.report import Check
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.validate.long_inputs import decoding
from llmconvert.validate.long_inputs.decoding import DecodingCheck, measure_decoding
from llmconvert.validate.measurement import Subject
from llmconvert.validate.runtimes.isolated import UnmeasuredError


def measure(artifact: Path, original: Path | None, check: DecodingCheck) -> Check:
    with SafetensorsCheckpoint(artifact) as stored:
        reference = SafetensorsCheckpoint(original) if original is not None else None
        subject = Subject(artifact, stored, open_dense(stored), reference, reference, None, torch.device("cpu"))
        (found,) = check.measure(subject)
        return found


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    return tuple(tiny_llama_dir(tmp_path / str(heads), num_key_value_heads=heads) for heads in (4, 1))  # type: ignore[return-value]


@pytest.mark.parametrize("context", [40, 300])
def test_a_cache_of_the_context_lies_behind_every_token(models: tuple[Path, Path], context: int) -> None:
    """Below and above what the model reads itself; the layer's numbers are two of head_dim 16 per head and token."""
    for directory, heads in zip(models, (4, 1), strict=True):
        found = measure_decoding(str(directory), context, 3, device="cpu", dtype="float32")
        assert found["cache_bytes"] == context * heads * 2 * 2 * 16 * 4
        assert len(found["seconds"]) == 3 and min(found["seconds"]) > 0


def test_original_and_artifact_take_turns(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run(function: str, arguments: dict[str, Any], timeout: float) -> Any:
        asked.append(Path(arguments["directory"]).name)
        pace = {"4": 0.04, "1": 0.02}[asked[-1]]
        return {"seconds": [pace, 10 * pace, pace], "cache_bytes": 7}

    monkeypatch.setattr(decoding, "run_isolated", run)
    check = measure(models[1], models[0], DecodingCheck(context=64, tokens=3))
    assert asked == ["4", "1", "4", "1"]
    assert (check.value, check.reference, check.unit) == (50.0, 25.0, "tokens/s")
    assert "2.00 × the original's" in check.text
    (section,) = check.sections
    assert [row[:3] for row in section.rows] == [
        ("original", 1.0, 25.0),
        ("artifact", 1.0, 50.0),
        ("original", 2.0, 25.0),
        ("artifact", 2.0, 50.0),
    ]


def test_what_can_not_be_measured_says_why(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> Any:
        raise UnmeasuredError("out of memory")

    monkeypatch.setattr(decoding, "run_isolated", run)
    check = measure(models[1], None, DecodingCheck())
    assert check.value is None and not check.ok and "not measured: out of memory" in check.text
    assert measure(models[1], None, DecodingCheck(asked=False)).ok, "what is measured by default may be left out"
    monkeypatch.setattr(decoding, "not_loaded", lambda *_: "loading it whole takes about 9 bytes, 1 are free")
    assert "9 bytes, 1 are free" in measure(models[1], models[0], DecodingCheck()).text


@pytest.mark.slow
def test_a_real_turn(models: tuple[Path, Path]) -> None:
    check = measure(models[1], models[0], DecodingCheck(context=64, tokens=4, rounds=1))
    assert check.value is not None and check.value > 0 and check.reference is not None and check.reference > 0
