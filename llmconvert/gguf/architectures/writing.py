"""From ``config.json`` to GGUF metadata, and the proof that the file's reader finds the same model in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from llmconvert.engine.architecture.config import build_config
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.errors import UnsupportedError
from llmconvert.gguf.architectures.architecture import GgufArchitecture
from llmconvert.gguf.architectures.orders import head_dim
from llmconvert.gguf.rope import rope_metadata, rope_settings

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["INERT", "check_same_model", "complete_values", "differences", "window_notes", "write_metadata"]

_NAMES: Final = """
_attn_implementation _name_or_path add_cross_attention architectures attention_dropout
attention_probs_dropout_prob attn_pdrop aux_loss_alpha bos_token_id chunk_size_feed_forward classifier_dropout
cross_attention_hidden_size decoder_start_token_id dtype emb_pdrop embd_pdrop embedding_dropout eos_token_id
ep_size experts_implementation ffn_dropout hidden_dropout hidden_dropout_prob id2label init_std
initializer_range is_decoder is_encoder_decoder label2id max_window_layers model_type moe_eps name_or_path
output_attentions output_dropout output_hidden_states output_router_logits pad_token_id pretraining_tp
problem_type resid_pdrop residual_dropout return_dict rope_scaling router_aux_loss_coef router_jitter_noise
sep_token_id seq_aux summary_activation summary_first_dropout summary_proj_to_labels summary_type
summary_use_proj tie_encoder_decoder tie_word_embeddings torch_dtype transformers_version use_cache
use_kernels vocab_size
"""
#: Settings that say nothing of what is computed for a text, or that are proven otherwise.
INERT: Final = frozenset(_NAMES.split())
_TOLERANCE: Final = 1e-6


def complete_values(config: PretrainedConfig) -> dict[str, Any]:
    """The settings of a config, the defaults of its class and its other names for some of them included."""
    values: dict[str, Any] = config.to_dict()
    aliases = {alias: getattr(config, alias, None) for alias in config.attribute_map}
    return {**aliases, **values, "num_hidden_layers": config.num_hidden_layers}


def write_metadata(config: Mapping[str, Any], model: Architecture, arch: GgufArchitecture) -> dict[str, Any]:
    """The architecture's part of the metadata.

    Args:
        config: with transformers' defaults filled in.
        model: what it says.
        arch: the GGUF architecture.

    Raises:
        UnsupportedError: a setting that llama.cpp's class of this architecture does not know.
    """
    if arch.gap:
        raise UnsupportedError(f"architecture {arch.model_type!r} cannot be written as GGUF: {arch.gap}")
    _check_activation(config, arch)
    _check_windows(config, model, arch)
    metadata: dict[str, Any] = {"vocab_size": model.vocab_size}
    for setting in arch.settings:
        value = config.get(setting.name)
        if value is None and not setting.zero:
            if setting.default is None:
                raise UnsupportedError(
                    f"config.json: {setting.name} is not set; llama.cpp's {arch.name} always has one"
                )
            continue
        metadata[setting.key] = setting.kind(value or 0)
    if arch.attention:
        metadata |= _heads(config, model, arch)
    metadata |= arch.write(config)
    return {f"{arch.name}.{key}": value for key, value in metadata.items()}


def _heads(config: Mapping[str, Any], model: Architecture, arch: GgufArchitecture) -> dict[str, Any]:
    size = head_dim(config) if arch.stated_heads else model.hidden_size // model.query_heads
    rope = rope_settings(config)
    found: dict[str, Any] = {
        "attention.head_count_kv": model.kv_heads,
        "attention.key_length": size,
        "attention.value_length": size,
    }
    if arch.rotary in ("none", "own"):
        return found
    rotary = int(size * (rope.get("partial_rotary_factor") or 1.0))
    if rotary != size and arch.rotary == "all":
        raise UnsupportedError(
            f"config.json: RoPE turns {rotary} of {size} dimensions; llama.cpp's {arch.name} turns all"
        )
    return found | {
        "rope.dimension_count": rotary,
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        **rope_metadata(config, arch.name, arch.scalings),
    }


def window_notes(model: Architecture, arch: GgufArchitecture) -> tuple[str, ...]:
    """A sentence on what llama.cpp's class is told of and does not keep to: a sliding window, or the ends of a ramp."""
    if model.rope.get("rope_type") == "yarn" and model.rope.get("truncate") is False:
        return (
            f"llama.cpp's {arch.name} rounds the ends of YaRN's ramp to whole dimensions, the model does not: some "
            "frequencies differ a little",
        )
    if arch.windows != "ignored" or model.window is None or model.window >= (model.context or 0):
        return ()
    return (
        f"llama.cpp's {arch.name} attends to everything, the model to the last {model.window:,} tokens: both compute "
        "the same up to that length",
    )


