"""SmoothQuant: the paper's formula, and what it saves where a few channels of the activations are huge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.quantized import random_inputs, random_weight
from support.tiny_architectures import ids, tiny_model
from transformers import AutoModelForCausalLM

from llmconvert.engine.evaluation import stream_logits
from llmconvert.errors import UnsupportedError
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.methods.base import ScaledEdge, Target, load_method
from llmconvert.quantize.methods.smoothquant import SmoothQuant
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

COLUMNS = 64
W8A8 = Scheme.parse("w8a8")
WINDOWS = ids((24, 16, 24))
Tiny = Callable[..., Path]


def edge_of(channels: torch.Tensor) -> ScaledEdge:
    inputs = random_inputs(128, COLUMNS).float()
    targets = [Target(str(rows), random_weight(rows, COLUMNS, seed=rows), W8A8) for rows in (40, 24)]
    return ScaledEdge(targets, channels, None, inputs.abs().mean(0), inputs.abs().amax(0), inputs)


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.8, 1.0])
def test_scales_are_those_of_the_paper(strength: float) -> None:
    edge = edge_of(torch.arange(COLUMNS))
    found = SmoothQuant(strength).scales(edge, torch.float32)
    for column in range(COLUMNS):
        weights = max(float(value) for target in edge.targets for value in target.weight[:, column].abs())
        expected = float(edge.largest[column]) ** strength / weights ** (1 - strength)
        assert float(found[column]) == pytest.approx(expected, rel=1e-5)


def test_columns_of_one_channel_share_the_largest() -> None:
    edge = edge_of(torch.arange(COLUMNS) // 4)
    found = SmoothQuant(0.5).scales(edge, torch.float32).view(-1, 4)
    assert torch.equal(found, found[:, :1].expand_as(found))
    weights = torch.cat([target.weight for target in edge.targets]).abs().amax(0).view(-1, 4).amax(1)
    torch.testing.assert_close(found[:, 0], (edge.largest.view(-1, 4).amax(1) / weights).sqrt())


def test_a_channel_without_inputs_is_left_alone() -> None:
    edge = edge_of(torch.arange(COLUMNS))
    edge.largest[5] = 0
    assert float(SmoothQuant(0.5).scales(edge, torch.float32)[5]) == 1


def integer_products(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What an int8 kernel gives: codes of both, multiplied as integers, and the scales afterwards.

    Codes are found in float32, as everywhere: the largest value of a row lies half-way between two by construction, and
    in another precision would fall to the other.
    """
    token, row = inputs.abs().amax(1, keepdim=True) / 127.5, weight.abs().amax(1, keepdim=True) / 127.5
    left, right = ((part / scale).round().clamp(-128, 127).long() for part, scale in ((inputs, token), (weight, row)))
    return (left @ right.T) * token.double() * row.double().T


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_the_search_takes_the_strength_whose_integer_products_are_nearest(spread: float) -> None:
    edge = edge_of(torch.arange(COLUMNS))
    assert edge.sample is not None
    # Channels from alike to thousands of times each other.
    factors = torch.exp(spread * torch.randn(COLUMNS, generator=torch.Generator().manual_seed(1)))
    sample = edge.sample * factors
    edge = replace(edge, sample=sample, largest=sample.abs().amax(0), mean=sample.abs().mean(0))

    def loss(scale: torch.Tensor) -> float:
        total = 0.0
        for target in edge.targets:
            expected = sample.double() @ target.weight.double().T
            error = (integer_products(sample / scale, target.weight.float() * scale) - expected).square().sum(1)
            energy = expected.square().sum(1)
            total += float((error / energy.clamp(min=float(energy.median()))).mean())
        return total

    strengths = [SmoothQuant(step / 20).scales(edge, torch.float32) for step in range(21)]
    losses = [loss(scale) for scale in (torch.ones(COLUMNS), *strengths)]
    found = SmoothQuant().scales(edge, torch.float32)
    assert loss(found) == pytest.approx(min(losses), rel=1e-3)
    assert min(losses) < 0.9 * max(losses)


@pytest.fixture
def with_outliers(tmp_path: Path) -> Path:
    """A model whose norms blow four channels up by fifty, and whose linears make them small again."""
    source = tiny_model(tmp_path / "source", "llama")
    path = source / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            tensor[:4] *= 50
        elif any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            tensor[:, :4] /= 50
    save_file(tensors, path, {"format": "pt"})
    return source


def distance(source: Path, artifact: Path) -> float:
    """Relative error of the logits, activations quantized as runtimes do."""
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    dense = open_dense(SafetensorsCheckpoint(artifact))
    errors = []
    for window, logits in zip(WINDOWS, stream_logits(dense, WINDOWS, device=torch.device("cpu")), strict=True):
        with torch.no_grad():
            expected = model(input_ids=window).logits
        errors.append(float((logits - expected).norm() / expected.norm()))
    return max(errors)


def quantize(source: Path, output: Path, **options: Any) -> Path:
    quantize_checkpoint(SafetensorsCheckpoint(source), output, scheme=W8A8, windows=WINDOWS, **options)
    return output


def test_outliers_of_activations_cost_little(with_outliers: Path, tmp_path: Path) -> None:
    plain = distance(with_outliers, quantize(with_outliers, tmp_path / "plain", method="gptq"))
    for then in ("nearest", "gptq"):
        output = quantize(with_outliers, tmp_path / then, method="smoothquant", options={"then": then})
        assert distance(with_outliers, output) < 0.5 * plain


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt_neox", "opt-untied"])
def test_artifacts_are_near_the_original(tiny: Tiny, tmp_path: Path, name: str) -> None:
    assert distance(tiny(name), quantize(tiny(name), tmp_path / "out", method="smoothquant")) < 0.05


def test_wrong_options_are_refused() -> None:
    for options in ({"strength": 1.5}, {"strength": "most"}, {"then": "hqq"}):
        with pytest.raises(UnsupportedError, match="strength is 0 to 1 or search, then is nearest or gptq"):
            load_method("smoothquant", options)
