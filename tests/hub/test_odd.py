"""Odd repositories, files, servers and settings that a publisher meets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.hub_client import Client
from support.hub_files import published, sent
from support.hub_server import WRITE_TOKEN, Fault, HubServer

NAMES = ("a b.txt", "ü.txt", "100%.txt", "%20.txt", "a#b?.txt", "a+b&c=d.txt", "deep/er/x y.txt", "a'b\".txt")


def test_files_with_odd_names_arrive_under_them(hub: HubServer, client: Client, artifact: Path) -> None:
    for number, name in enumerate(NAMES):
        (artifact / name).parent.mkdir(parents=True, exist_ok=True)
        (artifact / name).write_bytes(b"%d" % number * (1 + 1500 * (number % 2)))
    answer = client("push_folder", artifact, "me/model", verify_download=True)
    assert "result" in answer, answer
    assert sent(artifact).items() <= published(hub, "me/model").items()
    (artifact / NAMES[0]).write_text("changed")
    (artifact / NAMES[1]).unlink()
    assert "result" in client("push_folder", artifact, "me/model", verify_download=True)
    assert set(published(hub, "me/model")) == {".gitattributes", *sent(artifact)}


def test_a_renamed_repository_is_named_as_it_is_called_now(hub: HubServer, client: Client, artifact: Path) -> None:
    hub.add_repo("me/new", {"config.json": b"{}", "model.safetensors": bytes(2000)})
    hub.renamed["me/old"] = "me/new"
    for call in (("check_push",), ("push_folder", artifact)):
        assert "me/old: is called me/new now; publish there" in client(*call, "me/old")["text"]
    assert hub.count("PUT|preupload|commit/") == 0
    assert "result" in client("fetch", "me/old"), "and reading goes on under the old name"


@pytest.mark.parametrize("pattern", ["preupload", "commit/"])
def test_a_branch_that_is_deleted_meanwhile_is_said(
    hub: HubServer, client: Client, artifact: Path, pattern: str
) -> None:
    repo = hub.add_repo("me/model", {"config.json": b"{}"})
    repo.branches["w4"] = repo.branches["main"]
    hub.faults.append(Fault(f"POST .*{pattern}", hook=lambda: repo.branches.pop("w4"), times=1))
    failed = client("push_folder", artifact, "me/model", revision="w4")
    assert (failed["code"], "has no revision 'w4'" in failed["text"]) == (4, True)
    assert hub.files("me/model") == {"config.json": b"{}"}
    assert "result" in client("push_folder", artifact, "me/model", revision="w4")
    assert published(hub, "me/model", "w4") == sent(artifact)


def test_an_object_that_the_store_refuses_is_named(hub: HubServer, client: Client, artifact: Path) -> None:
    hub.refused_object = "quota exceeded"
    failed = client("push_folder", artifact, "me/model")
    assert (failed["code"], "quota exceeded" in failed["text"]) == (4, True), failed
    assert set(hub.files("me/model")) == {".gitattributes"}
    hub.refused_object = ""
    assert "result" in client("push_folder", artifact, "me/model")


def test_a_commit_refused_because_another_is_being_made_is_tried_again(
    hub: HubServer, client: Client, artifact: Path
) -> None:
    repo = hub.add_repo("me/model", {"config.json": b"{}"})
    hub.faults.append(Fault("POST .*commit/", 409, "a commit is in progress", times=2))
    assert "result" in client("push_folder", artifact, "me/model")
    assert (published(hub, "me/model"), len(repo.commits)) == (sent(artifact), 2)
    (artifact / "config.json").write_text("[1]")
    hub.faults.append(Fault("POST .*commit/", 409, "a commit is in progress"))
    failed = client("push_folder", artifact, "me/model")
    assert "HTTP 409: conflicts with what is there (the Hub says: a commit is in progress)" in failed["text"]
    assert len(repo.commits) == 2


@pytest.mark.parametrize("status", [500, 503, 504, 409, 412])
@pytest.mark.parametrize("options", [{}, {"create_pr": True}, {"revision": "w4", "tag": "v1"}], ids=str)
def test_a_failure_answered_after_it_was_done_is_no_failure(
    hub: HubServer, client: Client, artifact: Path, status: int, options: dict[str, Any]
) -> None:
    repo = hub.add_repo("me/model", {"config.json": b"{}"})
    done = "commit" if status == 412 else "(commit|branch|tag)"
    hub.faults.append(Fault(f"POST .*{done}/", late_status=status, times=3))
    answer = client("push_folder", artifact, "me/model", **options)
    assert "result" in answer, answer
    where = "refs/pr/1" if "create_pr" in options else options.get("revision", "main")
    assert published(hub, "me/model", where) == sent(artifact)
    assert (len(repo.commits), len(repo.pull_requests)) == (2, 1 if "create_pr" in options else 0)


def test_a_gitignore_that_leaves_out_a_file_stops_the_push(hub: HubServer, client: Client, artifact: Path) -> None:
    hub.ignored = {"config.json", "model-00001-of-00002.safetensors"}
    assert "a .gitignore there leaves out config.json" in client("push_folder", artifact, "me/model")["text"]
    assert set(hub.files("me/model")) == {".gitattributes"}


def test_the_token_of_the_environment_comes_before_that_of_the_file(
    hub: HubServer, new_client: Callable[..., Client], artifact: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text("hf_" + "x" * 34)
    client = new_client()
    assert "result" in client("push_folder", artifact, "me/model", token=f" {WRITE_TOKEN}\n")
    assert "the token was rejected" in client("push_folder", artifact, "me/model", token="")["text"]
    (home / "token").write_text(WRITE_TOKEN)
    assert "result" in client("push_folder", artifact, "me/model", token="")
    (home / "elsewhere").write_text(WRITE_TOKEN)
    (home / "token").unlink()
    client = new_client(HF_TOKEN_PATH=str(home / "elsewhere"))
    assert "result" in client("push_folder", artifact, "me/model", token="")


@pytest.mark.parametrize("slash", ["", "/"])
def test_an_endpoint_may_have_a_path(
    hub: HubServer, new_client: Callable[..., Client], artifact: Path, slash: str
) -> None:
    hub.prefix, plain = "/hub", hub.url
    hub.url = f"{plain}/hub"
    try:
        client = new_client(url=hub.url + slash)
        answer = client("push_folder", artifact, "me/model", tag="v1", verify_download=True)
        assert answer.get("result", answer) == f"{hub.url}/me/model/commit/{hub.repos['me/model'].branches['main']}"
        hub.add_repo("org/model", {"config.json": b"{}", "model.safetensors": bytes(2000)})
        assert "result" in client("fetch", "org/model")
        assert not [line for line in hub.log if " /hub/" not in line]
    finally:
        hub.url = plain


def test_offline_a_push_is_refused_and_a_dry_run_says_what_it_could_not_ask(
    hub: HubServer, new_client: Callable[..., Client], artifact: Path
) -> None:
    client = new_client(HF_HUB_OFFLINE="1")
    for call in (("check_push", "me/model"), ("push_folder", artifact, "me/model")):
        assert "HF_HUB_OFFLINE is set and this needs the Hub; unset it" in client(*call)["text"]
    dry = client("cli", "push", artifact, "me/model", "--dry-run", "--unmeasured")
    assert (dry["code"], "was not asked: no token, or offline" in dry["text"]) == (0, True)
    assert hub.log == []
