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
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from measured import markdown_table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.hub_server import WRITE_TOKEN, Fault, HubServer, Repo

REPOSITORY = "me/model"
SHARDS, SHARD_BYTES, SMALL_FILES, KILLS = 4, 12_000_000, 300, 20
# What each adds of its own, besides what lies in the directory.
OWN = (".gitattributes", "llmconvert/upload.json")
TOOLS = {
    "llmconvert": "from pathlib import Path; from llmconvert.hub import push_folder; "
    "push_folder(Path(argv[1]), argv[2])",
    "upload_folder": "from huggingface_hub import HfApi; api = HfApi(); api.create_repo(argv[2], exist_ok=True); "
    "api.upload_folder(repo_id=argv[2], folder_path=argv[1])",
}
TRANSPORTS = {"LFS": "1", "Xet": "0"}


@dataclass(frozen=True)
class Bench:
    """The Hub, the directory that is published, and a home for the client's caches."""

    hub: HubServer
    directory: Path
    home: Path

    def start(self, tool: str, transport: str) -> subprocess.Popen[bytes]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        settings = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "HF_TOKEN": WRITE_TOKEN}
        return subprocess.Popen(
            [sys.executable, "-c", f"from sys import argv\n{TOOLS[tool]}", str(self.directory), REPOSITORY],
            env={**environment, **settings, "HF_HUB_DISABLE_XET": TRANSPORTS[transport]},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def push(self, tool: str, transport: str) -> tuple[int, int, int]:
        """Requests, bytes sent, and bytes received by the client, of a whole push."""
        hub = self.hub
        before = len(hub.log), hub.received + hub.xet.nbytes(), hub.sent
        process = self.start(tool, transport)
        _, errors = process.communicate(timeout=300)
        if process.returncode:
            raise SystemExit(f"{tool} by {transport} failed:\n{errors.decode()[-3000:]}")
        after = len(hub.log), hub.received + hub.xet.nbytes(), hub.sent
        requests, sent, received = (new - old for new, old in zip(after, before, strict=True))
        return requests, sent, received

    def write(self, version: int) -> dict[str, bytes]:
        """Every file anew; returns them."""
        draw = random.Random(version)
        files = {f"model-{n}-of-{SHARDS}.safetensors": draw.randbytes(SHARD_BYTES) for n in range(1, SHARDS + 1)}
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
        # Contents that no earlier push of this script has brought into the Xet store.
        for what in ("first", "unchanged", "one file changed"):
            if what == "first":
                bench.write(random.randrange(1 << 30))
            elif what == "one file changed":
                (bench.directory / "small" / "007.json").write_bytes(b'{"changed": true}')
            requests, sent, received = bench.push(tool, transport)
            rows.append([f"{transport}, {what}", tool, str(requests), f"{sent:,}", f"{received:,}"])
    return rows


def kills(bench: Bench, tool: str, transport: str) -> list[str]:
    """A row: what readers saw after twenty kills, and how many commits there were once the same push was repeated."""
    hub = bench.hub
    hub.repos.clear()
    old = bench.write(1)
    bench.push(tool, transport)
    start = hub.repos[REPOSITORY]
    new = bench.write(2)
    hub.repos[REPOSITORY] = copy.deepcopy(start)
    requests, _, _ = bench.push(tool, transport)
    seen: Counter[str] = Counter()
    commits: Counter[int] = Counter()
    for number in range(1, KILLS + 1):
        repo = hub.repos[REPOSITORY] = copy.deepcopy(start)
        _kill_at(bench, tool, transport, max(1, round(requests * number / KILLS)))
        found = bench.read()
        seen["old" if found == old else "new" if found == new else "a mix"] += 1
        bench.push(tool, transport)
        assert bench.read() == new
        commits[_commits_since(start, repo)] += 1
    counts = [str(seen[what]) for what in ("old", "new", "a mix")]
    return [f"{tool}, {transport}", *counts, ", ".join(f"{n} ({times} times)" for n, times in sorted(commits.items()))]


def _commits_since(start: Repo, repo: Repo) -> int:
    return len(repo.commits) - len(start.commits)


def _kill_at(bench: Bench, tool: str, transport: str, request: int) -> None:
    """Push, and end the process without warning as soon as the Hub receives that request."""
    left = [request]
    process = bench.start(tool, transport)

    def count() -> None:
        left[0] -= 1
        if left[0] == 0:
            process.kill()

    bench.hub.faults.append(Fault(".", hook=count))
    process.communicate(timeout=300)
    bench.hub.faults.clear()
    bench.hub.drop_pending()


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch, HubServer().running() as hub:
        hub.page = 1000
        bench = Bench(hub, Path(scratch, "model"), Path(scratch, "home"))
        bench.directory.mkdir()
        total = SHARDS * SHARD_BYTES / 1e6
        print(f"huggingface_hub {version('huggingface_hub')}, hf_xet {version('hf_xet')}")
        print(f"{SHARDS} files of {SHARD_BYTES / 1e6:g} MB ({total:g} MB) and {SMALL_FILES + 1} small ones\n")
        rows = [row for transport in TRANSPORTS for row in costs(bench, transport)]
        header = ["push", "by", "requests", "bytes sent", "bytes received"]
        print(markdown_table(header, rows))
        print(f"\n{KILLS} kills of a push of a new version over an old one, then the same push again:\n")
        table = [kills(bench, tool, transport) for transport in TRANSPORTS for tool in TOOLS]
        print(markdown_table(["killed", "old version", "new version", "a mix", "commits in all"], table))


if __name__ == "__main__":
    main()
