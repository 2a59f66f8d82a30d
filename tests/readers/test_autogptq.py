"""The GPTQ layout in the package that defined it: AutoGPTQ 0.7.1's QuantLinear computes our product."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from environments import SCRIPTS, interpreter
from support.quantized import random_tensor

from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.numbers import Int
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor

SCHEMES = [Scheme(Int(bits, symmetric), 32) for bits in (2, 3, 4, 8) for symmetric in (True, False)]


@pytest.mark.slow
def test_the_product_is_ours(tmp_path: Path) -> None:
    python = interpreter("autogptq")
    tensors: dict[str, QuantizedTensor] = {}
    stored: dict[str, np.ndarray] = {}
    for scheme in SCHEMES:
        name = str(scheme)
        tensor = random_tensor(scheme, 64, 128, torch.float16)
        if tensor.zero is not None:
            # Where a zero point is 0, AutoGPTQ and its successor disagree (see the format's description).
            lowest = torch.tensor(int(scheme.number.limits[0]) + 1, dtype=torch.int8)
            tensor = QuantizedTensor(tensor.codes, tensor.scale, tensor.zero.maximum(lowest), scheme)
        tensors[name] = tensor
        stored |= {f"{name}/{key[2:]}": part.numpy() for key, part in load_format("gptq").pack("l", tensor).items()}
        stored[f"{name}/bits"] = np.array(scheme.bits)
    inputs = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "in.npz", allow_pickle=False, inputs=inputs.numpy(), **stored)
    subprocess.run(
        [python, SCRIPTS / "run_autogptq.py", tmp_path / "in.npz", tmp_path / "out.npz"], check=True, cwd=tmp_path
    )
    products = np.load(tmp_path / "out.npz")
    for name, tensor in tensors.items():
        expected = inputs @ tensor.dequantize(torch.float32).T
        assert torch.allclose(torch.from_numpy(products[name]), expected, rtol=1e-4, atol=1e-3), name
