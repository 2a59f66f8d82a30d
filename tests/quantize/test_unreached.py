"""Linears that text alone never passes: rounded and said, left out on request, refused where text is needed."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from support.quantize_jobs import WINDOWS, quantize, refused
from support.tiny_architectures import unreached_model

from llmconvert.errors import CalibrationError, SchemeError
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.numbers import Int
from llmconvert.quantize.plan import Override
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint


def test_a_linear_that_is_never_called_is_rounded_and_said(tmp_path: Path) -> None:
    source = unreached_model(tmp_path / "source")
    result = quantize(source, tmp_path / "out")
    (note,) = result.notes
    assert "8 of 20 linears take no part when text alone passes the model" in note
    quantize(source, tmp_path / "rtn", method="rtn")
    made, rounded = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "rtn" / "model.safetensors")
    unreached = {name for name in made if ".encoder_attn." in name}
    assert {name for name in made if torch.equal(made[name], rounded[name]) and "packed" in name} == {
        name for name in unreached if "packed" in name
    }


def test_a_linear_that_is_never_called_has_no_scale_of_its_inputs(tmp_path: Path) -> None:
    source = unreached_model(tmp_path / "source")
    refused(
        tmp_path,
        SchemeError,
        r"text never passes .*encoder_attn.* give such linears fp8-dynamic",
        source,
        name="fp8-static",
    )
    aside = [Override("*.encoder_attn.*", Scheme.parse("w8a16-channel"))]
    quantize(source, tmp_path / "out", "fp8-static", overrides=aside)
    scheme = Scheme.parse("fp8-static")
    quantize_checkpoint(
        SafetensorsCheckpoint(source), tmp_path / "rtn", method="rtn", scheme=scheme, overrides=aside, windows=WINDOWS
    )
    made, rounded = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "rtn" / "model.safetensors")
    packed = [name for name in made if ".encoder_attn." in name and name.endswith("weight_packed")]
    assert len(packed) == 8 and all(rounded[name].any() and torch.equal(made[name], rounded[name]) for name in packed)


def test_where_none_of_the_linears_is_called_none_can_be_calibrated(tmp_path: Path) -> None:
    source = unreached_model(tmp_path / "source")
    overrides = [Override("*.encoder_attn.*", Scheme(Int(4), 32)), Override("*", None)]
    refused(tmp_path, CalibrationError, "never calls this linear, nor any other", source, overrides=overrides)


def test_a_linear_that_is_never_called_can_be_left_out(tmp_path: Path) -> None:
    source = unreached_model(tmp_path / "source")
    result = quantize(source, tmp_path / "out", overrides=[Override("*.encoder_attn.*", None)])
    assert len(result.layers) == 12
    assert result.notes == ()
