"""vLLM: log-probabilities against our reader's, and the model card's snippet.

vLLM needs a torch of its own, so it lies in an environment of its own, which ``make readers`` builds and names in
``LLMCONVERT_READERS``. Without that, what needs it is skipped. This package is installed there too, so that a whole
``llmconvert validate`` finds vLLM beside itself.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import tiny_llama_dir

from llmconvert.engine.evaluation import stream_logits
from llmconvert.errors import GateError, UnsupportedError
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import Scheme
from llmconvert.report.report import Report
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.validate.measurement import Subject
from llmconvert.validate.render.card import Address, render_card
from llmconvert.validate.runtimes.vllm import VllmCheck, compare_logprobs, vllm_is_installed, vllm_logprobs

BUILT = Path(os.environ.get("LLMCONVERT_READERS") or "nowhere") / "vllm" / "bin" / "python"
PYTHON = str(BUILT) if BUILT.exists() else sys.executable if importlib.util.find_spec("vllm") else ""
with_vllm = pytest.mark.skipif(not PYTHON, reason="vLLM is not here; `make readers` builds its environment")
WINDOW = torch.tensor([[(7 * place * place + place) % 320 for place in range(96)]])


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with sizes that real kernels take, in 4 bits."""
    directory = tmp_path_factory.mktemp("vllm")
    source = tiny_llama_dir(
        directory / "source", dtype=torch.bfloat16, hidden_size=256, intermediate_size=512, initializer_range=0.05
    )
    with SafetensorsCheckpoint(source) as checkpoint:
        quantize_checkpoint(checkpoint, directory / "w4", method="rtn", scheme=Scheme.parse("w4a16-g32"))
    return directory / "w4"


def logits_of(directory: Path) -> torch.Tensor:
    with SafetensorsCheckpoint(directory) as stored:
        (logits,) = stream_logits(open_dense(stored), [WINDOW], device=torch.device("cpu"))
    return logits


@pytest.mark.slow
@with_vllm
def test_vllm_computes_what_our_reader_computes(artifact: Path, tmp_path: Path) -> None:
    found, name = vllm_logprobs(artifact, WINDOW, torch.bfloat16, python=PYTHON)
    assert re.match(r"vLLM \d+\.\d+\S* on CPU, bfloat16", name)
    result = compare_logprobs(found, logits_of(artifact))
    assert result.ok and result.tokens == 95, result
    # The same text from an artifact with one layer read wrongly is told apart.
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in artifact.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight_scale"].neg_()
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert not compare_logprobs(found, logits_of(broken)).ok


@pytest.mark.slow
@with_vllm
def test_the_cards_snippet_runs(artifact: Path, report: Report, tmp_path: Path) -> None:
    card = render_card(report, address=Address(str(artifact)), recipe="model: x", chat=True)
    (snippet,) = [text for text in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "from vllm" in text]
    (tmp_path / "snippet.py").write_text(snippet)
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run([PYTHON, "snippet.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr[-3000:]


@pytest.mark.slow
@with_vllm
def test_validate_beside_vllm_reports_its_fidelity(artifact: Path, tmp_path: Path) -> None:
    """The whole command, in vLLM's own environment, with that environment's transformers."""
    original = artifact.parent / "source"
    command = [PYTHON, "-m", "llmconvert.cli", "validate", str(artifact), "--reference", str(original)]
    command += ["--text", "pydoc-topics:test", "--window", "96", "--max-windows", "2", "--json", "report.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    checks = {check["name"]: check for check in json.loads((tmp_path / "report.json").read_text())["checks"]}
    found = checks["fidelity.vllm_mean_abs_diff"]
    assert found["ok"] and 0 < found["value"] < 0.1 and found["detail"]["tokens"] == 95
    assert re.match(r"vLLM \d+\.\d+\S* on CPU, bfloat16 gives the same", found["detail"]["text"])
    assert checks["fidelity.max_abs_diff"]["ok"] and checks["inventory"]["value"] == 0


@pytest.mark.slow
@with_vllm
def test_what_vllm_refuses_is_said(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch", "architectures": ["Nonesuch"]}')
    with pytest.raises(UnsupportedError, match=r"vLLM cannot run it: .*Error"):
        vllm_logprobs(tmp_path, WINDOW, torch.bfloat16, python=PYTHON)


def top(logits: torch.Tensor, count: int = 5) -> list[dict[int, float]]:
    """What vLLM would give for these logits."""
    rows = logits[0, :-1].float().log_softmax(-1)
    return [dict(zip(*(part.tolist() for part in reversed(row.topk(count))), strict=True)) for row in rows]


def test_comparison_by_hand() -> None:
    logits = torch.randn(1, 9, 50, generator=torch.Generator().manual_seed(0))
    same = compare_logprobs(top(logits), logits)
    assert same.max_abs_diff < 1e-6 and same.top1_agreement == 1 and same.tokens == 8 and same.ok
    shifted = top(logits)
    first = max(shifted[0], key=lambda token: shifted[0][token])
    shifted[0][first] -= 2.0
    found = compare_logprobs(shifted, logits)
    assert found.max_abs_diff == pytest.approx(2, abs=1e-5)
    assert found.mean_abs_diff == pytest.approx(2 / 40, abs=1e-5)
    assert found.top1_agreement == 7 / 8 and not found.ok


def test_numbers_that_mean_nothing_are_refused() -> None:
    logits = torch.randn(1, 4, 50)
    with pytest.raises(GateError, match="scored 2 positions, our reader 3"):
        compare_logprobs(top(logits)[:2], logits)
    with pytest.raises(GateError, match="not finite"):
        compare_logprobs([{1: math.nan}] * 3, logits)


def test_a_runtime_that_dies_is_an_error_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="vLLM cannot run it"):
        vllm_logprobs(tmp_path, WINDOW, torch.bfloat16, python=sys.executable)


@pytest.mark.skipif(vllm_is_installed(), reason="vLLM is installed")
def test_without_vllm_there_is_no_check(tiny_llama: Path) -> None:
    with SafetensorsCheckpoint(tiny_llama) as stored:
        subject = Subject(tiny_llama, stored, stored, None, None, None, torch.device("cpu"))
        assert VllmCheck().measure(subject) == []
