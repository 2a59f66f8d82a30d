"""Fetching and publishing with the real Hub client, in processes of its own, against a strict Hub on the loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import READ_TOKEN, WRITE_TOKEN, Fault, HubServer

from llmconvert.errors import HubError, SourceError
from llmconvert.hub import plan_push, without_tokens

CLIENT = """
import json, sys
from pathlib import Path
from llmconvert import hub
from llmconvert.errors import LlmconvertError
name, args, kwargs = json.loads(sys.argv[1])
if name != "fetch":
    args[0] = Path(args[0])
try:
    result = getattr(hub, name)(*args, **kwargs)
    shown = {"result": str(getattr(result, "directory", result)), "commit": getattr(result, "commit_hash", "")}
    print(json.dumps(shown))
except LlmconvertError as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error), "code": error.exit_code}))
"""

SAFETENSORS = bytes(range(256)) * 20
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "model.safetensors": SAFETENSORS,
    "pytorch_model.bin": b"pickle" * 500,
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"Apache",
    "README.md": b"# hello",
    "modeling_custom.py": b"import os",
    "onnx/model.onnx": b"onnx" * 500,
    "onnx/config.json": b"{}",
    ".gitattributes": b"",
}
NEEDED = ["LICENSE", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
NEEDED += ["tokenizer.json", "tokenizer_config.json"]


class Client:
    """Runs one function of ``llmconvert.hub`` in a new process, with the environment a user would set."""

    def __init__(self, url: str, home: Path) -> None:
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "HF_ENDPOINT": url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": WRITE_TOKEN,
        }

    def start(self, name: str, *args: Any, env: dict[str, str] | None = None, **kwargs: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CLIENT, json.dumps([name, [str(arg) for arg in args], kwargs])]
        pipe = subprocess.PIPE
        environment = {**self.environment, **(env or {})}
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)

    def __call__(self, name: str, *args: Any, env: dict[str, str] | None = None, **kwargs: Any) -> dict[str, Any]:
        with self.start(name, *args, env=env, **kwargs) as process:
            out, err = process.communicate(timeout=60)
        assert WRITE_TOKEN not in out + err
        assert READ_TOKEN not in out + err
        assert out, err
        answer: dict[str, Any] = json.loads(out.splitlines()[-1])
        assert "\n" not in answer.get("text", "")
        return answer


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer().running() as server:
        yield server


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub.url, tmp_path / "home")


def names(directory: str) -> list[str]:
    root = Path(directory)
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_fetch_takes_only_what_is_needed_and_pins_the_commit(hub: HubServer, client: Client) -> None:
    repo = hub.add_repo("org/model", MODEL)
    first = client("fetch", "org/model")
    assert first["commit"] == repo.branches["main"]
    assert names(first["result"]) == NEEDED
    assert (Path(first["result"]) / "model.safetensors").read_bytes() == SAFETENSORS
    downloads = hub.count(r"^GET /org/model/resolve")
    again = client("fetch", "org/model")
    assert again == first
    assert hub.count(r"^GET /org/model/resolve") == downloads


def test_fetch_honours_a_revision(hub: HubServer, client: Client) -> None:
    repo = hub.add_repo("org/model", MODEL)
    old = repo.branches["main"]
    repo.tags["v1"] = old
    newer = {**repo.commits[old]}
    del newer["LICENSE"]
    repo.commit("main", newer)
    assert client("fetch", "org/model", "v1")["commit"] == old
    assert "LICENSE" not in names(client("fetch", "org/model")["result"])
    assert "LICENSE" in names(client("fetch", "org/model", old)["result"])


def test_fetch_takes_the_shards_that_the_index_names(hub: HubServer, client: Client) -> None:
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    files = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-1-of-2.safetensors": b"1" * 2000,
        "model-2-of-2.safetensors": b"2" * 2000,
        "consolidated.safetensors": b"3" * 2000,
    }
    hub.add_repo("org/sharded", files)
    fetched = names(client("fetch", "org/sharded")["result"])
    assert fetched == sorted(set(files) - {"consolidated.safetensors"})
    index["weight_map"]["c"] = "../../../evil.safetensors"
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.add_repo("org/broken", files)
    assert "names 1 file(s) the repository lacks" in client("fetch", "org/broken")["text"]


def test_fetch_refuses_pickle_before_downloading_it(hub: HubServer, client: Client) -> None:
    hub.add_repo("org/old", {"config.json": b"{}", "pytorch_model.bin": b"pickle" * 500})
    refused = client("fetch", "org/old")
    assert refused["error"] == "HubError"
    assert "--allow-pickle" in refused["text"]
    assert hub.count("resolve.*bin") == 0
    assert names(client("fetch", "org/old", allow_pickle=True)["result"]) == ["config.json", "pytorch_model.bin"]


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"config.json": b"{}", "model.Q4.gguf": b"x"}, "download a .gguf file"),
        ({"config.json": b"{}"}, "it has no weights"),
        ({"model.safetensors": b"x"}, "no config.json"),
    ],
)
def test_fetch_refuses_repositories_it_cannot_use(
    hub: HubServer, client: Client, files: dict[str, bytes], text: str
) -> None:
    hub.add_repo("org/odd", files)
    assert text in client("fetch", "org/odd")["text"]


def test_fetch_failures_are_one_line_that_says_what_to_do(hub: HubServer, client: Client) -> None:
    hub.add_repo("org/model", MODEL)
    hub.add_repo("org/gated", MODEL, gated=True)
    hub.add_repo("org/private", MODEL, private=True)
    anonymous = {"HF_TOKEN": ""}
    assert "no such model" in client("fetch", "org/none")["text"]
    assert "has no revision 'v9'" in client("fetch", "org/model", "v9")["text"]
    assert "set HF_TOKEN if it is private" in client("fetch", "org/private", env=anonymous)["text"]
    assert "is gated; accept its terms" in client("fetch", "org/gated", env=anonymous)["text"]
    assert "the token was rejected" in client("fetch", "org/model", env={"HF_TOKEN": "hf_" + "x" * 34})["text"]
    assert client("fetch", "org/none")["code"] == 4
    assert names(client("fetch", "org/private")["result"]) == NEEDED


def test_fetch_works_offline_once_cached(hub: HubServer, client: Client) -> None:
    hub.add_repo("org/model", MODEL)
    hub.add_repo("org/other", MODEL)
    fetched = client("fetch", "org/model")
    requests = len(hub.log)
    offline = {"HF_HUB_OFFLINE": "1"}
    assert client("fetch", "org/model", env=offline) == fetched
    assert "HF_HUB_OFFLINE is set and the model is not" in client("fetch", "org/other", env=offline)["text"]
    (Path(fetched["result"]) / "model.safetensors").unlink()
    assert "not (completely) in the cache" in client("fetch", "org/model", env=offline)["text"]
    assert len(hub.log) == requests


def test_fetch_uses_the_cache_when_the_hub_is_away(hub: HubServer, client: Client) -> None:
    hub.add_repo("org/model", MODEL)
    fetched = client("fetch", "org/model")
    away = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert client("fetch", "org/model", env=away) == fetched
    refused = client("fetch", "org/other", env=away)["text"]
    assert "http://127.0.0.1:9 could not be reached (ConnectError), and the model is not in the cache" in refused
    hub.faults.append(Fault("GET /api/models/org/failing", 503, "maintenance"))
    hub.add_repo("org/failing", MODEL)
    assert "could not be reached" in client("fetch", "org/failing")["text"]


def test_fetch_onto_a_full_disk_is_a_capacity_error(hub: HubServer, client: Client, tmp_path: Path) -> None:
    hub.add_repo("org/model", {**MODEL, "model.safetensors": bytes(6 << 20)})
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system takes root")
    try:
        refused = client("fetch", "org/model", env={"HF_HOME": str(disk)})
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert (refused["error"], refused["code"]) == ("CapacityError", 5)
    assert "is full; free some space" in refused["text"]


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    root = tmp_path / "artifact"
    (root / "llmconvert").mkdir(parents=True)
    files = {
        "config.json": b"{}",
        "model-00001-of-00002.safetensors": b"1" * 5000,
        "model-00002-of-00002.safetensors": b"2" * 6000,
        "model.safetensors.index.json": b"{}",
        "README.md": b"---\nlicense: apache-2.0\n---\n# model\n",
        "llmconvert/report.json": b"{}",
        "empty.txt": b"",
        ".hidden": b"no",
    }
    for name, content in files.items():
        (root / name).write_bytes(content)
    return root


def published(artifact: Path) -> dict[str, bytes]:
    return {name: (artifact / name).read_bytes() for name in names(str(artifact)) if not name.startswith(".")}


def test_push_creates_the_repository_and_makes_one_commit(hub: HubServer, client: Client, artifact: Path) -> None:
    answer = client("push_folder", artifact, "me/new", private=True, tag="v1")
    repo = hub.repos["me/new"]
    assert repo.private
    assert answer["result"] == f"{hub.url}/me/new/commit/{repo.branches['main']}"
    assert hub.files("me/new") == {".gitattributes": b"*.safetensors filter=lfs\n", **published(artifact)}
    assert hub.count("POST /api/models/me/new/commit/") == 1
    assert repo.tags == {"v1": repo.branches["main"]}
    again = client("push_folder", artifact, "me/new", tag="v1")
    assert again == answer
    assert hub.count("POST /api/models/me/new/commit/") == 1


def test_push_replaces_stale_weights_in_the_same_commit(hub: HubServer, client: Client, artifact: Path) -> None:
    stale = {
        "model.safetensors": b"old" * 900,
        "llmconvert/plot.png": b"old",
        "notes.md": b"keep",
        "onnx/model.bin": b"keep",
    }
    repo = hub.add_repo("me/model", stale)
    client("push_folder", artifact, "me/model")
    assert hub.files("me/model") == {"notes.md": b"keep", "onnx/model.bin": b"keep", **published(artifact)}
    assert len(repo.commits) == 2


def test_push_to_a_branch_or_a_pull_request_leaves_main_alone(hub: HubServer, client: Client, artifact: Path) -> None:
    repo = hub.add_repo("me/model", {"config.json": b"old"})
    main = repo.branches["main"]
    client("push_folder", artifact, "me/model", revision="w4a16")
    assert hub.files("me/model", "w4a16") == published(artifact)
    answer = client("push_folder", artifact, "me/model", create_pr=True)
    assert answer["result"] == f"{hub.url}/me/model/discussions/1"
    assert hub.files("me/model", "refs/pr/1") == published(artifact)
    assert repo.branches["main"] == main
    assert "leave one of them out" in client("push_folder", artifact, "me/model", create_pr=True, revision="x")["text"]


def test_a_killed_push_shows_nothing_and_its_rerun_sends_only_what_is_missing(
    hub: HubServer, client: Client, artifact: Path
) -> None:
    repo = hub.add_repo("me/model", {"config.json": b"old"})
    reached, release = threading.Event(), threading.Event()
    second = iter([False, True])

    def stall_the_second() -> None:
        if next(second):
            reached.set()
            release.wait(30)

    # One after the other, so that the first object is there when the client dies over the second.
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (artifact / name).write_bytes(name.encode() * 400_000)
    hub.faults.append(Fault("PUT /lfs/", hook=stall_the_second, times=2))
    process = client.start("push_folder", artifact, "me/model")
    assert reached.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    release.set()
    assert hub.files("me/model") == {"config.json": b"old"}
    assert len(repo.objects) == 1
    hub.faults.clear()
    hub.log.clear()
    client("push_folder", artifact, "me/model")
    assert hub.count("PUT /lfs/") == 1
    assert hub.files("me/model") == published(artifact)
    assert len(repo.commits) == 2


@pytest.mark.parametrize(
    ("pattern", "status", "text"),
    [
        ("POST /api/repos/create", 500, "HTTP 500: the Hub failed; run the same command again later"),
        ("POST /api/repos/create", 429, "HTTP 429: too many requests; wait"),
        ("POST /api/models/me/model/commit", 500, "HTTP 500"),
        ("POST /api/models/me/model/commit", 412, "the branch has moved meanwhile"),
        ("POST .*lfs/objects/batch", 403, "HTTP 403: the token does not allow this"),
        ("PUT /lfs/", 403, "HTTP 403"),
    ],
)
def test_push_failures_leave_the_repository_as_it_was(
    hub: HubServer, client: Client, artifact: Path, pattern: str, status: int, text: str
) -> None:
    hub.add_repo("me/model", {"config.json": b"old"})
    hub.faults.append(Fault(pattern, status, f"said with {WRITE_TOKEN} in it"))
    failed = client("push_folder", artifact, "me/model")
    assert failed["error"] == "HubError"
    assert text in failed["text"]
    assert hub.files("me/model") == {"config.json": b"old"}
    hub.faults.clear()
    assert "result" in client("push_folder", artifact, "me/model")
    assert hub.files("me/model") == published(artifact)


def test_a_commit_made_meanwhile_is_not_overwritten(hub: HubServer, client: Client, artifact: Path) -> None:
    repo = hub.add_repo("me/model", {"config.json": b"old"})

    def somebody_else() -> None:
        repo.commit("main", {**repo.commits[repo.branches["main"]]})

    hub.faults.append(Fault("POST .*lfs/objects/batch", hook=somebody_else, times=1))
    assert "the branch has moved meanwhile" in client("push_folder", artifact, "me/model")["text"]
    assert hub.files("me/model") == {"config.json": b"old"}


def test_push_needs_a_token_that_may_write(hub: HubServer, client: Client, artifact: Path) -> None:
    assert "publishing needs a token" in client("push_folder", artifact, "me/new", env={"HF_TOKEN": ""})["text"]
    refused = client("push_folder", artifact, "me/new", env={"HF_TOKEN": READ_TOKEN})["text"]
    assert "HTTP 403: the token does not allow this" in refused
    bad = client("push_folder", artifact, "me/new", env={"HF_TOKEN": "hf_" + "x" * 34})["text"]
    assert "the token was rejected" in bad
    assert hub.repos == {}


def test_push_refuses_what_would_go_wrong(hub: HubServer, client: Client, artifact: Path) -> None:
    repo = hub.add_repo("me/public", {"config.json": b"old"})
    assert "is public, and this was to be private" in client("push_folder", artifact, "me/public", private=True)["text"]
    repo.tags["v1"] = repo.branches["main"]
    assert "tag 'v1' exists already" in client("push_folder", artifact, "me/public", tag="v1")["text"]
    (artifact / "README.md").write_text("---\nlicense: nonsense\n---\n")
    hub.log.clear()
    assert "license" in client("push_folder", artifact, "me/public")["text"]
    assert hub.count("PUT|commit|preupload") == 0


def test_what_the_hub_lists_is_compared_with_what_was_sent(hub: HubServer, client: Client, artifact: Path) -> None:
    repo = hub.add_repo("me/model", {"config.json": b"old"})

    def corrupt_the_store() -> None:
        oid = next(oid for oid, content in repo.objects.items() if content.startswith(b"2"))
        repo.objects[oid] = b"x" * len(repo.objects[oid])

    hub.faults.append(Fault("POST /api/models/me/model/commit", hook=corrupt_the_store, times=1))
    text = client("push_folder", artifact, "me/model")["text"]
    assert "model-00002-of-00002.safetensors in commit" in text
    assert "did it change while it was sent?" in text


def test_a_plan_needs_neither_token_nor_network(artifact: Path, tmp_path: Path) -> None:
    plan = plan_push(artifact, "me/model")
    assert {file.name: file.size for file in plan.files} == {k: len(v) for k, v in published(artifact).items()}
    assert (plan.repo_id, plan.revision) == ("me/model", "main")
    assert plan.nbytes == sum(len(content) for content in published(artifact).values())
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
