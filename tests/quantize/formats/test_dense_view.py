"""Artifacts of every format seen with dense weights, and converted back to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmconvert.convert.dtype import convert_dtype
from llmconvert.errors import UnsupportedError
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

Tiny = Callable[..., Path]
NAME = "model.layers.1.mlp.down_proj"


def quantized(source: Path, output: Path, scheme: str, layout: str) -> Path:
    checkpoint = SafetensorsCheckpoint(source)
    quantize_checkpoint(checkpoint, output, method="rtn", scheme=Scheme.parse(scheme), format=layout)
    return output


FORMATS = [("w4a16-g32", "gptq"), ("w3a16-g32-asym", "gptq"), ("w8a16-channel", "gptq"), ("w4a16-g32-asym", "awq")]
FORMATS += [("w4a16-g32", "compressed-tensors"), ("w8a8", "bitsandbytes")]


@pytest.mark.parametrize(("scheme", "layout"), FORMATS)
def test_an_artifact_converts_back_to_a_dense_model(tiny: Tiny, tmp_path: Path, scheme: str, layout: str) -> None:
    """And from there into another format, with the same weights."""
    directory = quantized(tiny("llama", torch.bfloat16), tmp_path / "q", scheme, layout)
    view = open_dense(SafetensorsCheckpoint(directory))
    report = convert_dtype(SafetensorsCheckpoint(directory), tmp_path / "dense", dtype=torch.bfloat16)
    assert report.tensors == len(view)
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    original = load_file(tiny("llama", torch.bfloat16) / "model.safetensors")
    assert {name: (value.dtype, value.shape) for name, value in dense.items()} == {
        name: (value.dtype, value.shape) for name, value in original.items()
    }
    assert all(torch.equal(value, view[name]) for name, value in dense.items())
    assert not torch.equal(dense[f"{NAME}.weight"], original[f"{NAME}.weight"])
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not (tmp_path / "dense" / "quantize_config.json").exists()
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values())


def test_quantizing_what_is_quantized_stays_refused(tiny: Tiny, tmp_path: Path) -> None:
    directory = quantized(tiny("llama", torch.bfloat16), tmp_path / "q", "w4a16-g32", "gptq")
    with pytest.raises(UnsupportedError, match=r"already quantized \(gptq"):
        quantized(directory, tmp_path / "again", "w4a16-g32", "gptq")
