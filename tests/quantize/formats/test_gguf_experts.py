"""Experts and transposed layers in GGUF: every method chooses their codes, and llama.cpp computes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.gguf_families import GGUF_FAMILIES, save_family
from support.gguf_models import IDS, next_token
from support.llama_cpp import LlamaCpp
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.checkpoint import open_gguf
from llmconvert.gguf.ggml.mix import MIXES
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.passes.run import QuantizeResult
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

WINDOWS = tuple(torch.randint(3, 320, (1, 64), generator=torch.Generator().manual_seed(i)) for i in range(4))
#: Over log probabilities: llama.cpp rounds what it multiplies Q4_0 by to 8 bits.
TOLERANCE = 0.1
pytestmark = pytest.mark.filterwarnings("ignore")


def loaded(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def fused(directory: Path) -> None:
    """Store the experts of a layer as their class holds them."""
    model = loaded(directory)
    states = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(states, directory / "model.safetensors", {"format": "pt"})


def quantized(directory: Path, method: str) -> QuantizeResult:
    output = directory.parent / f"{method}.gguf"
    output.unlink(missing_ok=True)
    with SafetensorsCheckpoint(directory) as source:
        text: dict[str, Any] = {} if method == "rtn" else {"windows": WINDOWS}
        return quantize_checkpoint(
            source, output, method=method, scheme=MIXES["q4_0"], format="gguf", name="tiny", **text
        )


@torch.no_grad()
def lost(path: Path, original: PreTrainedModel, work: Path) -> float:
    """What a file's logits are off by on the calibration text; llama.cpp gives the same for another."""
    work.mkdir()
    with open_gguf(path) as checkpoint:
        tensors = {name: value.float().contiguous() for name, value in checkpoint.items()}
        save_file(tensors, work / "model.safetensors", {"format": "pt"})
        (work / "config.json").write_text(json.dumps(dict(checkpoint.config)))
    model = loaded(work)
    found = LlamaCpp(path).log_probabilities(IDS[0].tolist(), 320)
    assert (found - next_token(model)).abs().max() < TOLERANCE
    return sum(float((model(window).logits - original(window).logits).square().mean()) for window in WINDOWS)


@pytest.mark.parametrize("family", ["qwen2_moe", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_experts_are_solved_however_a_checkpoint_has_them(family: str, tmp_path: Path) -> None:
    directory = save_family(tmp_path / "model", *GGUF_FAMILIES[family])
    original = loaded(directory)
    losses = {}
    for method in ("rtn", "imatrix", "gptq"):
        result = quantized(directory, method)
        assert result.types == quantized(directory, "rtn").types
        losses[method] = lost(result.output, original, tmp_path / f"back-{method}")
    assert losses["gptq"] < losses["imatrix"] < losses["rtn"]
    alone = {method: quantized(directory, method).output.read_bytes() for method in ("imatrix", "gptq")}
    fused(directory)
    assert {method: quantized(directory, method).output.read_bytes() for method in alone} == alone


def test_transposed_layers_take_codes_of_every_method(tmp_path: Path) -> None:
    directory = save_family(tmp_path / "model", *GGUF_FAMILIES["gpt2"])
    original = loaded(directory)
    losses = {}
    for method in ("rtn", "imatrix", "gptq", "gptaq", "awq"):
        result = quantized(directory, method)
        assert len(result.layers) == (8 if method in ("gptq", "gptaq", "awq") else 0)
        losses[method] = lost(result.output, original, tmp_path / f"back-{method}")
    assert losses["gptaq"] < losses["gptq"] < losses["rtn"] and losses["awq"] < losses["rtn"]


def test_other_formats_have_no_transposed_layers(tmp_path: Path) -> None:
    directory = save_family(tmp_path / "model", *GGUF_FAMILIES["gpt2"])
    with (
        SafetensorsCheckpoint(directory) as source,
        pytest.raises(UnsupportedError, match=r"in Conv1D .*packs Linear alone, .*Use format: gguf"),
    ):
        quantize_checkpoint(source, tmp_path / "out", method="rtn", scheme=Scheme.parse("w4a16-g32"))
