"""Gemma 4: heads of two lengths, keys and values shared by the last layers, an embedding for each layer, mixtures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.architectures.architecture import GgufArchitecture, Reading, outer
from llmconvert.gguf.architectures.entries import Config, Form, entries
from llmconvert.gguf.architectures.families.llama import MLP, RMS
from llmconvert.gguf.architectures.orders import part
from llmconvert.gguf.rope import shortest

__all__ = ["ARCHITECTURES"]

_GELU: Final = "gelu_pytorch_tanh"
_SLIDING, _FULL = "sliding_attention", "full_attention"
_FREQUENCIES: Final = "rope_freqs.weight"
_STILL: Final = 1e30  # what llama.cpp divides a frequency by that does not turn
_GATE_UP, _DOWN = "experts.gate_up_proj", "experts.down_proj"
_LAYER: Final = (
    *entries(
        """
input_layernorm.weight hidden
post_attention_layernorm.weight hidden -> ATTN_POST_NORM.weight
pre_feedforward_layernorm.weight hidden
post_feedforward_layernorm.weight hidden
pre_feedforward_layernorm_2.weight?
post_feedforward_layernorm_1.weight?
post_feedforward_layernorm_2.weight?
self_attn.q_proj.weight
self_attn.k_proj.weight~
self_attn.v_proj.weight~
self_attn.o_proj.weight
self_attn.q_norm.weight
self_attn.k_norm.weight~
layer_scalar -> LAYER_OUT_SCALE.weight
per_layer_input_gate.weight?
per_layer_projection.weight?
post_per_layer_input_norm.weight?
router.proj.weight?
router.scale? -> FFN_GATE_INP.scale
router.per_expert_scale? -> FFN_DOWN_EXP.scale
"""
        + "\n".join(line.partition(" ")[0] for line in MLP.split("\n"))
    ),
    *entries(f"{_GATE_UP}? -> FFN_GATE_EXP.weight", {_GATE_UP: Form(part(0, 2), whole=True)}),
    *entries(f"{_GATE_UP}? -> FFN_UP_EXP.weight", {_GATE_UP: Form(part(1, 2), whole=True)}),
    *entries(f"{_DOWN}? -> FFN_DOWN_EXP.weight", {_DOWN: Form(whole=True)}),
)
_OUTER: Final = (
    *outer(head=False),
    *entries(
        """
