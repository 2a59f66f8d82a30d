"""Artifacts that GPTQModel made, read by us: both versions of the layout, activation order, asymmetric weights.

It writes float16 scales and rounds them to bfloat16 when it computes in that; we dequantize them as they are. So logits
agree within twice what bfloat16 changes in our own forward, as everywhere here, which is a twentieth of what 4 bits do.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from samples import PROMPTS, sample_model

from llmconvert.checkpoint import Checkpoint, SafetensorsCheckpoint
from llmconvert.engine.stream import stream_logits
from llmconvert.quantize.reader import QuantizedView, open_dense

PYTHON = Path(os.environ.get("LLMCONVERT_READERS", "/nonexistent")) / "gptqmodel" / "bin" / "python"
OPTIONS = {
    "ordered": {"bits": 4, "group_size": 64, "desc_act": True, "act_group_aware": False},
    "asymmetric": {"bits": 3, "group_size": 32, "sym": False, "desc_act": False},
    "version-2": {"bits": 4, "group_size": 64, "sym": False, "desc_act": False, "format": "gptq_v2"},
}


def our_logprobs(checkpoint: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
    """Log-probabilities ``[prompts, places, vocabulary]``."""
    windows = [torch.tensor([prompt]) for prompt in PROMPTS]
    logits = stream_logits(checkpoint, windows, device=torch.device("cpu"), dtype=dtype)
    return torch.cat(list(logits)).float().log_softmax(-1)


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_artifacts_of_gptqmodel(tmp_path: Path) -> None:
    if not PYTHON.exists():
        pytest.skip("the environment 'gptqmodel' is not here; `make readers` builds it")
    source = sample_model(tmp_path / "model", torch.bfloat16)
    models = {str(tmp_path / name): str(tmp_path / f"{name}.json") for name in OPTIONS}
    options = {str(tmp_path / name): values for name, values in OPTIONS.items()}
    job = {"prompts": PROMPTS, "new": 1, "source": str(source), "models": models, "options": options}
    (tmp_path / "job.json").write_text(json.dumps(job))
    script = Path(__file__).parent / "runtimes" / "make_gptqmodel.py"
    # With its default of one worker for two cores it does not start.
    settings = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2"}
    command = [PYTHON, script, tmp_path / "job.json"]
    result = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    for directory, path in models.items():
        view = open_dense(SafetensorsCheckpoint(directory))
        assert isinstance(view, QuantizedView) and len(view.quantized) == 14
        theirs = torch.tensor(json.loads(Path(path).read_text())["logprobs"])
        ours, exact = (our_logprobs(view, dtype) for dtype in (torch.bfloat16, torch.float32))
        assert rms(theirs - ours) <= 2 * rms(ours - exact), directory
    group = SafetensorsCheckpoint(tmp_path / "ordered")["model.layers.0.mlp.up_proj.g_idx"]
    assert not torch.equal(group, group.sort().values), "no activation order"
