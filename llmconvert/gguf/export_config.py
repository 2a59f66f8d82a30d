"""From ``config.json`` to GGUF metadata, for the architectures that :mod:`~llmconvert.gguf.config` reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.errors import UnsupportedError
from llmconvert.gguf.config import Geometry, gemma2_query_scalar
from llmconvert.gguf.rope import rope_metadata, rope_settings

__all__ = ["export_config", "export_geometry", "window_notes"]

#: Architectures whose class in llama.cpp knows no sliding window, and those where it does not keep to it.
_UNWINDOWED: Final = ("qwen2", "qwen3")
_IGNORED_WINDOWS: Final = ("llama", "phi3")
_ACTIVATIONS: Final[Mapping[str, str]] = {"gemma2": "gelu_pytorch_tanh"}


def export_geometry(config: Mapping[str, Any], model: Architecture) -> Geometry:
    """The sizes that a config gives its model.

    Args:
        config: with transformers' defaults filled in.
        model: what it says.
    """
    return Geometry(
        vocab=model.vocab_size,
        hidden=model.hidden_size,
        inner=model.inner_size,
        layers=model.layers,
        heads=model.query_heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        rotary_dim=int(model.head_dim * rope_settings(config).get("partial_rotary_factor", 1.0)),
    )


def export_config(config: Mapping[str, Any], model: Architecture, arch: str) -> dict[str, Any]:
    """The architecture's part of the metadata.

    Args:
        config: with transformers' defaults filled in.
        model: what it says.
        arch: the GGUF architecture.

    Raises:
        UnsupportedError: a setting that llama.cpp's class of this architecture does not know.
    """
    sizes = export_geometry(config, model)
    _check_activation(config, arch)
    if sizes.rotary_dim != sizes.head_dim and arch != "phi3":
        raise UnsupportedError(
            f"config.json: RoPE turns {sizes.rotary_dim} of {sizes.head_dim} dimensions; llama.cpp's {arch} turns all"
        )
    _check_windows(config, model, arch)
    window = config.get("sliding_window") if arch not in _UNWINDOWED else None
    metadata: dict[str, Any] = {
        "vocab_size": sizes.vocab,
        "context_length": model.context,
        "embedding_length": sizes.hidden,
        "block_count": sizes.layers,
        "feed_forward_length": sizes.inner,
        "attention.head_count": sizes.heads,
        "attention.head_count_kv": sizes.kv_heads,
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": sizes.rotary_dim,
        "rope.freq_base": float(rope_settings(config).get("rope_theta", 10000.0)),
        **rope_metadata(config, arch),
        **({"attention.sliding_window": window} if window else {}),
    }
    if arch == "gemma2":
        metadata |= _gemma2(config, model)
    return {f"{arch}.{key}": value for key, value in metadata.items()}


def window_notes(model: Architecture, arch: str) -> tuple[str, ...]:
    """A sentence on a sliding window that llama.cpp's class is told of and does not keep to."""
    if arch not in _IGNORED_WINDOWS or model.window is None or model.window >= (model.context or 0):
        return ()
    return (
        f"llama.cpp's {arch} attends to everything, the model to the last {model.window:,} tokens: both compute the "
        "same up to that length",
    )


def _check_windows(config: Mapping[str, Any], model: Architecture, arch: str) -> None:
    """Refuse layers that see another part of the text in llama.cpp, and other kinds of layers."""
    if arch in _UNWINDOWED and config.get("sliding_window") and config.get("use_sliding_window"):
        raise UnsupportedError(
            f"config.json: use_sliding_window is set; llama.cpp's {arch} attends to everything and would differ"
        )
    every: tuple[str, ...] = ("full_attention",) * model.layers
    if arch == "gemma2":
        every = tuple(("sliding_attention", "full_attention")[layer % 2] for layer in range(model.layers))
    elif arch in _IGNORED_WINDOWS and model.window is not None:
        every = ("sliding_attention",) * model.layers
    differing = next(
        (i for i, kinds in enumerate(zip(model.layer_kinds, every, strict=False)) if len(set(kinds)) > 1), None
    )
    if differing is not None:
        raise UnsupportedError(
            f"config.json: layer_types[{differing}] is {model.layer_kinds[differing]!r}; "
            f"llama.cpp's {arch} computes {every[differing]!r}"
        )


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
