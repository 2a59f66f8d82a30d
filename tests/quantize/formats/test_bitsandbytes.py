"""NF4 and 8-bit encodings against bitsandbytes itself, and its own artifacts as they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import (
    QuantState,
    create_dynamic_map,
    dequantize_4bit,
    dequantize_blockwise,
    int8_vectorwise_quant,
    quantize_4bit,
)
from bitsandbytes.nn import Int8Params
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quantized import random_weight, write_quantized
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.formats.dense_view import QuantizedView, open_dense
from llmconvert.quantize.methods.base import Target
from llmconvert.quantize.methods.rtn import Rtn
from llmconvert.quantize.numbers import NF4, Int
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import dynamic_levels
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

BNB = load_format("bitsandbytes")
Tiny = Callable[..., Path]
INT8 = Scheme(Int(8), activation_bits=8)


def test_the_levels_of_dynamic_floats() -> None:
    assert torch.equal(dynamic_levels(), create_dynamic_map())


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 70),
    groups=st.integers(1, 5),
    size=st.sampled_from([64, 128, 256]),
    nested=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 1 << 16),
)
def test_nf4_is_bitsandbytes_own(
    rows: int, groups: int, size: int, nested: bool, dtype: torch.dtype, seed: int
) -> None:
    weight = random_weight(rows, groups * size, seed).to(dtype)
    weight[0, :size] = 0
    codes, state = quantize_4bit(weight, blocksize=size, quant_type="nf4", compress_statistics=nested)
    expected = {"l.weight": codes, **{f"l.weight.{key}": part for key, part in state.as_dict(packed=True).items()}}
    scheme = Scheme(NF4, size, nested=nested)
    (solution,) = Rtn().quantize([Target("l", weight, scheme)], None, torch.float32).values()
    found = BNB.pack("l", solution.tensor)
    assert set(found) == set(expected)
    for name in found:
        if "quant_state" in name:
            ours, theirs = (json.loads(bytes(tensors[name].tolist())) for tensors in (found, expected))
            assert ours == {**theirs, "dtype": "bfloat16"}
        else:
            assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]), name
    again = BNB.unpack("l", found, scheme)
    assert torch.equal(again.codes, solution.tensor.codes) and torch.equal(again.scale, solution.tensor.scale)
    parts = {name.removeprefix("l.weight."): part for name, part in found.items() if name != "l.weight"}
    assert QuantState.from_dict(parts, torch.device("cpu")).nested == nested


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_8_bits_are_bitsandbytes_own(dtype: torch.dtype) -> None:
    """Codes and row maxima of LLM.int8, bit for bit, with ties, rows of zeros and values float16 barely holds."""
    weight = random_weight(512, 192)
    weight[0] = 0
    weight[1] = torch.arange(-96, 96) * 0.5  # ties under any scale that is a power of two
    weight[2] *= 1e-6
    weight[3, :2] = torch.tensor([60000.0, 0.5])
    weight = weight.to(dtype)
    theirs = Int8Params(weight.clone(), requires_grad=False).to("cpu")  # type: ignore[misc]
    found = Rtn().quantize([Target("l", weight, Scheme.parse("llm.int8"))], None, torch.float32)["l"].tensor
    packed = BNB.pack("l", found)
    specs = {spec.name: spec for spec in BNB.specs("l", (512, 192), found.scheme, torch.float32)}
    assert {name: (part.dtype, tuple(part.shape)) for name, part in packed.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in specs.items()
    }
    assert torch.equal(packed["l.weight"], theirs.CB)
    assert torch.equal(packed["l.SCB"], theirs.SCB)
    again = BNB.unpack("l", packed, found.scheme)
    assert torch.equal(again.codes, found.codes) and torch.equal(again.scale, found.scale)


def test_8_bits_beyond_float16_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'a\.b' has values that are not finite in float16"):
        Rtn().quantize([Target("a.b", torch.full((1, 64), 1e6), Scheme.parse("llm.int8"))], None, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_8_bits_are_stored_as_bitsandbytes_does(dtype: torch.dtype) -> None:
    """Codes and row maxima of its own quantization come through the canonical tensor unchanged."""
    weight = random_weight(300, 64).to(dtype)
    codes, largest, _ = int8_vectorwise_quant(weight.clone())
    stored = {"l.weight": codes, "l.SCB": largest, "l.weight_format": torch.tensor(0, dtype=torch.uint8)}
    tensor = BNB.unpack("l", stored, INT8)
    packed = BNB.pack("l", tensor)
    assert torch.equal(packed["l.weight"], codes) and packed["l.weight_format"].item() == 0
    assert torch.equal(BNB.unpack("l", packed, INT8).scale, tensor.scale)
    assert ((packed["l.SCB"] - largest).abs() <= torch.finfo(torch.float32).eps * largest).all()


def test_a_weight_that_is_not_finite_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"'a\.b' has values that are not finite"):
        Rtn().quantize([Target("a.b", torch.full((1, 64), torch.inf), Scheme.parse("nf4"))], None, torch.float32)


@pytest.mark.parametrize("name", ["w4a16-g64", "w8a16-channel", "w4a16-g32-nf4", "fp8"])
def test_other_schemes_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"bitsandbytes stores nf4 and nf4-dq .* llm\.int8 and w8a8"):
        BNB.check(Scheme.parse(name))


def test_two_schemes_in_one_model_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="bitsandbytes has one scheme per model"):
        BNB.quantization_config({"a": Scheme.parse("nf4"), "b": INT8}, [])


def test_the_offset_does_not_change_the_size() -> None:
    scheme = Scheme.parse("nf4-dq")
    sizes = set()
    for factor in (1.0, 1e-30, 0.1234567):
        (solution,) = Rtn().quantize([Target("l", factor * random_weight(4, 64), scheme)], None, torch.float32).values()
        sizes.add(BNB.pack("l", solution.tensor)["l.weight.quant_state.bitsandbytes__nf4"].shape)
    assert len(sizes) == 1


def artifact(source: Path, output: Path, **options: Any) -> tuple[Path, Any]:
    """What transformers and bitsandbytes make of a model, on disk, and the loaded model."""
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitsAndBytesConfig(**options), device_map="cpu", dtype=torch.bfloat16
    )
    model.save_pretrained(output)
    return output, model


@pytest.mark.parametrize("double", [False, True], ids=["", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bits_of_its_own_are_read(tiny_llama: Path, tmp_path: Path, kind: str, double: bool) -> None:
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    directory, model = artifact(tiny_llama, tmp_path / "out", **options)
    view = open_dense(SafetensorsCheckpoint(directory))
    assert isinstance(view, QuantizedView)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert len(linears) == 14
    for name, module in linears.items():
        weight = f"{name}.weight"
        assert view.infos[weight].shape == (module.out_features, module.in_features)
        expected = dequantize_4bit(module.weight.data, module.weight.quant_state)  # type: ignore[attr-defined]
        assert view.infos[weight].dtype == expected.dtype
        assert torch.equal(view[weight], expected)
        assert torch.equal(view.read_rows(weight, 3, 20), expected[3:20])
        assert str(view.scheme_of(weight)) == f"w4a16-g64-{kind}{'-dq' if double else ''}"
        assert torch.equal(view.read_quantized(weight).dequantize(expected.dtype), expected)


def test_blocks_run_over_rows(tmp_path: Path) -> None:
    """Of 96 columns a block of 64 takes two thirds. bitsandbytes' own CPU kernel (0.50) reads this wrong."""
    weight = torch.randn(33, 96, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    stored = {"l.weight": packed, **{f"l.weight.{key}": part for key, part in state.as_dict(packed=True).items()}}
    view = open_dense(write_quantized(tmp_path / "m", stored, {"quant_method": "bitsandbytes", "load_in_4bit": True}))
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), -1).view(-1)
    values = (state.code[codes.int()] * scales.float().repeat_interleave(64)[: codes.numel()]).view(33, 96)
    assert torch.equal(view["l.weight"], values)
    assert float((view["l.weight"] - weight).abs().mean()) < 0.08
    assert torch.equal(view.read_rows("l.weight", 7, 20), values[7:20])


def test_8_bits_of_its_own_are_read(tiny: Tiny, tmp_path: Path) -> None:
    directory, model = artifact(tiny("llama"), tmp_path / "out", load_in_8bit=True)
    view = open_dense(SafetensorsCheckpoint(directory), torch.float32)
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear8bitLt)
    }
    assert len(linears) == 21
    for name, module in linears.items():
        codes, largest = module.weight.CB, module.weight.SCB  # type: ignore[attr-defined]
        assert torch.equal(view[f"{name}.weight"], codes.float() * (largest / 127).unsqueeze(1))
    assert "lm_head.weight_format" not in view and not any(name.endswith((".SCB", "weight_format")) for name in view)
