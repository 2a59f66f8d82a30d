"""Refused before the work: by the check that a run begins with, by a push, and by a dry run alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.hub_client import Client
from support.hub_server import EXPIRED_TOKEN, READ_TOKEN, WRITE_TOKEN, Fault, HubServer

#: Of a push: whether it is asked by ``check_push`` (with the card's text), ``push_folder`` or the command line.
Way = Callable[..., dict[str, Any]]


@pytest.fixture(params=["check", "push", "dry run"])
def way(request: pytest.FixtureRequest, client: Client, artifact: Path) -> Way:
    def ask(repo_id: str, token: str = WRITE_TOKEN, **options: Any) -> dict[str, Any]:
        if request.param == "check":
            return client("check_push", repo_id, token=token, **options)
        if request.param == "push":
            return client("push_folder", artifact, repo_id, token=token, **options)
        switches = [
            f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}") for key, value in options.items()
        ]
        return client("cli", "push", artifact, repo_id, "--dry-run", "--unmeasured", *switches, token=token)

    return ask


def _scope(*entries: tuple[str, str, str]) -> dict[str, Any]:
    scoped = [{"entity": {"type": kind, "name": name}, "permissions": [what]} for kind, name, what in entries]
    return {"role": "fineGrained", "fineGrained": {"scoped": scoped}}


def _refused(hub: HubServer, answer: dict[str, Any], text: str) -> None:
    assert answer["code"] == 4, answer
    assert text in answer["text"]
    assert hub.count("preupload|commit/|PUT |branch/|/tag/|repos/create") == 0


@pytest.mark.parametrize(
    ("repo_id", "text"),
    [
        ("other/new", "can't publish as 'other'; it can as me, club, lab"),
        ("club/new", "may only read in club"),
        ("other/model", "can't publish as 'other'"),
        ("model", "is no repository"),
        ("me/a..b", "is no repository"),
        ("me/a--b", "is no repository"),
        ("me/model.git", "is no repository"),
        ("me/modèl", "is no repository"),
        ("me/-model", "is no repository"),
        ("me/" + "x" * 97, "is no repository"),
    ],
)
def test_a_namespace_or_name_that_is_not_mine(hub: HubServer, way: Way, repo_id: str, text: str) -> None:
    hub.account["orgs"] = [{"name": "lab", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}]
    hub.add_repo("other/model", {})
    _refused(hub, way(repo_id), text)


@pytest.mark.parametrize(("token", "text"), [(READ_TOKEN, "may only read"), (EXPIRED_TOKEN, "was rejected")])
def test_a_token_that_may_not_write(hub: HubServer, way: Way, token: str, text: str) -> None:
    _refused(hub, way("me/new", token=token), text)


def test_a_fine_grained_token_without_the_scope(hub: HubServer, way: Way) -> None:
    hub.add_repo("me/model", {})
    for scope in (_scope(), _scope(("user", "me", "repo.content.read")), _scope(("model", "me/other", "repo.write"))):
        hub.account["token"] = scope
        _refused(hub, way("me/model"), "lacks write access to me's repositories")


@pytest.mark.parametrize("what", ["tag", "revision"])
@pytest.mark.parametrize("name", ["a b", "a..b", "a.lock", "-x", "0" * 40])
def test_a_tag_or_branch_that_git_refuses(hub: HubServer, way: Way, what: str, name: str) -> None:
    _refused(hub, way("me/new", **{what: name}), "is no name that git takes")


def test_a_tag_or_branch_that_git_can_not_have_beside_others(hub: HubServer, way: Way) -> None:
    _refused(hub, way("me/new", revision="main/w4"), "git can't have branch 'main/w4' beside 'main'")
    repo = hub.add_repo("me/model", {})
    repo.branches["w4/new"] = repo.tags["v1"] = repo.branches["main"]
    _refused(hub, way("me/model", revision="w4"), "git can't have branch 'w4' beside 'w4/new'")
    _refused(hub, way("me/model", tag="v1/final"), "git can't have tag 'v1/final' beside 'v1'")
    _refused(hub, way("me/model", revision="v1"), "'v1' is a tag there, which no commit goes to")


@pytest.mark.parametrize("exists", [False, True])
def test_a_server_without_xet(hub: HubServer, new_client: Callable[..., Client], artifact: Path, exists: bool) -> None:
    if exists:
        hub.add_repo("me/model", {})
    hub.faults.append(Fault("xet-write-token", 404, "no such route"))
    client = new_client(HF_HUB_DISABLE_XET="0")
    for call in (
        ("check_push", "me/model"),
        ("push_folder", artifact, "me/model"),
        ("cli", "push", artifact, "me/model", "--dry-run", "--unmeasured"),
    ):
        _refused(hub, client(*call), "has no Xet storage, by which the installed client uploads")
    hub.faults.clear()
    assert "result" in client("check_push", "me/model")


@pytest.mark.parametrize(
    ("front", "text"),
    [
        ("license: [mit", "line 2: the front matter is no YAML"),
        (
            "license: mit\nlicense_name: a: b",
            "line 3: the front matter is no YAML: mapping values are not allowed here",
        ),
        ("just words", "the front matter is no mapping of names to values"),
        ("1: 2", "the front matter is no mapping of names to values"),
        ("\tlicense: mit", "the front matter is no YAML"),
        ("model-index: nonsense", "can't be read by the Hub"),
        ("date: 2024-13-45", "the front matter is no YAML"),
    ],
)
@pytest.mark.parametrize("token", [WRITE_TOKEN, ""], ids=["token", "no token"])
def test_front_matter_that_can_not_be_read(
    hub: HubServer, client: Client, artifact: Path, front: str, text: str, token: str
) -> None:
    (artifact / "README.md").write_text(f"---\n{front}\n---\n# model\n")
    _refused(hub, client("push_folder", artifact, "me/model", token=token), text)
    _refused(hub, client("cli", "push", artifact, "me/model", "--dry-run", "--unmeasured", token=token), text)
    (artifact / "README.md").write_bytes(b"---\nlicense: mit\n---\n\xff\n")
    _refused(hub, client("push_folder", artifact, "me/model", token=token), "README.md: byte 21 is no UTF-8")


def test_front_matter_that_the_hub_refuses(hub: HubServer, client: Client, artifact: Path) -> None:
    (artifact / "README.md").write_text("---\nlicense: nonsense\n---\n")
    for call in (("push_folder", artifact, "me/new"), ("cli", "push", artifact, "me/new", "--dry-run", "--unmeasured")):
        _refused(hub, client(*call), 'README.md: the Hub refuses its front matter: "license" must be one of the list')
    answer = client("check_push", "me/new")
    assert "result" in answer


def test_what_the_hub_warns_of_is_said_once(hub: HubServer, client: Client, artifact: Path) -> None:
    (artifact / "README.md").write_text("# a card without front matter\n")
    before = client.errors()
    answer = client("push_folder", artifact, "me/new")
    assert [line for line in answer["log"] if "metadata" in line] == [
        "me/new: README.md: empty or missing yaml metadata in repo card"
    ]
    assert client.errors() == before


@pytest.mark.parametrize("base", ["me/model", "[other/x, Me/Model]"])
def test_the_base_model_is_not_replaced_by_what_was_made_of_it(
    hub: HubServer, client: Client, artifact: Path, base: str
) -> None:
    (artifact / "README.md").write_text(f"---\nbase_model: {base}\n---\n# model\n")
    for call in (("push_folder", artifact, "me/model"), ("cli", "push", artifact, "me/model", "--dry-run")):
        _refused(hub, client(*call), "is what the card names as base_model; the original's files would be replaced")
    assert "is what the card names" in client("push_folder", artifact, "me/model", create_pr=True)["text"]
    for options in ({"folder": "w4"}, {"revision": "w4"}):
        assert "result" in client("push_folder", artifact, "me/model", **options)
    assert "result" in client("push_folder", artifact, "me/other")
