"""Linears without a weight: which classes fail over them where they initialize, and by which."""

from __future__ import annotations

import pytest
import torch
from support.tiny_checkpoints import tiny_config
from torch import nn

from llmconvert.engine.architecture.loading.initialization import weights_asked_for
from llmconvert.engine.architecture.model import build_meta_model


@pytest.mark.parametrize(
    ("model_type", "asked"),
    [
        ("llama", set()),
        ("nanochat", {"self_attn.o_proj"}),
        ("mamba2", {"mixer.out_proj"}),
        (
            "falcon",
            {"self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
        ),
    ],
)
def test_the_linears_that_a_class_sets_by_name_are_found(model_type: str, asked: set[str]) -> None:
    model = build_meta_model(tiny_config(model_type), torch.float32, "eager")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "head" not in name]
    state = torch.get_rng_state()
    found = weights_asked_for(model, linears)
    assert {".".join(name.rsplit(".", 2)[-2:]) for name in found} == asked
    assert torch.equal(torch.get_rng_state(), state)
