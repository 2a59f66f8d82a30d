"""What measurements hand to each other, and what those do that lack what they are about."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import tiny_tokenizer

from llmconvert.engine.evaluation import stream_logits
from llmconvert.errors import CalibrationError
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.recipes.schema.measuring import ValidateSettings
from llmconvert.recipes.stages.measurements import measurements
from llmconvert.report.report import Check
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.text.datasets import load_dataset_text
from llmconvert.text.tokens import draw_windows
from llmconvert.validate.artifact import validate_artifact
from llmconvert.validate.generation.behaviour import BehaviourCheck
from llmconvert.validate.inventory import InventoryCheck
from llmconvert.validate.measurement import Measurement, Subject
from llmconvert.validate.predictions.quality import QualityCheck
from llmconvert.validate.predictions.step_losses import StepLossesCheck
from llmconvert.validate.runtimes.fidelity import take_probe
from llmconvert.validate.runtimes.vllm import VllmCheck
from llmconvert.validate.size import SizeCheck
from llmconvert.validate.vocabulary import VocabularyCheck


@pytest.fixture
def alone(quantized: Path) -> Iterator[Subject]:
    """An artifact without an original, without a text."""
    with SafetensorsCheckpoint(quantized) as stored:
        yield Subject(quantized, stored, open_dense(stored), None, None, None, torch.device("cpu"))


@pytest.fixture
def read(alone: Subject) -> Subject:
    """The same with a text."""
    corpus = load_dataset_text("pydoc-topics:test")
    return replace(alone, windows=draw_windows(tiny_tokenizer(), corpus, samples=2, length=24, order="sequential"))


@dataclass(frozen=True)
class TensorCount(Measurement):
    """A measurement of a user's own."""

    def measure(self, subject: Subject) -> list[Check]:
        return [Check(name="tensors", value=len(subject.stored), reference=len(subject.checks))]


def test_a_measurement_of_ones_own_sees_what_was_measured_before(quantized: Path) -> None:
    counted = TensorCount()
    counted.require()
    checks = validate_artifact(quantized, [SizeCheck(), counted], reference=None, device=torch.device("cpu"))
    assert [check.name for check in checks] == ["size_bytes", "tensors"]
    assert (checks[1].value, checks[1].reference) == (48, 1)


@pytest.mark.parametrize(
    "measurement",
    [
        VocabularyCheck(),
        InventoryCheck(),
        QualityCheck(max_kl=1.0),
        BehaviourCheck(),
        VllmCheck(),
        StepLossesCheck({"attention": Path("gone")}, "quantize"),
    ],
    ids=lambda measurement: type(measurement).__name__,
)
def test_without_an_original_and_a_text_there_is_nothing_to_say(measurement: Measurement, alone: Subject) -> None:
    measurement.require()
    assert list(measurement.measure(alone)) == []


def test_a_size_alone_has_no_bits_per_weight(alone: Subject) -> None:
    (check,) = SizeCheck(max_bytes=1).measure(alone)
    assert (check.name, check.reference, check.ok) == ("size_bytes", None, False)


def test_the_probe_is_our_readers_beginning_of_the_text(read: Subject) -> None:
    probe = take_probe(read)
    assert probe is not None and read.windows is not None
    (expected,) = stream_logits(read.dense, read.windows.windows[:1], device=read.device)
    assert torch.equal(probe.window, read.windows.windows[0]) and torch.equal(probe.logits, expected)
    good = replace(read, checks=(Check(name="perplexity", value=9.0),))
    assert take_probe(good) is not None
    # NaN was found while perplexity was measured: no runtime can be held against that.
    broken = replace(read, checks=(Check(name="perplexity", ok=False),))
    assert take_probe(broken) is None and take_probe(replace(good, windows=None)) is None


def test_what_each_step_cost_adds_up_from_what_was_measured(read: Subject, original: Path) -> None:
    losses = StepLossesCheck({"attention": original}, "quantize")
    known = replace(read, checks=(Check(name="perplexity", value=300.0, reference=200.0),))
    (check,) = losses.measure(known)
    steps = {step["name"]: step["perplexity"] for step in check.detail["steps"]}
    assert (steps["original"], steps["quantize"]) == (200.0, 300.0)
    (section,) = check.sections
    assert sum(float(row[2] or 0) for row in section.rows) == pytest.approx(torch.tensor(1.5).log().item())
    # Without an original there is nothing that a step could have cost.
    assert losses.measure(replace(read, checks=(Check(name="perplexity", value=300.0),))) == []


def test_a_step_between_that_computes_nan_is_an_error(read: Subject, original: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(original, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    known = replace(read, checks=(Check(name="perplexity", value=300.0, reference=200.0),))
    with pytest.raises(CalibrationError, match="not finite"):
        StepLossesCheck({"attention": broken}, "quantize").measure(known)


def test_a_recipe_makes_one_list() -> None:
    always = [VocabularyCheck, SizeCheck, InventoryCheck, QualityCheck, BehaviourCheck, VllmCheck]
    assert [type(measurement) for measurement in measurements(ValidateSettings())] == always
    settings = ValidateSettings.model_validate({"memory": True, "decoding": True, "positions": True, "max_kl": 0.5})
    found = measurements(settings, overlap=0.2, between={"heal": Path("healed")})
    names = [type(measurement).__name__ for measurement in found[len(always) :]]
    assert names == ["PositionsCheck", "CacheCheck", "MemoryLadder", "DecodingCheck", "StepLossesCheck"]
    assert found[3] == QualityCheck(None, 0.5, None, 0.2)
