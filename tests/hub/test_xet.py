"""Publishing by Xet: the real ``hf_xet`` client and its local store in place of the content-addressed service."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.hub_client import Client
from support.hub_files import published, sent
from support.hub_server import Blob, Fault, HubServer

pytest.importorskip("hf_xet")


@pytest.fixture
def big(artifact: Path) -> Path:
    """Two shards that don't compress; each large enough for an upload of its own."""
    draw = random.Random(0)
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (artifact / name).write_bytes(draw.randbytes(11_000_000))
    return artifact


def test_it_is_one_commit_and_nothing_is_sent_twice(
    hub: HubServer, new_client: Callable[..., Client], big: Path
) -> None:
    repo = hub.add_repo("me/model", {"config.json": b"{}"})
    total = sum(path.stat().st_size for path in big.glob("*.safetensors"))
    reached, release = threading.Event(), threading.Event()

    def stall() -> None:
        reached.set()
        release.wait(60)

    hub.faults.append(Fault("POST /api/models/me/model/commit", hook=stall, times=1))
    first = new_client(HF_HUB_DISABLE_XET="0")
    first.send("push_folder", big, "me/model")
    assert reached.wait(60), first.errors()
    first.kill()
    hub.drop_pending()
    release.set()
    assert hub.files("me/model") == {"config.json": b"{}"}, "a reader sees nothing of it"
    stored = hub.xet.nbytes()
    assert stored >= total, "and yet everything was sent"

    second = new_client(HF_HUB_DISABLE_XET="0")
    answer = second("push_folder", big, "me/model", verify_download=True, tag="v1")
    assert answer["log"][-1].startswith("verifying the download: ")
    assert hub.xet.nbytes() - stored < total / 100, "chunks that were there are not sent again"
    assert published(hub, "me/model") == sent(big)
    assert (len(repo.commits), hub.count("lfs/")) == (2, 0)
    assert hub.count("xet-write-token") > 0

    second("push_folder", big, "me/model", revision="w4")
    assert published(hub, "me/model", "w4") == sent(big)
    (big / "model-00002-of-00002.safetensors").write_bytes(random.Random(1).randbytes(5000))
    second("push_folder", big, "me/model", create_pr=True)
    assert published(hub, "me/model", "refs/pr/1") == sent(big) != published(hub, "me/model")


def test_without_the_service_the_push_fails_in_one_line(
    hub: HubServer, new_client: Callable[..., Client], artifact: Path
) -> None:
    hub.add_repo("me/model", {"config.json": b"{}"})
    hub.faults.append(Fault("xet-write-token", 403, "no Xet here"))
    refused = new_client(HF_HUB_DISABLE_XET="0")("push_folder", artifact, "me/model")
    assert (refused["error"], refused["code"]) == ("HubError", 4)
    assert hub.files("me/model") == {"config.json": b"{}"}


def test_a_server_without_xet_is_told_before_anything_is_sent(
    hub: HubServer, new_client: Callable[..., Client], artifact: Path
) -> None:
    hub.add_repo("me/model", {"config.json": b"{}"})
    hub.faults.append(Fault("xet-write-token", 404, "no such route"))
    client = new_client(HF_HUB_DISABLE_XET="0")
    for call in (("check_push", "me/model"), ("push_folder", artifact, "me/model")):
        assert "has no Xet storage" in (text := client(*call)["text"]) and "HF_HUB_DISABLE_XET=1" in text
    assert hub.count("preupload|commit/") == 0
    assert "result" in new_client(HF_HUB_DISABLE_XET="1")("push_folder", artifact, "me/model")


def test_killed_between_files_only_the_rest_is_sent(
    hub: HubServer, new_client: Callable[..., Client], big: Path
) -> None:
    hub.add_repo("me/model", {"config.json": b"{}"})
    one, both = 11_000_000, 22_000_000
    draw = random.Random(7)  # the store knows nothing of it yet
    for path in big.glob("*.safetensors"):
        path.write_bytes(draw.randbytes(one))
    before = hub.xet.nbytes()
    first = new_client(HF_HUB_DISABLE_XET="0")

    def kill() -> None:  # the small files have been asked about, the first shard is there, and now the second's turn
        if hub.count("POST .*preupload") == 3:
            first.kill()

    hub.faults.append(Fault("POST .*preupload", hook=kill))
    first.send("push_folder", big, "me/model")
    first.process.wait(60)
    hub.faults.clear()
    stored = hub.xet.nbytes() - before
    assert one <= stored < 1.1 * one
    assert hub.files("me/model") == {"config.json": b"{}"}
    new_client(HF_HUB_DISABLE_XET="0")("push_folder", big, "me/model")
    assert both <= hub.xet.nbytes() - before < both + one / 10
    assert published(hub, "me/model") == sent(big)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("xet-write-token", 503, times=2),
        Fault("xet-write-token", 429, retry_after="3", times=1),
        Fault("POST /api/models/me/model/commit", 500, times=2),
        Fault("POST /api/models/me/model/commit", lose_response=True, times=1),
    ],
    ids=lambda fault: f"{fault.pattern} {fault.status or 'lost'}",
)
def test_passing_failures_are_overcome(
    hub: HubServer, new_client: Callable[..., Client], artifact: Path, fault: Fault
) -> None:
    repo = hub.add_repo("me/model", {"config.json": b"{}"})
    hub.faults.append(fault)
    answer = new_client(HF_HUB_DISABLE_XET="0")("push_folder", artifact, "me/model")
    assert "result" in answer, answer
    assert published(hub, "me/model") == sent(artifact)
    assert len(repo.commits) == 2


def test_a_commit_made_meanwhile_is_not_overwritten(
    hub: HubServer, new_client: Callable[..., Client], artifact: Path
) -> None:
    repo = hub.add_repo("me/model", {"config.json": b"{}"})
    theirs = {"config.json": b"new", "theirs.txt": b"new"}

    def somebody_else() -> None:
        repo.commit("main", {name: Blob(content, False) for name, content in theirs.items()})

    hub.faults.append(Fault("POST .*preupload", hook=somebody_else, times=1))
    refused = new_client(HF_HUB_DISABLE_XET="0")("push_folder", artifact, "me/model")
    assert "the branch has moved meanwhile" in refused["text"]
    assert hub.files("me/model") == theirs
