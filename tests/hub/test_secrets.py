"""The token: in request headers, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.hub_client import Client
from support.hub_server import READ_TOKEN, WRITE_TOKEN, Fault, HubServer

from llmconvert.cli import main


def test_a_list_of_processes_does_not_show_it(
    hub: HubServer, new_client: Callable[..., Client], artifact: Path
) -> None:
    reached, release = threading.Event(), threading.Event()

    def stall() -> None:
        reached.set()
        release.wait(60)

    hub.faults.append(Fault("POST .*commit/", hook=stall, times=1))
    pusher = new_client()
    pusher.send("push_folder", artifact, "me/model")
    assert reached.wait(60), pusher.errors()
    seen = b"".join(path.read_bytes() for path in _processes(pusher.process.pid, "cmdline"))
    release.set()
    assert b"llmconvert" in seen
    assert WRITE_TOKEN.encode() not in seen
    assert "result" in pusher.receive()


def _processes(pid: int, file: str) -> list[Path]:
    """Of a process and the threads and children that it has."""
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()
    ]
    return [Path(f"/proc/{pid}/{file}"), *(path for child in children for path in _processes(child, file))]


def test_debug_logs_and_failures_of_the_command_line_do_not_show_it(
    hub: HubServer, artifact: Path, tmp_path: Path
) -> None:
    hub.faults.append(Fault("POST .*preupload", 403, f"Forbidden for {WRITE_TOKEN} and {READ_TOKEN}"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(WRITE_TOKEN)  # where `hf auth login` puts it
    done = subprocess.run(
        [sys.executable, "-m", "llmconvert.cli", "push", str(artifact), "me/model", "--unmeasured"],
        env={**environment, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert "error: me/model: HTTP 403" in done.stderr
    assert "Forbidden for [token] and [token]" in done.stderr
    assert hub.repos["me/model"], "it was used"
    for token in (WRITE_TOKEN, READ_TOKEN):
        assert token not in done.stdout + done.stderr
        left = [path for path in tmp_path.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
        assert left == ([home / "token"] if token == WRITE_TOKEN else [])


def test_a_dry_run_needs_none(artifact: Path) -> None:
    done = CliRunner().invoke(main, ["push", str(artifact), "me/model", "--dry-run", "--unmeasured", "--folder", "w4"])
    assert done.exit_code == 0, done.output
    assert " 5,000  w4/model-00001-of-00002.safetensors\n" in done.output
    size = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file() and path.name != ".hidden")
    assert f"{size:,}  in 7 files, to me/model (main)\n" in done.output
    assert done.stdout.endswith((artifact / "README.md").read_text())
    assert "whether it may be published to me/model was not asked: no token, or offline" in done.stderr
    refused = CliRunner().invoke(main, ["push", str(artifact), "me/model", "--unmeasured"])
    assert (refused.exit_code, "publishing needs a token" in refused.output) == (4, True)


@pytest.mark.parametrize(
    "name", ["run.py", "fetch.sh", "a.toml", "chat.jinja", "notes.ipynb", "a.cfg", "a.csv", "Makefile"]
)
def test_a_token_in_any_file_but_weights_is_not_published(
    hub: HubServer, client: Client, artifact: Path, name: str
) -> None:
    (artifact / name).write_bytes(b"x" * ((1 << 22) - 20) + f"token = {READ_TOKEN}".encode())
    assert f"{name}: holds a Hub token; remove it" in client("push_folder", artifact, "me/model")["text"]
    assert hub.repos == {}


def test_links_that_grant_access_are_not_shown(
    hub: HubServer, new_client: Callable[..., Client], artifact: Path
) -> None:
    hub.faults.append(Fault("PUT /lfs/", 503))
    pusher = new_client()
    failed = pusher("push_folder", artifact, "me/model")
    assert "HTTP 503" in failed["text"]
    assert "signature=" not in failed["text"] + pusher.errors()
