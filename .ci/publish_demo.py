"""The demo recipe, published to a Hub on the loopback interface by the real client, fetched back from there by its id,
and scored again. For continuous integration; fails if the perplexity differs in any digit.

    python .ci/publish_demo.py --work-dir build/ci-work --set calibrate.samples=4
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import yaml
from support.hub_server import WRITE_TOKEN, HubServer

REPOSITORY, TAG = "me/SmolLM2-135M-Instruct-W4A16", "v1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    with HubServer().running() as hub, tempfile.TemporaryDirectory() as scratch:
        publish = [f"publish.to={REPOSITORY}", f"publish.tag={TAG}", "publish.verify_download=true"]
        settings = [part for setting in (*options.set, *publish) for part in ("--set", setting)]
        call(hub, Path(scratch, "publisher"), "run", options.recipe, "--work-dir", str(options.work_dir), *settings)
        files = hub.files(REPOSITORY, TAG)
        text = yaml.safe_load(files["llmconvert/recipe.yaml"])["validate"]["perplexity"]
        scored = Path(scratch, "scored.json")
        begin = time.perf_counter()
        call(
            hub,
            Path(scratch, "reader"),
            *("validate", f"{REPOSITORY}@{TAG}", "--text", text["dataset"], "--window", str(text["window"])),
            *(("--max-windows", str(text["max_windows"])) if "max_windows" in text else ()),
            *("--json", str(scored)),
        )
        seconds = time.perf_counter() - begin
        before, after = perplexity(files["llmconvert/report.json"]), perplexity(scored.read_bytes())
        way = "Xet" if hub.count("xet-write-token") else "LFS"
        commits = hub.count(f"POST /api/models/{REPOSITORY}/commit/")
    size = sum(map(len, files.values()))
    click.echo(f"published   {REPOSITORY}: {len(files)} files, {size:,} bytes, by {way}, in {commits} commit")
    click.echo(f"perplexity  {before!r} when it was measured, before publishing")
    click.echo(f"            {after!r} fetched back in {seconds:.0f} s: {'the same' if after == before else 'ANOTHER'}")
    problems = ["the perplexity of what was fetched back is another"] if after != before else []
    problems += [f"{commits} commits, expected one"] if commits != 1 else []
    problems += [f"{name} holds the token" for name, content in files.items() if WRITE_TOKEN.encode() in content]
    if problems:
        sys.exit("; ".join(problems))


def call(hub: HubServer, home: Path, *arguments: str) -> None:
    """The command line with a Hub to talk to and a cache of its own; its output is shown, and looked at for tokens."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": WRITE_TOKEN}
    command = [sys.executable, "-P", "-m", "llmconvert.cli", *arguments]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if WRITE_TOKEN.encode() in line:
                process.kill()
                sys.exit(f"llmconvert {arguments[0]} shows the token")
            click.echo(line, nl=False)
    if process.returncode:
        sys.exit(f"llmconvert {arguments[0]} ended with {process.returncode}")


def perplexity(report: bytes) -> Any:
    return next(check["value"] for check in json.loads(report)["checks"] if check["name"] == "perplexity")


if __name__ == "__main__":
    main()
