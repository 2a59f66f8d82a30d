"""What an engine adds to a batch: the same four jobs one after the other in processes of this machine, and on Ray.

    python bench/batch_engines.py --model DIR --calibration FILE --work DIR [--samples 8] [--length 256] [--rounds 2]

Every batch is a whole process of ``llmconvert batch`` with an empty work directory; rounds alternate. Ray's cluster is
one node, this machine, which runs before the first batch; so a batch on it begins to talk to a cluster, as it would
elsewhere, and does not start one. Artifacts of both are compared byte by byte.

What an engine adds does not grow with a job: the ratio is of these jobs, and seconds beside jobs are of any. Jobs of
half a minute or more (SmolLM2-135M with 8 windows of 256 tokens, on two cores) say something; shorter ones are mostly
imports.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml
from measured import Cost, markdown_table, run_measured
from options import parser_of

SCHEMES = ("w4a16-g64", "w3a16-g64", "w8a16-g64", "w4a16-g32")
ENGINES = ("local", "ray")
_ADDRESS = "127.0.0.1:6399"


def main() -> None:
    parser = parser_of(__doc__, samples=8, length=256, threads=2)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    scripts, ray = Path(sys.executable).parent, [sys.executable, "-m", "ray.scripts.scripts"]
    head = ["start", "--head", "--port", _ADDRESS.partition(":")[2], "--node-ip-address", "127.0.0.1"]
    head += ["--num-cpus", str(options.threads), "--include-dashboard", "false", "--disable-usage-stats"]
    # On the loopback interface; Ray sends no token to an address that is named, and asks for one where it has made any.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    costs: dict[str, list[Cost]] = {engine: [] for engine in ENGINES}
    beside: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    made: dict[str, set[str]] = {}
    with (options.work / "cluster.log").open("wb") as log:
        cluster = subprocess.Popen([*ray, *head, "--block"], stdout=log, stderr=log)
    try:
        wait_for_head(cluster)
        for _ in range(options.rounds):
            for engine in ENGINES:
                cost, made[engine] = run(options, scripts / "llmconvert", engine)
                costs[engine].append(cost)
                summary = json.loads((options.work / engine / "batch" / "summary.json").read_text())
                jobs = [job["seconds"] for job in summary["jobs"]]
                beside[engine].append(cost.seconds - sum(jobs))
                each = " + ".join(f"{one:.1f}" for one in jobs)
                print(f"{engine}: {cost.seconds:.1f} s, of these {each} in jobs", file=sys.stderr, flush=True)
    finally:
        cluster.terminate()  # its own processes end with it, and nobody else's
        cluster.wait()
    if made["local"] != made["ray"]:
        raise SystemExit("the engines made other bytes")
    local = statistics.median(cost.seconds for cost in costs["local"])
    rows = []
    for engine in ENGINES:
        seconds = [cost.seconds for cost in costs[engine]]
        middle = statistics.median(seconds)
        times = (*seconds, middle, statistics.median(beside[engine]))
        rows.append([engine, *(f"{one:.1f} s" for one in times), f"{middle / local:.2f}"])
    tokens = f"{options.samples} × {options.length} tokens"
    print(f"{options.model.name}, {len(SCHEMES)} jobs by gptq, {tokens}, {options.threads} threads, equal bytes")
    rounds = [f"round {number + 1}" for number in range(options.rounds)]
    print(markdown_table(["engine", *rounds, "median", "beside jobs", "ratio"], rows))


def wait_for_head(cluster: subprocess.Popen[bytes]) -> None:
    """Until the cluster's head listens."""
    host, _, port = _ADDRESS.partition(":")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and cluster.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.5)
    raise SystemExit("no cluster came up; see cluster.log")


def run(options: argparse.Namespace, llmconvert: Path, engine: str) -> tuple[Cost, set[str]]:
    """What a batch cost, and digests of the weights that it made."""
    work = options.work / engine
    shutil.rmtree(work, ignore_errors=True)
    recipes = []
    for scheme in SCHEMES:
        calibrate = {"dataset": str(options.calibration), "samples": options.samples, "length": options.length}
        quantize = {"method": "gptq", "scheme": scheme}
        recipes.append(options.work / f"{scheme}.yaml")
        values = {"model": str(options.model), "calibrate": calibrate, "quantize": quantize}
        recipes[-1].write_text(yaml.safe_dump(values))
    command = [llmconvert, "batch", *recipes, "--engine", engine, "--work-dir", work]
    command += ["--address", _ADDRESS] if engine == "ray" else []
    cost = run_measured(command, threads=options.threads, log=options.work / f"{engine}.log")
    weights = work.glob("artifact-*/model/*.safetensors")
    return cost, {hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}


if __name__ == "__main__":
    main()
