"""Artifacts that vLLM's CPU build has no kernels for: it understands their configs, and says itself what it lacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from environments import interpreter, run_script
from samples import PROMPTS, VOCABULARY, artifact, sample_model

from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.runtimes import runtimes_of
from llmconvert.quantize.scheme import Override, Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

_KERNEL = "Failed to find a kernel that can implement the {} linear layer"
#: Scheme → what vLLM says, once it has read config and shapes.
SAID = {
    "w2a16-g64": "Quant type (uint2b2) not supported by CPUWNA16",
    "w3a16-g64": "Quant type (uint3b4) not supported by CPUWNA16",
    "w8a16-channel": "Quant type (uint8b128) not supported by CPUWNA16",
    "w8a16-g128": "Quant type (uint8b128) not supported by CPUWNA16",
    "fp8-static": "static_scaled_fp8_quant",
    "mxfp8": _KERNEL.format("MXFP8"),
    "mxfp4": _KERNEL.format("MXFP4"),
    "mxfp4a16": _KERNEL.format("MXFP4"),
    "nvfp4": _KERNEL.format("NVFP4"),
    "nvfp4a16": "Marlin FP4 not available",
    "w4afp8": "No compressed-tensors compatible scheme was found",  # on GPUs of capability 9.0 alone there is one
}
if not torch.cpu._is_amx_tile_supported():
    SAID["fp8-block"] = "requires AMX tile support"
#: The same in GPTQ's format.
SAID_OF_GPTQ = {
    "w2a16-g64": "Unsupported quantization config: bits=2, sym=True",
    "w3a16-g64": "Unsupported quantization config: bits=3, sym=True",
    "w4a16-g64-asym": "Unsupported quantization config: bits=4, sym=False",
    "w8a16-g128": "Marlin does not support weight_bits = uint8b128",
}


@pytest.mark.parametrize(("format", "said"), [("compressed-tensors", SAID), ("gptq", SAID_OF_GPTQ)])
def test_what_is_known_to_be_refused_was_run(format: str, said: dict[str, str]) -> None:
    """``fp8-block`` is refused by some processors alone."""
    (runtime,) = [one for one in runtimes_of(format) if one.script == "vllm"]
    assert set(runtime.refused) == said.keys() - {"fp8-block"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_the_cpu_lacks_is_said_by_vllm(tmp_path: Path) -> None:
    interpreter("vllm")
    source = sample_model(tmp_path / "model", torch.bfloat16)
    made = {scheme: artifact(source, tmp_path / scheme, "compressed-tensors", scheme) for scheme in SAID}
    made |= {f"gptq-{scheme}": artifact(source, tmp_path / f"gptq-{scheme}", "gptq", scheme) for scheme in SAID_OF_GPTQ}
    head = tmp_path / "head"
    with SafetensorsCheckpoint(source) as checkpoint:
        overrides = [Override("head", Scheme.parse("w8a16-channel"))]
        quantize_checkpoint(checkpoint, head, method="rtn", scheme=Scheme.parse("w4a16-g64"), overrides=overrides)
    said = {
        **SAID,
        **{f"gptq-{scheme}": words for scheme, words in SAID_OF_GPTQ.items()},
        "head": SAID["w8a16-channel"],
    }
    models = {
        str(path): {
            "report": str(tmp_path / f"{name}.json"),
            "code": f"from vllm import LLM\nllm = LLM(model={str(path)!r})",
        }
        for name, path in {**made, "head": head}.items()
    }
    job = {"prompts": PROMPTS, "new": 1, "vocabulary": VOCABULARY, "models": models}
    log = run_script("run_vllm", "vllm", tmp_path / "run", job)
    for name, words in said.items():
        report = tmp_path / f"{name}.json"
        assert report.exists(), log[-3000:]
        assert words in json.loads(report.read_text()).get("refused", "it was loaded"), (name, report.read_text()[:300])
