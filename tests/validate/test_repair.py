"""Which layers a repair chooses: by divergence removed per byte, fused ones together, within the budget."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmconvert.gguf.ggml.blocks import load_codec
from llmconvert.gguf.ggml.mix import BLOCK_TYPES
from llmconvert.quantize.mixed_precision.budget import usual_types
from llmconvert.quantize.numbers import Int
from llmconvert.quantize.scheme import Scheme
from llmconvert.report.report import Check, ModelInfo, Report
from llmconvert.validate.repair import (
    TYPE_ERRORS,
    Unit,
    Upgrade,
    choose_upgrades,
    needed_share,
    sensitivities,
    unit_error,
)

W2, W3, W4 = (Scheme(Int(bits), 32) for bits in (2, 3, 4))
W4G128, W4G64 = Scheme(Int(4), 128), Scheme(Int(4), 64)


def nbytes(shape: tuple[int, int], scheme: Scheme | None) -> int:
    """Codes and two bytes per scale."""
    rows, columns = shape
    if scheme is None:
        return 2 * rows * columns
    return rows * columns * scheme.bits // 8 + 2 * rows * scheme.groups(columns)


def accepts(scheme: Scheme, shape: tuple[int, int]) -> bool:
    return scheme.group_size is None or shape[1] % scheme.group_size == 0


def choose(units: list[Unit], share: float = 0.5, budget: int = 10**9) -> list[Upgrade]:
    return choose_upgrades(units, share, budget, nbytes=nbytes, accepts=accepts)


def unit(name: str, divergence: float, scheme: Scheme | None = W2, rows: int = 64, columns: int = 128) -> Unit:
    return Unit((name,), ((rows, columns),), scheme, divergence)


def test_the_largest_divergence_per_byte_comes_first() -> None:
    (chosen,) = choose([unit("small", 1.0), unit("large", 8.0), unit("long", 8.0, rows=640)], share=0.7)
    assert chosen.linears == ("large",) and chosen.before == W2 and chosen.after == W3
    assert chosen.nbytes == 64 * 128 // 8


def test_steps_go_on_until_enough_is_removed() -> None:
    (chosen,) = choose([unit("only", 1.0)], share=0.1)
    assert chosen.after == W4  # two bits leave a sixteenth
    (chosen,) = choose([unit("only", 1.0)], share=0.0)
    assert chosen.after is None and chosen.nbytes == nbytes((64, 128), None) - nbytes((64, 128), W2)


def test_groups_shrink_where_that_is_cheaper_than_bits() -> None:
    # The next width after 4 bits is 8, so halving the groups removes more per byte.
    (chosen,) = choose([unit("only", 1.0, W4G128)], share=0.9)
    assert chosen.after == W4G64


def test_fused_linears_are_one_unit_and_dense_ones_none() -> None:
    fused = Unit(("q", "k", "v"), ((64, 128), (16, 128), (16, 128)), W2, 1.0)
    (chosen,) = choose([fused, unit("dense", 100.0, None)])
    assert chosen.linears == ("q", "k", "v") and chosen.nbytes == 96 * 128 // 8


def test_nothing_that_the_format_refuses_and_nothing_over_the_budget() -> None:
    assert choose([unit("only", 1.0)], budget=1023) == []
    assert [chosen.after for chosen in choose([unit("only", 1.0)], budget=1024)] == [W3]
    refused = choose_upgrades([unit("only", 1.0)], 0.5, 10**9, nbytes=nbytes, accepts=lambda scheme, shape: False)
    assert [chosen.after for chosen in refused] == [None]
    eight = Scheme(Int(8), None, activation_bits=8)
    assert [chosen.after for chosen in choose([unit("only", 1.0, eight)])] == [None]


def test_ggml_types_leave_what_the_table_says_of_normal_weights() -> None:
    values = np.random.default_rng(0).standard_normal((64, 1024), dtype=np.float32)
    assert set(TYPE_ERRORS) == set(BLOCK_TYPES)
    for name, expected in TYPE_ERRORS.items():
        codec = load_codec(name)
        decoded = codec.decode(codec.encode(values, np.ones(1024, np.float32))).reshape(values.shape)
        assert np.square(decoded - values).sum() / np.square(values).sum() == pytest.approx(expected, rel=0.05), name


@pytest.mark.parametrize("columns", [256, 288])
def test_ggml_types_go_up_one_by_one_and_end_as_floats(columns: int) -> None:
    shape = (4, columns)
    types = [Scheme.of_block(name) for name in usual_types(columns)]
    sizes = {str(scheme): taken(shape, scheme) for scheme in types}
    at, seen = types[0], [types[0]]
    while True:
        (chosen,) = choose_upgrades(
            [Unit(("only",), (shape,), at, 1.0)], 0.999, 10**9, nbytes=taken, accepts=lambda scheme, shape: True
        )
        if chosen.after is None:
            break
        assert sizes[str(chosen.after)] > sizes[str(at)]
        at = chosen.after
        seen.append(at)
    assert str(at) == "q8_0" and seen == [scheme for scheme in types if scheme in seen]
    assert len(seen) == (7 if columns == 256 else 5)


def taken(shape: tuple[int, int], scheme: Scheme | None) -> int:
    """Bytes of a matrix in a GGML type."""
    if scheme is None:
        return 2 * shape[0] * shape[1]
    codec = load_codec(scheme.block or "")
    return shape[0] * shape[1] // codec.size * codec.nbytes


@given(
    divergence=st.lists(st.floats(0, 100), min_size=1, max_size=8),
    share=st.floats(0, 1),
    budget=st.integers(0, 100_000),
)
def test_the_budget_is_kept_and_bytes_are_counted(divergence: list[float], share: float, budget: int) -> None:
    chosen = choose([unit(str(index), value) for index, value in enumerate(divergence)], share, budget)
    assert sum(upgrade.nbytes for upgrade in chosen) <= budget
    for upgrade in chosen:
        assert upgrade.nbytes == nbytes((64, 128), upgrade.after) - nbytes((64, 128), upgrade.before)


def failed(name: str, value: float | None, limit: float | None, reference: float | None = None) -> Check:
    return Check(name=name, value=value, limit=limit, reference=reference, ok=False)


def test_what_may_be_left() -> None:
    assert needed_share([failed("kl_mean", 0.2, 0.1)]) == pytest.approx(0.4)
    perplexity = failed("perplexity", 20 * math.e**0.2, 20 * math.e**0.05, 20)
    assert needed_share([perplexity]) == pytest.approx(0.2)
    assert needed_share([perplexity, failed("kl_mean", 0.2, 0.1)]) == pytest.approx(0.2)
    assert needed_share([failed("top1_agreement", 0.8, 0.9)]) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "check",
    [
        failed("size_bytes", 10, 5),
        failed("inventory", 1, 0),
        failed("perplexity", None, None),
        failed("perplexity", 21, 19, 20),
        failed("generation.agreement", 0.5, 1.1),
    ],
)
def test_what_more_bits_cannot_mend(check: Check) -> None:
    assert needed_share([check]) is None


def report_on(*own: float) -> Report:
    """A report with the own errors of as many blocks; what they add to the drift is made to mislead."""
    blocks = [
        {"name": f"layers.{index}", "own": error, "added": 0.9 - error, "error": 0.9} for index, error in enumerate(own)
    ]
    check = Check(name="block_divergence", detail={"blocks": blocks})
    return Report(model=ModelInfo(name="", source=""), checks=(check,))


def test_a_blocks_own_error_is_shared_by_the_errors_in_it() -> None:
    units = [("layers.0.up",), ("layers.1.q", "layers.1.k"), ("layers.1.up",), ("layers.10.up",)]
    errors = {"layers.0.up": 0.5, "layers.1.q": 0.3, "layers.1.k": 0.1, "layers.1.up": 0.6, "layers.10.up": 0.25}
    costs = sensitivities(report_on(0.1, 0.3), units, errors)
    shares = [cost * unit_error(unit, errors) for cost, unit in zip(costs, units, strict=True)]
    assert shares == pytest.approx([0.01, 0.09 * 0.25, 0.09 * 0.75, 0.25])
    assert sensitivities(Report(model=ModelInfo(name="", source="")), units, errors) == [1.0] * 4


def test_what_a_block_inherits_does_not_lead_to_eight_bits_before_others_have_four() -> None:
    """Round after round, with errors that quarter by the bit: alike units are raised alike."""
    names = [(f"layers.{index}.up",) for index in range(8)]
    own = [0.10, 0.11, 0.12, 0.13, 0.14, 0.15, 0.16, 0.17]
    schemes: dict[tuple[str, ...], Scheme] = dict.fromkeys(names, W3)
    errors = {name[0]: 0.02 for name in names}
    costs = sensitivities(report_on(*own), names, errors)
    budget = len(names) * 64 * 128 // 8 - 1  # one byte less than four bits for all
    for share in (0.7, 0.7, 0.7, 0.7):
        units = [
            Unit(name, ((64, 128),), schemes[name], cost * unit_error(name, errors))
            for name, cost in zip(names, costs, strict=True)
        ]
        for upgrade in choose(units, share, budget):
            assert upgrade.after is not None
            schemes[upgrade.linears] = upgrade.after
            errors[upgrade.linears[0]] *= 4.0 ** (upgrade.before.bits - upgrade.after.bits)
            budget -= upgrade.nbytes
        if any(scheme.bits == 3 for scheme in schemes.values()):
            assert all(scheme.bits < 8 for scheme in schemes.values())
    assert sorted(scheme.bits for scheme in schemes.values()) == [3, *[4] * 7]
    assert schemes[names[0]].bits == 3, "the block that errs least is the one left behind"
