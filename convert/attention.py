"""The attention geometry of a checkpoint: heads, rotary pairs, projections, from its config and tensor names.

Which tensors are query, key, value and output, and how positions enter, is a matter of the architecture; the table
below holds it as data. An architecture that is not in it is refused by name, with the reason where there is one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig

from llmconvert.checkpoint import Checkpoint
from llmconvert.engine.skeleton import build_config
from llmconvert.errors import CheckpointError, UnsupportedError

__all__ = ["AttentionGeometry", "Fusion", "Projections", "Rotary", "read_geometry", "require_kv_heads"]

#: How query, key and value share a tensor: not at all, one after the other (Phi-3), or key and value behind the
#: queries that they serve (Falcon).
Fusion = Literal["separate", "stacked", "grouped"]
Pairing = Literal["half", "interleaved"]


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary position embedding of one layer: the first ``dims`` of a head are rotated, in pairs.

    ``half`` pairs dimension i with i + dims/2 (Llama), ``interleaved`` 2i with 2i + 1 (Cohere, GLM). ``dims`` is 0
    where a layer has no rotary embedding.
    """

    pairing: Pairing
    dims: int


@dataclass(frozen=True, slots=True)
class Projections:
    """Tensor names of one layer, without ``.weight`` and ``.bias``; the first three are equal when fused."""

    query: str
    key: str
    value: str
    output: str


@dataclass(frozen=True, slots=True)
class AttentionGeometry:
    """How the attention layers of a checkpoint are built.

    Attributes:
        model_type: the architecture.
        query_heads: per layer.
        kv_heads: per layer.
        head_dim: of queries, keys and values.
        hidden_size: width of the attention input.
        rotary: per layer.
        fusion: how query, key and value share tensors.
        head_norm: whether every query and key head is divided by its root mean square after the projection.
        movable: whether heads may change places; not under ALiBi, which gives each query head its own slope.
        projections: per layer.
    """

    model_type: str
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    rotary: tuple[Rotary, ...]
    fusion: Fusion
    head_norm: bool
    movable: bool
    projections: tuple[Projections, ...]

    @property
    def layers(self) -> int:
        """Number of attention layers."""
        return len(self.projections)

    def kv_bytes_per_token(self, kv_heads: int, itemsize: int = 2) -> int:
        """Bytes of keys and values that a token leaves in the cache, over all layers."""
        return 2 * self.layers * kv_heads * self.head_dim * itemsize


@dataclass(frozen=True, slots=True)
class _Family:
    """What one architecture does. Config keys in ``forbidden`` must be unset or false."""

    pairing: Pairing = "half"
    parent: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    fusion: Fusion = "separate"
    head_norm: bool = False
    forbidden: tuple[str, ...] = ()


_LLAMA = _Family()
_FAMILIES: Mapping[str, _Family] = {
    "cohere": _Family(pairing="interleaved", forbidden=("use_qk_norm",)),
    "cohere2": _Family(pairing="interleaved"),
    "falcon": _Family(
        parent="self_attention",
        query="query_key_value",
        key="query_key_value",
        value="query_key_value",
        output="dense",
        fusion="grouped",
    ),
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _Family(head_norm=True),
    "glm": _Family(pairing="interleaved"),
    "granite": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo": _Family(forbidden=("clip_qkv",)),
    "phi": _Family(output="dense", forbidden=("qk_layernorm",)),
    "phi3": _Family(query="qkv_proj", key="qkv_proj", value="qkv_proj", fusion="stacked"),
    "qwen2": _LLAMA,
    "qwen3": _Family(head_norm=True),
    "smollm3": _LLAMA,
    "stablelm": _Family(forbidden=("qk_layernorm",)),
    "starcoder2": _LLAMA,
}

_NO_SETTING = "its transformers class has no setting for the number of key-value heads, so no checkpoint of it can"
_REASONS: Mapping[str, str] = {
    **dict.fromkeys(
        ("bloom", "codegen", "gpt2", "gpt_neo", "gpt_neox", "gptj", "mpt", "opt", "persimmon"),
        f"{_NO_SETTING} have fewer than query heads",
    ),
    "olmo2": "its query and key norms run over all heads at once, and merging heads changes what they divide by",
    "olmo3": "its query and key norms run over all heads at once, and merging heads changes what they divide by",
    "deepseek_v2": "it caches a compressed latent (MLA), not heads",
    "deepseek_v3": "it caches a compressed latent (MLA), not heads",
}
_FORBIDDEN: Mapping[str, str] = {
    "use_qk_norm": "normalizes every query and key head with weights of its own, which a merge would mix",
    "qk_layernorm": "normalizes query and key heads by mean and variance, which a merge would mix",
    "clip_qkv": "clips queries, keys and values, which undoes the symmetries that a merge is built on",
}


