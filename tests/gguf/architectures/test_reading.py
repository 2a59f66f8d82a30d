"""Settings that a config has to get right for the model to compute what it did: positions, windows, variants."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.llama_cpp import LlamaCpp
from support.tiny_gguf import byte_level_metadata, model_metadata, stored_tensors, tiny_model, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.checkpoint import open_gguf
from llmconvert.gguf.rope import llama3_divisors, llama3_parameters, shortest
from llmconvert.storage.checkpoint import Checkpoint

LENGTH = 200
IDS = torch.randint(3, 320, (1, LENGTH), generator=torch.Generator().manual_seed(2))
PLAIN = {"rope_type": "default", "rope_theta": 500000.0}


def opened(path: Path, family: str, changes: dict[str, Any], tensors: dict[str, Any], **model: Any) -> Checkpoint:
    source = tiny_model(family, **model)
    metadata = model_metadata(source) | byte_level_metadata() | changes
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return open_gguf(write_gguf(path, metadata, stored_tensors(source) | tensors))


@torch.no_grad()
def last(checkpoint: Checkpoint) -> torch.Tensor:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**checkpoint.config)).float().eval()
    model.load_state_dict(dict(checkpoint), strict=False)
    model.tie_weights()
    return model(IDS).logits[0, -1].log_softmax(-1)


def llama3_tensor(factor: float, low: float, high: float, context: int, theta: float, width: int) -> np.ndarray:
    """Llama 3's scaling, frequency by frequency, as Meta's reference code decides it."""
    divisors = []
    for index in range(0, width, 2):
        wavelength = 2 * math.pi * theta ** (index / width)
        if wavelength < context / high:
            divisors.append(1.0)
        elif wavelength > context / low:
            divisors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"llama.rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 64,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, {"rope_type": "default"}),
    ],
    ids=["linear", "old-linear", "yarn", "none"],
)
def test_scaled_positions_are_what_llama_cpp_computes(
    changes: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "t.gguf"
    with opened(path, "llama", changes, {}, num_key_value_heads=4) as checkpoint:
        assert checkpoint.config["rope_parameters"] == {"rope_theta": 10000.0} | expected
        theirs = LlamaCpp(path).log_probabilities(IDS[0].tolist(), 320)
        assert (last(checkpoint) - theirs).abs().max() < 0.03


def test_llama3_scaling_is_recovered_and_computes_what_llama_cpp_does(tmp_path: Path) -> None:
    model = {"hidden_size": 128, "num_attention_heads": 2}
    theta = {"llama.rope.freq_base": 500000.0}
    freqs = {"rope_freqs.weight": llama3_tensor(8.0, 1.0, 4.0, 64, 500000.0, 64)}
    path = tmp_path / "t.gguf"
    with opened(path, "llama", theta, freqs, **model) as checkpoint:
        rope = checkpoint.config["rope_parameters"]
        assert "rope_freqs.weight" not in checkpoint
        assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("llama3", 8.0, 64)
        assert rope["high_freq_factor"] == pytest.approx(4.0, abs=1e-3)
        theirs = LlamaCpp(path).log_probabilities(IDS[0].tolist(), 320)
        assert (last(checkpoint) - theirs).abs().max() < 0.03
    with opened(tmp_path / "plain.gguf", "llama", theta, {}, **model) as checkpoint:
        assert (last(checkpoint) - theirs).abs().max() > 0.3, "the scaling makes a difference"


@pytest.mark.parametrize(("factor", "width"), [(8.0, 128), (32.0, 64)], ids=["3.1", "3.2"])
def test_metas_own_parameters_come_back_exactly(factor: float, width: int) -> None:
    divisors = llama3_tensor(factor, 1.0, 4.0, 8192, 500000.0, width)
    assert llama3_parameters(divisors, PLAIN, width, "rope_freqs.weight") == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@given(
    factor=st.sampled_from([2.0, 4.0, 8.0, 16.0, 32.0]),
    low=st.sampled_from([1.0, 2.0]),
    ratio=st.sampled_from([3.0, 4.0, 8.0]),
    context=st.sampled_from([2048, 4096, 8192, 16384]),
)
@settings(deadline=None)
def test_other_llama3_parameters_come_back_equivalent(factor: float, low: float, ratio: float, context: int) -> None:
    divisors = llama3_tensor(factor, low, low * ratio, context, 500000.0, 128)
    found = llama3_parameters(divisors, PLAIN, 128, "rope_freqs.weight")
    np.testing.assert_allclose(llama3_divisors(found, 128), divisors, rtol=1e-5)


def test_divisors_that_are_not_llama3s_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"rope_freqs.weight: holds frequency divisors from 1 to 3"):
        llama3_parameters(np.linspace(1, 3, 32), PLAIN, 64, "rope_freqs.weight")
    with pytest.raises(CheckpointError, match=r"has shape \[8\], expected \[32\]"):
        llama3_parameters(np.ones(8), PLAIN, 64, "rope_freqs.weight")
    for wrong in (math.nan, math.inf, 0.0, -1.0):
        with pytest.raises(CheckpointError, match=r"a frequency divisor that is no positive number"):
            llama3_parameters(np.array([1.0] * 31 + [wrong]), PLAIN, 64, "rope_freqs.weight")
    assert llama3_parameters(np.ones(32), PLAIN, 64, "rope_freqs.weight") == PLAIN


@pytest.mark.parametrize("original", [128, 512], ids=["long", "short"])
def test_phi3_long_rope_and_partial_rotation(original: int, tmp_path: Path) -> None:
    """Beyond the original context the long factors hold for all positions, within it the short ones."""
    random = np.random.default_rng(0)
    factors = {f"rope_factors_{kind}.weight": random.uniform(1, 4, 6).astype(np.float32) for kind in ("long", "short")}
    scale = 1024 / original
    changes = {
        "phi3.context_length": 1024,
        "phi3.rope.dimension_count": 12,
        "phi3.rope.scaling.original_context_length": original,
        "phi3.rope.scaling.attn_factor": math.sqrt(1 + math.log(scale) / math.log(original)),
    }
    path = tmp_path / "t.gguf"
    with opened(path, "phi3", changes, factors) as checkpoint:
        rope = checkpoint.config["rope_parameters"]
        assert (rope["rope_type"], rope["partial_rotary_factor"], len(rope["long_factor"])) == ("longrope", 0.75, 6)
        theirs = LlamaCpp(path, context=256).log_probabilities(IDS[0].tolist(), 320)
        assert (last(checkpoint) - theirs).abs().max() < 0.03
    del factors["rope_factors_short.weight"]
    with pytest.raises(CheckpointError, match=r"'rope_factors_short.weight' is missing"):
        opened(path, "phi3", changes, factors)


def test_gemma2_windows_alternate(tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    with opened(path, "gemma2", {}, {}) as checkpoint:
        assert checkpoint.config["sliding_window"] == 16
        theirs = LlamaCpp(path).log_probabilities(IDS[0].tolist(), 320)
        assert (last(checkpoint) - theirs).abs().max() < 0.03
    with opened(path, "gemma2", {"gemma2.attention.sliding_window": None}, {}) as checkpoint:
        assert checkpoint.config["sliding_window"] == 4096
        assert (last(checkpoint) - theirs).abs().max() > 0.1, "the window makes a difference"


def test_gemma2_27b_scales_queries_by_its_width(tmp_path: Path) -> None:
    with opened(tmp_path / "t.gguf", "gemma2", {}, {}, num_hidden_layers=46) as checkpoint:
        assert checkpoint.config["query_pre_attn_scalar"] == 64 // 4
    with opened(tmp_path / "t.gguf", "gemma2", {}, {}) as checkpoint:
        assert checkpoint.config["query_pre_attn_scalar"] == 32


def test_a_llama_with_a_window_is_a_mistral(tmp_path: Path) -> None:
    with opened(tmp_path / "t.gguf", "llama", {"llama.attention.sliding_window": 32}, {}) as checkpoint:
        assert (checkpoint.config["model_type"], checkpoint.config["sliding_window"]) == ("mistral", 32)
    with opened(tmp_path / "t.gguf", "llama", {"general.basename": "Mistral-7B"}, {}) as checkpoint:
        assert checkpoint.config["architectures"] == ["MistralForCausalLM"]
        assert checkpoint.config["sliding_window"] is None


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"llama.expert_count": 8}, "llama.expert_count is 8"),
        ("qwen2", {"qwen2.logit_scale": 0.5}, "qwen2.logit_scale is 0.5"),
        ("llama", {"llama.rope.dimension_count": 8}, "8 rotary dimensions are not supported for llama"),
        ("llama", {"llama.attention.value_length": 8}, "values of 8"),
        ("llama", {"llama.rope.scaling.type": "ntk", "llama.rope.scaling.factor": 2.0}, "type is 'ntk'; supported are"),
        (
            "llama",
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 2.0,
                "llama.rope.scaling.yarn_log_multiplier": 0.1,
            },
            "yarn_log_multiplier is set",
        ),
        ("llama-biased", {"llama.attention.sliding_window": 8}, "sliding window and biases"),
    ],
)
def test_variants_that_transformers_cannot_express_are_refused(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        opened(tmp_path / "t.gguf", family, changes, {})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("factor", -2.0, "rope.scaling.factor is -2.0, expected a positive"),
        ("original_context_length", 0, "original_context_length is 0, expected at least 1"),
    ],
)
def test_scalings_that_make_no_sense(key: str, value: float, message: str, tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "attn_factor": 1.5, "original_context_length": 64, key: value}
    changes = {f"llama.rope.scaling.{name}": setting for name, setting in yarn.items()}
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path / "t.gguf", "llama", changes, {})


@pytest.mark.parametrize("theta", [1e-45, 1e-300, 0.5, 1.0, 1e38, 1e300])
@pytest.mark.filterwarnings("ignore")
def test_bases_that_make_no_sense_make_no_scaling(theta: float) -> None:
    """Overflow and NaN on the way to a line through the divisors end in a refusal, or in parameters that are right."""
    divisors = np.array([1.0, 2.0, 8.0, 8.0])
    with contextlib.suppress(UnsupportedError):
        found = llama3_parameters(divisors, PLAIN | {"rope_theta": theta}, 8, "rope_freqs.weight")
        np.testing.assert_allclose(llama3_divisors(found, 8), divisors, rtol=1e-5)


def test_tensors_without_a_place_and_incomplete_biases(tmp_path: Path) -> None:
    extra = {"blk.0.attn_sinks.weight": np.zeros(4, dtype=np.float32)}
    with pytest.raises(UnsupportedError, match=r"'blk.0.attn_sinks.weight' has no place in LlamaForCausalLM"):
        opened(tmp_path / "t.gguf", "llama", {}, extra)
    beyond = {"blk.2.attn_norm.weight": np.zeros(64, dtype=np.float32)}
    with pytest.raises(UnsupportedError, match=r"'blk.2.attn_norm.weight' has no place"):
        opened(tmp_path / "t.gguf", "llama", {}, beyond)
    one_layer = {"blk.0.attn_q.bias": np.zeros(64, dtype=np.float32)}
    with pytest.raises(CheckpointError, match=r"only 1 of 2 layers have 'attn_q.bias'"):
        opened(tmp_path / "t.gguf", "llama", {}, one_layer)
    queries = {f"blk.{layer}.attn_q.bias": np.zeros(64, dtype=np.float32) for layer in (0, 1)}
    with pytest.raises(UnsupportedError, match="biases on attn_q but not on all of attn_q, attn_k"):
        opened(tmp_path / "t.gguf", "llama", {}, queries)


def test_generation_ends_at_the_end_of_a_turn_too(tmp_path: Path) -> None:
    changes = {"tokenizer.ggml.eot_token_id": 1, "tokenizer.ggml.padding_token_id": 4_294_967_295}
    with opened(tmp_path / "t.gguf", "llama", changes, {}) as checkpoint:
        assert checkpoint.config["pad_token_id"] is None and checkpoint.config["eos_token_id"] == 2
        generation = json.loads(checkpoint.read_file("generation_config.json"))
        assert generation == {"bos_token_id": 0, "eos_token_id": [2, 1]}


@given(st.floats(2**-40, 2**40, width=32))
def test_shortest_decimals_are_the_same_float32(value: float) -> None:
    assert np.float32(shortest(value)) == np.float32(value)
    assert len(repr(shortest(value))) <= len(repr(value))
