"""Fixtures on what is measured: a tiny original, its artifact in 4 bits, and a report with checks of all kinds."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import pack_to_int32
from safetensors.torch import load_file, save_file
from support.tiny_models import tiny_llama, tiny_llama_dir

from llmconvert.report.report import Check, ModelInfo, Report, Step

GROUP = 32


@pytest.fixture(scope="session")
def tiny_llama_model() -> torch.nn.Module:
    """A resident tiny Llama in float32: read it, don't change it."""
    return tiny_llama()


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bfloat16 Llama on disk: read it, don't change it."""
    return tiny_llama_dir(tmp_path_factory.mktemp("validate") / "original", dtype=torch.bfloat16)


def round_to_groups(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes ``[rows, columns]`` and bfloat16 scales ``[rows, groups]`` by plain rounding."""
    grouped = weight.float().reshape(weight.shape[0], -1, GROUP)
    limit = 2 ** (bits - 1)
    scale = (grouped.abs().amax(-1) / (limit - 0.5)).bfloat16()
    codes = (grouped / scale.float().unsqueeze(-1)).round().clamp(-limit, limit - 1)
    return codes.to(torch.int8).reshape(weight.shape), scale


def write_quantized(original: Path, directory: Path, bits: int = 4) -> Path:
    """A compressed-tensors copy of a model directory, written without any of our own code."""
    shutil.copytree(original, directory)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(original / "model.safetensors").items():
        if re.search(r"_proj\.weight$", name) is None:
            stored[name] = tensor
            continue
        codes, scale = round_to_groups(tensor, bits)
        linear = name.removesuffix(".weight")
        stored[f"{linear}.weight_packed"] = pack_to_int32(codes, bits)
        stored[f"{linear}.weight_scale"] = scale
        stored[f"{linear}.weight_shape"] = torch.tensor(tensor.shape)
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((original / "config.json").read_text())
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def quantized(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in 4 bits: read it, don't change it."""
    return write_quantized(original, tmp_path_factory.mktemp("validate") / "quantized")


@pytest.fixture
def report() -> Report:
    """A report with all kinds of checks, and text that a careless template would let break the page."""
    tensors = [
        {"name": f"model.layers.{i}.mlp.{kind}.weight", "status": "quantized", "shape": [64, 64], "dtype": "BF16"}
        | {"error": 0.08 + 0.01 * i}
        for i in range(3)
        for kind in ("up_proj", "down_proj")
    ]
    measured: dict[str, Any] = {"dataset": "made:up", "windows": 16, "window": 512, "tokens": 8176, "overlap": 0.0012}
    intervals = {"low": 12.21, "high": 14.93, "reference_low": 11.02, "reference_high": 13.38}
    increase = {"increase": 0.108175, "increase_low": 0.0971, "increase_high": 0.1212}
    texts = [{"prompt": "Go & say", "reference": "<b>1 < 2</b>", "artifact": "</div>", "same": False, "looping": True}]
    blocks = [
        {"index": index, "name": f"model.layers.{index}", "error": error, "added": added, "cosine": 0.99} | {"own": own}
        for index, (error, added, own) in enumerate([(0.03, 0.03, 0.03), (0.05, 0.04, 0.035), (0.05, 0.0, 0.01)])
    ]
    worst = {"window": 1, "position": 7, "kl": 3.217, "reference_nll": 0.41, "artifact_nll": 5.12}
    return Report(
        model=ModelInfo(
            name="Tiny-W4A16",
            source="maker/Tiny",
            base_model="maker/Tiny",
            revision="0123456789abcdef0123456789abcdef01234567",
            parameters=134_515_008,
            license="apache-2.0",
            method="gptq",
            scheme="w4a16-g64-sym",
            format="compressed-tensors",
            calibration="other:text, 32 × 512 tokens",
        ),
        environment={"llmconvert": "0.1.0", "torch": "2.13.0"},
        steps=(Step(name="quantize", seconds=71.32, peak_rss_bytes=990_000_000), Step(name="validate", seconds=130)),
        checks=(
            Check(name="size_bytes", value=113_175_416, reference=269_060_552, unit="bytes"),
            Check(
                name="inventory", value=0, limit=0, unit="tensors", detail={"text": "6 quantized", "tensors": tensors}
            ),
            Check(
                name="perplexity",
                value=13.4187,
                reference=12.1089,
                limit=15.1361,
                detail={**measured, **intervals, **increase},
            ),
            Check(name="kl_mean", value=0.07314, unit="nats"),
            Check(
                name="kl_p99",
                value=0.6123,
                unit="nats",
                detail={"worst": [{**worst, "context": "if a < b &", "next": "&"}]},
            ),
            Check(name="kl_p999", value=1.8042, unit="nats"),
            Check(name="top1_agreement", value=0.87312, unit="share"),
            Check(name="block_divergence", value=0.05, unit="relative", detail={"blocks": blocks}),
            Check(name="generation.agreement", value=0.421, limit=0.3, unit="share", detail={"texts": texts}),
            Check(name="speed.decode", value=19.24, reference=20.1, unit="tokens/s"),
        ),
    )
