"""Pushes killed without warning: readers see the old state, and the next push sends only what is missing."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_client import Client
from hub_files import published, sent
from hub_server import Fault, HubServer

OLD = {"config.json": b"old"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_anywhere_the_rerun_sends_only_what_is_missing(
    hub: HubServer, new_client: Callable[..., Client], artifact: Path, seed: int
) -> None:
    repo = hub.add_repo("me/model", OLD)
    draw = random.Random(seed)
    for number in range(1, 7):  # six uploads one after the other, and the small files
        (artifact / f"model-0000{number}-of-00006.safetensors").write_bytes(draw.randbytes(10_000_000))
    hub.faults.append(Fault("PUT /lfs/", slow_seconds=0.0005))
    done: set[str] = set()
    for _ in range(3):
        hub.log.clear()
        victim = new_client()
        victim.send("push_folder", artifact, "me/model")
        while not hub.count("PUT /lfs/"):
            time.sleep(0.002)
        time.sleep(draw.random() * 0.5)
        victim.kill()
        sent_now = set(re.findall(r"PUT /lfs/me/model/(\w{64})", "\n".join(hub.log)))
        assert not sent_now & done, "what had arrived is not sent again"
        if len(repo.commits) == 1:
            assert hub.files("me/model") == OLD
        time.sleep(0.1)  # the Hub may still be storing what the last connection brought
        done = set(repo.objects)
    hub.log.clear()
    last = new_client()
    assert "result" in last("push_folder", artifact, "me/model", verify_download=True)
    assert not set(re.findall(r"PUT /lfs/me/model/(\w{64})", "\n".join(hub.log))) & done
    assert published(hub, "me/model") == sent(artifact)
    assert len(repo.commits) == 2


@pytest.mark.parametrize(
    "stage", ["POST /api/repos/create", "GET /api/models/me/model/tree", "POST .*preupload", "POST .*commit/", "/tag/"]
)
def test_killed_at_each_stage_the_rerun_completes(
    hub: HubServer, new_client: Callable[..., Client], client: Client, artifact: Path, stage: str
) -> None:
    hub.add_repo("me/model", OLD)
    victim = new_client()
    hub.faults.append(Fault(stage, hook=victim.kill, times=1))
    victim.send("push_folder", artifact, "me/model", tag="v1")
    victim.process.wait(60)
    assert hub.files("me/model") == OLD or published(hub, "me/model") == sent(artifact)
    client("push_folder", artifact, "me/model", tag="v1")
    repo = hub.repos["me/model"]
    assert published(hub, "me/model") == sent(artifact)
    assert repo.tags == {"v1": repo.branches["main"]}
    assert len(repo.commits) == 2
