"""What the environment says of processes that were started together."""

from __future__ import annotations

import pytest

from llmconvert.compute.ranks.launch import Launch
from llmconvert.errors import UsageError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "GROUP_RANK": "1",
}


def test_torchruns_variables_are_read_and_not_passed_on() -> None:
    assert Launch.of(TORCHRUN) == Launch(5, 8, 1, 4, "node0", 29500)
    environment = {**TORCHRUN, "HOME": "/root", "OMP_NUM_THREADS": "4"}
    Launch.forget(environment)
    assert environment == {"HOME": "/root", "OMP_NUM_THREADS": "4"}


@pytest.mark.parametrize("change", [{"WORLD_SIZE": "1", "RANK": "0"}, {"MASTER_ADDR": ""}, {"RANK": ""}])
def test_a_process_that_is_alone_is_none_of_several(change: dict[str, str]) -> None:
    left = {name: value for name, value in TORCHRUN.items() if not name.startswith("LOCAL")}
    assert Launch.of({**left, **change}) is None


def test_processes_started_by_hand_are_on_one_machine() -> None:
    left = {name: value for name, value in TORCHRUN.items() if not name.startswith("LOCAL")}
    assert Launch.of(left) == Launch(5, 8, 5, 8, "node0", 29500)


@pytest.mark.parametrize(("change", "found"), [({"RANK": "8"}, "RANK=8 of WORLD_SIZE=8"), ({"RANK": "x"}, "no number")])
def test_what_contradicts_itself_is_refused(change: dict[str, str], found: str) -> None:
    with pytest.raises(UsageError, match=found):
        Launch.of({**TORCHRUN, **change})
