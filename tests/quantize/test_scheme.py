"""Schemes and their names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmconvert.errors import SchemeError
from llmconvert.quantize.numbers import E4M3, MXFP4, MXFP8, NF4, NVFP4, Int
from llmconvert.quantize.scheme import Scheme

integers = st.builds(
    Scheme,
    st.builds(Int, st.integers(2, 8), st.booleans()),
    group_size=st.none() | st.integers(1, 4096),
    activation_bits=st.sampled_from([8, 16]),
)
floats = st.builds(
    Scheme,
    st.just(E4M3),
    group_size=st.none() | st.integers(1, 4096),
    activation_bits=st.sampled_from([8, 16]),
)
blocks = st.builds(
    lambda sides, bits: Scheme(E4M3, sides and sides[1], bits, rows=sides and sides[0]),
    st.none() | st.tuples(st.integers(1, 256), st.integers(1, 256)),
    st.sampled_from([8, 16]),
)
small = st.sampled_from([Scheme(NVFP4, 16, 4), Scheme(NVFP4, 16), Scheme(MXFP4, 32, 8), Scheme(MXFP8, 32, 8)])
levels = st.builds(Scheme, st.just(NF4), group_size=st.integers(1, 4096), nested=st.booleans())
schemes = integers | floats | blocks | small | levels


@given(schemes)
def test_a_name_stands_for_its_scheme(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme
    assert Scheme.parse(f" {str(scheme).upper()} ") == scheme


@pytest.mark.parametrize(
    ("name", "scheme", "canonical"),
    [
        ("w4a16-g128", Scheme(Int(4), 128), "w4a16-g128-sym"),
        ("w4a16-g128-sym", Scheme(Int(4), 128), "w4a16-g128-sym"),
        ("w3a16-g64-asym", Scheme(Int(3, symmetric=False), 64), "w3a16-g64-asym"),
        ("w8a8", Scheme(Int(8), activation_bits=8), "w8a8-channel-sym"),
        ("w8a16-channel-asym", Scheme(Int(8, symmetric=False)), "w8a16-channel-asym"),
        ("w2a16-asym", Scheme(Int(2, symmetric=False)), "w2a16-channel-asym"),
        ("fp8", Scheme(E4M3, activation_bits=8), "w8a8-channel-fp8"),
        ("w8a16-fp8", Scheme(E4M3), "w8a16-channel-fp8"),
        ("nf4", Scheme(NF4, 64), "w4a16-g64-nf4"),
        ("nf4-dq", Scheme(NF4, 64, nested=True), "w4a16-g64-nf4-dq"),
    ],
)
def test_defaults_are_filled_in(name: str, scheme: Scheme, canonical: str) -> None:
    assert Scheme.parse(name) == scheme
    assert str(scheme) == canonical


@pytest.mark.parametrize(
    "name", ["", "w4", "5bit", "w4a16-128", "w4a16-g", "w4a16-symm", "w4a16-sym-g64", "w4a16-g64-"]
)
def test_names_outside_the_grammar_are_refused_with_an_example(name: str) -> None:
    with pytest.raises(SchemeError, match=r"is not understood; expected w<bits>a<bits>.*for example w4a16-g128"):
        Scheme.parse(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w1a16", "weights can have 2 to 8 bits, found 1"),
        ("w9a16", "weights can have 2 to 8 bits, found 9"),
        ("w16a16", "weights can have 2 to 8 bits, found 16"),
        ("w4a16-g8x8", "rows share no scales of int weights"),
        ("w4a4", "activations can have 16 or 8 bits, found 4"),
        ("w4a16-g0", "group size must be positive, found 0"),
        ("w4a8-fp8", "fp8 weights have 8 bits and no zero point"),
        ("w3a16-g64-nf4", "nf4 weights have 4 bits, a group size and no zero point"),
        ("w4a16-nf4", "nf4 weights have 4 bits, a group size and no zero point"),
        ("w4a8-g64-nf4", "nf4 weights leave activations at 16 bits"),
        (
            "w8a16-channel-absmax",
            "absmax weights have 8 bits, 8-bit activations, a scale per channel and no zero point",
        ),
        ("w8a8-g64-absmax", "absmax weights have 8 bits, 8-bit activations, a scale per channel"),
        ("w8a8-channel-fp8-dq", "only nf4 weights have quantized scales"),
    ],
)
def test_numbers_out_of_range_are_named(name: str, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        Scheme.parse(name)


@given(integers)
def test_codes_fill_their_bits(scheme: Scheme) -> None:
    low, high = scheme.number.limits
    assert high - low + 1 == 1 << scheme.bits
    assert low == -high - 1


def test_groups_of_a_weight() -> None:
    assert (Scheme(Int(4), 32).groups(96), Scheme(Int(4), 32).columns_per_group(96)) == (3, 32)
    assert (Scheme(Int(4)).groups(96), Scheme(Int(4)).columns_per_group(96)) == (1, 96)


def test_a_group_size_that_does_not_divide_names_layer_and_fitting_sizes() -> None:
    Scheme(Int(4), 32).check_fits("layer", 96)
    Scheme(Int(4)).check_fits("layer", 97)
    with pytest.raises(SchemeError, match=r"group size 64 does not divide the 96 columns of a\.b; .*fit it: 16, 32$"):
        Scheme(Int(4), 64).check_fits("a.b", 96)
    with pytest.raises(SchemeError, match=r"the 97 columns of a\.b; only per-channel scales fit it"):
        Scheme(Int(4), 64).check_fits("a.b", 97)
