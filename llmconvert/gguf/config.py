"""From GGUF metadata to ``config.json`` and ``generation_config.json``, as transformers 5 reads them.

Key names: ``gguf.constants.Keys``. What a file leaves out takes llama.cpp's default, not the one of a transformers
config class, which describes one particular model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.header import GgufHeader, Metadata, shown
from llmconvert.gguf.names import Architecture
from llmconvert.gguf.rope import llama3_parameters, rope_parameters, shortest

__all__ = ["Geometry", "build_config", "build_generation_config", "gemma2_query_scalar", "read_geometry"]

# Settings that change what a model computes and that none of the supported classes has.
_REFUSED: Final = (
    "expert_count",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "attention.output_scale",
    "attention.temperature_scale",
    "attention.temperature_length",
    "attention.key_length_swa",
    "attention.shared_kv_layers",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "nextn_predict_layers",
)
_GEMMA2_27B_LAYERS: Final = 46
_GEMMA2_WINDOW: Final = 4096


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes of a model: ``rotary_dim`` is how many dimensions of a head RoPE turns."""

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int

    @property
    def symbols(self) -> dict[str, int]:
        """What the symbols in :class:`~llmconvert.gguf.names.Place` shapes stand for."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "vocab": self.vocab,
            "hidden": self.hidden,
            "inner": self.inner,
            "fused_inner": 2 * self.inner,
            "head": self.head_dim,
            "query": query,
            "key": key,
            "fused_qkv": query + 2 * key,
        }


def read_geometry(header: GgufHeader, arch: str) -> Geometry:
    """Read a model's sizes from the metadata, the vocabulary from the embedding's rows.

    Raises:
        CheckpointError: a size is missing or contradicts another.
        UnsupportedError: a setting that changes what the model computes and that no supported class has.
    """
    metadata = header.metadata
    for key in _REFUSED:
        value = metadata.get(f"{arch}.{key}")
        if value is not None and (not np.isscalar(value) or value != 0):
            raise UnsupportedError(
                f"{header.path}: {arch}.{key} is {shown(value)}; such {arch} models are not supported"
            )
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{header.path}: has no embedding matrix 'token_embd.weight'; the file is incomplete")
    hidden = _positive(metadata, f"{arch}.embedding_length")
    heads = _positive(metadata, f"{arch}.attention.head_count")
    layers = _positive(metadata, f"{arch}.block_count")
    if layers > len(header.tensors):
        raise CheckpointError(f"{header.path}: {arch}.block_count is {layers:,}, with {len(header.tensors)} tensors")
    head_dim = _positive(metadata, f"{arch}.attention.key_length", hidden // heads)
    geometry = Geometry(
        vocab=embedding.shape[0],
        hidden=hidden,
        inner=_positive(metadata, f"{arch}.feed_forward_length"),
        layers=layers,
        heads=heads,
        kv_heads=_positive(metadata, f"{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        rotary_dim=_positive(metadata, f"{arch}.rope.dimension_count", head_dim),
    )
    if heads % geometry.kv_heads or head_dim % 2 or geometry.rotary_dim > head_dim:
        raise CheckpointError(
            f"{header.path}: {heads} heads of {head_dim} with {geometry.kv_heads} key-value heads and "
            f"{geometry.rotary_dim} rotary dimensions are no attention; the metadata is corrupt"
        )
    value_length = _positive(metadata, f"{arch}.attention.value_length", head_dim)
    if value_length != head_dim or (geometry.rotary_dim != head_dim and arch != "phi3"):
        raise UnsupportedError(
            f"{header.path}: heads of {head_dim} with values of {value_length} and {geometry.rotary_dim} rotary "
            f"dimensions are not supported for {arch}"
        )
    return geometry


def build_config(
    header: GgufHeader,
    arch: str,
    architecture: Architecture,
    geometry: Geometry,
    read_tensor: Callable[[str], np.ndarray],
) -> dict[str, Any]:
    """The model's ``config.json``.

    Args:
        header: the file.
        arch: its ``general.architecture``.
        architecture: what that holds.
        geometry: the model's sizes.
        read_tensor: the float32 values of a stored tensor by GGUF name, for the settings that files keep as tensors.

    Raises:
        CheckpointError: a setting is missing or makes no sense.
        UnsupportedError: a setting that transformers' class of this model cannot express.
    """
    metadata = header.metadata
    config: dict[str, Any] = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        "vocab_size": geometry.vocab,
        "hidden_size": geometry.hidden,
        "intermediate_size": geometry.inner,
        "num_hidden_layers": geometry.layers,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": _positive(metadata, f"{arch}.context_length"),
        "rms_norm_eps": shortest(metadata.number(f"{arch}.attention.layer_norm_rms_epsilon")),
        "rope_parameters": rope_parameters(metadata, arch),
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "dtype": _dominant_dtype(header),
        **_token_ids(metadata, geometry.vocab),
    }
    return config | _SPECIFIC[arch](header, geometry, config, read_tensor)


def build_generation_config(config: Mapping[str, Any], metadata: Metadata) -> dict[str, Any]:
    """The model's ``generation_config.json``: its token ids, generation ending at the end of a turn too."""
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    valid = list(dict.fromkeys(end for end in ends if isinstance(end, int) and 0 <= end < config["vocab_size"]))
    if len(valid) > 1:
        ids["eos_token_id"] = valid
    return ids


