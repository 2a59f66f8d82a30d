"""Artifacts in the runtimes that serve them: their logits and greedy tokens are those of our own dequantized forward.

Runtimes of the package's own environment always run. The others need theirs (``make readers`` builds them and names
their folder in ``LLMCONVERT_READERS``); without it their tests are skipped.

Kernels sum in another order and round in between, so logits agree within a bound: twice what bfloat16 changes in our
own forward, as root mean square over all log-probabilities. Quantization itself changes several times that, in all
but the 8-bit schemes. Runtimes that quantize activations round them each in its own way, and get four times as much.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from samples import PROMPTS, artifact, sample_model

from llmconvert.checkpoint import SafetensorsCheckpoint
from llmconvert.engine.stream import stream_logits
from llmconvert.quantize.reader import open_dense
from llmconvert.quantize.runtimes import Pair, pairs

NEW_TOKENS = 8
ENVIRONMENTS = os.environ.get("LLMCONVERT_READERS")
SCRIPTS = Path(__file__).parent / "runtimes"
# vLLM: 16-bit activations for 4-bit weights, in this process, in little memory.
SETTINGS = {"VLLM_CPU_INT4_W4A8": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
PAIRS = [pytest.param(pair, id=f"{pair.runtime.name}-{pair.runtime.format}-{pair.scheme}") for pair in pairs()]

Reports = Callable[[Pair], tuple[Path, Path]]


def interpreter(environment: str) -> str | None:
    """The Python of an environment, None if it isn't there."""
    if not environment:
        return sys.executable
    path = Path(ENVIRONMENTS or "/nonexistent") / environment / "bin" / "python"
    return str(path) if path.exists() else None


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """``reports(pair)``: the artifact and what the runtime said of it. Each environment runs once over all it reads."""
    root = tmp_path_factory.mktemp("readers")
    source = sample_model(root / "model", torch.bfloat16)

    def directory(pair: Pair) -> Path:
        path = root / f"{pair.runtime.format}-{pair.scheme}"
        return path if path.exists() else artifact(source, path, pair.runtime.format, str(pair.scheme))

    @cache
    def run(script: str, environment: str) -> Path:
        python, output = interpreter(environment), root / f"{script}-{environment}"
        assert python is not None
        output.mkdir()
        mine = [pair for pair in pairs() if (pair.runtime.script, pair.runtime.environment) == (script, environment)]
        models = {str(directory(pair)): str(output / f"{directory(pair).name}.json") for pair in mine}
        job = {"prompts": PROMPTS, "new": NEW_TOKENS, "models": models}
        (output / "job.json").write_text(json.dumps(job))
        command = [python, str(SCRIPTS / f"run_{script}.py"), str(output / "job.json")]
        # In a folder of its own, and without the paths of the process that tests.
        settings = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | SETTINGS
        result = subprocess.run(command, cwd=output, env=settings, capture_output=True, text=True, timeout=3600)
        (output / "log.txt").write_text(result.stdout + result.stderr)
        return output

    def find(pair: Pair) -> tuple[Path, Path]:
        output = run(pair.runtime.script, pair.runtime.environment)
        path = output / f"{directory(pair).name}.json"
        assert path.exists(), (output / "log.txt").read_text()[-3000:]
        return directory(pair), path

    return find


def our_logprobs(directory: Path, dtype: torch.dtype) -> torch.Tensor:
    """Log-probabilities ``[prompts, places, vocabulary]`` of the dequantized model."""
    windows = [torch.tensor([prompt]) for prompt in PROMPTS]
    view = open_dense(SafetensorsCheckpoint(directory))
    logits = stream_logits(view, windows, device=torch.device("cpu"), dtype=dtype)
    return torch.cat(list(logits)).float().log_softmax(-1)


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_runtime_computes_what_we_read(pair: Pair, reports: Reports) -> None:
    if interpreter(pair.runtime.environment) is None:
        pytest.skip(f"the environment {pair.runtime.environment!r} is not here; `make readers` builds it")
    directory, path = reports(pair)
    report = json.loads(path.read_text())
    theirs = torch.tensor(report["logprobs"])
    places = theirs.shape[1]
    ours, exact = (our_logprobs(directory, dtype)[:, :places] for dtype in (torch.bfloat16, torch.float32))
    rounding = rms(ours - exact)
    allowed = (4 if pair.scheme.activation_bits == 8 else 2) * rounding
    assert rounding > 0
    assert rms(theirs - ours) <= allowed, f"{report['versions']}, {report['linears']}"
    # Greedy tokens: the first of each continuation is our best, or as good within the bound.
    first = torch.tensor(report["tokens"])[:, 0]
    last = our_logprobs(directory, torch.bfloat16)[:, -1]
    lost = last.amax(-1) - last.gather(-1, first.unsqueeze(-1)).squeeze(-1)
    assert float(lost.max()) <= 8 * allowed
