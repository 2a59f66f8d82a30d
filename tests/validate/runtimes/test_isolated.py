"""Measurements in processes of their own: what comes back, and what goes wrong in them."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from llmconvert.errors import MachineError
from llmconvert.validate.runtimes.isolated import UnmeasuredError, run_isolated

JOBS = """
import os, signal, time

def double(value):
    print("chatter")
    return {"doubled": 2 * value}

def fail():
    raise RuntimeError("no kernel for this")

def start(module):
    import subprocess, sys
    done = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True)
    raise RuntimeError(done.stderr.strip().splitlines()[-1])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def crash():
    os.abort()

def terminate():
    os.kill(os.getpid(), signal.SIGTERM)

def read():
    raise ValueError("no model") from OSError(5, "Input/output error")

def sleep():
    time.sleep(60)

def take(nbytes, limit):
    import torch
    from llmconvert.validate.runtimes.isolated import limit_memory
    limit_memory(limit)
    return torch.ones(nbytes, dtype=torch.uint8).numel()

def peak():
    import torch
    from llmconvert.memory import PeakMemory
    from llmconvert.validate.runtimes.isolated import reset_peak
    torch.ones(300_000_000, dtype=torch.uint8)
    reset_peak()
    with PeakMemory() as memory:
        torch.ones(100_000_000, dtype=torch.uint8)
    return memory.nbytes, memory.method
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "measured_jobs.py").write_text(textwrap.dedent(JOBS))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("jobs")
def test_the_answer_comes_back_whatever_else_is_printed() -> None:
    assert run_isolated("measured_jobs:double", {"value": 4}, timeout=60) == {"doubled": 8}


@pytest.mark.usefixtures("jobs")
@pytest.mark.parametrize(
    ("name", "reason"), [("fail", "no kernel for this"), ("crash", "ended with -6"), ("missing", "missing")]
)
def test_what_goes_wrong_is_a_reason(name: str, reason: str) -> None:
    with pytest.raises(UnmeasuredError, match=reason):
        run_isolated(f"measured_jobs:{name}", {}, timeout=60)


@pytest.mark.usefixtures("jobs")
def test_the_working_directory_shadows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started in a folder with modules of the same names, it imports the installed ones; so does what it starts."""
    for name in ("llmconvert/__init__", "json", "torch", "child"):
        path = tmp_path / "here" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise SystemExit('the wrong one')\n")
    monkeypatch.chdir(tmp_path / "here")
    assert run_isolated("measured_jobs:double", {"value": 4}, timeout=60) == {"doubled": 8}
    with pytest.raises(UnmeasuredError, match="No module named child"):
        run_isolated("measured_jobs:start", {"module": "child"}, timeout=60)


@pytest.mark.usefixtures("jobs")
@pytest.mark.parametrize(("name", "reason"), [("die", "SIGKILL"), ("terminate", "SIGTERM"), ("read", "no model")])
def test_what_the_machine_does_is_none(name: str, reason: str) -> None:
    with pytest.raises(MachineError, match=reason):
        run_isolated(f"measured_jobs:{name}", {}, timeout=60)


@pytest.mark.usefixtures("jobs")
def test_a_process_that_hangs_is_ended() -> None:
    with pytest.raises(UnmeasuredError, match="longer than 2 s"):
        run_isolated("measured_jobs:sleep", {}, timeout=2)


@pytest.mark.usefixtures("jobs")
@pytest.mark.skipif(sys.platform != "linux", reason="the system has no such limit")
def test_memory_beyond_the_limit_fails_in_the_child() -> None:
    assert run_isolated("measured_jobs:take", {"nbytes": 10**7, "limit": 2 * 10**8}, timeout=60) == 10**7
    with pytest.raises(UnmeasuredError, match="out of memory"):
        run_isolated("measured_jobs:take", {"nbytes": 10**9, "limit": 2 * 10**8}, timeout=60)


@pytest.mark.usefixtures("jobs")
@pytest.mark.skipif(sys.platform != "linux", reason="no mark to start anew")
def test_an_earlier_peak_is_forgotten() -> None:
    nbytes, method = run_isolated("measured_jobs:peak", {}, timeout=60)
    assert method == "exact" and nbytes < 600_000_000, "libraries and 100 MB, not the 300 MB before"