def _positive(metadata: Metadata, key: str, default: int | None = None) -> int:
    value = metadata.integer(key, default)
    if value < 1:
        raise CheckpointError(f"{metadata.path}: metadata {key} is {value}, expected a positive number")
    return value


def _token_ids(metadata: Metadata, vocab: int) -> dict[str, int | None]:
    ids: dict[str, int | None] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        # llama.cpp ignores ids outside the vocabulary; some converters wrote -1, as unsigned, for "none".
        ids[f"{name}_token_id"] = value if isinstance(value, int) and 0 <= value < vocab else None
    return ids


def _dominant_dtype(header: GgufHeader) -> str:
    """The dtype that most of the weights have once read: norms are float32 whatever the matrices are."""
    elements: Counter[str] = Counter()
    names = {"F16": "float16", "BF16": "bfloat16"}
    for tensor in header.tensors.values():
        elements[names.get(tensor.qtype.name, "float32")] += int(np.prod(tensor.shape, dtype=np.float64))
    return elements.most_common(1)[0][0]


def _llama(
    header: GgufHeader, geometry: Geometry, config: dict[str, Any], read_tensor: Callable[[str], np.ndarray]
) -> dict[str, Any]:
    metadata = header.metadata
    specific: dict[str, Any] = {"head_dim": geometry.head_dim}
    if "rope_freqs.weight" in header.tensors:
        specific["rope_parameters"] = llama3_parameters(
            read_tensor("rope_freqs.weight"),
            config["rope_parameters"],
            geometry.head_dim,
            f"{header.path}: rope_freqs.weight",
        )
    attention = _biased(header, ("attn_q", "attn_k", "attn_v", "attn_output"))
    mlp = _biased(header, ("ffn_gate", "ffn_up", "ffn_down"))
    window = metadata.integer("llama.attention.sliding_window", 0)
    if window == 0 and (attention or mlp or not _is_mistral(metadata)):
        return specific | {"attention_bias": attention, "mlp_bias": mlp}
    if attention or mlp:
        raise UnsupportedError(f"{header.path}: a llama model with a sliding window and biases is not supported")
    # Llama with a window is what transformers calls Mistral; without one both compute the same.
    return specific | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": window or None,
    }


def _is_mistral(metadata: Metadata) -> bool:
    keys = ("general.name", "general.basename", "general.base_model.0.name")
    return any("mistral" in str(metadata.get(key, "")).lower() for key in keys)


