"""From ``config.json`` to GGUF metadata, for the architectures that :mod:`~llmconvert.gguf.config` reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.errors import UnsupportedError
from llmconvert.gguf.config import gemma2_query_scalar
from llmconvert.gguf.rope import rope_metadata, rope_settings

__all__ = ["export_config"]

_ACTIVATIONS: Final[Mapping[str, str]] = {"gemma2": "gelu_pytorch_tanh"}


def export_config(config: Mapping[str, Any], model: Architecture, arch: str) -> dict[str, Any]:
    """The architecture's part of the metadata.

    Args:
        config: with transformers' defaults filled in.
        model: what it says.
        arch: the GGUF architecture.

    Raises:
        UnsupportedError: a setting that llama.cpp's class of this architecture does not know.
    """
    head_dim = model.head_dim
    _check_activation(config, arch)
    rotary = int(head_dim * rope_settings(config).get("partial_rotary_factor", 1.0))
    if rotary != head_dim and arch != "phi3":
        raise UnsupportedError(
            f"config.json: RoPE turns {rotary} of {head_dim} dimensions; llama.cpp's {arch} turns all"
        )
    metadata: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "context_length": model.context,
        "embedding_length": model.hidden_size,
        "block_count": model.layers,
        "feed_forward_length": model.inner_size,
        "attention.head_count": model.query_heads,
        "attention.head_count_kv": model.kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": rotary,
        "rope.freq_base": float(rope_settings(config).get("rope_theta", 10000.0)),
        **rope_metadata(config, arch),
        **_window(config, arch),
    }
    if arch == "gemma2":
        metadata |= _gemma2(config, model)
    return {f"{arch}.{key}": value for key, value in metadata.items()}


def _window(config: Mapping[str, Any], arch: str) -> dict[str, Any]:
    window = config.get("sliding_window")
    if arch not in ("qwen2", "qwen3"):
        return {"attention.sliding_window": window} if window else {}
    if window and config.get("use_sliding_window"):
        raise UnsupportedError(
            f"config.json: use_sliding_window is set; llama.cpp's {arch} attends to everything and would differ"
        )
    return {}


def _gemma2(config: Mapping[str, Any], model: Architecture) -> dict[str, Any]:
    assumed = gemma2_query_scalar(model.hidden_size, model.query_heads, model.layers, model.head_dim)
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
