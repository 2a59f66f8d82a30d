"""From ``config.json`` to GGUF metadata, for the architectures that :mod:`~llmconvert.gguf.config` reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.rope import llama3_divisors

__all__ = ["export_config", "export_rope_tensors"]

_ACTIVATIONS: Final[Mapping[str, str]] = {"gemma2": "gelu_pytorch_tanh"}
# Gemma 2's 27B, which llama.cpp knows by its layers, scales queries by its hidden size over its heads.
_GEMMA2_27B_LAYERS: Final = 46


def export_config(config: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """The architecture's part of the metadata.

    Args:
        config: with transformers' defaults filled in.
        arch: the GGUF architecture.

    Raises:
        UnsupportedError: a setting that llama.cpp's class of this architecture does not know.
    """
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = _head_dim(config)
    _check_activation(config, arch)
    rotary = int(head_dim * _rope(config).get("partial_rotary_factor", 1.0))
    if rotary != head_dim and arch != "phi3":
        raise UnsupportedError(
            f"config.json: RoPE turns {rotary} of {head_dim} dimensions; llama.cpp's {arch} turns all"
        )
    metadata: dict[str, Any] = {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": hidden,
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": rotary,
        "rope.freq_base": float(_rope(config).get("rope_theta", 10000.0)),
        **_scaling(config, arch),
        **_window(config, arch),
    }
    if arch == "gemma2":
        metadata |= _gemma2(config, head_dim)
    return {f"{arch}.{key}": value for key, value in metadata.items()}


def export_rope_tensors(config: Mapping[str, Any], arch: str) -> dict[str, np.ndarray]:
    """What llama.cpp keeps of RoPE scalings as tensors: Llama 3's divisors, Phi-3's long and short factors."""
    rope = _rope(config)
    head_dim = _head_dim(config)
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": llama3_divisors(dict(rope), head_dim).astype(np.float32)}
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], np.float32)
            for length in ("long", "short")
        }
    return {}


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    rope: Mapping[str, Any] = config.get("rope_parameters") or {}
    return {"rope_type": "default", **rope}


def _scaling(config: Mapping[str, Any], arch: str) -> dict[str, Any]:
    rope = _rope(config)
    kind = rope["rope_type"]
    if kind == "default":
        return (
            {"rope.scaling.original_context_length": config["original_max_position_embeddings"]}
            if arch == "phi3"
            else {}
        )
    if kind == "llama3" and arch == "llama":
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn" and not {"mscale", "mscale_all_dim", "truncate"} & {k for k, v in rope.items() if v is not None}:
        return _yarn(rope)
    if kind == "longrope" and arch == "phi3":
        original = config["original_max_position_embeddings"]
        stretch = config["max_position_embeddings"] / original
        attention = rope.get("attention_factor")
        if attention is None:
            attention = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        return {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": float(attention),
        }
    raise UnsupportedError(f"config.json: RoPE scaling {kind!r} cannot be written for GGUF architecture {arch!r}")


def _yarn(rope: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
    }
    if rope.get("attention_factor") is not None:
        # llama.cpp multiplies it with YaRN's own temperature, transformers takes it instead.
        values["rope.scaling.attn_factor"] = rope["attention_factor"] / (1 + 0.1 * math.log(rope["factor"]))
    for key in ("beta_fast", "beta_slow"):
        if rope.get(key) is not None:
            values[f"rope.scaling.yarn_{key}"] = float(rope[key])
    return values


def _window(config: Mapping[str, Any], arch: str) -> dict[str, Any]:
    window = config.get("sliding_window")
    if arch not in ("qwen2", "qwen3"):
        return {"attention.sliding_window": window} if window else {}
    if window and config.get("use_sliding_window"):
        raise UnsupportedError(
            f"config.json: use_sliding_window is set; llama.cpp's {arch} attends to everything and would differ"
        )
    return {}


def _gemma2(config: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    assumed = config["hidden_size"] // heads if layers == _GEMMA2_27B_LAYERS else head_dim
    if config["query_pre_attn_scalar"] != assumed:
        raise UnsupportedError(
            f"config.json: query_pre_attn_scalar is {config['query_pre_attn_scalar']}; llama.cpp scales queries "
            f"of this gemma2 by {assumed}"
        )
    caps = {key: config.get(key) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    missing = [key for key, value in caps.items() if not value]
    if missing:
        raise UnsupportedError(f"config.json: {missing[0]} is not set; llama.cpp's gemma2 always caps")
    return {key: float(value) for key, value in caps.items() if value}


def _check_activation(config: Mapping[str, Any], arch: str) -> None:
    wanted = _ACTIVATIONS.get(arch, "silu")
    found = config.get("hidden_activation") or config.get("hidden_act")
    if found not in (wanted, {"silu": "swish"}.get(wanted)):
        raise UnsupportedError(f"config.json: the activation is {found!r}; llama.cpp's {arch} computes {wanted!r}")
