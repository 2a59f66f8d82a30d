"""Every kind of target, by LFS and by Xet: branches, folders, tags, pull requests, collections, private and gated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.hub_client import Client
from support.hub_files import MANIFEST, published, sent
from support.hub_server import Fault, HubServer

SLUG = "me/nothing-" + "0" * 24


@pytest.fixture(params=["lfs", "xet"])
def push(request: pytest.FixtureRequest, client: Client, new_client: Callable[..., Client], artifact: Path) -> Any:
    if request.param == "xet":
        pytest.importorskip("hf_xet")
        client = new_client(HF_HUB_DISABLE_XET="0")

    def call(repo_id: str = "me/model", **options: Any) -> dict[str, Any]:
        answer = client("push_folder", artifact, repo_id, verify_download=True, **options)
        assert "result" in answer, answer
        return answer

    return call


def test_a_branch_a_folder_and_a_tag(hub: HubServer, push: Any, artifact: Path) -> None:
    push(revision="dev/w4", folder="a/w4", tag="v1/w4", message="Better weights\n\nThey were rounded anew.")
    repo = hub.repos["me/model"]
    assert set(hub.files("me/model")) == {".gitattributes"}
    found = hub.files("me/model", "dev/w4")
    assert {name.removeprefix("a/w4/"): data for name, data in found.items() if name.startswith("a/w4/")} == {
        **sent(artifact),
        MANIFEST: found[f"a/w4/{MANIFEST}"],
    }
    assert 'from_pretrained("me/model", revision="dev/w4", subfolder="a/w4")' in found["README.md"].decode()
    assert repo.tags == {"v1/w4": repo.branches["dev/w4"]}
    assert repo.messages[repo.branches["dev/w4"]] == ("Better weights", "They were rounded anew.")


def test_a_pull_request_says_what_it_brings_and_can_be_pushed_to(hub: HubServer, push: Any, artifact: Path) -> None:
    repo = hub.add_repo("other/model", {"config.json": b"old"})
    answer = push("other/model", create_pr=True)
    assert answer["result"] == f"{hub.url}/other/model/discussions/1"
    assert published(hub, "other/model", "refs/pr/1") == sent(artifact)
    title, description = repo.messages[repo.pull_requests["refs/pr/1"]]
    assert (title, "7 files, 11,04" in description) == ("Upload model", True), description
    hub.repos["me/model"] = repo  # a proposal to a repository of one's own is changed by pushing to it
    (artifact / "config.json").write_text('{"better": 1}')
    push("me/model", revision="refs/pr/1", replace=True)
    assert published(hub, "me/model", "refs/pr/1") == sent(artifact)
    assert hub.files("me/model") == {"config.json": b"old"}


def test_a_set_of_variants_is_listed_in_a_collection(hub: HubServer, push: Any) -> None:
    for name in ("w4", "w8", "w4"):
        answer = push(f"me/model-{name}", collection="Tiny, quantized", private=True)
    ((slug, found),) = hub.collections.items()
    assert (found.title, found.private, found.items) == ("Tiny, quantized", True, ["me/model-w4", "me/model-w8"])
    assert answer["log"][-1] == f"me/model-w4: listed in {hub.url}/collections/{slug}"
    push("me/model-w3", collection=slug)
    assert found.items[-1] == "me/model-w3"


def test_a_private_and_gated_repository_is_so_before_anything_lies_in_it(hub: HubServer, push: Any) -> None:
    def already() -> None:
        repo = hub.repos["me/model"]
        assert (repo.private, repo.gated) == (True, "manual")

    hub.faults.append(Fault("preupload|commit/", hook=already))
    push(private=True, gated="manual")
    push(private=True, gated="manual")
    assert hub.count("PUT /api/models/me/model/settings") == 1
    push()
    already()


def test_a_push_that_was_killed_before_it_gated_the_repository_gates_it(
    hub: HubServer, client: Client, artifact: Path
) -> None:
    hub.faults.append(Fault("PUT /api/models/me/model/settings", 403, times=1))
    assert "HTTP 403" in client("push_folder", artifact, "me/model", gated="auto")["text"]
    assert set(hub.files("me/model")) == {".gitattributes"}
    assert "result" in client("push_folder", artifact, "me/model", gated="auto")
    assert hub.repos["me/model"].gated == "auto"
    hub.add_repo("me/open", {"config.json": b"{}"})
    for call in (("check_push",), ("push_folder", artifact)):
        text = client(*call, "me/open", gated="auto")["text"]
        assert "is open to all, and this was to be gated" in text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"collection": ""}, "can't be a collection's title"),
        ({"collection": "x" * 61}, "can't be a collection's title; expected 1 to 60 characters"),
        ({"collection": "two\nlines"}, "can't be a collection's title"),
        ({"collection": SLUG}, f"there is no collection {SLUG}; name its title to have it made"),
        ({"collection": "Tiny", "create_pr": True}, "a pull request goes into no collection"),
        ({"message": " \n"}, "the commit's message is empty"),
    ],
)
def test_what_can_not_be_is_refused_before_the_work(
    hub: HubServer, client: Client, artifact: Path, options: dict[str, Any], text: str
) -> None:
    for call in (("check_push",), ("push_folder", artifact)):
        assert text in client(*call, "me/model", **options)["text"]
    assert hub.repos == {}


def test_a_fine_grained_token_may_write_files_and_not_collections(
    hub: HubServer, client: Client, artifact: Path
) -> None:
    def scope(*permissions: str) -> dict[str, Any]:
        scoped = [{"entity": {"type": "user", "name": "me"}, "permissions": list(permissions)}]
        return {"role": "fineGrained", "fineGrained": {"scoped": scoped}}

    hub.account["token"] = scope("repo.write")
    text = client("check_push", "me/model", collection="Tiny")["text"]
    assert "lacks write access to me's collections" in text
    hub.account["token"] = json.loads(json.dumps(scope("repo.write", "collection.write")))
    assert "result" in client("push_folder", artifact, "me/model", collection="Tiny")


@pytest.mark.parametrize("pattern", ["POST /api/collections$", "POST /api/collections/.*/items"])
@pytest.mark.parametrize("lost", [False, True], ids=["503", "lost"])
def test_a_collection_survives_passing_failures(
    hub: HubServer, client: Client, artifact: Path, pattern: str, lost: bool
) -> None:
    hub.faults.append(Fault(pattern, 0 if lost else 503, lose_response=lost, times=2))
    assert "result" in client("push_folder", artifact, "me/model", collection="Tiny")
    (found,) = hub.collections.values()
    assert found.items == ["me/model"]
