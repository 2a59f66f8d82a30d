"""Reading artifacts of other tools back to dense weights, and one format into another."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.quantized import random_tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmconvert.convert.dtype import convert_dtype
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.formats.dense_view import QuantizedView, open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.numbers import Int
from llmconvert.quantize.pack import pack_words
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

Tiny = Callable[..., Path]
NAME = "model.layers.1.mlp.down_proj"


def write(directory: Path, tensors: dict[str, torch.Tensor], declared: dict[str, Any]) -> SafetensorsCheckpoint:
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = {"dtype": "bfloat16", "quantization_config": declared}
    (directory / "config.json").write_text(json.dumps(config))
    return SafetensorsCheckpoint(directory)


def quantized(source: Path, output: Path, scheme: str, layout: str) -> Path:
    checkpoint = SafetensorsCheckpoint(source)
    quantize_checkpoint(checkpoint, output, method="rtn", scheme=Scheme.parse(scheme), format=layout)
    return output


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Hypothesis runs many examples in one test; each makes a folder of its own below this one."""
    return iter(tmp_path_factory.mktemp("example") / str(index) for index in range(10_000))


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    version=st.sampled_from(["gptq", "gptq_v2"]),
    order=st.sampled_from(["groups", "scattered", "none"]),
    symmetric=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_gptq(folders: Iterator[Path], bits: int, version: str, order: str, symmetric: bool, seed: int) -> None:
    """Versions 1 and 2, activation order, and checkpoints without ``g_idx``."""
    scheme = Scheme(Int(bits, symmetric), 32)
    tensor = random_tensor(scheme, 64, 96, torch.float16, seed)
    stored = load_format("gptq").pack("l", tensor)
    if version == "gptq_v2":
        half = 1 << (bits - 1)
        zero = torch.zeros(64, 3, dtype=torch.int8) if tensor.zero is None else tensor.zero
        stored["l.qzeros"] = pack_words((zero.int() + half).to(torch.uint8).T.contiguous(), bits)
    expected = tensor.dequantize(torch.float32)
    if order == "scattered":
        group = torch.randperm(96, generator=torch.Generator().manual_seed(seed)) // 32
        stored["l.g_idx"] = group.to(torch.int32)
        zero = 0.0 if tensor.zero is None else tensor.zero.float()[:, group]
        expected = (tensor.codes.float() - zero) * tensor.scale.float()[:, group]
    elif order == "none":
        del stored["l.g_idx"]
    declared = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": symmetric, "checkpoint_format": version}
    view = open_dense(write(next(folders), stored, declared), torch.float32)
    assert isinstance(view, QuantizedView)
    assert list(view) == ["l.weight"] and view.scheme_of("l.weight") == scheme
    assert torch.equal(view["l.weight"], expected)
    assert torch.equal(view.read_rows("l.weight", 5, 33), expected[5:33])
    if order == "scattered":
        with pytest.raises(UnsupportedError, match="l: its groups are scattered columns"):
            view.read_quantized("l.weight")
    else:
        found = view.read_quantized("l.weight")
        assert torch.equal(found.codes, tensor.codes)
        assert tensor.zero is None or (found.zero is not None and torch.equal(found.zero, tensor.zero))


def test_gptq_linears_of_several_widths(tmp_path: Path) -> None:
    """GPTQModel's ``dynamic`` rules are not looked up: the tensors show it."""
    tensors = {name: random_tensor(Scheme(Int(bits), 32), 64, 96, torch.float16) for name, bits in (("a", 4), ("b", 8))}
    stored = {
        name: part for linear in tensors for name, part in load_format("gptq").pack(linear, tensors[linear]).items()
    }
    view = open_dense(write(tmp_path / "m", stored, {"quant_method": "gptq", "bits": 4, "sym": True}))
    assert all(torch.equal(view[f"{name}.weight"], tensors[name].dequantize(torch.bfloat16)) for name in tensors)


