"""GGML tensor types against two references: the ``gguf`` package's arrays and llama.cpp's own quantization."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support.ggml_reference import ggml_quantize

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.ggml.blocks import CODECS, BlockCodec, Blocks, load_codec

SIMPLE = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
SUPER = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
BLOCKS = (*SIMPLE, "IQ4_NL", *SUPER)
COLUMNS = 768


def weights(kind: str, rows: int = 96) -> np.ndarray:
    random = np.random.default_rng(0)
    shapes: dict[str, Callable[[tuple[int, int]], np.ndarray]] = {
        "normal": random.standard_normal,
        "heavy tails": lambda shape: random.standard_t(3, shape),
        "one sign": lambda shape: random.gamma(2.0, 1.0, shape),
    }
    return (shapes[kind]((rows, COLUMNS)) * 0.05).astype(np.float32)


def importance() -> np.ndarray:
    return np.exp(np.random.default_rng(1).standard_normal(COLUMNS)).astype(np.float32)


def edge_cases() -> np.ndarray:
    """Rows that divide by zero, tie, underflow float16 or have one value that is not like the others."""
    rows = np.zeros((9, COLUMNS), np.float32)
    rows[1] = 0.5
    rows[2] = -3.0
    rows[3] = np.tile(np.arange(-16, 16), COLUMNS // 32) / 8
    rows[4, ::256] = 1e-9
    rows[5] = 1e-7 * np.random.default_rng(2).standard_normal(COLUMNS)
    rows[6, 5] = 100.0
    rows[7] = np.random.default_rng(3).standard_normal(COLUMNS) * 1e3
    rows[8] = np.where(np.arange(COLUMNS) % 2, 127.5, -127.5) / 255
    return rows


@pytest.mark.parametrize("name", CODECS)
def test_sizes_are_ggmls(name: str) -> None:
    codec = load_codec(name)
    assert (codec.size, codec.nbytes) == GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    assert codec.name == name


@pytest.mark.parametrize("name", ["F16", "BF16", *SIMPLE])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "one sign"])
def test_simple_types_are_the_gguf_packages_to_the_bit(name: str, kind: str) -> None:
    values = weights(kind)
    expected = quantize(values, GGMLQuantizationType[name]).view(np.uint8).reshape(len(values), -1)
    np.testing.assert_array_equal(load_codec(name).encode(values), expected)


@pytest.mark.parametrize("name", SIMPLE)
def test_edge_cases_are_the_gguf_packages_to_the_bit(name: str) -> None:
    values = edge_cases()
    expected = quantize(values, GGMLQuantizationType[name])
    np.testing.assert_array_equal(load_codec(name).encode(values), expected)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "one sign"])
def test_the_gguf_package_decodes_what_we_do(name: str, kind: str) -> None:
    codec = load_codec(name)
    for weighting in (None, importance()):
        raw = codec.encode(weights(kind), weighting)
        expected = dequantize(raw, GGMLQuantizationType[name])
        np.testing.assert_array_equal(codec.decode(raw), expected)


def error(raw: np.ndarray, name: str, values: np.ndarray, weighting: np.ndarray) -> float:
    difference = dequantize(raw, GGMLQuantizationType[name]) - values
    return float((weighting * difference.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize("name", BLOCKS[5:])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "one sign"])
def test_super_blocks_err_less_than_llama_cpps(name: str, kind: str) -> None:
    values, ones = weights(kind), np.ones(COLUMNS)
    ours, theirs = load_codec(name).encode(values), ggml_quantize(values, name)
    assert error(ours, name, values, ones) < 0.99 * error(theirs, name, values, ones)


@pytest.mark.parametrize("name", BLOCKS[1:])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "one sign"])
def test_with_importance_the_weighted_error_is_less_than_llama_cpps(name: str, kind: str) -> None:
    values, weighting = weights(kind), importance()
    codec = load_codec(name)
    ours = error(codec.encode(values, weighting), name, values, weighting)
    assert ours < error(ggml_quantize(values, name, weighting), name, values, weighting)
    assert ours < 0.97 * error(codec.encode(values), name, values, weighting)


def test_q8_0_does_not_look_at_importance() -> None:
    values = weights("normal")
    np.testing.assert_array_equal(load_codec("Q8_0").encode(values, importance()), load_codec("Q8_0").encode(values))


@pytest.mark.parametrize("name", BLOCKS)
def test_edge_cases_stay_finite_and_close(name: str) -> None:
    values, coarse = edge_cases(), 0.7 if name in ("Q2_K", "Q3_K") else 0.3
    for weighting in (None, importance(), np.zeros(COLUMNS, np.float32)):
        decoded = load_codec(name).decode(load_codec(name).encode(values, weighting))
        assert np.isfinite(decoded).all()
        assert not decoded[0].any()
        scale = np.abs(values).max(axis=1, keepdims=True)
        # Weights that count little may be clipped; float16 scales cannot go below 2^-24, so what is tiny becomes zero.
        assert (np.abs(decoded - values) <= scale * coarse + 6e-8 * 32).all()


def stored_blocks(name: str) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.uint8, st.tuples(st.integers(1, 5), st.just(load_codec(name).nbytes)))


@pytest.mark.parametrize("name", BLOCKS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_block_unpacks_and_packs_to_itself(name: str, data: st.DataObject) -> None:
    codec = load_codec(name)
    assert isinstance(codec, BlockCodec)
    raw = data.draw(stored_blocks(name))
    blocks: Blocks = codec.unpack(raw)
    np.testing.assert_array_equal(codec.pack(blocks), raw)
    again = codec.unpack(codec.pack(blocks))
    for part in ("codes", "sub_scales", "sub_minima"):
        np.testing.assert_array_equal(getattr(again, part), getattr(blocks, part))


@pytest.mark.parametrize("name", BLOCKS)
def test_rows_do_not_depend_on_their_neighbours(name: str) -> None:
    values, codec = weights("normal", 130), load_codec(name)
    whole = codec.encode(values, importance())
    np.testing.assert_array_equal(codec.encode(values[37:41], importance()), whole[37:41])


def test_other_types_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"'IQ2_XXS' cannot be written; known are F32, F16, .*Q6_K"):
        load_codec("IQ2_XXS")
