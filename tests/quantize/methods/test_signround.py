"""SignRound: its gradients against autograd on a plain formula, and what it gains over where it starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.quantized import random_weight
from support.tiny_architectures import ids

from llmconvert.engine.divergence import SideBySide
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.methods import signround
from llmconvert.quantize.methods.base import BlockQuantizer, Target, load_method
from llmconvert.quantize.methods.gptq import Gptq
from llmconvert.quantize.methods.rtn import Rtn
from llmconvert.quantize.methods.signround import _Learned
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

CPU = torch.device("cpu")
WINDOWS = ids((32, 24, 32, 32))
Tiny = Callable[..., Path]


def learned(name: str = "w4a16-g16-asym") -> tuple[Target, _Learned]:
    target = Target("block.0.linear", random_weight(20, 64), Scheme.parse(name))
    start = Rtn(search=True).quantize([target], None, torch.float32)[target.name].tensor
    return target, _Learned(target, start, "weight")


FLOATS = ["nvfp4a16", "mxfp4a16", "fp8-dynamic", "w8a16-g128x128-fp8"]


@pytest.mark.parametrize("name", ["w4a16-g16-asym", "w3a16-g32", "w2a16", *FLOATS])
def test_training_starts_at_the_codes_it_is_given(name: str) -> None:
    _, weight = learned(name)
    found = weight.quantized()
    assert torch.equal(found.codes.view(torch.uint8), weight.start.codes.view(torch.uint8))
    assert torch.equal(found.scale, weight.start.scale)
    torch.testing.assert_close(weight.value.detach(), weight.start.dequantize(torch.float32))


def by_autograd(target: Target, weight: _Learned, offset: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The dequantized weight as a function of offsets and factors, with the rounding passed straight through."""
    scheme = target.scheme
    rows, groups = weight.start.scale.shape
    first = weight.start.scale.unsqueeze(-1)
    zero = torch.zeros_like(first) if weight.start.zero is None else weight.start.zero.float().unsqueeze(-1)
    raw = target.weight.view(rows, groups, -1) / (first * factor) + zero + offset
    codes = (raw + (raw.round() - raw).detach()).clamp(*scheme.number.limits)
    return ((codes - zero) * (first * factor)).flatten(1)


@pytest.mark.parametrize("at_once", [64, 1 << 17], ids=["row by row", "whole"])
@pytest.mark.parametrize("name", ["w4a16-g16-asym", "w3a16-g32", "w2a16", "w2a16-g16"])
def test_steps_go_against_the_sign_of_the_gradient(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signround, "_WEIGHTS_AT_ONCE", at_once)
    target, weight = learned(name)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        offset, factor = (part.clone().requires_grad_() for part in weight.state())
        expected = by_autograd(target, weight, offset, factor)
        torch.testing.assert_close(weight.value.detach(), expected.detach())
        gradient = torch.randn((20, 64), generator=generator)
        by_offset, by_factor = torch.autograd.grad(expected, [offset, factor], gradient)
        weight.value.grad = gradient
        weight.step(0.1, 0.05)
        torch.testing.assert_close(weight.offset, (offset - 0.1 * by_offset.sign()).detach())
        torch.testing.assert_close(weight.factor, (factor - 0.05 * by_factor.sign()).detach().clamp(0.5, 1.2))
        assert weight.value.grad is None


@pytest.mark.parametrize("name", ["w3a16-g32", *FLOATS])
def test_values_are_what_is_written(name: str) -> None:
    _, weight = learned(name)
    weight.value.grad = torch.randn((20, 64), generator=torch.Generator().manual_seed(2))
    weight.step(0.3, 0.1)
    assert torch.equal(weight.value.detach(), weight.quantized().dequantize(torch.float32))


@pytest.mark.parametrize("mode", ["lockstep", "replay"])
@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "phi3", "opt"])
def test_blocks_come_nearer_to_the_original_than_where_they_started(
    tiny: Tiny, name: str, mode: str, tmp_path: Path
) -> None:
    source = tiny(name)
    errors = {}
    for method, options in (("gptq", {}), ("signround", {"steps": 40, "batch": 2})):
        output = tmp_path / method
        quantize_checkpoint(
            SafetensorsCheckpoint(source),
            output,
            method=method,
            scheme=Scheme.parse("w3a16-g32"),
            windows=WINDOWS,
            options=options,
            mode="replay" if mode == "replay" else "lockstep",
        )
        original, ours = SafetensorsCheckpoint(source), open_dense(SafetensorsCheckpoint(output))
        with SideBySide(original, [ours], WINDOWS, device=CPU) as both:
            for _ in both.logits():
                pass
            errors[method] = both.divergences()[-1].error
    assert errors["signround"] < 0.95 * errors["gptq"]


@pytest.mark.parametrize("start", ["gptaq", "gptq"])
def test_training_starts_where_the_method_by_itself_ends(tiny: Tiny, start: str, tmp_path: Path) -> None:
    """Block by block as linear by linear: without a step, the artifact is that of the method, codes and all."""
    options = {"gptaq": {}, "gptq": {"sweeps": 2}}[start]
    found = []
    for method, given in ((start, options), ("signround", {"steps": 0, "start": start})):
        scheme, source = Scheme.parse("w3a16-g32"), SafetensorsCheckpoint(tiny("llama"))
        output = tmp_path / method
        quantize_checkpoint(source, output, method=method, scheme=scheme, windows=WINDOWS, options=given)
        found.append((output / "model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_it_is_a_block_quantizer_and_gptq_is_none() -> None:
    assert isinstance(load_method("signround", {"steps": 3}), BlockQuantizer)
    assert not isinstance(Gptq(), BlockQuantizer)
