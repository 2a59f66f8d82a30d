"""Reading ``config.json``, and the changes that steps make to it, read back by transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_architectures import ARCHITECTURES
from transformers import AutoConfig

from llmconvert.engine.architecture.config import (
    build_config,
    declared_dtype,
    declared_number,
    declares_tied_embeddings,
    language_model,
    with_kv_heads,
    with_rope,
    with_size,
    with_split_embeddings,
)
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.engine.architecture.model import build_meta_model, find_blocks
from llmconvert.errors import UnsupportedError

SMALL = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 4, "vocab_size": 100}


@pytest.mark.parametrize(
    ("model_type", "settings", "kv_heads"),
    [
        ("llama", {"num_key_value_heads": 4}, 2),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 4}, 2),
        ("falcon", {"multi_query": False}, 1),
        ("gpt_bigcode", {"multi_query": False}, 1),
    ],
)
def test_fewer_key_value_heads_are_declared_as_the_family_does(
    model_type: str, settings: dict[str, Any], kv_heads: int
) -> None:
    config = {**SMALL, "model_type": model_type, **settings}
    before = dict(config)
    assert Architecture.of(with_kv_heads(config, kv_heads)).kv_heads == kv_heads
    assert config == before


def test_the_language_model_in_a_config_with_parts() -> None:
    whole: dict[str, Any] = {"model_type": "gemma3", "vocab_size": 7, "text_config": {"vocab_size": 9}}
    assert declared_number(whole, "vocab_size") == 9
    assert declared_number(whole, "hidden_size") is None
    assert language_model({"text_config": None, "vocab_size": 7}) == {"text_config": None, "vocab_size": 7}
    changed = with_rope(whole, {"rope_type": "yarn"}, 64)
    assert changed["text_config"] == {
        "vocab_size": 9,
        "rope_parameters": {"rope_type": "yarn"},
        "max_position_embeddings": 64,
    }
    assert "rope_parameters" not in whole["text_config"], "the config that was given stays as it is"


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"dtype": None}, None),
    ],
)
def test_the_declared_dtype(config: dict[str, Any], dtype: str | None) -> None:
    assert declared_dtype(config) == dtype


def test_tied_embeddings() -> None:
    config = {**SMALL, "model_type": "llama", "tie_word_embeddings": True}
    assert declares_tied_embeddings(config) is True and declares_tied_embeddings(SMALL) is None
    assert declares_tied_embeddings(with_split_embeddings(config)) is False
    assert not Architecture.of(with_split_embeddings(config)).tied


def test_the_first_layers_of_a_model() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    config = {**SMALL, "model_type": "gemma2", "head_dim": 8, "layer_types": kinds, "eos_token_id": 99}
    found = Architecture.of(with_size(config, 4, layers=2, vocabulary=10))
    assert (found.layers, found.vocab_size, found.layer_kinds) == (2, 10, tuple(kinds[:2]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "t5"}, "'t5' has no causal language model"),
        ({"model_type": "bart", "vocab_size": 100}, "'bart' is an encoder-decoder"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "x"}}, "'own' is not known .* code from its repository"),
    ],
)
def test_models_that_are_no_decoders_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        build_config(values)


def test_a_class_that_cannot_be_built_is_an_error_by_name() -> None:
    config = build_config({**SMALL, "model_type": "llama"})
    config.hidden_act = "no_such_activation"
    with pytest.raises(UnsupportedError, match=r"architecture 'llama' cannot be built: .*no_such_activation"):
        build_meta_model(config, torch.float32, "sdpa")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_are_found(name: str) -> None:
    found = ARCHITECTURES[name]
    config = build_config(AutoConfig.for_model(found.model_type, **dict(found.config)).to_dict())
    model = build_meta_model(config, torch.float32, "sdpa")
    ((where, blocks),) = find_blocks(model).items()
    assert model.get_submodule(where) is blocks
    assert len(blocks) == Architecture.of(config).layers
