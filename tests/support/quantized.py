"""Random weights, calibration statistics and quantized tensors for the tests of quantization."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llmconvert.engine.statistics import Hessian
from llmconvert.quantize.numbers import Float, Levels, Number
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

__all__ = ["every_code", "hessian_of", "random_inputs", "random_tensor", "random_weight", "write_quantized"]


def every_code(number: Number) -> torch.Tensor:
    """All codes of a number, in the order of their bits."""
    if isinstance(number, Float):
        every = torch.arange(1 << number.bits).to(torch.uint8).view(number.code_dtype)
        return every[torch.isfinite(every.float())]
    low, high = (0, len(number.levels) - 1) if isinstance(number, Levels) else map(int, number.limits)
    return torch.arange(low, high + 1).to(torch.int8)


def random_tensor(
    scheme: Scheme, rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> QuantizedTensor:
    """Codes, scales and zero points of every value their types allow."""
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(columns)
    low, high = map(int, scheme.number.limits)
    codes = torch.randint(low, high + 1, (rows, columns), generator=generator, dtype=torch.int64).to(torch.int8)
    codes = codes.view(scheme.number.code_dtype) if scheme.number.even else codes
    scale = torch.rand((rows, groups), generator=generator).mul_(0.1).add_(0.01).to(dtype)
    if isinstance(scheme.number, Float):
        codes = torch.randn((rows, columns), generator=generator).to(scheme.number.code_dtype)
        return QuantizedTensor(codes, scale, None, scheme)
    if scheme.number.minima:
        offset = torch.randn((rows, groups), generator=generator).to(dtype)
        return QuantizedTensor(codes, scale, None, scheme, offset=offset)
    zero = torch.randint(low, high + 1, (rows, groups), generator=generator, dtype=torch.int64).to(torch.int8)
    return QuantizedTensor(codes, scale, None if scheme.symmetric else zero, scheme)


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Normally distributed, with a few outliers and an offset per row, so that zero points matter."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.1 * torch.randn((rows, columns), generator=generator)
    weight += 0.05 * torch.randn((rows, 1), generator=generator)
    outliers = torch.rand((rows, columns), generator=generator) < 0.005
    return torch.where(outliers, 5 * weight, weight)


def random_inputs(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated activations, some channels much larger than others, as transformers have them."""
    generator = torch.Generator().manual_seed(1000 + seed)
    mixing = torch.randn((columns, columns), generator=generator, dtype=torch.float64) / columns**0.5
    strength = torch.exp(torch.randn(columns, generator=generator, dtype=torch.float64))
    values = torch.randn((tokens, columns), generator=generator, dtype=torch.float64)
    return (values @ (torch.eye(columns, dtype=torch.float64) + mixing)) * strength


def hessian_of(inputs: torch.Tensor, dtype: torch.dtype = torch.float32) -> Hessian:
    """Their second moment, as the engine accumulates it but in any precision."""
    return Hessian((inputs.T @ inputs / len(inputs)).to(dtype), len(inputs))


def write_quantized(
    directory: Path, tensors: dict[str, torch.Tensor], declared: Mapping[str, Any]
) -> SafetensorsCheckpoint:
    """A checkpoint of these tensors alone, with a ``quantization_config``."""
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = {"dtype": "bfloat16", "quantization_config": declared}
    (directory / "config.json").write_text(json.dumps(config))
    return SafetensorsCheckpoint(directory)
