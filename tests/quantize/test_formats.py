"""The contract of every format: what is packed comes back bit for bit, and looks as announced."""

from __future__ import annotations

import itertools

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from quantized import random_tensor

from llmconvert.errors import UnsupportedError
from llmconvert.quantize.formats.base import FORMATS, Format, load_format
from llmconvert.quantize.scheme import Scheme

SHAPES = [(1, 64), (40, 96), (33, 192)]
WEIGHT_ONLY = [
    Scheme(bits, group, symmetric)
    for bits, group, symmetric in itertools.product(range(2, 9), (None, 32), (True, False))
]
FLOATS = [Scheme.parse("fp8"), Scheme.parse("w8a16-fp8")]
SCHEMES = [*WEIGHT_ONLY, Scheme(8, activation_bits=8), *FLOATS]


@pytest.fixture(params=FORMATS)
def layout(request: pytest.FixtureRequest) -> Format:
    return load_format(request.param)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_unpacking_undoes_packing(layout: Format, scheme: Scheme, scale_dtype: torch.dtype) -> None:
    layout.check(scheme)
    for rows, columns in SHAPES:
        tensor = random_tensor(scheme, rows, columns, scale_dtype)
        found = layout.unpack("a.b", layout.pack("a.b", tensor), scheme)
        assert found.scheme == scheme
        assert found.codes.dtype == tensor.codes.dtype
        assert torch.equal(found.codes.view(torch.int8), tensor.codes.view(torch.int8))
        assert torch.equal(found.scale, tensor.scale) and found.scale.dtype == scale_dtype
        if tensor.zero is None:
            assert found.zero is None
        else:
            assert found.zero is not None and torch.equal(found.zero, tensor.zero)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_tensors_look_as_announced(layout: Format, scheme: Scheme, scale_dtype: torch.dtype) -> None:
    for rows, columns in SHAPES:
        packed = layout.pack("a.b", random_tensor(scheme, rows, columns, scale_dtype))
        specs = layout.specs("a.b", (rows, columns), scheme, scale_dtype)
        assert [(spec.name, spec.dtype, spec.shape) for spec in specs] == [
            (name, packed[name].dtype, tuple(packed[name].shape)) for name in (spec.name for spec in specs)
        ]
        assert {spec.name for spec in specs} == set(packed)
        assert all(name.startswith("a.b.") for name in packed)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_packing_saves_what_the_bits_promise(layout: Format, scheme: Scheme) -> None:
    packed = layout.pack("a.b", random_tensor(scheme, 64, 256, torch.bfloat16))
    weight = sum(tensor.nbytes for name, tensor in packed.items() if "scale" not in name and "zero" not in name)
    assert weight <= 64 * 256 * scheme.bits / 8 + 16


def test_int8_activations_need_plain_int8_weights() -> None:
    layout = load_format("compressed-tensors")
    for name in ("w4a8-g32", "w8a8-g128", "w8a8-asym"):
        with pytest.raises(UnsupportedError, match=r"int8 activations with w8a8-channel-sym weights only"):
            layout.check(Scheme.parse(name))


def test_kinds_that_compressed_tensors_has_no_layout_for() -> None:
    layout = load_format("compressed-tensors")
    for name, message in (("nf4", "no nf4; format bitsandbytes has"), ("w8a8-g64-fp8", "one scale per channel only")):
        with pytest.raises(UnsupportedError, match=message):
            layout.check(Scheme.parse(name))


def test_unknown_formats_are_refused_with_those_there_are() -> None:
    with pytest.raises(UnsupportedError, match=r"format 'gguf2' is not known; known are .*compressed-tensors"):
        load_format("gguf2")


@pytest.mark.parametrize("scheme", WEIGHT_ONLY, ids=str)
def test_compressed_tensors_unpacks_the_same_codes(scheme: Scheme) -> None:
    tensor = random_tensor(scheme, 40, 96)
    packed = load_format("compressed-tensors").pack("l", tensor)
    shape = torch.Size(packed["l.weight_shape"].tolist())
    assert torch.equal(unpack_from_int32(packed["l.weight_packed"], scheme.bits, shape), tensor.codes)
    if tensor.zero is not None:
        groups = torch.Size(tensor.zero.shape)
        zero = unpack_from_int32(packed["l.weight_zero_point"], scheme.bits, groups, packed_dim=0)
        assert torch.equal(zero, tensor.zero)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_compressed_tensors_parses_the_config(scheme: Scheme) -> None:
    declared = load_format("compressed-tensors").quantization_config({"a.b": scheme, "a.c": scheme}, ["lm_head"])
    config = QuantizationConfig.model_validate(declared)
    assert config.quant_method == "compressed-tensors"
    assert config.ignore == ["lm_head"]
    plain = "float-quantized" if scheme.kind == "fp8" else "int-quantized"
    assert config.format == ("pack-quantized" if scheme in WEIGHT_ONLY else plain)
    (group,) = config.config_groups.values()
    assert group.targets == ["Linear"]
    weights = group.weights
    assert weights is not None
    assert weights.type == ("float" if scheme.kind == "fp8" else "int")
    assert (weights.num_bits, weights.symmetric, weights.group_size) == (
        scheme.bits,
        scheme.symmetric,
        scheme.group_size,
    )
    assert weights.strategy == ("channel" if scheme.group_size is None else "group")
    assert (group.input_activations is not None) == (scheme.activation_bits == 8)


def test_several_schemes_become_groups_by_name() -> None:
    four, eight, dynamic = Scheme(4, 32), Scheme(8, 32), Scheme(8, activation_bits=8)
    schemes = {"a": four, "b": eight, "c": four, "d": dynamic, "e": four}
    declared = load_format("compressed-tensors").quantization_config(schemes, [])
    config = QuantizationConfig.model_validate(declared)
    found = {tuple(group.targets): group.weights.num_bits for group in config.config_groups.values() if group.weights}
    assert found == {("Linear",): 4, ("b",): 8, ("d",): 8}
    assert config.format == "mixed-precision"