@settings(max_examples=15, deadline=None)
@given(start=st.integers(0, 63), length=st.integers(1, 64), seed=st.integers(0, 1 << 16))
def test_awq(folders: Iterator[Path], start: int, length: int, seed: int) -> None:
    tensor = random_tensor(Scheme(Int(4, symmetric=False), 32), 64, 96, torch.float16, seed)
    declared = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}
    view = open_dense(write(next(folders), load_format("awq").pack("l", tensor), declared))
    stop = min(64, start + length)
    assert view.infos["l.weight"].dtype == torch.bfloat16
    assert torch.equal(view.read_rows("l.weight", start, stop), tensor.dequantize(torch.bfloat16)[start:stop])


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format: marlin; this reader"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"}, "pack_dtype: int16; this reader"),
        ({"quant_method": "awq", "version": "gemv", "bits": 4}, "version: gemv, bits: 4; this reader"),
        ({"quant_method": "awq", "zero_point": False}, "zero_point: False; this reader"),
    ],
)
def test_other_versions_are_refused_by_name(tmp_path: Path, declared: dict[str, Any], message: str) -> None:
    stored = load_format("gptq").pack("l", random_tensor(Scheme(Int(4), 32), 32, 32, torch.float16))
    with pytest.raises(UnsupportedError, match=message):
        open_dense(write(tmp_path / "m", stored, declared))


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_a_missing_part_is_named(tmp_path: Path, part: str) -> None:
    stored = load_format("gptq").pack("a.b", random_tensor(Scheme(Int(4), 32), 32, 32, torch.float16))
    del stored[f"a.b.{part}"]
    with pytest.raises(CheckpointError, match=rf"quantized linear 'a\.b' has no tensor 'a\.b\.{part}'"):
        open_dense(write(tmp_path / "m", stored, {"quant_method": "gptq", "bits": 4}))


def bnb_artifact(source: Path, output: Path, **options: Any) -> tuple[Path, Any]:
    """What transformers and bitsandbytes make of a model, on disk, and the loaded model."""
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitsAndBytesConfig(**options), device_map="cpu", dtype=torch.bfloat16
    )
    model.save_pretrained(output)
    return output, model


@pytest.mark.parametrize("double", [False, True], ids=["", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4_bits(tiny_llama: Path, tmp_path: Path, kind: str, double: bool) -> None:
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    directory, model = bnb_artifact(tiny_llama, tmp_path / "out", **options)
    view = open_dense(SafetensorsCheckpoint(directory))
    assert isinstance(view, QuantizedView)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert len(linears) == 14
    for name, module in linears.items():
        weight = f"{name}.weight"
        assert view.infos[weight].shape == (module.out_features, module.in_features)
        expected = dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert view.infos[weight].dtype == expected.dtype
        assert torch.equal(view[weight], expected)
        assert torch.equal(view.read_rows(weight, 3, 20), expected[3:20])
        assert str(view.scheme_of(weight)) == f"w4a16-g64-{kind}{'-dq' if double else ''}"
        assert torch.equal(view.read_quantized(weight).dequantize(expected.dtype), expected)


def test_bitsandbytes_blocks_run_over_rows(tmp_path: Path) -> None:
    """Of 96 columns a block of 64 takes two thirds. bitsandbytes' own CPU kernel (0.50) reads this wrong."""
    weight = torch.randn(33, 96, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    stored = {"l.weight": packed, **{f"l.weight.{key}": part for key, part in state.as_dict(packed=True).items()}}
    view = open_dense(write(tmp_path / "m", stored, {"quant_method": "bitsandbytes", "load_in_4bit": True}))
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), -1).view(-1)
    values = (state.code[codes.int()] * scales.float().repeat_interleave(64)[: codes.numel()]).view(33, 96)
    assert torch.equal(view["l.weight"], values)
    assert float((view["l.weight"] - weight).abs().mean()) < 0.08
    assert torch.equal(view.read_rows("l.weight", 7, 20), values[7:20])


def test_bitsandbytes_8_bits(tiny: Tiny, tmp_path: Path) -> None:
    directory, model = bnb_artifact(tiny("llama"), tmp_path / "out", load_in_8bit=True)
    view = open_dense(SafetensorsCheckpoint(directory), torch.float32)
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear8bitLt)
    }
    assert len(linears) == 21
    for name, module in linears.items():
        codes, largest = module.weight.CB, module.weight.SCB
        assert torch.equal(view[f"{name}.weight"], codes.float() * (largest / 127).unsqueeze(1))
    assert "lm_head.weight_format" not in view and not any(name.endswith((".SCB", "weight_format")) for name in view)


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
