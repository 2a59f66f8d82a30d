"""Batches on a real Ray cluster of two nodes on this machine, one of which is killed in the middle."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmconvert.errors import MachineError, UsageError
from llmconvert.recipes.batch.run import run_batch


def test_an_address_that_nobody_listens_at_is_refused_at_once(write_recipe: Any, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    recipe = str(write_recipe("one"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    begin = time.monotonic()
    with pytest.raises(MachineError, match=f"no Ray cluster answers at {address}: Connection refused; start one"):
        run_batch([recipe], work_dir=tmp_path / "work", engine="ray", address=address)
    assert time.monotonic() - begin < 30
    with pytest.raises(UsageError, match="address: found 'head', expected host:port"):
        run_batch([recipe], work_dir=tmp_path / "work", engine="ray", address="head")


@pytest.mark.slow
def test_a_job_whose_node_dies_finishes_on_the_other(write_recipe: Any, tmp_path: Path) -> None:
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    recipes = [
        str(write_recipe(name, quantize={"method": "rtn", "scheme": scheme}, validate=None))
        for name, scheme in (("one", "w4a16-g32"), ("two", "w8a16-g32"))
    ]
    work, logs = tmp_path / "work", tmp_path / "logs"
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        command = [sys.executable, "-m", "llmconvert.cli", "batch", *recipes, "--engine", "ray"]
        command += ["--address", cluster.address, "--work-dir", str(work), "--logs", str(logs)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        lines: list[str] = []
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as driver:
            assert driver.stdout is not None
            for line in driver.stdout:
                lines.append(line)
                if sum("started" in said for said in lines) == 2 and "started" in line:
                    cluster.remove_node(second, allow_graceful=False)
        assert driver.returncode == 0, "".join(lines)
    finally:
        cluster.shutdown()
    assert sum("done in" in line for line in lines) == 2, "".join(lines)
    here = run_batch(recipes, work_dir=tmp_path / "here")
    made = {path.read_bytes() for path in work.glob("artifact-*/model/model.safetensors")}
    assert made == {(one.result.artifact / "model.safetensors").read_bytes() for one in here if one.result is not None}
    said = "".join((logs / f"00{number}-{name}.log").read_text() for number, name in ((1, "one"), (2, "two")))
    # The line of a process that is killed just after it may be lost with it.
    assert said.count("convert: done in") <= 1 <= said.count("convert: unchanged, reusing"), "nothing is done twice"
