"""Configs that no model can have: each is one line, found before any work."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmconvert.api import quantize_model
from llmconvert.convert.inspection import inspect_model
from llmconvert.engine.architecture.config import read_config
from llmconvert.errors import CheckpointError, UnsupportedError

Tiny = Callable[..., Path]

#: Changes of a Llama's config that `quantize` has to refuse.
HOSTILE: dict[str, dict[str, Any]] = {
    "unknown rope type": {"rope_parameters": {"rope_type": "spiral", "rope_theta": 10000.0}},
    "rope type of another kind": {"rope_parameters": {"rope_type": ["yarn"], "rope_theta": 10000.0}},
    "rope of text": {"rope_parameters": "yarn"},
    "rope without its factor": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}},
    "rope factor of zero": {"rope_parameters": {"rope_type": "linear", "factor": 0.0, "rope_theta": 10000.0}},
    "rope factor below zero": {"rope_parameters": {"rope_type": "linear", "factor": -2.0, "rope_theta": 10000.0}},
    "rope factors": {"rope_parameters": {"rope_type": "linear", "factor": [2.0], "rope_theta": 10000.0}},
    "infinite rope factor": {"rope_parameters": {"rope_type": "linear", "factor": math.inf, "rope_theta": 10000.0}},
    "rope base of zero": {"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}},
    "heads that don't divide": {"num_attention_heads": 5},
    "heads of zero": {"num_attention_heads": 0},
    "heads of text": {"num_attention_heads": "four"},
    "key-value heads that don't divide": {"num_key_value_heads": 3},
    "odd head size": {"head_dim": 15},
    "no epsilon": {"rms_norm_eps": None},
    "negative epsilon": {"rms_norm_eps": -1.0},
    "epsilon that is no number": {"rms_norm_eps": math.nan},
    "epsilon of text": {"rms_norm_eps": "small"},
    "no layers": {"num_hidden_layers": 0},
    "negative layers": {"num_hidden_layers": -3},
    "a billion layers": {"num_hidden_layers": 10**9},
    "more layers than tensors": {"num_hidden_layers": 5000},
    "a billion labels": {"num_labels": 10**9},
    "a billion digits": {"hidden_size": 10**300},
    "no vocabulary": {"vocab_size": 0},
    "negative vocabulary": {"vocab_size": -1},
    "padding outside the vocabulary": {"pad_token_id": 10**6},
    "another width": {"hidden_size": 96},
    "unknown activation": {"hidden_act": "wobble"},
    "no activation": {"hidden_act": None},
    "layer types of another depth": {"layer_types": ["full_attention"]},
    "model type of another kind": {"model_type": ["llama"]},
    "no model type": {"model_type": None},
}


def changed(source: Path, directory: Path, change: dict[str, Any]) -> Path:
    shutil.copytree(source, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **change}))
    return directory


def test_what_is_changed_is_quantized_as_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    model = changed(tiny_llama, tmp_path / "model", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}})
    assert quantize_model(model, tmp_path / "out", method="rtn", scheme="w8a16-g32").layers == 14


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_config_is_one_line(tiny_llama: Path, tmp_path: Path, case: str) -> None:
    model = changed(tiny_llama, tmp_path / "model", HOSTILE[case])
    started = time.process_time()
    with pytest.raises((CheckpointError, UnsupportedError), match=r"config\.json|architecture") as caught:
        quantize_model(model, tmp_path / "out", method="rtn", scheme="w8a16-g32")
    assert time.process_time() - started < 10
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "case", ["a billion layers", "more layers than tensors", "rope factor of zero", "a billion labels"]
)
def test_inspect_refuses_what_would_take_for_ever(tiny_llama: Path, tmp_path: Path, case: str) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        inspect_model(str(changed(tiny_llama, tmp_path / "model", HOSTILE[case])))


def test_a_setting_is_named_by_its_path() -> None:
    config = {"model_type": "gemma3_text", "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 0}}}
    with pytest.raises(CheckpointError, match=r"config\.json: rope_parameters\.full_attention\.factor is 0, expected"):
        read_config(config)
    factors = {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [1.0, 0.0]}
    with pytest.raises(CheckpointError, match=r"rope_parameters\.long_factor\[1\] is 0\.0"):
        read_config({"model_type": "llama", "rope_parameters": {**factors, "original_max_position_embeddings": 128}})
    with pytest.raises(CheckpointError, match=r"text_config\.num_hidden_layers is 10000000… \(31 digits\)"):
        read_config({"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**30}})


def test_what_a_class_raises_is_ours(tiny_llama: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    with pytest.raises(UnsupportedError, match=r"config\.json: model type 'llama': "):
        read_config({**config, "num_attention_heads": "four"})
    assert read_config(config).rms_norm_eps == config["rms_norm_eps"]
