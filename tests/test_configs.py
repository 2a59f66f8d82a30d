"""No command changes a model's config, on disk or in memory; an artifact's says what was done, and nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import tiny_llama_dir, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from llmconvert.api import convert_model, quantize_model, validate_model
from llmconvert.convert.inspection import inspect_model
from llmconvert.convert.source import Source, open_source
from llmconvert.recipes import single
from llmconvert.recipes.stages import opening

#: In the spelling of models on the Hub, which transformers completes and renames when it builds a config of it.
SPELLINGS: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_theta": 1e4,
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
    },
    "phi3": {
        "rope_theta": 1e4,
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    },
}
#: What each command may write into a config.
DTYPE = {"dtype", "torch_dtype"}
COMMANDS: dict[str, tuple[Callable[[Path, Path], object], set[str]]] = {
    "inspect": (lambda model, out: inspect_model(str(model)), set()),
    "convert": (lambda model, out: convert_model(model, out, dtype="bfloat16"), DTYPE),
    "kv heads": (
        lambda model, out: convert_model(model, out, dtype="bfloat16", kv_heads=2),
        DTYPE | {"num_key_value_heads"},
    ),
    "quantize": (
        lambda model, out: quantize_model(model, out, method="rtn", scheme="w4a16-g32"),
        DTYPE | {"quantization_config"},
    ),
    "quantize, gptq": (
        lambda model, out: quantize_model(model, out, method="rtn", scheme="w4a16-g32", format="gptq"),
        DTYPE | {"quantization_config"},
    ),
    "validate": (lambda model, out: validate_model(model, reference=model, text=text(out), window=32), set()),
}


def text(beside: Path) -> Path:
    path = beside.with_suffix(".txt")
    path.write_text("A text that says little, in many words, and says it again and again. " * 40)
    return path


def spelled(directory: Path, model_type: str) -> Path:
    """A model of four heads whose config is spelled as on the Hub, with a key that no class knows."""
    settings = SPELLINGS[model_type]
    if model_type == "llama":
        tiny_llama_dir(directory, num_key_value_heads=4, tokenizer=False)
    else:
        sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0, "tie_word_embeddings": True}
        torch.manual_seed(0)
        config = AutoConfig.for_model("phi3", **sizes, **heads)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    written = json.loads((directory / "config.json").read_text())
    del written["rope_parameters"]
    written |= {"max_position_embeddings": 128, "somebodys_own": {"key": [1, None]}, **settings}
    (directory / "config.json").write_text(json.dumps(written))
    return directory


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("model_type", SPELLINGS)
def test_a_config_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, command: str
) -> None:
    if (model_type, command) == ("phi3", "kv heads"):
        pytest.skip("its queries, keys and values are one matrix, whose heads are not merged")
    model = spelled(tmp_path / "model", model_type)
    before = (model / "config.json").read_bytes()
    opened: list[tuple[Source, dict[str, Any]]] = []

    def spy(*args: Any, **options: Any) -> Source:
        source = open_source(*args, **options)
        opened.append((source, copy.deepcopy(dict(source.checkpoint.config))))
        return source

    for module in (single, opening):
        monkeypatch.setattr(module, "open_source", spy)
    run, allowed = COMMANDS[command]
    run(model, tmp_path / "out")
    assert (model / "config.json").read_bytes() == before
    assert opened or command == "inspect"
    assert all(source.checkpoint.config == config for source, config in opened)
    if (tmp_path / "out").exists():
        source, artifact = json.loads(before), json.loads((tmp_path / "out" / "config.json").read_text())
        assert {key for key in source | artifact if source.get(key) != artifact.get(key)} <= allowed
        assert load_file(next((tmp_path / "out").glob("*.safetensors")))
        AutoConfig.from_pretrained(tmp_path / "out")
