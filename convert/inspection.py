"""What a model is and what it needs, from its config and its tensors' headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmconvert.convert.kv_cache import cache_layout, kv_head_count
from llmconvert.convert.source import open_source, parse_hub_id
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import Checkpoint, TensorInfo
from llmconvert.storage.remote import RemoteCheckpoint

__all__ = ["ModelSummary", "describe_model", "inspect_model", "text_config", "uses_alibi"]

# Weights of these schemes are estimated besides the plain dtypes; scales are 16-bit.
_SCHEMES = (Scheme(8), Scheme(4, 128))
_LEARNED_POSITIONS = (".wpe.weight", "wpe.weight", "embed_positions.weight", "position_embeddings.weight")


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """What :func:`inspect_model` finds.

    Attributes:
        architecture: class name in the config, or its model type.
        layers: decoder blocks.
        hidden_size: width of the residual stream.
        query_heads: per layer.
        kv_heads: per layer.
        head_dim: of keys and values.
        attention: ``MHA``, ``GQA``, ``MQA`` or ``MLA`` (a compressed cache).
        positions: ``RoPE …``, ``ALiBi``, ``learned, 1024`` or ``none``.
        windows: layers with sliding-window attention and the window in tokens, or None.
        experts: per layer; 0 for a dense model.
        vocabulary: rows of the embedding.
        context: longest sequence the config allows, in tokens; None if it doesn't say.
        tied: whether input and output embedding are one tensor.
        parameters: number of stored weights.
        kv_bytes_per_token: of a 16-bit cache, all layers; sliding windows bound it but are not in it.
        stored_bytes: of all tensors as they are.
        weight_bytes: dtype or scheme → size of all weights in it, in bytes; schemes apply to the blocks' linears and
            leave the rest in 16 bits. Empty for a model that is already quantized.
        quantization: the method of a model that is already quantized, or None.
    """

    architecture: str
    layers: int
    hidden_size: int
    query_heads: int
    kv_heads: int
    head_dim: int
    attention: str
    positions: str
    windows: tuple[int, int] | None
    experts: int
    vocabulary: int
    context: int | None
    tied: bool
    parameters: int
    kv_bytes_per_token: int
    stored_bytes: int
    weight_bytes: Mapping[str, int]
    quantization: str | None


def inspect_model(model: str) -> ModelSummary:
    """Summarize ``MODEL`` (any of its four forms); of a Hub model only headers are fetched.

    Raises:
        SourceError: it does not exist or cannot be read.
        UnsupportedError: the config names no architecture that transformers knows.
    """
    hub = parse_hub_id(model) if not Path(model).expanduser().exists() else None
    if hub is not None:
        with RemoteCheckpoint(*hub) as remote:
            return describe_model(remote)
    with open_source(model, allow_pickle=True).checkpoint as checkpoint:
        return describe_model(checkpoint)


def describe_model(checkpoint: Checkpoint) -> ModelSummary:
    """Summarize a checkpoint without reading a tensor.

    Raises:
        CheckpointError: the config lacks sizes that every decoder has.
        UnsupportedError: transformers does not know its ``model_type``.
    """
    config = text_config(checkpoint.config)
    try:
        heads, hidden, layers = config.num_attention_heads, config.hidden_size, config.num_hidden_layers
        head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
        kv_heads = kv_head_count(config)
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"config.json of model type {config.model_type!r}: {error}") from error
    quantization = checkpoint.config.get("quantization_config")
    embedding = max((info.shape[0] for info in _matrices(checkpoint) if _is_embedding(info.name)), default=0)
    return ModelSummary(
        architecture=(checkpoint.config.get("architectures") or [config.model_type])[0],
        layers=layers,
        hidden_size=hidden,
        query_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        attention=_attention_kind(config, heads, kv_heads),
        positions=_positions(config, checkpoint),
        windows=_windows(config),
        experts=_experts(config),
        vocabulary=embedding or int(getattr(config, "vocab_size", 0)),
        context=getattr(config, "max_position_embeddings", None),
        tied=not any(name.endswith(("lm_head.weight", "embed_out.weight")) for name in checkpoint.infos),
        parameters=sum(math.prod(info.shape) for info in checkpoint.infos.values()),
        kv_bytes_per_token=cache_layout(config).bytes_per_token(),
        stored_bytes=checkpoint.nbytes,
        weight_bytes={} if quantization else _weight_bytes(checkpoint),
        quantization=quantization.get("quant_method", "unknown") if quantization else None,
    )


def text_config(values: Mapping[str, Any]) -> Any:
    """The language model's part of the config as transformers' own class, which gives all families the same names."""
    from transformers import AutoConfig

    model_type = values.get("model_type")
    settings = {key: value for key, value in values.items() if key not in ("model_type", "quantization_config")}
    try:
        return AutoConfig.for_model(str(model_type), **settings).get_text_config()
    except Exception as error:  # config classes check their values with exceptions of many kinds
        raise UnsupportedError(f"config.json: model type {model_type!r}: {error}") from error


def _attention_kind(config: Any, heads: int, kv_heads: int) -> str:
    if getattr(config, "kv_lora_rank", None):
        return "MLA"
    return "MHA" if kv_heads == heads else "MQA" if kv_heads == 1 else "GQA"


def _positions(config: Any, checkpoint: Checkpoint) -> str:
    if uses_alibi(config):
        return "ALiBi"
    for info in _matrices(checkpoint):
        if info.name.endswith(_LEARNED_POSITIONS):
            return f"learned, {info.shape[0]:,}"
    rope = getattr(config, "rope_parameters", None) or {}
    # Models that alternate kinds of layers hold one set of parameters per kind.
    first = next((value for value in rope.values() if isinstance(value, Mapping)), rope)
    theta = first.get("rope_theta", getattr(config, "rope_theta", None))
    share = first.get("partial_rotary_factor", 1.0)
    if getattr(config, "rotary_dim", None):
        theta, share = theta or 10000.0, config.rotary_dim * config.num_attention_heads / config.hidden_size
    if theta is None:
        return "none"
    kind = first.get("rope_type", "default")
    scaling = "" if kind == "default" else f", {kind} ×{first.get('factor', 1):g}"
    return f"RoPE, θ = {theta:,.0f}{'' if share == 1 else f', {share:.0%} of each head'}{scaling}"


def uses_alibi(config: Any) -> bool:
    """Whether positions enter as ALiBi biases (Press et al. 2021, arXiv 2108.12409)."""
    if config.model_type == "bloom" or getattr(config, "alibi", False):
        return True
    attention = getattr(config, "attn_config", None)
    if isinstance(attention, Mapping):
        return bool(attention.get("alibi"))
    return bool(getattr(attention, "alibi", False))


def _windows(config: Any) -> tuple[int, int] | None:
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = getattr(config, "layer_types", None)
    count = kinds.count("sliding_attention") if kinds else config.num_hidden_layers
    return (int(count), int(window)) if count else None


def _experts(config: Any) -> int:
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return next((int(value) for name in names if (value := getattr(config, name, None))), 0)


def _matrices(checkpoint: Checkpoint) -> list[TensorInfo]:
    return [info for info in checkpoint.infos.values() if len(info.shape) >= 2]


def _is_embedding(name: str) -> bool:
    return any(part in name for part in ("embed", "wte.", "wpe.", "lm_head"))


def _weight_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    count = sum(math.prod(info.shape) for info in checkpoint.infos.values() if info.dtype.is_floating_point)
    linear = [info for info in _matrices(checkpoint) if not _is_embedding(info.name)]
    quantized = sum(math.prod(info.shape) for info in linear)
    sizes = {"float32": 4 * count, "bfloat16": 2 * count}
    for scheme in _SCHEMES:
        codes = quantized * scheme.bits // 8
        scales = sum(
            math.prod(info.shape[:-1]) * math.ceil(info.shape[-1] / scheme.columns_per_group(info.shape[-1]))
            for info in linear
        )
        sizes[str(scheme)] = codes + 2 * scales + 2 * (count - quantized)
    return sizes
