"""Fetching models with the real Hub client against a strict Hub on the loopback interface."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.hub_client import Client
from support.hub_files import names
from support.hub_server import EXPIRED_TOKEN, READ_TOKEN, Fault, HubServer

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
NEEDED = ["LICENSE", "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
NEEDED += ["tokenizer.json", "tokenizer_config.json"]


Clients = Callable[..., Client]


def test_fetch_takes_only_what_is_needed_and_pins_the_commit(hub: HubServer, client: Client, tmp_path: Path) -> None:
    repo = hub.add_repo("org/model", MODEL)
    first = client("fetch", "org/model", cache_dir=tmp_path)
    assert first["commit"] == repo.branches["main"]
    assert names(first["result"]) == NEEDED
    assert (Path(first["result"]) / "model.safetensors").read_bytes() == SAFETENSORS
    total = sum(len(MODEL[name]) for name in NEEDED)
    assert first["log"] == [f"fetching org/model: {total} of {total}"]
    downloads = hub.count(r"^GET /org/model/resolve")
    again = client("fetch", "org/model", cache_dir=tmp_path)
    assert (again["result"], again["commit"]) == (first["result"], first["commit"])
    assert hub.count(r"^GET /org/model/resolve") == downloads


def test_fetch_takes_what_prepares_images(hub: HubServer, client: Client, tmp_path: Path) -> None:
    files = ["preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"]
    hub.add_repo("org/images", {**MODEL, **dict.fromkeys(files, b"{}")})
    result = client("fetch", "org/images", cache_dir=tmp_path)["result"]
    assert names(result) == sorted([*NEEDED, *files])


def test_fetch_takes_chat_templates_beside_the_default_one(hub: HubServer, client: Client, tmp_path: Path) -> None:
    templates = "additional_chat_templates"
    hub.add_repo("org/templates", {**MODEL, f"{templates}/tools.jinja": b"{{ tools }}", "onnx/model.onnx": b"o"})
    result = client("fetch", "org/templates", cache_dir=tmp_path)["result"]
    assert names(result) == sorted([*NEEDED, f"{templates}/tools.jinja"])


def test_fetch_honours_a_revision(hub: HubServer, client: Client, tmp_path: Path) -> None:
    repo = hub.add_repo("org/model", MODEL)
    old = repo.branches["main"]
    repo.tags["v1"] = old
    newer = {**repo.commits[old]}
    del newer["LICENSE"]
    repo.commit("main", newer)
    assert client("fetch", "org/model", "v1", cache_dir=tmp_path)["commit"] == old
    assert "LICENSE" not in names(client("fetch", "org/model", cache_dir=tmp_path)["result"])
    assert "LICENSE" in names(client("fetch", "org/model", old, cache_dir=tmp_path)["result"])


def test_fetch_takes_the_shards_that_the_index_names(hub: HubServer, client: Client, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    files = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-1-of-2.safetensors": b"1" * 2000,
        "model-2-of-2.safetensors": b"2" * 2000,
        "consolidated.safetensors": b"3" * 2000,
    }
    hub.add_repo("org/sharded", files)
    fetched = names(client("fetch", "org/sharded", cache_dir=tmp_path)["result"])
    assert fetched == sorted(set(files) - {"consolidated.safetensors"})
    index["weight_map"]["c"] = "../../../evil.safetensors"
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.add_repo("org/broken", files)
    assert "names 1 file(s) the repository lacks" in client("fetch", "org/broken", cache_dir=tmp_path)["text"]


def test_fetch_takes_the_old_file_names_of_autogptq(hub: HubServer, client: Client, tmp_path: Path) -> None:
    files = {
        "config.json": b"{}",
        "quantize_config.json": b'{"bits": 4}',
        "gptq_model-4bit-128g.safetensors": SAFETENSORS,
        "pytorch_model.bin": b"pickle" * 500,
    }
    hub.add_repo("org/old", files)
    found = client("fetch", "org/old", cache_dir=tmp_path)["result"]
    assert names(found) == ["config.json", "gptq_model-4bit-128g.safetensors", "quantize_config.json"]


def test_fetch_refuses_pickle_before_downloading_it(hub: HubServer, client: Client, tmp_path: Path) -> None:
    hub.add_repo("org/old", {"config.json": b"{}", "pytorch_model.bin": b"pickle" * 500})
    refused = client("fetch", "org/old", cache_dir=tmp_path)
    assert refused["error"] == "HubError"
    assert "--allow-pickle" in refused["text"]
    assert hub.count("resolve.*bin") == 0
    taken = client("fetch", "org/old", cache_dir=tmp_path, allow_pickle=True)
    assert names(taken["result"]) == ["config.json", "pytorch_model.bin"]


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"config.json": b"{}", "model.Q4.gguf": b"x"}, "download a .gguf file"),
        ({"config.json": b"{}"}, "it has no weights"),
        ({"model.safetensors": b"x"}, "no config.json"),
    ],
)
def test_fetch_refuses_repositories_it_cannot_use(
    hub: HubServer, client: Client, tmp_path: Path, files: dict[str, bytes], text: str
) -> None:
    hub.add_repo("org/odd", files)
    assert text in client("fetch", "org/odd", cache_dir=tmp_path)["text"]


def test_failures_are_one_line_that_says_what_to_do(hub: HubServer, client: Client, tmp_path: Path) -> None:
    hub.add_repo("org/model", MODEL)
    hub.add_repo("org/gated", MODEL, gated=True)
    hub.add_repo("org/private", MODEL, private=True)

    def refused(*args: str, token: str = "") -> str:
        answer = client("fetch", *args, cache_dir=tmp_path, token=token)
        assert (answer["error"], answer["code"]) == ("HubError", 4)
        return str(answer["text"])

    assert "has no revision 'v9'" in refused("org/model", "v9")
    assert "set HF_TOKEN if it is private" in refused("org/private")
    for token in ("", READ_TOKEN):  # without an account, and of one that has not accepted the terms
        assert "is gated; accept its terms" in refused("org/gated", token=token)
    for token in (EXPIRED_TOKEN, "hf_" + "x" * 34):
        assert "the token was rejected, it may have expired; make one at" in refused("org/model", token=token)
    assert names(client("fetch", "org/private", cache_dir=tmp_path)["result"]) == NEEDED


def test_a_wrong_id_is_met_with_near_ones(hub: HubServer, client: Client, tmp_path: Path) -> None:
    for known in ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct", "other/SmolLM2", "org/unlike"):
        hub.add_repo(known, MODEL)
    hub.add_repo("HuggingFaceTB/SmolLM2-135M-instruct-secret", MODEL, private=True)

    def refused(model_id: str) -> str:
        return str(client("fetch", model_id, cache_dir=tmp_path, token="")["text"])

    text = refused("HuggingFaceTB/SmolLM2-135M-Instuct")
    assert "did you mean HuggingFaceTB/SmolLM2-135M-Instruct or HuggingFaceTB/SmolLM2-135M?" in text
    assert "did you mean HuggingFaceTB/SmolLM2-135M or" in refused("HugingFaceTB/SmolLM2-135M")
    assert "did you mean" not in refused("nobody/nothing-like-it")
    hub.faults.append(Fault("GET /api/models[?]", 500))
    text = refused("HuggingFaceTB/SmolLM2-135M-Instuct")
    assert "no such model on" in text and "did you mean" not in text


def test_fetch_works_offline_once_cached(hub: HubServer, new_client: Clients) -> None:
    hub.add_repo("org/model", MODEL)
    hub.add_repo("org/other", MODEL)
    fetched = new_client()("fetch", "org/model")
    requests = len(hub.log)
    offline = new_client(HF_HUB_OFFLINE="1")
    assert offline("fetch", "org/model")["result"] == fetched["result"]
    refused = offline("fetch", "org/other")
    assert (refused["code"], "HF_HUB_OFFLINE is set and the model is not" in refused["text"]) == (4, True)
    (Path(fetched["result"]) / "model.safetensors").unlink()
    assert "not (completely) in the cache" in offline("fetch", "org/model")["text"]
    assert len(hub.log) == requests


def test_fetch_uses_the_cache_when_the_hub_is_away(hub: HubServer, new_client: Clients) -> None:
    hub.add_repo("org/model", MODEL)
    fetched = new_client()("fetch", "org/model")
    away = new_client(url="http://127.0.0.1:9")
    assert away("fetch", "org/model")["result"] == fetched["result"]
    refused = away("fetch", "org/other")
    assert refused["code"] == 4
    assert (
        "http://127.0.0.1:9 could not be reached (ConnectError), and the model is not in the cache" in refused["text"]
    )


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (503, "HTTP 503: the Hub failed; run the same command again later (the Hub says: maintenance)"),
        (500, "HTTP 500: the Hub failed"),
        (
            429,
            "HTTP 429: too many requests; wait a few minutes and run the same command again; it asks to wait 2,000 s",
        ),
        (400, "HTTP 400: the Hub refused the request (the Hub says: maintenance)"),
    ],
)
@pytest.mark.parametrize("call", ["fetch", "fetch_without_weights"])
def test_a_failing_hub_is_named(
    hub: HubServer, client: Client, tmp_path: Path, call: str, status: int, text: str
) -> None:
    wait = "2000" if status == 429 else None
    hub.faults.append(Fault("GET /api/models/org/failing", status, "maintenance", retry_after=wait))
    hub.add_repo("org/failing", MODEL)
    refused = client(call, "org/failing", cache_dir=str(tmp_path))
    assert refused["code"] == 4
    assert text in refused["text"]


BIG = bytes(range(256)) * (16 << 10)


def test_a_killed_download_continues_in_the_next_process(hub: HubServer, new_client: Clients, tmp_path: Path) -> None:
    hub.add_repo("org/model", {**MODEL, "model.safetensors": BIG})
    hub.faults.append(Fault("GET /org/model/resolve/.*safetensors", slow_seconds=0.02, times=1))
    first = new_client()
    first.send("fetch", "org/model", cache_dir=tmp_path / "cache")

    # The name is spelled, not searched for in the tree: the cache's probe for links makes a directory and removes it.
    def arrived() -> int:
        return sum(path.stat().st_size for path in (tmp_path / "cache/models--org--model/blobs").glob(".*.incomplete"))

    while arrived() < 2 << 20:
        assert first.process.poll() is None
    first.kill()
    kept = arrived()
    assert 2 << 20 <= kept < len(BIG)
    hub.log.clear()
    fetched = new_client()("fetch", "org/model", cache_dir=tmp_path / "cache")
    assert (Path(fetched["result"]) / "model.safetensors").read_bytes() == BIG
    assert [line for line in hub.log if line.startswith("GET /org/model/resolve/") and "safetensors" in line] == [
        f"GET /org/model/resolve/{fetched['commit']}/model.safetensors bytes={kept}-"
    ]
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_dropped_connection_is_taken_up_again(hub: HubServer, client: Client, tmp_path: Path) -> None:
    hub.add_repo("org/model", {**MODEL, "model.safetensors": BIG})
    hub.faults.append(Fault("GET /org/model/resolve/.*safetensors", drop_after=1 << 20, times=3))
    hub.faults.append(Fault("GET /org/model/resolve/.*safetensors", 429, retry_after="7", times=1))
    fetched = client("fetch", "org/model", cache_dir=tmp_path)
    assert (Path(fetched["result"]) / "model.safetensors").read_bytes() == BIG
    assert hub.count("^GET /org/model/resolve/.*safetensors") == 4
    assert 7.0 in fetched["naps"]


def test_a_hub_that_stays_silent_is_given_up(hub: HubServer, new_client: Clients, tmp_path: Path) -> None:
    hub.add_repo("org/model", {**MODEL, "model.safetensors": BIG})
    release = threading.Event()
    hub.faults.append(Fault("GET /org/model/resolve/.*safetensors", hook=lambda: bool(release.wait(20)), times=5))
    refused = new_client(HF_HUB_DOWNLOAD_TIMEOUT="1")("fetch", "org/model", cache_dir=tmp_path / "cache")
    release.set()
    assert (refused["error"], refused["code"]) == ("HubError", 4)
    assert "could not be reached (ReadTimeout" in refused["text"]


def test_damaged_content_is_not_kept(hub: HubServer, client: Client, tmp_path: Path) -> None:
    repo = hub.add_repo("org/model", {**MODEL, "model.safetensors": BIG})
    tree = repo.commits[repo.branches["main"]]
    good = tree["model.safetensors"]

    def damage() -> None:
        hub.served_instead[good.sha256] = b"x" + BIG[1:]

    hub.faults.append(Fault("GET /org/model/resolve/.*safetensors", hook=damage, times=1))
    assert "model.safetensors arrived damaged" in client("fetch", "org/model", cache_dir=tmp_path)["text"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size >= len(BIG)]
    hub.served_instead.clear()
    fetched = client("fetch", "org/model", cache_dir=tmp_path)
    assert (Path(fetched["result"]) / "model.safetensors").read_bytes() == BIG


def test_a_damaged_small_file_is_fetched_again_and_never_kept(hub: HubServer, client: Client, tmp_path: Path) -> None:
    repo = hub.add_repo("org/model", {**MODEL, "model.safetensors": BIG})
    good = repo.commits[repo.branches["main"]]["LICENSE"]
    hub.served_instead[good.sha256] = b"x" + good.content[1:]
    assert "LICENSE arrived damaged, twice" in client("fetch", "org/model", cache_dir=tmp_path)["text"]
    hub.served_instead.clear()
    fetched = Path(client("fetch", "org/model", cache_dir=tmp_path)["result"])
    assert (fetched / "LICENSE").read_bytes() == good.content
    # What was damaged on this disk meanwhile is noticed as well.
    (fetched / "LICENSE").resolve().write_bytes(b"?")
    fetched = Path(client("fetch", "org/model", cache_dir=tmp_path)["result"])
    assert (fetched / "LICENSE").read_bytes() == good.content


def test_fetch_onto_a_full_disk_is_a_capacity_error(hub: HubServer, client: Client, tmp_path: Path) -> None:
    hub.add_repo("org/model", {**MODEL, "model.safetensors": bytes(6 << 20)})
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system takes root")
    try:
        refused = client("fetch", "org/model", cache_dir=disk)
        sizes = [path.stat().st_size for path in disk.rglob("*") if path.is_file()]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert (refused["error"], refused["code"]) == ("CapacityError", 5)
    assert "is full: 6,291,456 more bytes are needed" in refused["text"]
    assert sum(sizes) < 1 << 16, "nothing of the file that can't fit was begun"


def test_a_disk_that_fills_up_meanwhile_is_a_capacity_error(hub: HubServer, client: Client, tmp_path: Path) -> None:
    hub.add_repo("org/model", {**MODEL, "model.safetensors": BIG})
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system takes root")
    other = disk / "of somebody else"
    hub.faults.append(Fault("GET .*safetensors", hook=lambda: other.write_bytes(bytes(4 << 20)) and None, times=1))
    try:
        refused = client("fetch", "org/model", cache_dir=disk / "cache")
        other.unlink()
        fetched = client("fetch", "org/model", cache_dir=disk / "cache")
        assert (Path(fetched["result"]) / "model.safetensors").read_bytes() == BIG
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert (refused["error"], refused["code"]) == ("CapacityError", 5)
    assert "is full" in refused["text"]


@pytest.mark.parametrize(
    "request_line",
    [
        "GET /api/models/org/model(/revision/main)?([?].*)?$",
        "GET /api/models/org/model/tree",
        "HEAD /org/model/resolve/.*config.json",
        "GET /org/model/resolve/.*/LICENSE",
        "POST /api/models/org/model/paths-info",
        "GET /org/model/resolve/.*safetensors",
    ],
)
@pytest.mark.parametrize("kind", ["429", "500", "503", "dropped"])
def test_passing_failures_are_overcome(
    hub: HubServer, client: Client, tmp_path: Path, request_line: str, kind: str
) -> None:
    hub.add_repo("org/model", MODEL)
    if kind == "dropped":
        fault = Fault(request_line, lose_response=True, times=1)
    else:
        fault = Fault(request_line, int(kind), retry_after="3" if kind == "429" else None, times=1)
    hub.faults.append(fault)
    answer = client("fetch", "org/model", cache_dir=tmp_path)
    assert "result" in answer, answer
    assert names(answer["result"]) == NEEDED
    if fault.times:
        pytest.fail(f"{request_line} was never asked, these were: {hub.log}")
    if kind == "429" and not request_line.startswith("HEAD"):  # those the client repeats by a rule of its own
        assert any(nap >= 3 for nap in answer["naps"])


def test_the_client_adds_no_words_of_its_own(
    hub: HubServer, new_client: Clients, artifact: Path, tmp_path: Path
) -> None:
    """No bars, no notes on its inner steps, and no warnings: whatever matters is said by this package."""
    hub.add_repo("org/model", MODEL)
    hub.add_repo("org/no-config", {"model.safetensors": SAFETENSORS})
    for xet in ("0", "1"):
        client = new_client(HF_HUB_DISABLE_XET=xet, HF_HOME=str(tmp_path / xet))
        assert "result" in client("fetch", "org/model")
        assert "has no config.json" in client("fetch", "org/no-config")["text"]
        (artifact / "README.md").write_text("# a card without front matter\n")
        assert "result" in client("push_folder", artifact, "me/model")
        assert "result" in client("push_folder", artifact, "me/model")
        assert client.errors() == ""
