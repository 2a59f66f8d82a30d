"""Inputs beyond static scales: nothing on the text that fixed them, named by linear where scales are too small."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.heard import Heard
from support.tiny_models import tiny_tokenizer

from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.solve.fixed_scales import LargestInput, lone_peaks
from llmconvert.report.report import Check
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.text.datasets import load_dataset_text
from llmconvert.text.tokens import TokenWindows, draw_windows
from llmconvert.validate.artifact import validate_artifact
from llmconvert.validate.predictions.quality import QualityCheck

PART = {"fp8-static": "input_scale", "nvfp4": "input_global_scale"}


def measure(artifact: Path, original: Path | None, text: TokenWindows, lines: Heard, **limits: Any) -> dict[str, Check]:
    reference = None if original is None else SafetensorsCheckpoint(original)
    checks = validate_artifact(
        artifact,
        [QualityCheck(**limits)],
        reference=reference,
        windows=text,
        device=torch.device("cpu"),
        progress=lines,
    )
    return {check.name: check for check in checks}


@pytest.mark.parametrize("name", PART)
def test_what_overflows_is_counted_by_linear_and_fails_its_gate(original: Path, tmp_path: Path, name: str) -> None:
    corpus = load_dataset_text("pydoc-topics:test")
    text = draw_windows(tiny_tokenizer(), corpus, samples=3, length=40, order="sequential")
    made, lines = tmp_path / "made", Heard()
    quantize_checkpoint(
        SafetensorsCheckpoint(original), made, method="rtn", scheme=Scheme.parse(name), windows=list(text.windows)
    )
    # Sums in another order move an input of 4 bits by a whole step.
    whole = measure(made, original, text, lines, max_saturated=1e-3)["saturated_inputs"]
    assert whole.ok and whole.value is not None and (whole.value == 0 or name == "nvfp4")
    assert not [line for line in lines.lines if "overflow" in line]

    narrow, linear = tmp_path / "narrow", "model.layers.1.mlp.down_proj"
    shutil.copytree(made, narrow)
    tensors = load_file(narrow / "model.safetensors")
    scale = tensors[f"{linear}.{PART[name]}"]
    scale *= 1 / 64 if name == "fp8-static" else 64
    save_file(tensors, narrow / "model.safetensors", metadata={"format": "pt"})
    compared = measure(narrow, original, text, lines, max_saturated=0.01)["saturated_inputs"]
    alone = measure(narrow, None, text, lines)["saturated_inputs"]
    assert compared.value is not None and compared.value > 0.01 and not compared.ok and alone.ok
    assert compared.value == pytest.approx(alone.value)
    (section,) = compared.sections
    assert section.rows[0][0] == linear and "activations overflow static scales: " in compared.text
    assert compared.detail["linears"] == 14 and compared.detail["saturated"] >= 1
    assert any(
        line.startswith("warning: activations overflow static scales") and linear in line for line in lines.lines
    )


def test_a_scale_that_one_window_set_is_said() -> None:
    scheme = Scheme.parse("fp8-static")
    seen = {name: LargestInput([scheme]) for name in ("even", "lone", "once")}
    for name, peaks in {"even": (1.0, -0.9, 0.8), "lone": (1.0, 5.0, -2.0), "once": (4.0,)}.items():
        for peak in peaks:
            seen[name].look(torch.tensor([peak, 0.1]))
    leads = {name: one.lead for name, one in seen.items()}
    assert leads == {"even": pytest.approx(1 / 0.9), "lone": 2.5, "once": 1.0}
    assert "in 1 of 3 linears one window alone" in lone_peaks(leads) and "(lone: 2.5 times)" in lone_peaks(leads)
    assert lone_peaks({"even": 1.0}) == ""
