"""What processes give each other: sums in the order of ranks, and tensors of any kind bit for bit."""

from __future__ import annotations

import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.ranks_jobs import BATCHES, SHAPES, arrivals, both_refuse, die, exercise, refuse, summed
from support.ranks_process import run_ranks

from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.errors import CalibrationError


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_hessians_of_several_processes_are_those_of_one(tmp_path: Path, count: int) -> None:
    ended = run_ranks(count, tmp_path / "logs", partial(exercise, tmp_path))
    assert ended.codes == (0,) * count, ended.errors
    by_rank = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(count)]
    for other in by_rank[1:]:
        assert other.keys() == by_rank[0].keys()
        for name, tensor in other.items():
            assert tensor.dtype == by_rank[0][name].dtype
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), by_rank[0][name].reshape(-1).view(torch.uint8))
    found = by_rank[0]
    for seed, (columns, rows) in enumerate(SHAPES):
        for dtype in (torch.float32, torch.bfloat16):
            alone, name = summed(ALONE, seed, columns, rows, dtype), f"{seed} {str(dtype)[6:]}"
            assert int(found[f"{name} tokens"]) == alone.tokens == sum(BATCHES)
            batches = [one for one, _ in arrivals(seed, columns, rows, dtype)]
            exact = sum((one.inputs.double().T @ one.inputs.double() for one in batches), torch.zeros(()))
            # Products of bfloat16 are summed with more error than that by processors that have them.
            bound = max(1e-6, distance(alone.matrix.double() * alone.tokens, exact) if dtype != torch.float32 else 0.0)
            assert distance(found[f"{name} matrix"], alone.matrix) < bound
            if alone.aim is not None:
                assert distance(found[f"{name} aim"], alone.aim) < bound
    for rank in range(count):
        drawn = torch.randn(3, rank + 2, generator=torch.Generator().manual_seed(rank))
        assert torch.equal(found[f"from {rank} 0"], drawn) and int(found[f"from {rank} 1"]) == rank


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_others_with_one_line(tmp_path: Path, victim: int) -> None:
    begin = time.monotonic()
    ended = run_ranks(3, tmp_path, partial(die, victim))
    assert time.monotonic() - begin < 30
    assert ended.codes[victim] == -signal.SIGKILL
    speaker = 0 if victim else 1
    for rank in range(3):
        if rank == victim:
            continue
        said = ended.errors[rank].splitlines()
        if rank == speaker:
            assert said[-1].endswith(f"rank {victim} of 3 has died; run the same command to continue")
        else:
            assert not said and ended.codes[rank] == 5


@pytest.mark.slow
def test_the_first_process_says_what_ended_another(tmp_path: Path) -> None:
    ended = run_ranks(2, tmp_path / "one", refuse)
    assert "CalibrationError: rank 1 of 2: layer 7: values that are not finite" in ended.errors[0]
    assert ended.codes[1] == CalibrationError.exit_code and not ended.errors[1]
    ended = run_ranks(2, tmp_path / "both", both_refuse)
    assert (
        "UnsupportedError: the same in all of them" in ended.errors[0]
        and "rank" not in ended.errors[0].splitlines()[-1]
    )
    assert not ended.errors[1]


def test_shares_are_whole_and_come_one_after_the_other() -> None:
    for count in range(1, 6):
        for total in range(12):
            shares = [Ranks(rank, count).share(total) for rank in range(count)]
            assert [number for share in shares for number in share] == list(range(total))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
