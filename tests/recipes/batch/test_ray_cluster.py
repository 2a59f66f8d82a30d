"""Batches on a real Ray cluster on this machine: stopped, their driver killed, and a node of it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmconvert.errors import MachineError, UsageError
from llmconvert.recipes.batch import ray_tasks
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


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head with one core."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    made = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    made.shutdown()


@contextlib.contextmanager
def driver(cluster: Any, recipes: Sequence[str], work: Path) -> Iterator[subprocess.Popen[str]]:
    """The command, in the directory of ``work``."""
    command = [sys.executable, "-m", "llmconvert.cli", "batch", *recipes, "--engine", "ray"]
    command += ["--address", cluster.address, "--work-dir", str(work), "--logs", str(work.parent / "logs")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=work.parent
    ) as process:
        yield process


def jobs_in(directory: Path) -> list[int]:
    """Processes of jobs that run in a directory."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdecimal() and (process / "cwd").readlink() == directory:
                found += [int(process.name)] * (b"batch.worker" in (process / "cmdline").read_bytes())
    return found


@pytest.mark.slow
def test_a_task_that_waits_for_an_answer_keeps_its_cores(cluster: Any) -> None:
    """Ray lends those of a task whose main thread waits to the next one, and two jobs ran beside each other on them."""
    ray = pytest.importorskip("ray")
    get_aside = ray_tasks.get_aside

    def wait(answer: Any) -> tuple[float, float]:
        begin = time.monotonic()
        get_aside(answer)
        time.sleep(0.5)
        return begin, time.monotonic()

    def answer() -> None:
        time.sleep(3)

    ray.init(address=cluster.address, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(ray_tasks)
    try:
        asked = ray.remote(num_cpus=0)(answer)
        waiting = ray.remote(num_cpus=1)(lambda: wait(asked.remote()))
        first, second = sorted(ray.get([waiting.remote(), waiting.remote()]))
    finally:
        ray.shutdown()
    assert first[1] <= second[0]


@pytest.mark.slow
def test_stopped_killed_and_its_node_lost_a_batch_is_continued(cluster: Any, write_recipe: Any, tmp_path: Path) -> None:
    """Whatever ends the driver ends its jobs, the same command goes on, and a job whose node dies ends on the other."""
    recipes = [
        str(write_recipe(name, quantize={"method": "rtn", "scheme": scheme}, validate=None))
        for name, scheme in (("one", "w4a16-g32"), ("two", "w8a16-g32"))
    ]
    work = tmp_path / "work"
    for number, ends in ((signal.SIGINT, 6), (signal.SIGKILL, -signal.SIGKILL)):
        with driver(cluster, recipes[:1], work) as process:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if "one.yaml: started" in line:
                    assert jobs_in(tmp_path)
                    process.send_signal(number)
        assert process.returncode == ends, "".join(lines)
        if number == signal.SIGINT:
            assert lines[-1].endswith("stopped by SIGINT; run the same command to continue\n")
            assert "started" in lines[-2], "that line is all it says"
        deadline = time.monotonic() + 60
        while jobs_in(tmp_path):
            assert time.monotonic() < deadline, "a job outlives its driver"
            time.sleep(0.1)

    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    lines = []
    with driver(cluster, recipes, work) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if sum("started" in said for said in lines) == 2 and "started" in line:
                cluster.remove_node(second, allow_graceful=False)
    assert process.returncode == 0, "".join(lines)
    assert sum("done in" in line for line in lines) == 2, "".join(lines)
    here = run_batch(recipes, work_dir=tmp_path / "here")
    made = {path.read_bytes() for path in work.glob("artifact-*/model/model.safetensors")}
    assert made == {(one.result.artifact / "model.safetensors").read_bytes() for one in here if one.result is not None}
    said = "".join(path.read_text() for path in (tmp_path / "logs").glob("*.log"))
    # The line of a process that is killed just after it may be lost with it.
    assert said.count("convert: done in") <= 1 <= said.count("convert: unchanged, reusing"), "nothing is done twice"
    assert said.count("quantize: done in") <= len(recipes)