def _check_windows(config: Mapping[str, Any], model: Architecture, arch: GgufArchitecture) -> None:
    """Refuse layers that see another part of the text in llama.cpp, and other kinds of layers."""
    if arch.windows == "kept":
        return
    if arch.windows == "none" and config.get("sliding_window") and config.get("use_sliding_window"):
        raise UnsupportedError(
            f"config.json: use_sliding_window is set; llama.cpp's {arch.name} attends to everything and would differ"
        )
    usual = "sliding_attention" if arch.windows == "ignored" and model.window is not None else "full_attention"
    kinds = model.layer_kinds if arch.windows == "ignored" or config.get("layer_types") else ()
    differing = next((index for index, kind in enumerate(kinds) if kind != usual), None)
    if differing is not None:
        raise UnsupportedError(
            f"config.json: layer_types[{differing}] is {kinds[differing]!r}; llama.cpp's {arch.name} computes {usual!r}"
        )


def _check_activation(config: Mapping[str, Any], arch: GgufArchitecture) -> None:
    found = config.get("hidden_activation") or config.get("hidden_act")
    if arch.activation and found not in (arch.activation, {"silu": "swish"}.get(arch.activation)):
        raise UnsupportedError(
            f"config.json: the activation is {found!r}; llama.cpp's {arch.name} computes {arch.activation!r}"
        )


def check_same_model(config: Mapping[str, Any], again: Mapping[str, Any], arch: GgufArchitecture) -> None:
    """Refuse a model that a file's reader takes for another: its settings, but for those that compute nothing.

    Args:
        config: with transformers' defaults filled in.
        again: the ``config.json`` that a reader makes of the file.
        arch: the file's architecture.

    Raises:
        UnsupportedError: a setting that llama.cpp's class has otherwise, or that a file cannot say.
    """
    found = complete_values(build_config(again))
    differing = next(differences(config, found, INERT | arch.inert), None)
    if differing is not None:
        name, wanted, given = differing
        raise UnsupportedError(f"config.json: {name} is {wanted!r}; llama.cpp's {arch.name} computes {given!r}")


def differences(
    config: Mapping[str, Any], found: Mapping[str, Any], inert: frozenset[str]
) -> Iterator[tuple[str, Any, Any]]:
    """Settings of a config that another one has otherwise: name, value, and the other's.

    Args:
        config: the one.
        found: the other.
        inert: names of settings that don't count.
    """
    for name, wanted in config.items():
        given = found.get(name)
        if name in inert or name.startswith("_") or wanted is None or (given is None and name not in found):
            continue
        if isinstance(wanted, Mapping) and isinstance(given, Mapping):
            # Llama 3's scaling may come back in other numbers; its reader has proven that they compute the same.
            if wanted.get("rope_type") != "llama3" or given.get("rope_type") != "llama3":
                pairs = differences(wanted, given, inert)
                yield from ((f"{name}.{inside}", *values) for inside, *values in pairs)
        elif not _same(wanted, given):
            yield name, wanted, given


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, int | float) and isinstance(second, int | float):
        return math.isclose(first, second, rel_tol=_TOLERANCE)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    return bool(first == second) or (not first and not second)
