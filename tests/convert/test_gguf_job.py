"""Written GGUF files against llama.cpp, which loads them, and against the checkpoints they were made from.

llama.cpp quantizes activations for its integer products: to 8 bits per 32 values (256 for K types), that is by up to
1/254 of the largest among them. Our forward multiplies the same weights in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from gguf_models import IDS, built, next_token
from llama_cpp import LlamaCpp
from tiny_gguf import FAMILIES, tiny_model
from tiny_models import tiny_tokenizer
from transformers import PreTrainedModel

from llmconvert.checkpoint import SafetensorsCheckpoint
from llmconvert.convert.gguf import open_gguf
from llmconvert.convert.gguf_job import write_gguf
from llmconvert.quantize.ggml.mix import MIXES, GgmlMix

VOCABULARY = 320
#: Root mean square over log probabilities that llama.cpp's attention, in less than float32, is off by.
ATTENTION = 0.01
SIZES = {"hidden_size": 256, "intermediate_size": 512}


@functools.cache
def hugging_face(root: Path, family: str) -> Path:
    """A tiny model with its tokenizer in Hugging Face layout, wide enough for super-blocks."""
    directory = root / family
    model = tiny_model(family, **SIZES)
    model.save_pretrained(directory)
    tiny_tokenizer(VOCABULARY).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def written(directory: Path, path: Path, mix: str, **options: object) -> Path:
    with SafetensorsCheckpoint(directory) as source:
        return write_gguf(source, path, mix=GgmlMix.parse(mix), **options).path  # type: ignore[arg-type]


CASES = [(family, "q4_k_m") for family in FAMILIES] + [("llama", mix) for mix in MIXES if mix != "q4_k_m"]


@pytest.mark.parametrize(("family", "mix"), CASES)
def test_llama_cpp_computes_what_we_do(family: str, mix: str, models: Path, tmp_path: Path) -> None:
    directory = hugging_face(models, family)
    path = written(directory, tmp_path / "tiny.gguf", mix)
    theirs = LlamaCpp(path)
    found = theirs.log_probabilities(IDS[0].tolist(), VOCABULARY)
    with open_gguf(path) as checkpoint, SafetensorsCheckpoint(directory) as source:
        assert set(checkpoint) == set(source)
        model = built(checkpoint)
        exact = next_token(model)
        round_inputs(model, {place.name: tensor.qtype.name for tensor, place in checkpoint._sources.values()})
    rounding = distance(exact, next_token(model))
    assert distance(exact, found) < 1.6 * rounding + ATTENTION
    assert distance(exact, found) < 0.1  # a wrong layout is off by more than 1
    text = "Hello, world! It's 123 <|im_start|>user\nnot\tspaces  "
    assert theirs.tokenize(text) == tiny_tokenizer(VOCABULARY)(text).input_ids


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def round_inputs(model: PreTrainedModel, types: Mapping[str, str]) -> None:
    """Let a model's linears round their inputs as llama.cpp does before multiplying weights of each type."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            stored = types.get(f"{name}.weight") or types["model.embed_tokens.weight"]
            module.register_forward_pre_hook(lambda _, values, stored=stored: (rounded(values[0], stored),))


def rounded(values: torch.Tensor, stored: str) -> torch.Tensor:
    floats = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if stored in floats:
        return values.to(floats[stored]).float()
    groups = values.reshape(*values.shape[:-1], -1, 256 if stored.endswith("K") else 32)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    codes = torch.round(groups / scale.clamp(min=1e-30))
    return (codes * (scale if stored.endswith("K") else scale.half().float())).reshape(values.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_floats_come_back_as_they_were(family: str, models: Path, tmp_path: Path) -> None:
    directory = hugging_face(models, family)
    path = written(directory, tmp_path / "tiny.gguf", "f32")
    with SafetensorsCheckpoint(directory) as source, open_gguf(path) as back:
        assert set(back) == set(source)
        for name, tensor in source.items():
            rounding = 1e-6 if "gemma2" in family and "norm" in name else 0.0
            torch.testing.assert_close(back[name], tensor, rtol=0, atol=rounding)
        assert back.config["model_type"] == source.config["model_type"]
        assert back.read_file("chat_template.jinja") == source.read_file("chat_template.jinja")
