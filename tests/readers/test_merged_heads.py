"""A checkpoint with fewer key-value heads is a plain one: runtimes serve it, and compute what we read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from environments import OWN, interpreter, run_script
from forward import our_forward
from samples import PROMPTS, VOCABULARY, sample_model
from snippets import ARTIFACT, loading_snippets
from support.agreement import compare, joined

from llmconvert.convert.gqa.job import convert_attention
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("script", "environment"), [("transformers", OWN), ("vllm", "vllm")])
def test_a_runtime_serves_a_single_key_value_head(script: str, environment: str, tmp_path: Path) -> None:
    interpreter(environment)
    merged, quantized = tmp_path / "merged", tmp_path / "quantized"
    with SafetensorsCheckpoint(sample_model(tmp_path / "model", torch.bfloat16)) as source:
        convert_attention(source, merged, kv_heads=1)
    with SafetensorsCheckpoint(merged) as source:
        quantize_checkpoint(source, quantized, method="rtn", scheme=Scheme.parse("w4a16-g64"))
    name = {"transformers": "transformers", "vllm": "vLLM"}[script]
    (code,) = [code for title, code in loading_snippets().items() if title.partition(":")[0] == name]
    reports = {path: tmp_path / f"{path.name}.json" for path in (merged, quantized)}
    models = {
        str(path): {"report": str(report), "code": code.replace(ARTIFACT, str(path))}
        for path, report in reports.items()
    }
    job = {"prompts": PROMPTS, "new": 16, "vocabulary": VOCABULARY, "models": models}
    log = run_script(f"run_{script}", environment, tmp_path / "run", job)
    for path, place in reports.items():
        assert json.loads((path / "config.json").read_text())["num_key_value_heads"] == 1
        assert place.exists(), log[-3000:]
        report = json.loads(place.read_text())
        tokens = torch.tensor(report["tokens"])
        ours = our_forward(path, joined(PROMPTS, tokens))
        found = compare(torch.tensor(report["logprobs"]), tokens, ours, prompt=len(PROMPTS[0]))
        assert found.holds and found.decided > 0.1, (path.name, found)
