"""A Hub on the loopback interface and the real client, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.hub_client import Client
from support.hub_server import HubServer


@pytest.fixture(scope="package")
def running_hub() -> Iterator[HubServer]:
    with HubServer().running() as server:
        yield server


@pytest.fixture
def hub(running_hub: HubServer) -> HubServer:
    """Empty, without faults."""
    running_hub.reset()
    return running_hub


@pytest.fixture(scope="package")
def client(running_hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The client without Xet; one process for all tests."""
    with Client(running_hub.url, tmp_path_factory.mktemp("client") / "home") as started:
        yield started


@pytest.fixture
def new_client(running_hub: HubServer, tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """Starts clients of this test's own, with environment variables as keyword arguments."""
    started: list[Client] = []

    def start(**environment: str) -> Client:
        settings = {"url": running_hub.url, **environment}
        started.append(Client(settings.pop("url"), tmp_path / "home", **settings))
        return started[-1]

    yield start
    for client in started:
        client.close()


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A directory such as a run leaves it, with two weight files large enough to be large objects."""
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
