"""Fewer key-value heads, then four bits, in one run of a recipe: for every kind of attention that can be merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from support.disguised_heads import grouped_model
from support.tiny_models import VOCABULARY, tiny_tokenizer
from transformers import AutoModelForCausalLM

from llmconvert.cli import main
from llmconvert.recipes.loading import load_recipe
from llmconvert.recipes.runner import run_recipe
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 8},
    "cohere": {"use_qk_norm": True},
    "cohere2": {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 4},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 11, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 11},
    "glm": {"head_dim": 8, "partial_rotary_factor": 0.5, "attention_bias": True},
    "granite": {"attention_multiplier": 0.3},
    "olmo2": {},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"partial_rotary_factor": 0.5},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "smollm3": {"head_dim": 8, "no_rope_layers": [1, 0]},
    "stablelm": {"partial_rotary_factor": 0.25, "qk_layernorm": True},
    "starcoder2": {"use_bias": True},
}


def family_model(directory: Path, kind: str) -> Path:
    sizes = {"hidden_size": 64, "vocab_size": VOCABULARY, "kv_heads": 4}
    grouped_model(directory, kind, **{**sizes, **FAMILIES[kind]})
    tiny_tokenizer().save_pretrained(directory)
    return directory


def heads_of(directory: Path) -> int:
    config = json.loads((directory / "config.json").read_text())
    count = config["num_kv_heads" if config["model_type"] == "falcon" else "num_key_value_heads"]
    assert isinstance(count, int)
    return count


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "falcon"])  # which is not quantized yet
def test_fewer_heads_then_four_bits_in_one_run(kind: str, write_recipe: Any, tmp_path: Path) -> None:
    model = family_model(tmp_path / "model", kind)
    validate = yaml.safe_load(write_recipe().read_text())["validate"]
    recipe = write_recipe(
        model=str(model),
        convert={"dtype": "bfloat16"},
        attention={"kv_heads": 2},
        quantize={"method": "rtn", "scheme": "w4a16-g16"},
        # Its processes take most of the time and say nothing of a family.
        validate={**validate, "decoding": False},
    )
    result = run_recipe(load_recipe(recipe))
    assert heads_of(result.artifact) == 2
    with SafetensorsCheckpoint(result.artifact) as checkpoint:
        assert checkpoint.config["quantization_config"]["quant_method"] == "compressed-tensors"
        assert any(name.endswith("weight_packed") for name in checkpoint)
    steps = {step.name: step.model_dump() for step in result.report.steps}
    details = steps["attention"]["details"]
    assert tuple(details["kv_heads"]) == (4, 2)
    assert details["kv_bytes_per_token"][0] == 2 * details["kv_bytes_per_token"][1]
    assert all(0 <= layer["output_loss"] < 1 for layer in details["layers"])
    checks = {check.name: check for check in result.report.checks}
    assert "perplexity" in checks and checks["inventory"].ok


@pytest.mark.parametrize("kind", ["qwen3", "olmo2", "phi3", "falcon"])
def test_the_command_writes_a_plain_checkpoint(kind: str, texts: tuple[Path, Path], tmp_path: Path) -> None:
    model, output = family_model(tmp_path / "model", kind), tmp_path / "out"
    text = ["--calibration", str(texts[0]), "--samples", "4", "--length", "64"]
    arguments = ["convert", str(model), str(output), "--dtype", "float32", "--kv-heads", "2", *text]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert ("note: queries and keys are normalized" in result.output) == (kind in ("qwen3", "olmo2"))
    # Falcon's projections are of a class of their own.
    assert ("no plain linear layers" in result.output) == (kind == "falcon")
    before, after = (json.loads((path / "config.json").read_text()) for path in (model, output))
    assert after == {**before, "num_kv_heads" if kind == "falcon" else "num_key_value_heads": 2}
    loaded, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in load_file(output / "model.safetensors").items():
        assert torch.equal(loaded.state_dict()[name], tensor)