def read_geometry(checkpoint: Checkpoint) -> AttentionGeometry:
    """The geometry of ``checkpoint``, from its config and its tensors' headers.

    Raises:
        UnsupportedError: an architecture, or a setting of it, whose heads cannot be merged.
        CheckpointError: tensors are missing or contradict the config.
    """
    config = build_config(checkpoint.config)
    kind = str(config.model_type)
    family = _family(kind, config)
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    layers = int(config.num_hidden_layers)
    geometry = AttentionGeometry(
        model_type=kind,
        query_heads=heads,
        kv_heads=_kv_heads(config),
        head_dim=head_dim,
        hidden_size=int(config.hidden_size),
        rotary=tuple(_rotary(config, family, head_dim, layer) for layer in range(layers)),
        fusion=family.fusion,
        head_norm=family.head_norm,
        movable=not getattr(config, "alibi", False),
        projections=_projections(checkpoint, family, layers),
    )
    _check_shapes(checkpoint, geometry)
    return geometry


def require_kv_heads(geometry: AttentionGeometry, kv_heads: int) -> None:
    """Refuse a number of key-value heads that ``geometry`` cannot be merged to.

    Raises:
        UnsupportedError: naming the numbers that it can be merged to.
    """
    now = geometry.kv_heads
    possible = [count for count in range(1, now) if now % count == 0]
    if geometry.model_type == "falcon" and now == geometry.query_heads and now > 1:
        possible = [1]  # the old layout holds one key-value head or as many as there are query heads
    if kv_heads in possible:
        return
    ways = f"possible: {', '.join(map(str, possible))}" if possible else "it is multi-query attention already"
    raise UnsupportedError(
        f"{geometry.model_type} with {now} key-value heads cannot be merged to {kv_heads}: whole groups of equal size "
        f"become one; {ways}"
    )


def _family(kind: str, config: PretrainedConfig) -> _Family:
    family = _FAMILIES.get(kind)
    if family is None:
        reason = _REASONS.get(kind, f"known are {', '.join(_FAMILIES)}")
        raise UnsupportedError(f"attention heads of architecture {kind!r} cannot be merged: {reason}")
    for key in family.forbidden:
        if getattr(config, key, None):
            raise UnsupportedError(f"attention heads of this {kind} model cannot be merged: {key} {_FORBIDDEN[key]}")
    return family


def _kv_heads(config: PretrainedConfig) -> int:
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        return 1 if config.multi_query else int(config.num_attention_heads)
    name = "num_kv_heads" if config.model_type == "falcon" else "num_key_value_heads"
    return int(getattr(config, name, None) or config.num_attention_heads)


def _rotary(config: PretrainedConfig, family: _Family, head_dim: int, layer: int) -> Rotary:
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    factor = parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    dims = int(head_dim * factor)
    flags = getattr(config, "no_rope_layers", None)
    without = (
        (config.model_type == "smollm3" and flags is not None and not flags[layer])
        or (config.model_type == "cohere2" and config.layer_types[layer] != "sliding_attention")
        or (config.model_type == "falcon" and config.alibi)
    )
    return Rotary(family.pairing, 0 if without else dims)


def _projections(checkpoint: Checkpoint, family: _Family, layers: int) -> tuple[Projections, ...]:
    """Names by layer. What stands before the layer's number is found out from the output projections."""
    pattern = re.compile(rf"(?P<list>.*\.|)(?P<index>\d+)\.{family.parent}\.{family.output}\.weight")
    found = {int(m["index"]): m["list"] for m in map(pattern.fullmatch, checkpoint) if m is not None}
    missing = [layer for layer in range(layers) if layer not in found]
    if missing:
        raise CheckpointError(
            f"layer {missing[0]} has no tensor …{family.parent}.{family.output}.weight; config.json names {layers} "
            "layers, and the weights do not go with it"
        )
    stems = [f"{found[layer]}{layer}.{family.parent}." for layer in range(layers)]
    parts = (family.query, family.key, family.value, family.output)
    return tuple(Projections(*(stem + part for part in parts)) for stem in stems)


def _check_shapes(checkpoint: Checkpoint, geometry: AttentionGeometry) -> None:
    queries, keys = geometry.query_heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    for names in geometry.projections:
        if geometry.fusion == "separate":
            expected = {names.query: queries, names.key: keys, names.value: keys}
        else:
            expected = {names.query: queries + 2 * keys}
        for name, rows in expected.items():
            info = checkpoint.infos.get(f"{name}.weight")
            if info is None:
                raise CheckpointError(f"the checkpoint has no tensor {name}.weight, which {geometry.model_type} needs")
            if info.shape != (rows, geometry.hidden_size):
                raise CheckpointError(
                    f"tensor {info.name} has shape {list(info.shape)}, config.json says {[rows, geometry.hidden_size]}"
                )
