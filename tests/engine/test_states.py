"""Block inputs kept in memory and on disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from llmconvert.engine.states import DiskStates, MemoryStates, ScratchStates, States, passing_states
from llmconvert.errors import CapacityError, UnsupportedError

LENGTHS = (5, 3, 8)
WIDTH = 6


def hidden(block: int, batch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * block + batch)
    return torch.randn((1, LENGTHS[batch], WIDTH), generator=generator).to(dtype)


def walk(states: States, dtype: torch.dtype) -> None:
    """Put and get as a stream does: read a batch's input, then put what it gives the next block."""
    for batch in range(3):
        states.put(0, batch, hidden(0, batch, dtype))
    for block in range(4):
        for batch in range(3):
            assert torch.equal(states.get(block, batch), hidden(block, batch, dtype))
            assert torch.equal(states.get(block, batch), hidden(block, batch, dtype))
            states.put(block + 1, batch, hidden(block + 1, batch, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_put_is_got(tmp_path: Path, dtype: torch.dtype) -> None:
    walk(MemoryStates(), dtype)
    scratch = ScratchStates(LENGTHS, WIDTH, dtype)
    walk(scratch, dtype)
    scratch.close()
    states = DiskStates(tmp_path, LENGTHS, WIDTH, dtype)
    walk(states, dtype)
    states.close()


def test_tensors_that_are_not_contiguous_are_kept_as_well(tmp_path: Path) -> None:
    states = DiskStates(tmp_path, LENGTHS, WIDTH, torch.float32)
    value = torch.randn((1, WIDTH, LENGTHS[0])).transpose(1, 2)
    states.put(0, 0, value)
    assert torch.equal(states.get(0, 0), value)
    states.close()


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (torch.ones(1, 3, 8), r"hidden states in float32, its weights are in bfloat16, .*convert --dtype float32"),
        (torch.ones(1, 3, 2, 8, dtype=torch.bfloat16), r"of shape \[1, 3, 2, 8\], expected as many .*rtn"),
    ],
)
def test_what_would_run_into_the_next_batch_is_refused(tmp_path: Path, hidden: torch.Tensor, message: str) -> None:
    states = DiskStates(tmp_path, [3, 5], 8, torch.bfloat16)
    with pytest.raises(UnsupportedError, match=message):
        states.put(1, 0, hidden)
    streams = torch.randn(1, 3, 2, 4).bfloat16()
    states.put(1, 0, streams)
    assert torch.equal(states.get(1, 0).view(1, 3, 2, 4), streams)
    states.close()


def test_memory_states_forget_what_is_behind() -> None:
    states = MemoryStates()
    for block in range(10):
        for batch in range(3):
            states.put(block, batch, hidden(block, batch))
    assert len(states._kept) == 3


def test_scratch_states_have_no_name_and_give_their_space_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    states = ScratchStates(LENGTHS, WIDTH, torch.float32)
    assert len(os.listdir("/proc/self/fd")) == before, "nothing is reserved for states that never come"
    states.put(0, 0, hidden(0, 0))
    assert not list(tmp_path.iterdir())
    assert len(os.listdir("/proc/self/fd")) == before + 1
    states.close()
    states.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_many_states_go_to_a_file_and_few_stay_in_memory() -> None:
    width = 1 << 15
    assert isinstance(passing_states([2048], width, torch.float32), MemoryStates)
    assert isinstance(passing_states([2048, 1], width, torch.float32), ScratchStates)
    assert isinstance(passing_states([2048, 2048], width, torch.bfloat16), MemoryStates)


def test_a_temporary_directory_without_space_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    states = ScratchStates([1 << 40], 1 << 12, torch.float32)
    with pytest.raises(CapacityError, match=f"{tmp_path} .set TMPDIR to a directory on a larger disk.: no space for"):
        states.put(0, 0, hidden(0, 0))


def test_inputs_of_a_block_outlast_those_of_the_next(tmp_path: Path) -> None:
    """A run killed while block 4's inputs are written starts again from block 3's."""
    states = DiskStates(tmp_path, LENGTHS, WIDTH, torch.float32)
    for batch in range(3):
        states.put(3, batch, hidden(3, batch))
    states.sync(3)
    states.put(4, 0, hidden(4, 0))
    states.close()
    reopened = DiskStates(tmp_path, LENGTHS, WIDTH, torch.float32)
    for batch in range(3):
        assert torch.equal(reopened.get(3, batch), hidden(3, batch))
    assert torch.equal(reopened.get(4, 0), hidden(4, 0))
    reopened.close()


def test_space_is_reserved_at_once(tmp_path: Path) -> None:
    states = DiskStates(tmp_path, LENGTHS, WIDTH, torch.bfloat16)
    sizes = {path.name: (path.stat().st_size, path.stat().st_blocks) for path in tmp_path.iterdir()}
    assert {name: size for name, (size, _) in sizes.items()} == {
        "states-even.bin": sum(LENGTHS) * WIDTH * 2,
        "states-odd.bin": sum(LENGTHS) * WIDTH * 2,
    }
    assert all(blocks > 0 for _, blocks in sizes.values())
    states.close()


def test_a_full_disk_is_named_and_no_descriptor_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CapacityError, match=r"states-even\.bin: no space for 384 bytes of activations: No space left"):
        DiskStates(tmp_path, LENGTHS, WIDTH, torch.float32)
    assert len(os.listdir("/proc/self/fd")) == before
