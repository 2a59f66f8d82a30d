"""SignRound: its gradients against autograd on a plain formula, and what it gains over where it starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantized import random_weight
from tiny_architectures import ids

from llmconvert.checkpoint import SafetensorsCheckpoint
from llmconvert.engine.divergence import SideBySide
from llmconvert.quantize.base import BlockQuantizer, Target, load_method
from llmconvert.quantize.gptq import Gptq
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.reader import open_dense
from llmconvert.quantize.rtn import Rtn
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.signround import _Learned

CPU = torch.device("cpu")
WINDOWS = ids((32, 24, 32, 32))
Tiny = Callable[..., Path]


def learned(name: str = "w4a16-g16-asym") -> tuple[Target, _Learned]:
    target = Target("block.0.linear", random_weight(20, 64), Scheme.parse(name))
    start = Rtn(search=True).quantize([target], None, torch.float32)[target.name].tensor
    return target, _Learned(target, start, "block.0.")


@pytest.mark.parametrize("name", ["w4a16-g16-asym", "w3a16-g32", "w2a16"])
def test_training_starts_at_the_codes_it_is_given(name: str) -> None:
    _, weight = learned(name)
    found = weight.quantized(torch.float32)
    assert torch.equal(found.codes, weight.start.codes) and torch.equal(found.scale, weight.start.scale)
    torch.testing.assert_close(weight.value(torch.float32), weight.start.dequantize(torch.float32))
    assert weight.parameter == "linear.weight"


def test_steps_go_against_the_sign_of_the_gradient() -> None:
    """Offset: scale times the gradient where the code is inside its range, nothing outside."""
    _, weight = learned("w2a16-g16")
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn((20, 64), generator=generator)
    before = weight.offset.detach().clone()
    raw = (weight._scaled + weight._zero + weight.offset).detach()
    inside = (raw.round() >= -2) & (raw.round() <= 1)
    weight.step(weight.value(torch.float32), gradient, 0.01, 0.0)
    expected = before - 0.01 * gradient.view_as(before).sign() * inside
    torch.testing.assert_close(weight.offset.detach(), expected)


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
        with SideBySide(original, ours, WINDOWS, device=CPU) as both:
            for _ in both.logits():
                pass
            errors[method] = both.divergences[-1].error
    assert errors["signround"] < 0.95 * errors["gptq"]


def test_it_is_a_block_quantizer_and_gptq_is_none() -> None:
    assert isinstance(load_method("signround", {"steps": 3}), BlockQuantizer)
    assert not isinstance(Gptq(), BlockQuantizer)
