"""Publishing with the real Hub client: what a reader finds, and what is kept, refused and repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.hub_client import Client
from support.hub_files import MANIFEST, published, sent
from support.hub_server import EXPIRED_TOKEN, READ_TOKEN, WRITE_TOKEN, Blob, Fault, HubServer

from llmconvert.errors import HubError, SourceError
from llmconvert.hub import plan_push, without_tokens


def test_it_creates_the_repository_and_makes_one_commit(hub: HubServer, client: Client, artifact: Path) -> None:
    answer = client("push_folder", artifact, "me/new", private=True, tag="v1")
    repo = hub.repos["me/new"]
    assert repo.private
    assert answer["result"] == f"{hub.url}/me/new/commit/{repo.branches['main']}"
    assert published(hub, "me/new") == {".gitattributes": b"*.safetensors filter=lfs\n", **sent(artifact)}
    assert hub.count("POST /api/models/me/new/commit/") == 1
    assert repo.tags == {"v1": repo.branches["main"]}
    again = client("push_folder", artifact, "me/new", tag="v1")
    assert again["result"] == answer["result"]
    assert hub.count("POST /api/models/me/new/commit/") == 1
    assert again["log"] == ["me/new: holds all of it already; nothing was sent"]
    (artifact / "config.json").write_text('{"new": 1}')
    changed = client("push_folder", artifact, "me/new")
    manifest = len(hub.files("me/new")[MANIFEST])
    assert changed["log"] == [f"uploading to me/new: {10 + manifest} of {10 + manifest}"], "what differs"
    assert sent(artifact).items() <= published(hub, "me/new").items()


def test_large_objects_go_in_parts_where_the_hub_asks_for_it(hub: HubServer, client: Client, artifact: Path) -> None:
    hub.part_bytes = 2000
    client("push_folder", artifact, "me/new", verify_download=True)
    assert (hub.count("PUT /lfs/.*/part/"), hub.count("POST /lfs/.*/complete")) == (6, 2)
    assert sent(artifact).items() <= published(hub, "me/new").items()


def test_an_earlier_push_is_replaced_and_foreign_files_stay(hub: HubServer, client: Client, artifact: Path) -> None:
    repo = hub.add_repo("me/model", {"notes.md": b"keep", "onnx/model.bin": b"keep" * 400})
    first = client("push_folder", artifact, "me/model")
    assert "me/model: kept notes.md, onnx/model.bin; --replace removes what is not the artifact's" in first["log"]
    for name in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ):
        (artifact / name).unlink()
    (artifact / "llmconvert" / "report.json").rename(artifact / "llmconvert" / "other.json")
    (artifact / "model.safetensors").write_bytes(b"3" * 7000)
    client("push_folder", artifact, "me/model")
    assert published(hub, "me/model") == {"notes.md": b"keep", "onnx/model.bin": b"keep" * 400, **sent(artifact)}
    assert len(repo.commits) == 3


def test_weights_of_other_origin_are_refused_or_replaced(hub: HubServer, client: Client, artifact: Path) -> None:
    stale = {"model.safetensors": b"old" * 900, "llmconvert/plot.png": b"old", "notes.md": b"mine"}
    hub.add_repo("me/model", stale)
    refused = client("push_folder", artifact, "me/model")
    assert refused["code"] == 4
    assert "model.safetensors would be loaded instead of the artifact or mixed with it; --replace" in refused["text"]
    assert hub.files("me/model") == stale
    assert hub.count("preupload|lfs") == 0
    answer = client("push_folder", artifact, "me/model", replace=True)
    assert any("removed llmconvert/plot.png, model.safetensors, notes.md" in line for line in answer["log"])
    assert published(hub, "me/model") == sent(artifact)


def test_what_somebody_edited_is_not_written_over(hub: HubServer, client: Client, artifact: Path) -> None:
    client("push_folder", artifact, "me/model")
    repo = hub.repos["me/model"]
    tree = repo.commits[repo.branches["main"]]
    repo.commit("main", {**tree, "README.md": tree["config.json"]})
    (artifact / "README.md").write_text("---\nlicense: mit\n---\n# better\n")
    refused = client("push_folder", artifact, "me/model")["text"]
    assert "README.md was changed since it was published" in refused
    client("push_folder", artifact, "me/model", replace=True)
    assert published(hub, "me/model")["README.md"] == (artifact / "README.md").read_bytes()


def test_a_branch_or_a_pull_request_leaves_main_alone(hub: HubServer, client: Client, artifact: Path) -> None:
    repo = hub.add_repo("me/model", {"config.json": b"old"})
    main = repo.branches["main"]
    client("push_folder", artifact, "me/model", revision="w4a16")
    assert published(hub, "me/model", "w4a16") == sent(artifact)
    answer = client("push_folder", artifact, "me/model", create_pr=True)
    assert answer["result"] == f"{hub.url}/me/model/discussions/1"
    assert published(hub, "me/model", "refs/pr/1") == sent(artifact)
    assert repo.branches["main"] == main
    assert "leave one of them out" in client("push_folder", artifact, "me/model", create_pr=True, revision="x")["text"]


def test_variants_on_branches_start_from_main_and_replace_it(hub: HubServer, client: Client, artifact: Path) -> None:
    client("push_folder", artifact, "me/model")
    before = published(hub, "me/model")
    (artifact / "model-00002-of-00002.safetensors").rename(artifact / "model-00002-of-00003.safetensors")
    client("push_folder", artifact, "me/model", revision="w8")
    assert published(hub, "me/model", "w8") == {".gitattributes": before[".gitattributes"], **sent(artifact)}
    assert published(hub, "me/model") == before


def test_variants_in_folders_share_a_card(hub: HubServer, client: Client, artifact: Path) -> None:
    client("push_folder", artifact, "me/model", folder="w4")
    (artifact / "model-00002-of-00002.safetensors").write_bytes(b"8" * 9_994_000)
    client("push_folder", artifact, "me/model", folder="w8")
    found = hub.files("me/model")
    assert {f"w8/{name}": content for name, content in sent(artifact).items()}.items() <= found.items()
    assert "w4/model-00002-of-00002.safetensors" in found and f"w4/{MANIFEST}" in found
    card = found["README.md"].decode()
    assert card.startswith("---\nlicense: apache-2.0\n---\n")
    assert "| `w4` | 0.0 MB | [card](w4/README.md) |\n| `w8` | 10.0 MB | [card](w8/README.md) |" in card
    assert 'from_pretrained("me/model", subfolder="w4")' in card
    again = client("push_folder", artifact, "me/model", folder="w8", replace=True)
    assert hub.files("me/model") == found
    assert hub.count("POST /api/models/me/model/commit/") == 2, again
    for bad in ("..", "a/../b", "/a", "a//b", ".git"):
        assert "is no folder of a repository" in client("push_folder", artifact, "me/model", folder=bad)["text"]


def test_a_first_push_does_not_write_over_what_is_there(hub: HubServer, client: Client, artifact: Path) -> None:
    theirs = {".gitattributes": b"", "README.md": b"# by hand", "notes.md": b"mine"}
    hub.add_repo("me/model", theirs)
    refused = client("push_folder", artifact, "me/model")
    assert refused["code"] == 4
    assert "README.md is there already and was not published from here" in refused["text"]
    assert "--replace" in refused["text"]
    assert hub.files("me/model") == theirs
    assert hub.count("preupload|lfs") == 0
    # Where readers keep finding it, nothing is lost: a pull request, a new branch, a folder.
    assert "result" in client("push_folder", artifact, "me/model", create_pr=True)
    assert "result" in client("push_folder", artifact, "me/model", revision="w4")
    assert hub.files("me/model") == theirs
    assert "result" in client("push_folder", artifact, "me/model", replace=True)
    assert published(hub, "me/model") == {".gitattributes": b"", **sent(artifact)}


def test_the_list_of_variants_is_not_written_over_once_edited(hub: HubServer, client: Client, artifact: Path) -> None:
    client("push_folder", artifact, "me/model", folder="w4")
    repo = hub.repos["me/model"]
    tree = repo.commits[repo.branches["main"]]
    edited = tree["README.md"].content + b"Read this first.\n"
    repo.commit("main", {**tree, "README.md": Blob(edited, False)})
    refused = client("push_folder", artifact, "me/model", folder="w8")["text"]
    assert "README.md, which lists the variants, was changed since it was published" in refused
    assert hub.files("me/model")["README.md"] == edited
    client("push_folder", artifact, "me/model", folder="w8", replace=True)
    assert "| `w8` |" in hub.files("me/model")["README.md"].decode()
    assert "result" in client("push_folder", artifact, "me/model", folder="w3")


def test_an_unchanged_push_costs_as_few_requests_as_the_first(hub: HubServer, client: Client, artifact: Path) -> None:
    for number in range(60):
        (artifact / f"note-{number}.txt").write_text(f"{number}\n")
    client("push_folder", artifact, "me/model")
    first = len(hub.log)
    client("push_folder", artifact, "me/model")
    # The listing comes in pages of three here, twice more often than for the empty repository; no file is fetched.
    assert hub.count("GET /me/model/resolve") == 1, "the manifest alone"
    assert len(hub.log) - first - hub.count("GET /api/models/me/model/tree") < 12


def test_a_manifest_of_the_first_version_is_understood(hub: HubServer, client: Client, artifact: Path) -> None:
    client("push_folder", artifact, "me/model")
    repo = hub.repos["me/model"]
    tree = repo.commits[repo.branches["main"]]
    files = json.loads(tree[MANIFEST].content)["files"]
    old = {"schema": "llmconvert.upload/1", "files": {name: entry["sha256"] for name, entry in files.items()}}
    repo.commit("main", {**tree, MANIFEST: Blob(json.dumps(old).encode(), False)})
    (artifact / "config.json").write_text('{"new": 1}')
    (artifact / "empty.txt").unlink()
    assert "result" in client("push_folder", artifact, "me/model")
    assert published(hub, "me/model") == {
        ".gitattributes": hub.files("me/model")[".gitattributes"],
        **sent(artifact),
    }


def test_a_card_that_somebody_wrote_stays(hub: HubServer, client: Client, artifact: Path) -> None:
    hub.add_repo("me/model", {"README.md": b"# by hand"})
    client("push_folder", artifact, "me/model", folder="w4")
    assert hub.files("me/model")["README.md"] == b"# by hand"


def test_it_needs_a_token_that_may_write(hub: HubServer, client: Client, artifact: Path) -> None:
    def refused(token: str) -> str:
        answer = client("push_folder", artifact, "me/new", token=token)
        assert answer["code"] == 4
        return str(answer["text"])

    assert "publishing needs a token" in refused("")
    assert "the token may only read; set HF_TOKEN to one that may write" in refused(READ_TOKEN)
    for token in (EXPIRED_TOKEN, "hf_" + "x" * 34):
        assert "the token was rejected, it may have expired" in refused(token)
    assert hub.repos == {}


def test_what_would_go_wrong_is_refused_before_anything_is_sent(hub: HubServer, client: Client, artifact: Path) -> None:
    repo = hub.add_repo("me/public", {"config.json": b"old"})
    assert "is public, and this was to be private" in client("push_folder", artifact, "me/public", private=True)["text"]
    repo.tags["v1"] = repo.branches["main"]
    assert "tag 'v1' exists already" in client("push_folder", artifact, "me/public", tag="v1", replace=True)["text"]
    (artifact / "README.md").write_text("---\nlicense: nonsense\n---\n")
    refused = client("push_folder", artifact, "me/public")["text"]
    assert 'README.md: the Hub refuses its front matter: "license" must be one of the list' in refused
    (artifact / "README.md").write_text(f"run with HF_TOKEN={WRITE_TOKEN}")
    assert "README.md: holds a Hub token; remove it" in client("push_folder", artifact, "me/public")["text"]
    assert hub.count("PUT|commit|preupload|branch") == 0


def test_a_check_before_the_work_finds_what_would_fail_at_its_end(hub: HubServer, client: Client) -> None:
    hub.add_repo("me/public", {"config.json": b"old"})
    assert client("check_push", "me/new", private=True)["result"] == "None"
    assert client("check_push", "me/public")["result"] == "None"
    assert "is public, and this was to be private" in client("check_push", "me/public", private=True)["text"]
    assert "the token was rejected" in client("check_push", "me/new", token=EXPIRED_TOKEN)["text"]
    assert "publishing needs a token" in client("check_push", "me/new", token="")["text"]
    assert "the token may only read; set HF_TOKEN" in client("check_push", "me/public", token=READ_TOKEN)["text"]


def test_a_namespace_must_be_the_accounts_own(hub: HubServer, client: Client, artifact: Path) -> None:
    hub.account["orgs"] = [{"name": "lab", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}]
    assert client("check_push", "lab/model")["result"] == "None"
    assert "may only read in club" in client("check_push", "club/model")["text"]
    refused = client("check_push", "other/model")
    assert refused["code"] == 4
    assert "can't publish as 'other'; it can as me, club, lab" in refused["text"]
    hub.add_repo("other/model", {"config.json": b"{}"})
    assert "can't publish as 'other'" in client("check_push", "other/model")["text"]
    assert client("check_push", "other/model", create_pr=True)["result"] == "None"


def test_a_fine_grained_token_must_reach_the_repository(hub: HubServer, client: Client) -> None:
    def scope(*entries: tuple[str, str, str]) -> None:
        scoped = [{"entity": {"type": kind, "name": name}, "permissions": [what]} for kind, name, what in entries]
        hub.account["token"] = {"role": "fineGrained", "fineGrained": {"scoped": scoped}}

    scope(("user", "me", "repo.content.read"))
    assert "lacks write access to me's repositories (it may write nowhere)" in client("check_push", "me/new")["text"]
    scope(("user", "me", "repo.write"))
    assert client("check_push", "me/new")["result"] == "None"
    scope(("model", "me/model", "repo.write"))
    assert "it may write in me/model" in client("check_push", "me/new")["text"]
    hub.add_repo("me/model", {})
    assert client("check_push", "me/model")["result"] == "None"


@pytest.mark.parametrize(
    "name",
    ["a b", "a..b", "~x", "x^", "a:b", "what?", "a*", "[x", "a\\b", "/a", "a/", "a//b", "a.", "a.lock", ".a", "@"],
)
def test_names_that_git_refuses_are_refused_before_the_work(client: Client, name: str) -> None:
    for key, what in (("tag", "tag"), ("revision", "branch")):
        text = client("check_push", "me/model", **{key: name})["text"]
        assert f"{what} {name!r} is no name that git takes" in text


def test_what_the_hub_lists_is_compared_with_what_was_sent(hub: HubServer, client: Client, artifact: Path) -> None:
    repo = hub.add_repo("me/model", {"notes.md": b"old"})

    def corrupt_the_store() -> None:
        oid = next(oid for oid, content in repo.objects.items() if content.startswith(b"2"))
        repo.objects[oid] = b"x" * len(repo.objects[oid])

    hub.faults.append(Fault("POST /api/models/me/model/commit", hook=corrupt_the_store, times=1))
    text = client("push_folder", artifact, "me/model")["text"]
    assert "model-00002-of-00002.safetensors has 6,000 bytes and hash" in text
    assert "did it change while it was sent?" in text


def test_what_the_hub_serves_is_compared_when_asked_for(hub: HubServer, client: Client, artifact: Path) -> None:
    answer = client("push_folder", artifact, "me/model", verify_download=True)
    size = sum(map(len, sent(artifact).values())) + len(hub.files("me/model")[MANIFEST])
    assert answer["log"][-1] == f"verifying the download: {size} of {size}"
    repo = hub.repos["me/model"]
    blob = repo.commits[repo.branches["main"]]["model-00002-of-00002.safetensors"]
    for served, text in (
        (b"2" * 3000 + b"1" + b"2" * 2999, "from byte 3,000 on"),
        (b"2" * 5999, "after 5,999 of 6,000"),
    ):
        hub.served_instead[blob.sha256] = served
        assert text in client("push_folder", artifact, "me/model", verify_download=True)["text"]


def test_the_manifest_lists_what_was_sent(hub: HubServer, client: Client, artifact: Path) -> None:
    client("push_folder", artifact, "me/model")
    assert set(json.loads(hub.files("me/model")[MANIFEST])["files"]) == set(sent(artifact))


def test_a_plan_needs_neither_token_nor_network(artifact: Path, tmp_path: Path) -> None:
    plan = plan_push(artifact, "me/model")
    assert {file.name: file.size for file in plan.files} == {k: len(v) for k, v in sent(artifact).items()}
    assert (plan.repo_id, plan.revision) == ("me/model", "main")
    assert plan.nbytes == sum(len(content) for content in sent(artifact).values())
    assert plan.card == (artifact / "README.md").read_text()
    assert plan_push(artifact, "me/model", folder="a/b").files[0].name == "a/b/README.md"
    for bad in ("model", "a/b/c", "me/mo del", "../x", ""):
        with pytest.raises(HubError, match="is no repository"):
            plan_push(artifact, bad)
    with pytest.raises(SourceError, match="no such directory"):
        plan_push(tmp_path / "none", "me/model")
    (tmp_path / "void").mkdir()
    with pytest.raises(SourceError, match="no files to publish"):
        plan_push(tmp_path / "void", "me/model")
    (artifact / "secret").symlink_to("/etc/hostname")
    with pytest.raises(SourceError, match="is a link out of"):
        plan_push(artifact, "me/model")


def test_tokens_are_removed_from_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "an-odd-token")
    text = without_tokens(f"x {WRITE_TOKEN} y an-odd-token z hf_hub_download")
    assert text == "x [token] y [token] z hf_hub_download"
