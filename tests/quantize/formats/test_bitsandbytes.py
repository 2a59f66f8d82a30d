"""NF4 and 8-bit encodings against bitsandbytes itself."""

from __future__ import annotations

import json

import pytest
import torch
from bitsandbytes.functional import QuantState, create_dynamic_map, int8_vectorwise_quant, quantize_4bit
from bitsandbytes.nn import Int8Params
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quantized import random_weight

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.methods.base import Target
from llmconvert.quantize.methods.rtn import Rtn
from llmconvert.quantize.numbers import NF4, Int, dynamic_levels
from llmconvert.quantize.scheme import Scheme

BNB = load_format("bitsandbytes")
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
    theirs = Int8Params(weight.clone(), requires_grad=False).to("cpu")
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
