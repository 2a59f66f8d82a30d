"""Products with AVX-512 BF16, against their definition in float64; skipped on processors without it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmconvert.compute import dot_kernels, dot_products
from llmconvert.compute.dot_products import LANES, add_products, pack_pairs
from llmconvert.engine import statistics
from llmconvert.engine.statistics import Aim, Arrival, Departure, HessianSum

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_bf16"), reason="this processor has no AVX-512 BF16"
)


def values(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((rows, columns), generator=generator).bfloat16()


def packed(matrix: torch.Tensor) -> torch.Tensor:
    return pack_pairs(matrix, torch.empty(matrix.numel() // 2, dtype=torch.int32))


@settings(max_examples=60, deadline=None)
@given(pairs=st.integers(1, 40), panels=st.integers(1, 7), seed=st.integers(0, 99))
def test_pairs_are_two_rows_of_a_column(pairs: int, panels: int, seed: int) -> None:
    matrix = values(2 * pairs, panels * LANES, seed)
    found = packed(matrix).view(torch.bfloat16).view(panels, pairs, LANES, 2)
    assert torch.equal(found.permute(1, 3, 0, 2).reshape(matrix.shape), matrix)


@settings(max_examples=60, deadline=None)
@given(pairs=st.integers(1, 700), left=st.integers(1, 20), right=st.integers(1, 20), seed=st.integers(0, 99))
def test_the_product_is_added(pairs: int, left: int, right: int, seed: int) -> None:
    a, b = values(2 * pairs, left * LANES, seed), values(2 * pairs, right * LANES, seed + 1)
    before = torch.randn((left * LANES, right * LANES), generator=torch.Generator().manual_seed(seed))
    total = before.clone()
    add_products(total, packed(a), packed(b))
    expected = before.double() + a.double().T @ b.double()
    # What each sum can lose in float32, by the size of what is added.
    bound = 2e-7 * (before.abs() + a.abs().double().T @ b.abs().double())
    assert ((total - expected).abs() <= bound * max(1, pairs) ** 0.5).all()


@settings(max_examples=40, deadline=None)
@given(pairs=st.integers(1, 300), panels=st.integers(1, 20), seed=st.integers(0, 99))
def test_the_upper_triangle_is_that_of_the_whole_product(pairs: int, panels: int, seed: int) -> None:
    matrix = packed(values(2 * pairs, panels * LANES, seed))
    whole, upper = torch.zeros((panels * LANES, panels * LANES)), torch.zeros((panels * LANES, panels * LANES))
    add_products(whole, matrix, matrix)
    add_products(upper, matrix, matrix, upper=True)
    assert torch.equal(upper.triu(), whole.triu())
    assert panels <= 3 or not upper[-LANES:, :LANES].any(), "tiles below the diagonal are not multiplied"


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_bit(threads: int) -> None:
    matrix, before = packed(values(600, 320, 1)), torch.get_num_threads()
    found = []
    try:
        for count in (2, threads):
            torch.set_num_threads(count)
            found.append(torch.zeros((320, 320)))
            add_products(found[-1], matrix, matrix, upper=True)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_hessians_are_the_same_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """An odd number of tokens, a chunk's end, and a batch of another dtype in between."""
    lengths, found = [700, 1501, 33, 900], []
    for pairs in (True, False):
        monkeypatch.setattr(statistics, "use_dot_products", lambda pairs=pairs: pairs)
        total = HessianSum("layer", 96, CPU, original=True, aim=Aim(48, 0.5))
        for seed, length in enumerate(lengths):
            x, y, mine, theirs = (values(length, width, 10 * seed + i) for i, width in enumerate((96, 48, 48, 48)))
            if length == 33:
                x, y = x.float(), y.float()
            total.add(Arrival(x, mine), Departure(y, theirs))
        found.append(total.hessian())
    torch.testing.assert_close(found[0].matrix, found[1].matrix, rtol=1e-4, atol=1e-6)
    # What is aimed at is rounded to bfloat16.
    torch.testing.assert_close(found[0].aim, found[1].aim, rtol=1e-4, atol=1e-2)
    assert found[0].tokens == sum(lengths)


def test_loaded_kernels_are_those_that_a_hessian_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (dot_products, statistics):
        monkeypatch.setattr(module, "use_dot_products", lambda: True)
    dot_products.load_dot_products()
    kernels = (dot_kernels.multiply, dot_kernels.pack, dot_kernels.tiles_left)
    loaded = [len(kernel.signatures) for kernel in kernels]
    for original in (False, True):
        total, x = HessianSum("layer", 96, CPU, original=original), values(64, 96, 0)
        total.add(Arrival(x), Arrival(x) if original else None)
        total.hessian()
    assert [len(kernel.signatures) for kernel in kernels] == loaded
