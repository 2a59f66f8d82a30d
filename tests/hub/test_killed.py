"""Pushes killed without warning: readers see the old state, and the next push sends only what is missing."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.hub_client import Client
from support.hub_files import published, sent
from support.hub_server import WRITE_TOKEN, Fault, HubServer

OLD = {"config.json": b"{}"}  # as the artifact has it: nobody loses anything


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
    "stage", ["GET /api/whoami-v2", "GET /api/models/me/model/tree", "POST .*preupload", "POST .*commit/", "/tag/"]
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


@pytest.mark.parametrize("stage", ["POST .*branch/w4", "POST .*preupload", "POST .*commit/"])
def test_killed_on_a_branch_of_its_own_main_never_shows_it(
    hub: HubServer, new_client: Callable[..., Client], client: Client, artifact: Path, stage: str
) -> None:
    repo = hub.add_repo("me/model", OLD)
    victim = new_client()
    hub.faults.append(Fault(stage, hook=victim.kill, times=1))
    victim.send("push_folder", artifact, "me/model", revision="w4")
    victim.process.wait(60)
    # The commit may have come through whole; then it holds the push's own record too.
    whole = "w4" not in repo.branches or hub.files("me/model", "w4") == OLD
    assert whole or published(hub, "me/model", "w4") == sent(artifact)
    client("push_folder", artifact, "me/model", revision="w4")
    assert published(hub, "me/model", "w4") == sent(artifact)
    assert hub.files("me/model") == OLD
    assert len(repo.commits) == 2


def test_a_pull_request_that_a_killed_push_had_opened_is_not_opened_twice(
    hub: HubServer, new_client: Callable[..., Client], client: Client, artifact: Path
) -> None:
    repo = hub.add_repo("me/model", OLD)
    victim = new_client()
    opened = threading.Event()
    hub.faults.append(Fault("GET .*/tree/refs%2Fpr%2F1|GET .*/tree/refs/pr/1", hook=opened.set, times=1))
    hub.faults.append(Fault("GET .*/tree/refs%2Fpr%2F1|GET .*/tree/refs/pr/1", hook=victim.kill, times=1))
    victim.send("push_folder", artifact, "me/model", create_pr=True)
    victim.process.wait(60)
    assert opened.is_set() and list(repo.pull_requests) == ["refs/pr/1"]
    again = client("push_folder", artifact, "me/model", create_pr=True)
    assert again["result"] == f"{hub.url}/me/model/discussions/1"
    assert list(repo.pull_requests) == ["refs/pr/1"]
    repo.closed.add("refs/pr/1")
    another = client("push_folder", artifact, "me/model", create_pr=True)
    assert another["result"] == f"{hub.url}/me/model/discussions/2"
    assert hub.files("me/model") == OLD


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_the_command_line_stops_at_once_and_goes_on_later(
    hub: HubServer, artifact: Path, tmp_path: Path, number: signal.Signals
) -> None:
    hub.add_repo("me/model", OLD)
    (artifact / "model-00001-of-00002.safetensors").write_bytes(bytes(12_000_000))
    hub.faults.append(Fault("PUT /lfs/", slow_seconds=0.1))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "llmconvert.cli", "push", str(artifact), "me/model", "--unmeasured"]
    options: dict[str, Any] = {"env": {**environment, **settings, "HF_TOKEN": WRITE_TOKEN}, "text": True}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, **options)
    large = hashlib.sha256(bytes(12_000_000)).hexdigest()
    while not hub.count(f"PUT /lfs/.*{large}"):
        assert process.poll() is None
        time.sleep(0.01)
    begin = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - begin < 5, "twelve seconds of upload were left"
    assert process.returncode == 6, errors
    assert f"stopped by {number.name}; files already sent are not sent again" in errors
    assert hub.files("me/model") == OLD
    hub.faults.clear()
    subprocess.run(command, check=True, capture_output=True, **options)
    assert published(hub, "me/model") == sent(artifact)
