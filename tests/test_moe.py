"""The mixture that computes what a dense model does: quantized, it is what the dense model is, expert by expert."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import cast

import pytest
import torch
from support.tiny_architectures import ids
from support.tiny_models import tiny_llama_dir

from llmconvert.quantize.catalog.methods import METHODS
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

WINDOWS = ids((64,) * 8, seed=5)


@pytest.fixture
def moe(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    yield importlib.import_module("moe")


def test_its_experts_have_the_codes_of_a_dense_solve_that_knows_as_little(
    moe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is GPTQ on the dense model, with four diagonal blocks of a down projection's Hessian left.

    In float32: in bfloat16 the experts' outputs are rounded one by one, which moves activations, and codes after them.
    """
    dense = tiny_llama_dir(tmp_path / "dense", hidden_size=64, intermediate_size=256)
    moe.make_mixture(dense, tmp_path / "mixture", "exact", 4, 0.0, 0)
    monkeypatch.setitem(cast(dict[str, str], METHODS), "gptq-cut", "moe:CutGptq")
    for name, method in (("dense", "gptq-cut"), ("mixture", "gptq")):
        with SafetensorsCheckpoint(tmp_path / name) as source:
            scheme = Scheme.parse("w4a16-g32")
            quantize_checkpoint(
                source,
                tmp_path / f"{name}-4",
                method=method,
                scheme=scheme,
                windows=WINDOWS,
                options={"shrinkage": 0.0},
            )
    with SafetensorsCheckpoint(tmp_path / "dense-4") as first, SafetensorsCheckpoint(tmp_path / "mixture-4") as second:
        one, other = open_dense(first), open_dense(second)
        for layer in range(2):
            for theirs, ours in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
                prefix = f"model.layers.{layer}."
                whole = one[f"{prefix}mlp.{ours}.weight"]
                parts = [other[f"{prefix}block_sparse_moe.experts.{expert}.{theirs}.weight"] for expert in range(4)]
                joined = torch.cat(parts, 1) / 4 if ours == "down_proj" else torch.cat(parts)
                unlike = float((joined != whole).float().mean())
                # One code that falls otherwise in the first block moves what comes to the second.
                assert unlike < (0.001, 0.05)[layer], (layer, ours)