def _biased(header: GgufHeader, stems: tuple[str, ...]) -> bool:
    """Whether these linears have biases, which transformers' Llama switches on and off together."""
    having = [stem for stem in stems if f"blk.0.{stem}.bias" in header.tensors]
    if having and len(having) != len(stems):
        raise UnsupportedError(
            f"{header.path}: has biases on {', '.join(having)} but not on all of {', '.join(stems)}; "
            "transformers' Llama cannot express that"
        )
    return bool(having)


def _qwen2(
    header: GgufHeader, geometry: Geometry, config: dict[str, Any], read_tensor: Callable[[str], np.ndarray]
) -> dict[str, Any]:
    specific: dict[str, Any] = {"use_sliding_window": False, "sliding_window": None}
    if geometry.head_dim * geometry.heads != geometry.hidden:
        specific["head_dim"] = geometry.head_dim
    return specific


def _qwen3(
    header: GgufHeader, geometry: Geometry, config: dict[str, Any], read_tensor: Callable[[str], np.ndarray]
) -> dict[str, Any]:
    return {
        "head_dim": geometry.head_dim,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
    }


def _phi3(
    header: GgufHeader, geometry: Geometry, config: dict[str, Any], read_tensor: Callable[[str], np.ndarray]
) -> dict[str, Any]:
    metadata = header.metadata
    if geometry.head_dim * geometry.heads != geometry.hidden:
        raise UnsupportedError(f"{header.path}: phi3 heads of {geometry.head_dim} do not add up to {geometry.hidden}")
    context = _positive(metadata, "phi3.rope.scaling.original_context_length", config["max_position_embeddings"])
    rope = config["rope_parameters"] | {"partial_rotary_factor": geometry.rotary_dim / geometry.head_dim}
    names = [f"rope_factors_{length}.weight" for length in ("long", "short")]
    if any(name in header.tensors for name in names):
        long, short = (_factors(header, name, geometry.rotary_dim, read_tensor) for name in names)
        rope |= {
            "rope_type": "longrope",
            "long_factor": long,
            "short_factor": short,
            "original_max_position_embeddings": context,
        }
    return {
        "rope_parameters": rope,
        "original_max_position_embeddings": context,
        "sliding_window": metadata.integer("phi3.attention.sliding_window", 0) or None,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    }


def _factors(header: GgufHeader, name: str, rotary_dim: int, read_tensor: Callable[[str], np.ndarray]) -> list[float]:
    if name not in header.tensors or header.tensors[name].shape != (rotary_dim // 2,):
        raise CheckpointError(f"{header.path}: tensor {name!r} is missing or not of {rotary_dim // 2} elements")
    return [shortest(value) for value in read_tensor(name).tolist()]


def gemma2_query_scalar(hidden: int, heads: int, layers: int, head_dim: int) -> int:
    """What Gemma 2 scales queries by, under a root.

    Of its sizes only the 27B does not take its head size, and the file does not say so; llama.cpp, too, knows it by its
    number of layers.
    """
    return hidden // heads if layers == _GEMMA2_27B_LAYERS else head_dim


def _gemma2(
    header: GgufHeader, geometry: Geometry, config: dict[str, Any], read_tensor: Callable[[str], np.ndarray]
) -> dict[str, Any]:
    metadata = header.metadata
    return {
        "head_dim": geometry.head_dim,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": gemma2_query_scalar(
            geometry.hidden, geometry.heads, geometry.layers, geometry.head_dim
        ),
        "sliding_window": _positive(metadata, "gemma2.attention.sliding_window", _GEMMA2_WINDOW),
        "attn_logit_softcapping": shortest(metadata.number("gemma2.attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": shortest(metadata.number("gemma2.final_logit_softcapping", 30.0)),
    }


_SPECIFIC: Final = {"llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "phi3": _phi3, "gemma2": _gemma2}
