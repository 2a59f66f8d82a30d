"""The contract of every format: what is packed comes back bit for bit, and looks as announced."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from support.quantized import random_tensor

from llmconvert.errors import UnsupportedError
from llmconvert.quantize.catalog.formats import FORMATS
from llmconvert.quantize.formats.base import FileFormat, Format, load_format
from llmconvert.quantize.matrix import check_format, check_method
from llmconvert.quantize.methods.base import load_method
from llmconvert.quantize.numbers import E4M3, Int
from llmconvert.quantize.scheme import Scheme

WEIGHT_ONLY = [
    Scheme(Int(bits, symmetric), group)
    for bits, group, symmetric in itertools.product(range(2, 9), (None, 32), (True, False))
]
FLOATS = [Scheme.parse("fp8"), Scheme.parse("w8a16-fp8")]
AFFINE = [Scheme.parse("w3a16-g32-affine"), Scheme.parse("w8a16-g64-affine")]
SCHEMES = [*WEIGHT_ONLY, Scheme(Int(8), activation_bits=8), *FLOATS, *AFFINE]
# What a format can hold of these; the rest it has to refuse, which is tested too.
SHAPES = [(1, 64), (40, 96), (33, 192), (64, 128), (96, 64)]


def holds(layout: Format, scheme: Scheme) -> bool:
    try:
        layout.check(scheme)
    except UnsupportedError:
        return False
    return True


PAIRS = [(name, scheme) for name in FORMATS for scheme in SCHEMES if holds(load_format(name), scheme)]
pairs = pytest.mark.parametrize(("name", "scheme"), PAIRS, ids=lambda value: str(value))


def packed_tensors(layout: Format, scheme: Scheme, dtype: torch.dtype) -> Iterator[tuple[Any, Any, Any]]:
    """``(tensor, specs, packed)`` of every shape that the format takes."""
    scale_dtype = layout.scale_dtype(scheme, dtype)
    for rows, columns in SHAPES:
        try:
            specs = layout.specs("a.b", (rows, columns), scheme, scale_dtype)
        except UnsupportedError:
            continue
        if columns % scheme.columns_per_group(columns):
            continue
        tensor = random_tensor(scheme, rows, columns, scale_dtype)
        yield tensor, specs, layout.pack("a.b", tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pairs
def test_unpacking_undoes_packing(name: str, scheme: Scheme, dtype: torch.dtype) -> None:
    layout = load_format(name)
    tried = 0
    for tensor, _, packed in packed_tensors(layout, scheme, dtype):
        found = layout.unpack("a.b", packed, scheme)
        assert found.scheme == scheme
        assert found.codes.dtype == tensor.codes.dtype
        assert torch.equal(found.codes.view(torch.int8), tensor.codes.view(torch.int8))
        assert torch.equal(found.scale.float(), tensor.scale.float())
        if tensor.zero is None:
            assert found.zero is None
        else:
            assert found.zero is not None and torch.equal(found.zero, tensor.zero)
        tried += 1
    assert tried >= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pairs
def test_tensors_look_as_announced(name: str, scheme: Scheme, dtype: torch.dtype) -> None:
    for _, specs, packed in packed_tensors(load_format(name), scheme, dtype):
        assert [(spec.name, spec.dtype, spec.shape) for spec in specs] == [
            (name, packed[name].dtype, tuple(packed[name].shape)) for name in (spec.name for spec in specs)
        ]
        assert {spec.name for spec in specs} == set(packed)
        assert all(name.startswith("a.b.") for name in packed)


@pairs
def test_packing_saves_what_the_bits_promise(name: str, scheme: Scheme) -> None:
    layout = load_format(name)
    packed = layout.pack("a.b", random_tensor(scheme, 64, 256, layout.scale_dtype(scheme, torch.bfloat16)))
    beside = ("scale", "biases", "zero", "g_idx", "SCB", "weight_format")
    weight = sum(tensor.nbytes for name, tensor in packed.items() if not any(part in name for part in beside))
    within = 2 * 64 * scheme.groups(256) if isinstance(layout, FileFormat) else 0  # a block begins with its scale
    assert weight <= 64 * 256 * scheme.bits / 8 + within + 16


@pytest.mark.parametrize("name", FORMATS)
def test_the_other_files_are_those_that_readers_ask_for(name: str) -> None:
    layout = load_format(name)
    scheme = next(scheme for other, scheme in PAIRS if other == name)
    declared = layout.quantization_config({"model.layers.0.a": scheme}, ["lm_head"])
    assert json.loads(json.dumps(declared)) == declared, "config.json would not hold it"
    for content in layout.files(declared).values():
        assert json.loads(content) == declared


def test_int8_activations_need_plain_int8_weights() -> None:
    layout = load_format("compressed-tensors")
    for name in ("w4a8-g32", "w8a8-g128", "w8a8-asym"):
        with pytest.raises(UnsupportedError, match=r"int8 activations with w8a8-channel-sym weights only"):
            layout.check(Scheme.parse(name))


def test_kinds_that_compressed_tensors_has_no_layout_for() -> None:
    layout = load_format("compressed-tensors")
    for name, message in (
        ("nf4", "no nf4; format bitsandbytes has"),
        ("w8a8-g64-fp8", r"one scale per channel \(fp8-dynamic\), per tensor"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            layout.check(Scheme.parse(name))


@pytest.mark.parametrize(
    ("layout", "scheme", "able"),
    [
        ("awq", "w3a16-g64", "compressed-tensors, gptq"),
        ("gptq", "nf4", "bitsandbytes"),
        ("gptq", "w8a8", "compressed-tensors, bitsandbytes"),
        ("compressed-tensors", "w4a8-g32", "none"),
    ],
)
def test_a_refusal_names_the_formats_that_hold_the_scheme(layout: str, scheme: str, able: str) -> None:
    with pytest.raises(UnsupportedError, match=f"formats that hold {Scheme.parse(scheme)}: {able}$"):
        check_format(load_format(layout), Scheme.parse(scheme))


@pytest.mark.parametrize(
    ("method", "scheme", "message"),
    [
        ("gptq", "nf4", r"gptq chooses int, float and GGUF codes only; methods for nf4 are rtn$"),
        (
            "hqq",
            "fp8",
            r"hqq chooses int codes only; methods for fp8 are rtn, gptq, gptaq, signround, awq, smoothquant$",
        ),
    ],
)
def test_a_refusal_names_the_methods_that_choose_such_codes(method: str, scheme: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        check_method(load_method(method, {}), Scheme.parse(scheme))


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


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme not in AFFINE], ids=str)
def test_compressed_tensors_parses_the_config(scheme: Scheme) -> None:
    declared = load_format("compressed-tensors").quantization_config({"a.b": scheme, "a.c": scheme}, ["lm_head"])
    config = QuantizationConfig.model_validate(declared)
    assert config.quant_method == "compressed-tensors"
    assert config.ignore == ["lm_head"]
    plain = "float-quantized" if scheme.number == E4M3 else "int-quantized"
    assert config.format == ("pack-quantized" if scheme in WEIGHT_ONLY else plain)
    (group,) = config.config_groups.values()
    assert group.targets == ["Linear"]
    weights = group.weights
    assert weights is not None
    assert weights.type == ("float" if scheme.number == E4M3 else "int")
    assert (weights.num_bits, weights.symmetric, weights.group_size) == (
        scheme.bits,
        scheme.symmetric,
        scheme.group_size,
    )
    assert weights.strategy == ("channel" if scheme.group_size is None else "group")
    assert (group.input_activations is not None) == (scheme.activation_bits == 8)


def test_several_schemes_become_groups_by_name() -> None:
    four, eight, dynamic = Scheme(Int(4), 32), Scheme(Int(8), 32), Scheme(Int(8), activation_bits=8)
    schemes = {"a": four, "b": eight, "c": four, "d": dynamic, "e": four}
    declared = load_format("compressed-tensors").quantization_config(schemes, [])
    config = QuantizationConfig.model_validate(declared)
    found = {tuple(group.targets): group.weights.num_bits for group in config.config_groups.values() if group.weights}
    assert found == {("Linear",): 4, ("b",): 8, ("d",): 8}
    assert config.format == "mixed-precision"
