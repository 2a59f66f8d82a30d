"""Choosing a scheme per unit within a number of bytes: against every possible choice."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmconvert.errors import SchemeError
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.methods.gptq import Gptq
from llmconvert.quantize.mixed_precision.budget import Budget, Options, allocate, candidates, convex_hull
from llmconvert.quantize.mixed_precision.units import FusedUnit, Storage
from llmconvert.quantize.scheme import Scheme

SCHEMES = [Scheme.parse(f"w{bits}a16-g{size}") for bits in (2, 3, 4, 8) for size in (32, 64)]


def unit(index: int, rows: int = 8, columns: int = 64) -> FusedUnit:
    return FusedUnit((f"model.layers.{index}.a", f"model.layers.{index}.b"), ((rows, columns),) * 2, index)


costs = st.dictionaries(
    st.sampled_from(SCHEMES), st.tuples(st.integers(1, 60), st.floats(0, 10, allow_subnormal=False)), min_size=1
)


def totals(choice: tuple[Scheme, ...], every: list[Options]) -> tuple[int, float]:
    found = [option.costs[scheme] for option, scheme in zip(every, choice, strict=True)]
    return sum(nbytes for nbytes, _ in found), sum(divergence for _, divergence in found)


@given(st.lists(costs, min_size=1, max_size=3), st.floats(0.01, 1.5))
def test_it_keeps_the_budget_and_is_within_a_step_of_the_best(
    tables: list[Mapping[Scheme, tuple[int, float]]], bits: float
) -> None:
    every = [Options(unit(index), table) for index, table in enumerate(tables)]
    limit = int(sum(option.unit.weights for option in every) * bits / 8)
    possible = [totals(choice, every) for choice in itertools.product(*(option.costs for option in every))]
    fitting = [divergence for nbytes, divergence in possible if nbytes <= limit]
    if not fitting:
        with pytest.raises(SchemeError, match="bits per weight"):
            allocate(every, Budget(bits))
        return
    chosen = allocate(every, Budget(bits))
    assert sum(choice.nbytes for choice in chosen) <= limit
    for choice, option in zip(chosen, every, strict=True):
        assert (choice.nbytes, choice.divergence) == option.costs[choice.scheme]
    hulls = [[option.costs[scheme][1] for scheme in convex_hull(option.costs)] for option in every]
    largest = max((a - b for hull in hulls for a, b in itertools.pairwise(hull)), default=0.0)
    assert sum(choice.divergence for choice in chosen) <= min(fitting) + largest + 1e-9


@given(costs)
def test_the_hull_lies_below_every_other_scheme(table: Mapping[Scheme, tuple[int, float]]) -> None:
    hull = [table[scheme] for scheme in convex_hull(table)]
    assert hull == sorted(hull)
    for nbytes, divergence in table.values():
        assert nbytes >= hull[0][0]
        if nbytes >= hull[-1][0]:
            assert divergence >= hull[-1][1]
        for (small, worse), (large, better) in itertools.pairwise(hull):
            if small <= nbytes <= large:
                assert divergence >= worse + (better - worse) * (nbytes - small) / (large - small) - 1e-9


def test_a_sensitive_unit_gets_more_than_one_that_is_not() -> None:
    table = {scheme: (64 * scheme.bits, 4.0**-scheme.bits) for scheme in SCHEMES if scheme.group_size == 64}
    sensitive = {scheme: (nbytes, 100 * divergence) for scheme, (nbytes, divergence) in table.items()}
    middle = sum(table[Scheme.parse(f"w{bits}a16-g64")][0] for bits in (2, 4))
    first, second = allocate([Options(unit(0), table), Options(unit(1), sensitive)], Budget(8 * middle / 2048))
    assert first.scheme.bits < second.scheme.bits


def test_schemes_that_are_given_count_into_the_mean() -> None:
    table = {Scheme.parse("w2a16-g32"): (100, 2.0), Scheme.parse("w4a16-g32"): (200, 1.0)}
    every = [Options(unit(0), table)]
    assert allocate(every, Budget(8 * 200 / 1024))[0].nbytes == 200
    # As many weights again at 150 bytes: 350 are too much for twice the mean of 160.
    assert allocate(every, Budget(8 * 160 / 1024), fixed=[(1024, 150)])[0].nbytes == 100
    with pytest.raises(SchemeError, match="smallest schemes"):
        allocate(every, Budget(8 * 120 / 1024), fixed=[(1024, 150)])


def test_candidates_are_what_method_format_and_shape_allow() -> None:
    def names(columns: int, scheme: str, budget: Budget) -> list[str]:
        storage = Storage(Gptq(), load_format("compressed-tensors"), torch.bfloat16)
        return [str(found) for found in candidates(unit(0, 16, columns), Scheme.parse(scheme), budget, storage)]

    assert names(64, "w4a16", Budget(4)) == [f"w{bits}a16-g{size}-sym" for bits in (2, 3, 4, 8) for size in (32, 64)]
    assert names(96, "w4a16-asym", Budget(4, bits=(4,))) == ["w4a16-g32-asym"]
    assert names(128, "w4a16", Budget(4, (4, 8), (128,))) == ["w4a16-g128-sym", "w8a16-g128-sym"]
    kinds = (4, Scheme.parse("nvfp4"), Scheme.parse("fp8-dynamic"), Scheme.parse("fp8-block"))
    assert names(64, "w4a16", Budget(4, kinds, (64,))) == ["w4a16-g64-sym", "w4a4-g16-nvfp4", "w8a8-channel-fp8"]
    with pytest.raises(SchemeError, match=r"can have none of the schemes to choose from \(w4a16-g64-sym\)"):
        names(96, "w4a16", Budget(4, (4,), (64,)))