model.embed_tokens_per_layer.weight?
model.per_layer_model_projection.weight?
model.per_layer_projection_norm.weight?
""",
        prefix="",
    ),
)


def _wide(config: Config) -> Mapping[str, Any]:
    """What layers that see everything have otherwise: the length of their heads, how many keys there are."""
    found: Mapping[str, Any] = next(iter((config.get("per_layer_config") or {}).values()), {})
    return {"head_dim": config["head_dim"], "num_key_value_heads": config["num_key_value_heads"], **found}


def _turning(config: Config) -> int:
    """Frequencies of a head that sees everything that turn."""
    share = config["rope_parameters"][_FULL].get("partial_rotary_factor", 1.0)
    return int(share * _wide(config)["head_dim"] // 2)


def _write(config: Config) -> Mapping[str, Any]:
    sliding, full = (config["rope_parameters"][kind] for kind in (_SLIDING, _FULL))
    for kind, rope, wanted in ((_SLIDING, sliding, "default"), (_FULL, full, "proportional")):
        if rope.get("rope_type") != wanted or rope.get("factor") not in (None, 1.0):
            raise UnsupportedError(
                f"config.json: rope_parameters.{kind} is of type {rope.get('rope_type')!r}, factor "
                f"{rope.get('factor')}; llama.cpp's gemma4 computes {wanted!r} without one"
            )
    kinds, layers, wide = config["layer_types"], config["num_hidden_layers"], _wide(config)
    shared, inner = config["num_kv_shared_layers"], config["intermediate_size"]
    widened = config["use_double_wide_mlp"] and shared
    if shared and list(kinds[layers - shared - 2 : layers - shared]) != [_SLIDING, _FULL]:
        raise UnsupportedError(
            f"config.json: num_kv_shared_layers is {shared}; llama.cpp's gemma4 shares the keys of the last two layers "
            "before those, which have to be one with a window and one without"
        )
    keys = {_SLIDING: config["num_key_value_heads"], _FULL: wide["num_key_value_heads"]}
    mixture = {
        "expert_count": config["num_experts"],
        "expert_used_count": config["top_k_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
    }
    cap = config.get("final_logit_softcapping")
    return {
        "feed_forward_length": np.array(
            [inner * (2 if widened and i >= layers - shared else 1) for i in range(layers)]
        ).astype(np.int32),
        "attention.head_count_kv": np.array([keys[kind] for kind in kinds], np.int32),
        "attention.key_length": wide["head_dim"],
        "attention.value_length": wide["head_dim"],
        "attention.key_length_swa": config["head_dim"],
        "attention.value_length_swa": config["head_dim"],
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": np.array([kind == _SLIDING for kind in kinds], np.int32),
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"] or 0,
        "rope.dimension_count": wide["head_dim"],
        "rope.dimension_count_swa": config["head_dim"],
        "rope.freq_base": float(full["rope_theta"]),
        "rope.freq_base_swa": float(sliding["rope_theta"]),
        **(mixture if config["enable_moe_block"] else {}),
        **({"final_logit_softcapping": float(cap)} if cap else {}),
    }


def _tensors(config: Config) -> Mapping[str, np.ndarray]:
    half, turning = _wide(config)["head_dim"] // 2, _turning(config)
    return {_FREQUENCIES: np.array([1.0] * turning + [_STILL] * (half - turning), np.float32)}


def _read(file: Reading) -> Mapping[str, Any]:
    metadata, layers = file.header.metadata, file.layers
    kinds = [_SLIDING if flag else _FULL for flag in file.flags("attention.sliding_window_pattern")]
    keys = [int(one) for one in file.get("attention.head_count_kv")]
    of_kind = dict(zip(kinds, keys, strict=True))
    inner = [int(one) for one in file.get("feed_forward_length")]
    shared, wide = file.get("attention.shared_kv_layers", 0), file.get("attention.key_length")
    width = file.get("embedding_length_per_layer_input", 0)
    per_layer = file.header.tensors.get("per_layer_token_embd.weight")
    mixture = file.has("ffn_down_exps.weight")
    divisors = file.tensor(_FREQUENCIES)
    cap = shortest(metadata.number(f"{file.arch}.final_logit_softcapping", 0.0))
    equal = any(
        kind == _FULL and f"blk.{layer}.attn_v.weight" not in file.header.tensors
        for layer, kind in enumerate(kinds[: layers - shared])
    )
    narrow = of_kind.get(_SLIDING, keys[0])
    ropes = {key: shortest(metadata.number(f"{file.arch}.rope.{key}")) for key in ("freq_base", "freq_base_swa")}
    return {
        "hidden_activation": _GELU,
        "intermediate_size": inner[0],
        "use_double_wide_mlp": inner[-1] != inner[0],
        "num_key_value_heads": narrow,
        "head_dim": file.get("attention.key_length_swa"),
        "global_head_dim": wide,
        "num_global_key_value_heads": of_kind.get(_FULL) if equal else None,
        "attention_k_eq_v": equal,
        "sliding_window": file.get("attention.sliding_window"),
        "layer_types": kinds,
        "num_kv_shared_layers": shared,
        "hidden_size_per_layer_input": width,
        "vocab_size_per_layer_input": per_layer.shape[0] if per_layer is not None else file.config["vocab_size"],
        "enable_moe_block": mixture,
        "num_experts": file.get("expert_count") if mixture else None,
        "top_k_experts": file.get("expert_used_count") if mixture else None,
        "moe_intermediate_size": file.get("expert_feed_forward_length") if mixture else None,
        "rope_parameters": {
            _SLIDING: {"rope_type": "default", "rope_theta": ropes["freq_base_swa"]},
            _FULL: {
                "rope_type": "proportional",
                "rope_theta": ropes["freq_base"],
                "partial_rotary_factor": int((divisors == 1).sum()) * 2 / wide,
            },
        },
        "final_logit_softcapping": cap or None,
    }


GEMMA4: Final = GgufArchitecture(
    "gemma4",
    "gemma4_text",
    "Gemma4ForCausalLM",
    _OUTER,
    _LAYER,
    tuple(setting for setting in RMS if setting.name != "intermediate_size"),
    always={"attention_bias": False, "use_bidirectional_attention": None},
    write=_write,
    read=_read,
    tensors=_tensors,
    # Sizes: tensors have them, or nothing has.
    inert=frozenset({"vocab_size_per_layer_input", "num_experts", "moe_intermediate_size"}),
    windows="kept",
    attention=False,
    rotary="own",
    activation=_GELU,
    consumed=frozenset({_FREQUENCIES}),
    unquantized=("per_layer_model_proj.weight",),
    known=frozenset(
        {"final_logit_softcapping", "expert_count", "attention.key_length_swa", "attention.shared_kv_layers"}
    ),
)
ARCHITECTURES: Final = (GEMMA4,)
