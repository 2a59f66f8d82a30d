"""What is known about an architecture, against transformers' own models of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.tiny_architectures import ARCHITECTURES
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from llmconvert.engine.architecture.config import build_config
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.errors import CheckpointError, UnsupportedError

SMALL = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 4, "vocab_size": 100}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 48, "vocab_size": 100}


def declared(name: str) -> dict[str, Any]:
    """``config.json`` of a tiny architecture, written by transformers."""
    found = ARCHITECTURES[name]
    values: dict[str, Any] = AutoConfig.for_model(found.model_type, **copy.deepcopy(dict(found.config))).to_dict()
    return values


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_widths_and_heads_are_those_of_the_model(name: str) -> None:
    config = declared(name)
    found = Architecture.of(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_config(config))
    assert found.vocab_size == model.get_input_embeddings().weight.shape[0]
    linears = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    inner = {part.in_features for name, part in linears.items() if name.endswith(("down_proj", "fc2", "4h_to_h"))}
    assert inner == {found.inner_size}
    queries, keys = found.query_heads * found.head_dim, found.kv_heads * found.head_dim
    for name, part in linears.items():
        if name.endswith(("qkv_proj", "query_key_value")):
            assert part.out_features == queries + 2 * keys
        elif name.endswith("q_proj"):
            assert (part.in_features, part.out_features) == (found.hidden_size, queries)
        elif name.endswith(("k_proj", "v_proj")):
            assert part.out_features == keys
    head = model.get_output_embeddings()
    assert found.tied == (head.weight is model.get_input_embeddings().weight)
    layers = getattr(model, model.base_model_prefix)
    blocks = next(part for part in layers.modules() if isinstance(part, nn.ModuleList))
    assert len(blocks) == found.layers == len(found.layer_kinds)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_config_is_left_as_it_is(name: str) -> None:
    config = declared(name)
    before = copy.deepcopy(config)
    Architecture.of(config)
    assert config == before


def test_what_classes_complete_in_place_does_not_reach_the_checkpoint() -> None:
    config = {**SMALL, "model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    before = copy.deepcopy(config)
    assert Architecture.of(config).rope["rope_type"] == "linear"
    assert config == before


@pytest.mark.parametrize(
    ("model_type", "settings", "kv_heads", "multi_query_only"),
    [
        ("llama", {"num_key_value_heads": 2}, 2, False),
        ("llama", {}, 8, False),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, 2, False),
        ("falcon", {"multi_query": True}, 1, True),
        ("falcon", {"multi_query": False}, 8, True),
        ("gpt_bigcode", {"multi_query": True}, 1, True),
        ("gpt_bigcode", {"multi_query": False}, 8, True),
    ],
)
def test_key_value_heads_under_every_name(
    model_type: str, settings: dict[str, Any], kv_heads: int, multi_query_only: bool
) -> None:
    found = Architecture.of({**SMALL, "model_type": model_type, **settings})
    assert (found.kv_heads, found.multi_query_only) == (kv_heads, multi_query_only)
    assert found.has_kv_heads_setting
    assert not Architecture.of(GPT2).has_kv_heads_setting


def test_names_of_an_older_family() -> None:
    found = Architecture.of(GPT2)
    assert (found.hidden_size, found.query_heads, found.layers, found.context) == (64, 4, 2, 48)
    assert found.inner_size == 4 * 64
    assert found.rope_theta is None and not found.uses_alibi


def test_the_decoder_of_a_model_with_parts() -> None:
    whole = {"model_type": "gemma3", "text_config": {**SMALL, "model_type": "gemma3_text"}}
    assert (Architecture.of(whole).model_type, Architecture.of(whole).hidden_size) == ("gemma3_text", 64)


def test_parameters_of_full_attention_stand_for_a_model_with_several_sets() -> None:
    found = Architecture.of({**SMALL, "model_type": "gemma3_text", "head_dim": 8})
    assert set(found.rope_sets) == {"sliding_attention", "full_attention"}
    assert found.rope_theta == 1_000_000
    assert found.reach("sliding_attention") == found.window and found.reach("full_attention") is None


@pytest.mark.parametrize(
    ("model_type", "settings", "rotary"),
    [
        ("llama", {}, [True] * 4),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, [True, False, True, False]),
        ("cohere2", {"layer_types": ALTERNATING}, [True, False] * 2),
        ("exaone4", {"layer_types": ALTERNATING, "sliding_window": 8}, [True, False] * 2),
        ("exaone4", {"layer_types": ["full_attention"] * 4, "sliding_window": None}, [True] * 4),
        ("falcon", {"alibi": True}, [False] * 4),
        ("bloom", {}, [False] * 4),
    ],
)
def test_layers_without_rotary_positions(model_type: str, settings: dict[str, Any], rotary: list[bool]) -> None:
    found = Architecture.of({**SMALL, "model_type": model_type, **settings})
    assert [found.has_rotary(layer) for layer in range(4)] == rotary


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "default"}, 512),
        ({"rope_type": "linear", "factor": 4.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}, 100),
    ],
)
def test_the_trained_length(rope: dict[str, Any], length: int) -> None:
    rope = {"rope_theta": 10000.0, **rope}
    config = {**SMALL, "model_type": "llama", "max_position_embeddings": 512, "rope_parameters": rope}
    assert Architecture.of(config).trained_length == length


def test_a_compressed_cache_and_experts() -> None:
    settings = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "n_routed_experts": 8, "moe_intermediate_size": 32}
    found = Architecture.of({**SMALL, "model_type": "deepseek_v3", **settings, "num_experts_per_tok": 2})
    assert (found.latent_size, found.experts, found.inner_size) == (24, 8, 64)


def test_what_a_config_lacks_is_missed_when_it_is_asked_for() -> None:
    mamba = Architecture.of({"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2})
    assert (mamba.layers, mamba.context) == (2, None)
    with pytest.raises(CheckpointError, match=r"model type 'mamba': num_attention_heads"):
        _ = mamba.kv_heads


def test_several_models_in_one_are_told() -> None:
    with pytest.raises(UnsupportedError, match=r"'blt' is several models in one.*num_hidden_layers.*encoder_config"):
        _ = Architecture.of({"model_type": "blt"}).layers


def test_settings_that_the_class_refuses_are_an_error_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"model type 'llama': .*not a multiple"):
        Architecture.of({**SMALL, "model_type": "llama", "hidden_size": 65})
    with pytest.raises(UnsupportedError, match=r"'new_model' is not known .*never run"):
        Architecture.of({"model_type": "new_model", "auto_map": {}})
    with pytest.raises(UnsupportedError, match="says no model_type"):
        Architecture.of({})
