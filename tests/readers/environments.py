"""The environments that runtimes and other tools run in, and running a script in one of them.

``make readers`` builds them and names their folder in ``LLMCONVERT_READERS``; what is not there is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

__all__ = ["OWN", "SCRIPTS", "interpreter", "run_script"]

#: The package's own environment.
OWN = ""
SCRIPTS = Path(__file__).parent / "runtimes"
SETTINGS = {
    # vLLM: 16-bit activations for 4-bit weights, in this process, in little memory.
    "VLLM_CPU_INT4_W4A8": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # GPTQModel quantizes in workers; with its default of one for two cores it does not start.
    "GPTQMODEL_CPU_WORKERS": "2",
    "HF_HUB_OFFLINE": "1",
}


def interpreter(environment: str) -> str:
    """The Python of an environment; skips the test if it isn't there."""
    if environment == OWN:
        return sys.executable
    path = Path(os.environ.get("LLMCONVERT_READERS", "/nonexistent")) / environment / "bin" / "python"
    if not path.exists():
        pytest.skip(f"the environment {environment!r} is not here; `make readers` builds it")
    return str(path)


def run_script(script: str, environment: str, folder: Path, job: dict[str, Any]) -> str:
    """Run ``runtimes/SCRIPT.py JOB.json`` in a folder of its own, without the paths of the process that tests.

    Returns:
        What it printed. That it failed shows in what it left undone: each artifact has a report of its own.
    """
    python = interpreter(environment)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job))
    # With PYTHONSAFEPATH the scripts would not find what lies beside them.
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    settings = inherited | SETTINGS
    result = subprocess.run(
        [python, str(SCRIPTS / f"{script}.py"), str(folder / "job.json")],
        cwd=folder,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3600,
    )
    return result.stdout
