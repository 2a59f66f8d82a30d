"""Reading attention geometry, and refusing by name what cannot be merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.disguised_heads import grouped_model
from transformers import AutoConfig, AutoModelForCausalLM

from llmconvert.convert.gqa.geometry import Rotary, read_geometry, require_kv_heads
from llmconvert.convert.gqa.weights import attention_tensors, layer_tensors, read_layer
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.storage.directory import SINGLE_NAME

Tiny = Callable[..., Path]


def test_geometry_of_a_llama(tiny: Tiny) -> None:
    geometry = read_geometry(SafetensorsCheckpoint(tiny("llama")))
    assert (geometry.query_heads, geometry.kv_heads, geometry.head_dim, geometry.layers) == (4, 2, 16, 3)
    assert geometry.rotary == (Rotary("half", 16),) * 3
    assert geometry.projections[2].key == "model.layers.2.self_attn.k_proj"
    assert geometry.kv_bytes_per_token(2) == 2 * 3 * 2 * 16 * 2
    assert geometry.kv_bytes_per_token(1) == geometry.kv_bytes_per_token(2) // 2


def test_layers_without_rotary_are_known(tmp_path: Path) -> None:
    path = grouped_model(tmp_path / "model", "smollm3", head_dim=8, no_rope_layers=[1, 0])
    assert [rotary.dims for rotary in read_geometry(SafetensorsCheckpoint(path)).rotary] == [8, 0]


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gemma2"])
def test_weights_survive_being_taken_apart(name: str, tiny: Tiny) -> None:
    checkpoint = SafetensorsCheckpoint(tiny(name))
    geometry = read_geometry(checkpoint)
    for layer in range(geometry.layers):
        tensors = layer_tensors(checkpoint, geometry, layer, read_layer(checkpoint, geometry, layer))
        assert sorted(tensors) == sorted(attention_tensors(checkpoint, geometry, layer))
        assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neox", "bloom", "mpt"])
def test_architectures_without_the_setting_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    names = {
        "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64},
        "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64},
        "mpt": {"d_model": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 64},
        "opt": {**sizes, "ffn_dim": 32, "word_embed_proj_dim": 32},
    }
    config = AutoConfig.for_model(kind, **names.get(kind, {**sizes, "intermediate_size": 32}))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=rf"'{kind}'.*no setting for the number of key-value heads"):
        read_geometry(SafetensorsCheckpoint(tmp_path))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("biogpt", "no setting for the number of key-value heads"),
        ("bitnet", "normalizes attention outputs"),
        ("deepseek_v3", "latent"),
        ("qwen3_next", "gate"),
        ("gemma3n_text", "known are .*llama"),
    ],
)
def test_other_architectures_are_refused_with_the_reason(kind: str, reason: str, tmp_path: Path) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / SINGLE_NAME)
    with pytest.raises(UnsupportedError, match=rf"{kind!r}.*{reason}"):
        read_geometry(SafetensorsCheckpoint(tmp_path))


def test_settings_that_undo_the_symmetry_are_refused(tmp_path: Path) -> None:
    path = grouped_model(tmp_path / "model", "phi", hidden_size=64, qk_layernorm=True)
    with pytest.raises(UnsupportedError, match="qk_layernorm"):
        read_geometry(SafetensorsCheckpoint(path))


def test_norms_are_found_where_the_config_has_them(tmp_path: Path) -> None:
    path = grouped_model(tmp_path / "with", "stablelm", hidden_size=64, qk_layernorm=True)
    geometry = read_geometry(SafetensorsCheckpoint(path))
    assert geometry.norm is not None and geometry.norm.centred
    assert geometry.projections[1].key_norm[1] == "model.layers.1.self_attn.k_layernorm.norms.1"
    path = grouped_model(tmp_path / "without", "stablelm", hidden_size=64)
    assert read_geometry(SafetensorsCheckpoint(path)).norm is None


def test_norms_that_contradict_the_config_are_refused(tmp_path: Path) -> None:
    path = grouped_model(tmp_path / "model", "olmo2", hidden_size=64)
    tensors = load_file(path / SINGLE_NAME)
    name = "model.layers.1.self_attn.k_norm.weight"
    save_file({**tensors, name: tensors[name][:8].clone()}, path / SINGLE_NAME)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[8\], config.json says 16 numbers"):
        read_geometry(SafetensorsCheckpoint(path))
    del tensors[name]
    save_file(tensors, path / SINGLE_NAME)
    with pytest.raises(CheckpointError, match=f"no tensor {name}"):
        read_geometry(SafetensorsCheckpoint(path))


@pytest.mark.parametrize("count", [0, 3, 8])
def test_counts_that_do_not_divide_are_refused_with_those_that_do(count: int, tmp_path: Path) -> None:
    geometry = read_geometry(SafetensorsCheckpoint(grouped_model(tmp_path / "model", "llama", kv_heads=4, head_dim=8)))
    with pytest.raises(UnsupportedError, match=rf"cannot be merged to {count}: .*possible: 1, 2$"):
        require_kv_heads(geometry, count)
    with pytest.raises(UnsupportedError, match=r"has 4 .* already.*\[null, \{kv_heads: 2\}\]\); possible: 1, 2$"):
        require_kv_heads(geometry, 4)
    require_kv_heads(geometry, 2)


def test_multi_query_models_have_nothing_to_merge(tmp_path: Path) -> None:
    geometry = read_geometry(SafetensorsCheckpoint(grouped_model(tmp_path / "model", "llama", kv_heads=1, head_dim=8)))
    with pytest.raises(UnsupportedError, match="already"):
        require_kv_heads(geometry, 1)


def test_falcon_of_the_old_layout_names_its_only_choice(tmp_path: Path) -> None:
    path = grouped_model(tmp_path / "model", "falcon", hidden_size=64, multi_query=False)
    geometry = read_geometry(SafetensorsCheckpoint(path))
    assert geometry.kv_heads == 8
    with pytest.raises(UnsupportedError, match=r"possible: 1$"):
        require_kv_heads(geometry, 4)


def test_weights_that_contradict_the_config_are_refused(tmp_path: Path) -> None:
    path = grouped_model(tmp_path / "model", "llama", head_dim=8)
    tensors = load_file(path / SINGLE_NAME)
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file({**tensors, name: tensors[name][:8].clone()}, path / SINGLE_NAME)
    with pytest.raises(CheckpointError, match=name):
        read_geometry(SafetensorsCheckpoint(path))
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, path / SINGLE_NAME)
    with pytest.raises(CheckpointError, match="layer 1 has no tensor"):
        read_geometry(SafetensorsCheckpoint(path))
