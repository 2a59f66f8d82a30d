"""Bit packing: the identity when undone, and compressed-tensors' own words."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from llmconvert.quantize.pack import pack_words, packed_length, unpack_words


def random_codes(bits: int, rows: int, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1 << bits, (rows, count), generator=generator, dtype=torch.int64).to(torch.uint8)


@settings(max_examples=150, deadline=None)
@given(bits=st.integers(1, 8), rows=st.integers(1, 6), count=st.integers(1, 200), seed=st.integers(0, 1000))
def test_packing_is_undone_by_unpacking(bits: int, rows: int, count: int, seed: int) -> None:
    codes = random_codes(bits, rows, count, seed)
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32 and words.is_contiguous()
    assert words.shape == (rows, packed_length(count, bits))
    assert torch.equal(unpack_words(words, bits, count), codes)


@settings(max_examples=150, deadline=None)
@given(bits=st.integers(1, 8), rows=st.integers(1, 6), count=st.integers(1, 200), seed=st.integers(0, 1000))
def test_words_are_those_of_compressed_tensors(bits: int, rows: int, count: int, seed: int) -> None:
    codes = random_codes(bits, rows, count, seed)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    theirs = pack_to_int32(signed, bits)
    assert torch.equal(pack_words(codes, bits), theirs)
    assert torch.equal(unpack_from_int32(pack_words(codes, bits), bits, torch.Size((rows, count))), signed)
    assert torch.equal(unpack_words(theirs, bits, count), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_layout_is_dense_and_little_endian(bits: int) -> None:
    """Code ``i`` lies at bits ``i * bits`` and up of one long number."""
    codes = random_codes(bits, 1, 77)
    number = sum(int(code) << (index * bits) for index, code in enumerate(codes[0].tolist()))
    expected = number.to_bytes(4 * packed_length(77, bits), "little")
    assert pack_words(codes, bits).numpy().tobytes() == expected


@pytest.mark.parametrize("bits", range(1, 9))
def test_extreme_codes_survive(bits: int) -> None:
    for value in (0, (1 << bits) - 1):
        codes = torch.full((2, 65), value, dtype=torch.uint8)
        assert torch.equal(unpack_words(pack_words(codes, bits), bits, 65), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("count", [40, 64])
def test_views_are_packed_as_what_they_show(bits: int, count: int) -> None:
    codes = random_codes(bits, count, 24)
    assert torch.equal(pack_words(codes.T, bits), pack_words(codes.T.contiguous(), bits))
    words = pack_words(codes, bits)
    assert torch.equal(unpack_words(words.T.contiguous().T, bits, 24), codes)
