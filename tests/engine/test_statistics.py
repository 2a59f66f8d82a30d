"""Second moments of inputs, against their definition in float64."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmconvert.engine.statistics import Aim, Arrival, Departure, HessianSum, accumulate_hessian, hessian_nbytes
from llmconvert.errors import CalibrationError

CPU = torch.device("cpu")


def batches(lengths: list[int], columns: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((length, columns), generator=generator).to(dtype) for length in lengths]


def second_moment(inputs: list[torch.Tensor]) -> torch.Tensor:
    rows = torch.cat(inputs).double()
    return rows.T @ rows / len(rows)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    columns=st.integers(1, 700),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_hessian_is_the_mean_outer_product(lengths: list[int], columns: int, dtype: torch.dtype) -> None:
    inputs = batches(lengths, columns, dtype)
    found = accumulate_hessian("layer", iter(inputs), columns, CPU)
    assert found.tokens == sum(lengths)
    assert found.matrix.dtype == torch.float32
    assert torch.equal(found.matrix, found.matrix.T)
    expected = second_moment(inputs)
    # Products of bfloat16 values are exact; only their sums round.
    assert (found.matrix - expected).abs().max() <= 2e-6 * expected.diagonal().max() * sum(lengths) ** 0.5


def test_original_inputs_are_multiplied_with_these() -> None:
    inputs = batches([700, 900, 800], 96, torch.bfloat16)
    originals = [value + 0.25 * value.flip(0) for value in inputs]
    found = accumulate_hessian("layer", iter(inputs), 96, CPU, iter(originals))
    x, o = torch.cat(inputs).double(), torch.cat(originals).double()
    assert found.cross is not None
    torch.testing.assert_close(found.cross.double(), o.T @ x / 2400, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.matrix.double(), x.T @ x / 2400, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_aimed_at_is_multiplied_with_the_inputs(dtype: torch.dtype) -> None:
    """Differences of values that are near to each other: taken in their dtype, or little would be left of them."""
    lengths = [700, 5000, 800]
    inputs, outputs = batches(lengths, 96, dtype), batches(lengths, 40, dtype, seed=1)
    here = batches(lengths, 40, dtype, seed=2)
    there = [value * 1.03125 for value in here]
    total = HessianSum("layer", 96, CPU, original=True, aim=Aim(40, 0.75))
    for x, mine, y, theirs in zip(inputs, here, outputs, there, strict=True):
        total.add(Arrival(x, mine), Departure(y, theirs))
    found = total.hessian()
    x, mine, y, theirs = (torch.cat(parts).double() for parts in (inputs, here, outputs, there))
    expected = (y + 0.75 * (theirs - mine)).T @ x / sum(lengths)
    assert found.cross is None and found.aim is not None
    # Where products take bfloat16 as it is, the sum is rounded to it.
    assert (found.aim - expected).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-5) * expected.norm()
    torch.testing.assert_close(found.matrix.double(), second_moment(inputs), rtol=1e-4, atol=1e-4)


def test_what_is_stated_covers_an_aim() -> None:
    """Which takes less than a second matrix as wide as the inputs."""
    columns, rows = 1536, 576
    aimed = hessian_nbytes(columns, torch.bfloat16, original=True, aimed=rows)
    assert aimed < hessian_nbytes(columns, torch.bfloat16, original=True)
    assert aimed >= 4 * (columns + rows) * (columns + 2048)


def test_batches_longer_than_a_chunk_are_split() -> None:
    inputs = batches([9000, 5, 4090], 8, torch.float32)
    found = accumulate_hessian("layer", inputs, 8, CPU)
    assert found.tokens == 13_095
    torch.testing.assert_close(found.matrix.double(), second_moment(inputs), rtol=1e-5, atol=1e-5)


def test_the_result_depends_on_the_tokens_and_not_on_how_batches_arrive() -> None:
    """Lockstep hands out tensors that live on, replay ones that die: both must give the same bytes."""
    inputs = batches([300, 700, 300], 96, torch.bfloat16)
    first = accumulate_hessian("layer", inputs, 96, CPU).matrix
    assert torch.equal(first, accumulate_hessian("layer", (value.clone() for value in inputs), 96, CPU).matrix)


def test_no_input_is_kept() -> None:
    """Batches are copied into one buffer, so calibration sets of any size fit."""
    columns, most = 64, 0

    def inputs() -> Iterator[torch.Tensor]:
        nonlocal most
        for seed in range(40):
            alive = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
            storages = {tensor.untyped_storage().data_ptr() for tensor in alive if tensor.shape == (512, columns)}
            most = max(most, len(storages))
            del alive
            yield batches([512], columns, torch.float32, seed)[0]

    gc.collect()
    gc.freeze()
    try:
        accumulate_hessian("layer", inputs(), columns, CPU)
    finally:
        gc.unfreeze()
    assert most == 1
    assert hessian_nbytes(columns, torch.float32) >= 4 * columns * columns + 2048 * columns * 4


@pytest.mark.parametrize("inputs", [[], [torch.empty((0, 8))]], ids=["no batch", "empty batches"])
def test_a_linear_that_no_token_reached_is_named(inputs: list[torch.Tensor]) -> None:
    with pytest.raises(CalibrationError, match=r"layers\.7\.up_proj: no calibration token reached this linear"):
        accumulate_hessian("layers.7.up_proj", inputs, 8, CPU)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_that_are_not_finite_are_named(value: float, dtype: torch.dtype) -> None:
    inputs = batches([20, 20], 600, dtype)
    inputs[1][3, 550] = value
    with pytest.raises(CalibrationError, match=r"layers\.7\.up_proj: batch 1 comes .* not finite"):
        accumulate_hessian("layers.7.up_proj", inputs, 600, CPU)


def test_inputs_whose_squares_overflow_are_named() -> None:
    inputs = batches([20, 20], 600, torch.float32)
    inputs[1][3, 550] = 1e30
    with pytest.raises(CalibrationError, match=r"layers\.7\.up_proj: the squares of its calibration inputs"):
        accumulate_hessian("layers.7.up_proj", inputs, 600, CPU)


def test_settings_of_the_process_are_left_as_they_were() -> None:
    settings_ = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings_.fp32_precision
    accumulate_hessian("layer", batches([64], 600, torch.bfloat16), 600, CPU)
    assert settings_.fp32_precision == before
