"""Buffers that no checkpoint holds, and every architecture whose numbers are the resident model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.every_architecture import STREAMED, save_tiny
from support.tiny_architectures import ids
from support.tiny_models import tiny_llama_dir
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from llmconvert.api import quantize_model
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.engine.discovery import discover
from llmconvert.engine.evaluation import stream_logits
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.stream import Mode, Stream
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

CPU = torch.device("cpu")
WINDOW = ids((24,))


def resident_logits(directory: Path) -> torch.Tensor:
    """What transformers computes with the whole model, by the attention that the engine takes."""
    attention = "eager" if Architecture.of(SafetensorsCheckpoint(directory).config).eager_only else "sdpa"
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation=attention).eval()
    except ValueError:  # the class has no other
        model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=WINDOW[0], use_cache=False).logits
    return logits


def assert_streams(directory: Path) -> None:
    (streamed,) = stream_logits(SafetensorsCheckpoint(directory), WINDOW, device=CPU)
    # Llama 4 multiplies all experts in one batched product, here each goes alone: their last bits differ.
    tolerance = 1e-5 if "llama4" in json.loads((directory / "config.json").read_text())["model_type"] else 0
    torch.testing.assert_close(streamed, resident_logits(directory), rtol=0, atol=tolerance)


@pytest.mark.parametrize("model_type", ["falcon_h1", "bamba"])
def test_buffers_that_a_parent_computes_are_there(tmp_path: Path, model_type: str) -> None:
    """Falcon-H1's ``mup_vector`` is set by its mixer's parent. Its config, and Bamba's, hold an infinite number."""
    save_tiny(tmp_path, model_type)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {"__float__": "Infinity"} in config["time_step_limit"]
    assert_streams(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", STREAMED)
def test_streamed_logits_are_those_of_the_resident_model(tmp_path: Path, model_type: str) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip("the installed transformers doesn't know it")
    assert_streams(save_tiny(tmp_path, model_type))


class Half(nn.Module):
    """A module with one buffer that the model's class knows nothing of, or half of which it computes."""

    table: torch.Tensor

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table, persistent=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_a_buffer_that_nothing_computes_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    skeleton = Skeleton(SafetensorsCheckpoint(save_tiny(tmp_path, "llama")), CPU)
    skeleton.model.extra = Half(torch.empty(4, dtype=dtype, device="meta"))
    with pytest.raises(UnsupportedError, match=r"nothing computes 'extra\.table', which no checkpoint holds"):
        skeleton.restore_buffers()


def test_a_buffer_that_is_half_computed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = Skeleton(SafetensorsCheckpoint(save_tiny(tmp_path, "llama")), CPU)
    skeleton.model.extra = Half(torch.empty(4, device="meta"))
    original: Any = type(skeleton.model)._init_weights

    def half(self: nn.Module, module: nn.Module) -> None:
        original(self, module)
        if isinstance(module, Half):
            module.table[:2] = 1.0

    monkeypatch.setattr(type(skeleton.model), "_init_weights", half)
    with pytest.raises(UnsupportedError, match=r"nothing computes 'extra\.table'"):
        skeleton.restore_buffers()


def test_modules_without_buffers_take_no_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some classes ask there for weights of parts of theirs that a slot stands for."""
    skeleton = Skeleton(SafetensorsCheckpoint(save_tiny(tmp_path, "llama")), CPU)
    original: Any = LlamaPreTrainedModel._init_weights
    seen: list[str] = []

    def noted(self: nn.Module, module: nn.Module) -> None:
        seen.append(type(module).__name__)
        original(self, module)

    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", noted)
    skeleton.restore_buffers()
    assert "LlamaRotaryEmbedding" in seen and not {"LlamaMLP", "LlamaDecoderLayer", "Linear"} & set(seen)


def test_buffers_are_the_same_when_restored_again_and_weights_stay(tmp_path: Path) -> None:
    skeleton = Skeleton(SafetensorsCheckpoint(save_tiny(tmp_path, "llama")), CPU)
    skeleton.restore_buffers()
    skeleton.load_outer(head=True)
    inner: Any = skeleton.model.model
    frequencies, embedding = inner.rotary_emb.inv_freq.clone(), inner.embed_tokens.weight.clone()
    state = torch.get_rng_state()
    inner.rotary_emb.inv_freq.zero_()  # as dynamic scaling leaves it after a long input
    skeleton.restore_buffers()
    assert torch.equal(inner.rotary_emb.inv_freq, frequencies)
    assert torch.equal(inner.embed_tokens.weight, embedding)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", ["lockstep", "replay"])
def test_frequencies_that_depend_on_the_input_are_those_of_its_length(tmp_path: Path, mode: Mode) -> None:
    """Dynamic scaling starts beyond the trained length. What came before an input leaves no trace, in any order."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    directory = tiny_llama_dir(tmp_path, max_position_embeddings=16, rope_parameters=rope, tokenizer=False)
    windows = ids((12, 20, 24, 18, 12))
    expected = []
    for window in windows:
        model = AutoModelForCausalLM.from_pretrained(directory).eval()
        with torch.no_grad():
            expected.append(model(input_ids=window, use_cache=False).logits)
    skeleton = Skeleton(SafetensorsCheckpoint(directory), CPU)
    for _ in range(2):
        stream = Stream(skeleton, windows, discover(skeleton, 24), mode=mode, head=True)
        try:
            for _run in stream.blocks():
                pass
            assert all(map(torch.equal, stream.logits(), expected))
        finally:
            stream.close()


def test_falcons_linears_are_linears(tmp_path: Path) -> None:
    """Its class derives from ``nn.Linear``, and transformers reads its weights quantized."""
    save_tiny(tmp_path / "model", "falcon")
    made = quantize_model(tmp_path / "model", tmp_path / "out", method="rtn", scheme="w8a8")
    assert made.layers == 3 * 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = model(input_ids=WINDOW[0], use_cache=False).logits
    (streamed,) = stream_logits(open_dense(SafetensorsCheckpoint(tmp_path / "out")), WINDOW, device=CPU)
    assert torch.equal(streamed, expected)


def test_a_buffer_larger_than_the_model_is_refused_before_it_is_made(tmp_path: Path) -> None:
    """Some classes hold a mask of all positions by all positions; a config may say any number of them."""
    skeleton = Skeleton(SafetensorsCheckpoint(save_tiny(tmp_path, "llama")), CPU)
    skeleton.model.extra = Half(torch.empty(1 << 40, device="meta"))
    with pytest.raises(CheckpointError, match=r"asks for a buffer of 4,398,046,511,104 bytes, 'extra\.table'"):
        skeleton.restore_buffers()
