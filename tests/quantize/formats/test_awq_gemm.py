"""The AWQ format against its layout, stated here output by output."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quantized import random_tensor, write_quantized

from llmconvert.errors import UnsupportedError
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.numbers import Int
from llmconvert.quantize.scheme import Scheme

AWQ = load_format("awq")
# Which of eight neighbouring outputs lies at which nibble of a word, from the lowest.
NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]


def words(values: np.ndarray) -> np.ndarray:
    """Unsigned ``values [n, rows]`` as uint32 ``[n, rows / 8]``."""
    packed = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for nibble, output in enumerate(NIBBLES):
        packed |= values[:, output::8].astype(np.uint32) << np.uint32(4 * nibble)
    return packed


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([8, 24, 64]),
    groups=st.integers(1, 3),
    size=st.sampled_from([16, 32, 128]),
    seed=st.integers(0, 1 << 16),
)
def test_the_layout(rows: int, groups: int, size: int, seed: int) -> None:
    scheme = Scheme(Int(4, symmetric=False), size)
    tensor = random_tensor(scheme, rows, groups * size, torch.float16, seed)
    assert tensor.zero is not None
    packed = AWQ.pack("l", tensor)
    assert np.array_equal(packed["l.qweight"].numpy().view(np.uint32), words(tensor.codes.numpy().T + 8))
    assert np.array_equal(packed["l.qzeros"].numpy().view(np.uint32), words(tensor.zero.numpy().T + 8))
    assert torch.equal(packed["l.scales"], tensor.scale.T)
    found = AWQ.unpack("l", packed, scheme)
    assert torch.equal(found.codes, tensor.codes) and torch.equal(found.scale, tensor.scale)
    assert found.zero is not None and torch.equal(found.zero, tensor.zero)


@pytest.mark.parametrize("name", ["w4a16-g32", "w3a16-g32-asym", "w8a16-g32-asym", "w4a16-channel-asym"])
def test_other_schemes_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"scheme {Scheme.parse(name)}: awq .*w4a16-g128-asym"):
        AWQ.check(Scheme.parse(name))


def test_shapes_that_no_word_holds_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"a\.b: a weight of shape \[36, 64\]; awq needs a multiple of 8"):
        AWQ.specs("a.b", (36, 64), Scheme(Int(4, symmetric=False), 32), torch.float16)


def test_two_schemes_in_one_model_are_refused() -> None:
    schemes = {"a": Scheme(Int(4, symmetric=False), 32), "b": Scheme(Int(4, symmetric=False), 64)}
    with pytest.raises(UnsupportedError, match=r"w4a16-g32-asym, w4a16-g64-asym: awq has one scheme per model"):
        AWQ.quantization_config(schemes, [])


@settings(max_examples=15, deadline=None)
@given(start=st.integers(0, 63), length=st.integers(1, 64), seed=st.integers(0, 1 << 16))
def test_rows_are_those_of_the_whole(folders: Iterator[Path], start: int, length: int, seed: int) -> None:
    tensor = random_tensor(Scheme(Int(4, symmetric=False), 32), 64, 96, torch.float16, seed)
    declared = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}
    view = open_dense(write_quantized(next(folders), AWQ.pack("l", tensor), declared))
    stop = min(64, start + length)
    assert view.infos["l.weight"].dtype == torch.bfloat16
    assert torch.equal(view.read_rows("l.weight", start, stop), tensor.dequantize(torch.bfloat16)[start:stop])


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"quant_method": "awq", "version": "gemv", "bits": 4}, "version: gemv, bits: 4; this reader"),
        ({"quant_method": "awq", "zero_point": False}, "zero_point: False; this reader"),
    ],
)
def test_other_versions_are_refused_by_name(tmp_path: Path, declared: dict[str, Any], message: str) -> None:
    stored = AWQ.pack("l", random_tensor(Scheme(Int(4, symmetric=False), 32), 32, 32, torch.float16))
    with pytest.raises(UnsupportedError, match=message):
        open_dense(write_quantized(tmp_path / "m", stored, declared))
