"""Publishing to a Hub that fails: what is repeated, what is given up, and that nothing is ever half there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.hub_client import Client
from support.hub_files import published, sent
from support.hub_server import WRITE_TOKEN, Blob, Fault, HubServer

OLD = {"config.json": b"{}"}  # as the artifact has it: nobody loses anything


@pytest.fixture
def big(artifact: Path) -> Path:
    """With a shard large enough to be cut off in its midst."""
    (artifact / "model-00001-of-00002.safetensors").write_bytes(bytes(range(256)) * 8192)
    return artifact


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET /api/whoami-v2", 503, times=2),
        Fault("POST /api/validate-yaml", 503, times=2),
        Fault("GET /api/models/me/model/tree", 500, times=2),
        Fault("POST .*preupload", 429, retry_after="3", times=1),
        Fault("POST .*lfs/objects/batch", 500, times=2),
        Fault("PUT /lfs/", 503, times=2),
        Fault("PUT /lfs/", drop_after=1 << 17, times=2),
        Fault("PUT /lfs/", slow_seconds=0.005, times=1),
        Fault("POST /lfs/.*/verify", 500, times=1),
        Fault("POST /api/models/me/model/commit", 500, times=2),
        Fault("POST /api/models/me/model/commit", 429, retry_after="3", times=1),
        Fault("POST /api/models/me/model/commit", drop_after=100, times=2),
        Fault("POST /api/models/me/model/tag", 503, times=2),
    ],
    ids=lambda fault: f"{fault.pattern} {fault.status or 'cut off'}",
)
def test_passing_failures_are_overcome(hub: HubServer, client: Client, big: Path, fault: Fault) -> None:
    repo = hub.add_repo("me/model", OLD)
    fault.times, before = fault.times, fault.times
    hub.faults.append(fault)
    answer = client("push_folder", big, "me/model", tag="v1")
    assert "result" in answer, answer
    assert fault.times < before
    if fault.retry_after is not None:
        assert any(nap >= 3 for nap in answer["naps"])
    assert published(hub, "me/model") == sent(big)
    assert len(repo.commits) == 2
    assert repo.tags == {"v1": repo.branches["main"]}


def test_a_repository_is_made_by_the_next_try(hub: HubServer, client: Client, artifact: Path) -> None:
    hub.faults.append(Fault("POST /api/repos/create", 503, times=1))
    hub.faults.append(Fault("POST /api/repos/create", lose_response=True, times=2))
    assert "result" in client("push_folder", artifact, "me/model")
    assert published(hub, "me/model").items() >= sent(artifact).items()


@pytest.mark.parametrize("create_pr", [False, True])
def test_a_commit_whose_answer_was_lost_is_not_made_twice(
    hub: HubServer, client: Client, artifact: Path, create_pr: bool
) -> None:
    repo = hub.add_repo("me/model", OLD)
    hub.faults.append(Fault("POST /api/models/me/model/commit", lose_response=True, times=1))
    answer = client("push_folder", artifact, "me/model", create_pr=create_pr)
    assert len(repo.commits) == 2
    assert hub.count("POST /api/models/me/model/commit") == 1
    page = "discussions/1" if create_pr else f"commit/{repo.branches['main']}"
    assert answer["result"] == f"{hub.url}/me/model/{page}"
    assert published(hub, "me/model", "refs/pr/1" if create_pr else "main") == sent(artifact)


@pytest.mark.parametrize(
    ("pattern", "status", "text"),
    [
        ("GET /api/whoami-v2", 500, "HTTP 500: the Hub failed; run the same command again later"),
        ("POST /api/validate-yaml", 429, "HTTP 429: too many requests; wait"),
        ("POST /api/models/me/model/commit", 500, "HTTP 500"),
        ("POST /api/models/me/model/commit", 412, "the branch has moved meanwhile"),
        ("POST .*lfs/objects/batch", 403, "HTTP 403: the token does not allow this"),
        ("PUT /lfs/", 403, "HTTP 403"),
        ("PUT /lfs/", 503, "HTTP 503"),
    ],
)
def test_lasting_failures_leave_the_repository_as_it_was(
    hub: HubServer, client: Client, artifact: Path, pattern: str, status: int, text: str
) -> None:
    hub.add_repo("me/model", OLD)
    hub.faults.append(Fault(pattern, status, f"said with {WRITE_TOKEN} in it"))
    failed = client("push_folder", artifact, "me/model")
    assert (failed["error"], failed["code"]) == ("HubError", 4)
    assert text in failed["text"]
    assert hub.files("me/model") == OLD
    hub.faults.clear()
    assert "result" in client("push_folder", artifact, "me/model")
    assert published(hub, "me/model") == sent(artifact)


def test_an_expired_link_to_the_storage_is_asked_for_anew(hub: HubServer, client: Client, artifact: Path) -> None:
    hub.storage = hub.url.replace("127.0.0.1", "localhost")
    hub.faults.append(Fault("PUT /lfs/", 403, "Request has expired", times=1))
    answer = client("push_folder", artifact, "me/model")
    assert "result" in answer, answer
    hub.faults.append(Fault("PUT /lfs/", 403, "Request has expired"))
    (artifact / "model-00001-of-00002.safetensors").write_bytes(b"7" * 5000)
    text = client("push_folder", artifact, "me/model")["text"]
    assert "from the storage server: the link that the Hub gave expired" in text


def test_a_wait_without_end_is_not_waited_for(hub: HubServer, client: Client, artifact: Path) -> None:
    hub.faults.append(Fault("POST /api/repos/create", 429, retry_after="86400"))
    failed = client("push_folder", artifact, "me/model")
    assert "HTTP 429" in failed["text"]
    assert "it asks to wait 86,400 s" in failed["text"]
    assert failed["naps"] == []


def test_a_hub_without_room_is_named(hub: HubServer, client: Client, artifact: Path) -> None:
    hub.add_repo("me/model", OLD)
    hub.store_bytes = 8000
    assert "HTTP 507: the Hub has no room for this" in client("push_folder", artifact, "me/model")["text"]
    assert hub.files("me/model") == OLD


@pytest.mark.parametrize("lost", [False, True], ids=["before the commit", "while its answer was lost"])
@pytest.mark.parametrize("name", ["theirs.txt", "config.json"])
def test_a_commit_made_meanwhile_is_not_overwritten(
    hub: HubServer, client: Client, artifact: Path, lost: bool, name: str
) -> None:
    repo = hub.add_repo("me/model", OLD)

    def somebody_else() -> None:
        repo.commit("main", {**repo.commits[repo.branches["main"]], name: Blob(b"new", False)})

    if lost:
        hub.faults.append(Fault("POST /api/models/me/model/commit", 503, hook=somebody_else, times=1))
    else:
        hub.faults.append(Fault("POST .*lfs/objects/batch", hook=somebody_else, times=1))
    answer = client("push_folder", artifact, "me/model")
    if name == "theirs.txt":  # nothing of the artifact's: the push builds on it
        assert any("another commit came in" in line for line in answer["log"]), answer
        assert published(hub, "me/model") == {"theirs.txt": b"new", **sent(artifact)}
        assert len(repo.commits) == 3
        return
    assert "the branch has moved meanwhile" in answer["text"]
    assert "run the same command again" in answer["text"]
    assert hub.files("me/model") == {"config.json": b"new"}
    assert "config.json is there already" in client("push_folder", artifact, "me/model")["text"]


def test_variants_pushed_at_once_both_arrive(
    hub: HubServer, client: Client, new_client: Callable[..., Client], artifact: Path
) -> None:
    hub.add_repo("me/model", {})

    def the_other() -> None:
        assert "result" in new_client()("push_folder", artifact, "me/model", folder="w8")

    hub.faults.append(Fault("POST /api/models/me/model/commit", 412, hook=the_other, times=1))
    answer = client("push_folder", artifact, "me/model", folder="w4")
    assert "result" in answer, answer
    found = hub.files("me/model")
    for folder in ("w4", "w8"):
        assert {f"{folder}/{name}": content for name, content in sent(artifact).items()}.items() <= found.items()
        assert f"| `{folder}` |" in found["README.md"].decode()


def test_no_network_is_one_line(artifact: Path, tmp_path: Path) -> None:
    with Client("http://127.0.0.1:9", tmp_path / "home") as away:
        refused = away("push_folder", artifact, "me/model")
    assert refused["code"] == 4
    assert "http://127.0.0.1:9 could not be reached (ConnectError" in refused["text"]
