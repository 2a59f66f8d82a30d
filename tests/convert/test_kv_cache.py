"""The cache's formula against transformers' own cache, filled by real forward passes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.tiny_architectures import ARCHITECTURES
from transformers import AutoConfig, AutoModelForCausalLM

from llmconvert.convert.kv_cache import cache_layout
from llmconvert.engine.architecture.decoder import Architecture

SMALL = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 4, "vocab_size": 100}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (found.model_type, dict(found.config)) for name, found in ARCHITECTURES.items()},
    "mqa": ("llama", {**SMALL, "num_key_value_heads": 1}),
    "bloom": ("bloom", {"hidden_size": 64, "n_head": 4, "n_layer": 2, "vocab_size": 100}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 100}),
    "falcon": ("falcon", SMALL),
    "gemma3": ("gemma3_text", {**SMALL, "head_dim": 16, "num_key_value_heads": 2, "sliding_window": 8}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("context", "batch"), [(5, 2), (40, 1)])
def test_the_formula_is_what_a_real_cache_holds(name: str, context: int, batch: int) -> None:
    model_type, settings = MODELS[name]
    config = AutoConfig.for_model(model_type, **copy.deepcopy(settings))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.inference_mode():
        cache = model(torch.randint(90, (batch, context)), use_cache=True).past_key_values
    held = sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))
    assert held == cache_layout(Architecture.of(config)).nbytes(context, batch, 4)


def test_what_another_number_of_heads_would_take() -> None:
    config = AutoConfig.for_model("llama", **SMALL, num_key_value_heads=8)
    assert cache_layout(Architecture.of(config)).nbytes(100) == 8 * cache_layout(Architecture.of(config), 1).nbytes(100)
