"""The memory estimate, and the choice between lockstep and replay that follows from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmconvert.engine import memory
from llmconvert.engine.discovery import BlockPlan, Stop, discover
from llmconvert.engine.memory import BASE_NBYTES, activation_nbytes, available_nbytes, choose_mode
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import CapacityError
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

Tiny = Callable[..., Path]
WORK = 1_000_000


@pytest.fixture
def skeleton(tiny: Tiny) -> Skeleton:
    return Skeleton(SafetensorsCheckpoint(tiny("llama", torch.bfloat16)), torch.device("cpu"))


def block(index: int, held: int, peak: int) -> BlockPlan:
    return BlockPlan(index, (Stop(("a",), 8, held // 2), Stop(("b",), 8, held)), (), 0, peak)


PLANS = (block(0, 1000, 5000), block(1, 3000, 4000), block(2, 2000, 4500))


def test_lockstep_holds_all_batches_and_replay_one(skeleton: Skeleton) -> None:
    assert activation_nbytes(PLANS, skeleton, [16, 16, 16], "lockstep") == 5000 + 3 * 3000
    assert activation_nbytes(PLANS, skeleton, [16, 8], "lockstep") == 5000 + 3000 * 24 // 16
    assert activation_nbytes(PLANS, skeleton, [16, 16, 16], "replay") == 5000


def test_model_bytes_are_those_of_its_tensors(tiny: Tiny) -> None:
    for name in ("llama", "llama-tied", "opt-untied", "gemma2"):
        checkpoint = SafetensorsCheckpoint(tiny(name, torch.bfloat16))
        skeleton = Skeleton(checkpoint, torch.device("cpu"))
        blocks = sum(skeleton.block_nbytes(index) for index in range(3))
        assert blocks + skeleton.outer_nbytes(head=True) == checkpoint.nbytes
        head = skeleton.outer_nbytes(head=True) - skeleton.outer_nbytes(head=False)
        assert head == (128 * 64 * 2 if name == "llama" else 128 * 32 * 2 if name == "opt-untied" else 0)


def test_float32_weights_read_as_bfloat16_count_half(tiny: Tiny) -> None:
    checkpoint = SafetensorsCheckpoint(tiny("llama", torch.float32))
    wide = Skeleton(checkpoint, torch.device("cpu"))
    narrow = Skeleton(checkpoint, torch.device("cpu"), torch.bfloat16)
    assert narrow.block_nbytes(0) * 2 == wide.block_nbytes(0)
    assert narrow.outer_nbytes(head=True) * 2 == wide.outer_nbytes(head=True)


def test_the_mode_follows_from_the_budget(skeleton: Skeleton) -> None:
    lengths = [16] * 100
    roomy = choose_mode(skeleton, PLANS, lengths, WORK, 10**12)
    assert roomy.mode == "lockstep"
    assert roomy.total == sum(roomy.parts.values())
    assert roomy.parts["base"] == BASE_NBYTES and roomy.parts["one linear"] == WORK
    assert roomy.parts["two blocks"] == 2 * skeleton.block_nbytes(0)
    assert choose_mode(skeleton, PLANS, lengths, WORK, roomy.total) == roomy
    least = roomy.total - roomy.parts["kept"]
    exact = choose_mode(skeleton, PLANS, lengths, WORK, least)
    assert (exact.mode, exact.total) == ("lockstep", least)
    tight = choose_mode(skeleton, PLANS, lengths, WORK, least - 1)
    assert tight.mode == "replay"
    assert least - tight.total == 100 * 3000
    assert choose_mode(skeleton, PLANS, lengths, WORK, tight.total).mode == "replay"


def test_a_mode_that_is_asked_for_is_used(skeleton: Skeleton) -> None:
    assert choose_mode(skeleton, PLANS, [16], WORK, 10**12, "replay").mode == "replay"
    replayed = choose_mode(skeleton, PLANS, [16] * 100, WORK, 10**12, "replay")
    tight = replayed.total - replayed.parts["kept"]
    with pytest.raises(CapacityError, match="lockstep"):
        choose_mode(skeleton, PLANS, [16] * 100, WORK, tight, "lockstep")


def test_a_budget_too_small_for_one_block_is_named(skeleton: Skeleton) -> None:
    with pytest.raises(CapacityError, match=r"needs 50\d MB \(replay: base 500 MB, .*two.*\), 100 MB may be"):
        choose_mode(skeleton, PLANS, [16], WORK, 100_000_000)


def test_without_a_budget_most_of_what_is_free_is_used(skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_nbytes", lambda device: 400_000_000)
    with pytest.raises(CapacityError, match="320 MB may be used"):
        choose_mode(skeleton, PLANS, [16], WORK, None)
    monkeypatch.setattr(memory, "available_nbytes", lambda device: 700_000_000)
    assert choose_mode(skeleton, PLANS, [16], WORK, None).mode == "lockstep"


def test_freed_memory_is_kept_where_there_is_room(skeleton: Skeleton) -> None:
    roomy = choose_mode(skeleton, PLANS, [16], WORK, 10**10)
    tight = choose_mode(skeleton, PLANS, [16], WORK, roomy.total - 1)
    assert tight.mode == roomy.mode == "lockstep"
    assert dict(roomy.parts) == {**tight.parts, "kept": roomy.total - tight.total}
    assert tight.total < roomy.kept < roomy.total and tight.kept == 0
    assert choose_mode(skeleton, PLANS, [], WORK, 10**10).kept == 0


def test_available_memory_is_what_the_kernel_says() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 0 < available_nbytes(torch.device("cpu")) <= int(total.split()[1]) * 1024


def test_of_a_gpu_its_own_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (device.index, 9))
    assert available_nbytes(torch.device("cuda", 7)) == 7


def test_estimates_grow_with_the_length_of_the_windows(skeleton: Skeleton) -> None:
    short, long = (
        activation_nbytes(discover(skeleton, length), skeleton, [length] * 4, "lockstep") for length in (32, 128)
    )
    assert 3 * short < long < 5 * short
