"""What a push costs, in requests and bytes, and what readers see of one that is killed; beside ``upload_folder``.

    python bench/hub_cost.py

Both publish the same directory to the Hub on the loopback interface that the tests use, each push in a process of its
own, by LFS and by Xet: first into nothing, then unchanged, then with a single changed file. Then a new version of every
file is pushed over the old one and killed with SIGKILL when the Hub receives request 1, 2, … of 20 that are spread
evenly over a whole push.
"""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from measured import markdown_table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.hub_server import WRITE_TOKEN, Fault, HubServer, Repo

REPOSITORY = "me/model"
SHARDS, SHARD_BYTES, SMALL_FILES = 4, 12_000_000, 300
# Pushes that are killed are many, and send less.
KILLS, KILLED_SHARD_BYTES = 20, 1_000_000
# What each adds of its own, besides what lies in the directory.
OWN = (".gitattributes", "llmconvert/upload.json")
TOOLS = {
    "llmconvert": "from pathlib import Path; from llmconvert.hub import push_folder\n"
    "def push(directory, repository): push_folder(Path(directory), repository)",
    "upload_folder": "from huggingface_hub import HfApi\n"
    "def push(directory, repository):\n"
    "    HfApi().create_repo(repository, exist_ok=True)\n"
    "    HfApi().upload_folder(repo_id=repository, folder_path=directory)",
}
# Imports once, and forks a process for every line that it reads: tells its id, and then how it ended.
NURSERY = """
import os, sys
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        push(*sys.argv[1:])
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
TRANSPORTS = {"LFS": "1", "Xet": "0"}


class Pusher:
    """Pushes a directory by one tool and transport, each time in a process of its own."""

    def __init__(self, hub: HubServer, scratch: Path, tool: str, transport: str) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(scratch / "home"), "HF_TOKEN": WRITE_TOKEN}
        self._nursery = subprocess.Popen(
            [sys.executable, "-c", TOOLS[tool] + NURSERY, str(scratch / "model"), REPOSITORY],
            env={**environment, **settings, "HF_HUB_DISABLE_XET": TRANSPORTS[transport]},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def start(self) -> int:
        """The id of the process."""
        assert self._nursery.stdin is not None
        self._nursery.stdin.write("push\n")
        self._nursery.stdin.flush()
        return self._read()

    def wait(self) -> int:
        """What the process ended with."""
        return self._read()

    def _read(self) -> int:
        assert self._nursery.stdout is not None
        return int(self._nursery.stdout.readline())

    def close(self) -> None:
        self._nursery.communicate("")


@dataclass(frozen=True)
class Bench:
    """The Hub, and the directory that is published."""

    hub: HubServer
    scratch: Path

    @property
    def directory(self) -> Path:
        return self.scratch / "model"

    def pusher(self, tool: str, transport: str) -> Pusher:
        return Pusher(self.hub, self.scratch, tool, transport)

    def push(self, pusher: Pusher) -> tuple[int, int, int]:
        """Requests, bytes sent, and bytes received by the client, of a whole push."""
        hub = self.hub
        before = len(hub.log), hub.received + hub.xet.nbytes(), hub.sent
        pusher.start()
        if code := pusher.wait():
            raise SystemExit(f"a push ended with {code}; the last requests were {hub.log[-5:]}")
        after = len(hub.log), hub.received + hub.xet.nbytes(), hub.sent
        requests, sent, received = (new - old for new, old in zip(after, before, strict=True))
        return requests, sent, received

    def write(self, version: int, shard_bytes: int) -> dict[str, bytes]:
        """Every file anew; returns them."""
        draw = random.Random(version)
        files = {f"model-{n}-of-{SHARDS}.safetensors": draw.randbytes(shard_bytes) for n in range(1, SHARDS + 1)}
        files |= {f"small/{n:03}.json": b'{"version": %d, "n": %d}' % (version, n) for n in range(SMALL_FILES)}
        files["README.md"] = b"---\nlicense: mit\n---\n# version %d\n" % version
        for name, content in files.items():
            (self.directory / name).parent.mkdir(exist_ok=True, parents=True)
            (self.directory / name).write_bytes(content)
        return files

    def read(self) -> dict[str, bytes]:
        return {name: data for name, data in self.hub.files(REPOSITORY).items() if name not in OWN}


def costs(bench: Bench, transport: str) -> list[list[str]]:
    """A row per tool and push."""
    rows = []
    for tool in TOOLS:
        bench.hub.repos.clear()
        pusher = bench.pusher(tool, transport)
        # Contents that no earlier push of this script has brought into the Xet store.
        for what in ("first", "unchanged", "one file changed"):
            if what == "first":
                bench.write(random.randrange(1 << 30), SHARD_BYTES)
            elif what == "one file changed":
                (bench.directory / "small" / "007.json").write_bytes(b'{"changed": true}')
            requests, sent, received = bench.push(pusher)
            rows.append([f"{transport}, {what}", tool, str(requests), f"{sent:,}", f"{received:,}"])
        pusher.close()
    return rows


def kills(bench: Bench, tool: str, transport: str) -> list[str]:
    """A row: what readers saw after twenty kills, and how many commits there were once the same push was repeated."""
    hub = bench.hub
    hub.repos.clear()
    pusher = bench.pusher(tool, transport)
    old = bench.write(1, KILLED_SHARD_BYTES)
    bench.push(pusher)
    start = hub.repos[REPOSITORY]
    new = bench.write(2, KILLED_SHARD_BYTES)
    hub.repos[REPOSITORY] = copy.deepcopy(start)
    requests, _, _ = bench.push(pusher)
    seen: Counter[str] = Counter()
    commits: Counter[int] = Counter()
    for number in range(1, KILLS + 1):
        repo = hub.repos[REPOSITORY] = copy.deepcopy(start)
        _kill_at(bench, pusher, max(1, round(requests * number / KILLS)))
        found = bench.read()
        seen["old" if found == old else "new" if found == new else "a mix"] += 1
        bench.push(pusher)
        assert bench.read() == new
        commits[_commits_since(start, repo)] += 1
    pusher.close()
    counts = [str(seen[what]) for what in ("old", "new", "a mix")]
    return [f"{tool}, {transport}", *counts, ", ".join(f"{n} ({times} times)" for n, times in sorted(commits.items()))]


def _commits_since(start: Repo, repo: Repo) -> int:
    return len(repo.commits) - len(start.commits)


def _kill_at(bench: Bench, pusher: Pusher, request: int) -> None:
    """Push, and end the process without warning as soon as the Hub receives that request."""
    left, started = [request], Future[int]()

    def count() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(started.result(), signal.SIGKILL)

    bench.hub.faults.append(Fault(".", hook=count))
    started.set_result(pusher.start())
    pusher.wait()
    bench.hub.faults.clear()
    bench.hub.drop_pending()


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch, HubServer().running() as hub:
        hub.page = 1000
        bench = Bench(hub, Path(scratch))
        bench.directory.mkdir()
        total = SHARDS * SHARD_BYTES / 1e6
        print(f"huggingface_hub {version('huggingface_hub')}, hf_xet {version('hf_xet')}")
        print(f"{SHARDS} files of {SHARD_BYTES / 1e6:g} MB ({total:g} MB) and {SMALL_FILES + 1} small ones\n")
        rows = [row for transport in TRANSPORTS for row in costs(bench, transport)]
        header = ["push", "by", "requests", "bytes sent", "bytes received"]
        print(markdown_table(header, rows), flush=True)
        print(f"\n{KILLS} kills of a push of a new version over an old one, then the same push again:\n")
        table = [kills(bench, tool, transport) for tool in TOOLS for transport in TRANSPORTS]
        print(markdown_table(["killed", "old version", "new version", "a mix", "commits in all"], table))


if __name__ == "__main__":
    main()
