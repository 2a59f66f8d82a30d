"""Attention of each architecture as data: which heads can be merged, and why some can't.

An architecture that is not in the table is refused by name. Adding one whose attention is made of known parts is one
line here and one disguised model in its test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["FAMILIES", "FORBIDDEN", "NO_SETTING", "REASONS", "Family", "Fusion", "Norm", "Pairing"]

#: How query, key and value share a tensor: not at all, one after the other (Phi-3), or key and value behind the
#: queries that they serve (Falcon).
Fusion = Literal["separate", "stacked", "grouped"]
Pairing = Literal["half", "interleaved"]


@dataclass(frozen=True, slots=True)
class Norm:
    """How queries and keys are normalized after their projection.

    Attributes:
        scope: what is divided by its root mean square: each head by itself, or all heads of the layer at once.
        query: name of the module below the attention; empty where the norm has no weights.
        key: likewise.
        weights: one vector for all heads, or one for each (as one tensor, or as a module per head).
        centred: whether a head's mean is subtracted first.
        offset: what is added to stored weights before they multiply.
        after_rotary: whether rotation comes before the norm.
    """

    scope: Literal["head", "layer"] = "head"
    query: str = "q_norm"
    key: str = "k_norm"
    weights: Literal["shared", "own", "modules"] = "shared"
    centred: bool = False
    offset: float = 0.0
    after_rotary: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """What one architecture does.

    Attributes:
        pairing: of rotary dimensions; None where there is no rotary embedding.
        parent: the attention module's name in a block, and below it the four projections.
        fusion: how query, key and value share tensors.
        norm: of queries and keys.
        switched_norm: ``norm`` applies only where this key of the config is true.
        sinks: whether query heads carry numbers of their own, so that they have to keep their places.
        plain: whether projections are torch's own linear layers; through others no calibration text is run.
        forbidden: keys of the config that must be unset or false, see :data:`FORBIDDEN`.
    """

    pairing: Pairing | None = "half"
    parent: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    fusion: Fusion = "separate"
    norm: Norm | None = None
    switched_norm: str | None = None
    sinks: bool = False
    plain: bool = True
    forbidden: tuple[str, ...] = ()


_LLAMA = Family()
_INTERLEAVED = Family(pairing="interleaved")
_HEAD_NORM = Family(norm=Norm())
_LAYER_NORM = Family(norm=Norm(scope="layer", weights="own"))

FAMILIES: Mapping[str, Family] = {
    "apertus": _HEAD_NORM,
    "arcee": _LLAMA,
    "cohere": Family(pairing="interleaved", norm=Norm(weights="own", centred=True), switched_norm="use_qk_norm"),
    "cohere2": _INTERLEAVED,
    "ernie4_5": _INTERLEAVED,
    "exaone4": _HEAD_NORM,
    "falcon": Family(
        parent="self_attention",
        query="query_key_value",
        key="query_key_value",
        value="query_key_value",
        output="dense",
        fusion="grouped",
        plain=False,
    ),
    "flex_olmo": _LAYER_NORM,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": Family(norm=Norm(offset=1.0)),
    "glm": _INTERLEAVED,
    "glm4": _INTERLEAVED,
    "gpt_bigcode": Family(
        pairing=None, parent="attn", query="c_attn", key="c_attn", value="c_attn", output="c_proj", fusion="grouped"
    ),
    "gpt_oss": Family(sinks=True),
    "granite": _LLAMA,
    "granitemoe": _LLAMA,
    "helium": _INTERLEAVED,
    "hunyuan_v1_dense": Family(norm=Norm(query="query_layernorm", key="key_layernorm", after_rotary=True)),
    "hyperclovax": _LLAMA,
    "jais2": _LLAMA,
    "llama": _LLAMA,
    "ministral": _LLAMA,
    "ministral3": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "nanochat": Family(norm=Norm(query="", key="", after_rotary=True)),
    "nemotron": _LLAMA,
    "olmo": Family(forbidden=("clip_qkv",)),
    "olmo2": _LAYER_NORM,
    "olmo3": _LAYER_NORM,
    "olmoe": Family(norm=Norm(scope="layer", weights="own"), forbidden=("clip_qkv",)),
    "phi": Family(output="dense", forbidden=("qk_layernorm",)),
    "phi3": Family(query="qkv_proj", key="qkv_proj", value="qkv_proj", fusion="stacked"),
    "phimoe": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_moe": _LLAMA,
    "qwen3": _HEAD_NORM,
    "qwen3_moe": _HEAD_NORM,
    "seed_oss": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": Family(
        norm=Norm(query="q_layernorm", key="k_layernorm", weights="modules", centred=True),
        switched_norm="qk_layernorm",
    ),
    "starcoder2": _LLAMA,
    "vaultgemma": _LLAMA,
}

NO_SETTING = (
    "its transformers class has no setting for the number of key-value heads, so no checkpoint of it can have fewer "
    "than query heads"
)
_GATED = "it multiplies attention outputs by a gate before their projection, which ties values to their dimensions"
_LATENT = "it caches a compressed latent (MLA), not heads"
REASONS: Mapping[str, str] = {
    **dict.fromkeys(
        ("bloom", "codegen", "gpt2", "gpt_neo", "gpt_neox", "gptj", "mpt", "opt", "persimmon"),
        NO_SETTING,
    ),
    **dict.fromkeys(("afmoe", "qwen3_5", "qwen3_5_text", "qwen3_next"), _GATED),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"), _LATENT),
    "bitnet": "it normalizes attention outputs before their projection, which ties values to their dimensions",
    "dbrx": "its number of key-value heads stands in a nested config that is not read yet",
}
FORBIDDEN: Mapping[str, str] = {
    "qk_layernorm": "adds one bias to all normalized heads, which no head can be transformed under",
    "clip_qkv": "clips queries, keys and values, which undoes the symmetries that a merge is built on",
}
