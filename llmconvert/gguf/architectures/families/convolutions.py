"""Short convolutions, or linear attention, in turns with attention: LFM2 and Qwen3-Next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.architectures.architecture import GgufArchitecture, Reading, Setting, outer
from llmconvert.gguf.architectures.entries import Change, Config, Entry, Form, entries
from llmconvert.gguf.architectures.families.llama import experts
from llmconvert.gguf.architectures.families.state_spaces import (
    DECAY,
    RMS_EPS,
    SQUEEZED,
    attending,
    kv_heads,
)
from llmconvert.gguf.architectures.orders import Order
from llmconvert.gguf.rope import rope_metadata, rope_parameters

__all__ = ["ARCHITECTURES"]

# LFM2: short convolutions in turns with attention.
_LFM2_TENSORS: Final = """
operator_norm.weight
ffn_norm.weight
conv.conv.weight~
conv.in_proj.weight~
conv.out_proj.weight~
self_attn.q_proj.weight~
self_attn.k_proj.weight~
self_attn.v_proj.weight~
self_attn.out_proj.weight~
self_attn.q_layernorm.weight~
self_attn.k_layernorm.weight~
feed_forward.w1.weight~
feed_forward.w2.weight~
feed_forward.w3.weight~
"""
_LFM2_EXPERTS: Final = """
feed_forward.gate.weight~
feed_forward.expert_bias~ -> FFN_EXP_PROBS_B.bias
feed_forward.experts.#.w1.weight~ -> FFN_GATE_EXP.weight
feed_forward.experts.#.w3.weight~ -> FFN_UP_EXP.weight
feed_forward.experts.#.w2.weight~ -> FFN_DOWN_EXP.weight
"""
_LFM2_SETTINGS: Final = (
    Setting("context_length", "max_position_embeddings"),
    Setting("embedding_length", "hidden_size"),
    Setting("block_count", "num_hidden_layers"),
    Setting("attention.head_count", "num_attention_heads"),
    Setting(RMS_EPS, "norm_eps", float),
    Setting("shortconv.l_cache", "conv_L_cache"),
)


def _lfm2_width(config: Config) -> int:
    width = int(config["intermediate_size"])
    if not config.get("block_auto_adjust_ff_dim"):
        return width
    width = int(2 * width / 3)
    if config.get("block_ffn_dim_multiplier") is not None:
        width = int(config["block_ffn_dim_multiplier"] * width)
    multiple = int(config["block_multiple_of"])
    return multiple * -(-width // multiple)


def _write_lfm2(config: Config) -> Mapping[str, Any]:
    return {
        "attention.head_count_kv": kv_heads(config, [kind == "full_attention" for kind in config["layer_types"]]),
        "rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
        "rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        **rope_metadata(config, "lfm2", ()),
        "feed_forward_length": _lfm2_width(config),
    }


def _read_lfm2(file: Reading) -> Mapping[str, Any]:
    layers, heads = attending(file)
    return {
        "num_key_value_heads": heads,
        "layer_types": ["full_attention" if one else "conv" for one in layers],
        "rope_parameters": rope_parameters(file.header.metadata, file.arch),
        "intermediate_size": file.get("feed_forward_length"),
        "block_auto_adjust_ff_dim": False,
        "conv_bias": False,
    }


_LFM2_OUTER: Final = entries(
    "model.embed_tokens.weight\nmodel.embedding_norm.weight -> TOKEN_EMBD_NORM.weight", prefix=""
)
LFM2: Final = GgufArchitecture(
    "lfm2",
    "lfm2",
    "Lfm2ForCausalLM",
    _LFM2_OUTER,
    entries(_LFM2_TENSORS, {"conv.conv": SQUEEZED}),
    _LFM2_SETTINGS,
    write=_write_lfm2,
    read=_read_lfm2,
    # The width of the MLP is stored as it comes out of these.
    inert=frozenset(
        {
            *("intermediate_size", "block_multiple_of", "block_ffn_dim_multiplier", "block_auto_adjust_ff_dim"),
            *("full_attn_idxs", "block_ff_dim", "block_dim"),
        }
    ),
    windows="kept",
    attention=False,
    activation="",
)
LFM2_MOE: Final = GgufArchitecture(
    "lfm2moe",
    "lfm2_moe",
    "Lfm2MoeForCausalLM",
    _LFM2_OUTER,
    entries(_LFM2_TENSORS + _LFM2_EXPERTS, {"conv.conv": SQUEEZED}),
    (
        *_LFM2_SETTINGS,
        Setting("expert_count", "num_experts"),
        Setting("expert_used_count", "num_experts_per_tok"),
        Setting("expert_feed_forward_length", "moe_intermediate_size"),
        Setting("leading_dense_block_count", "num_dense_layers", default=0, least=0),
    ),
    always={"norm_topk_prob": True, "routed_scaling_factor": 1.0, "use_expert_bias": True},
    write=lambda config: {**_write_lfm2(config), "expert_gating_func": 2},
    read=_read_lfm2,
    inert=frozenset({"full_attn_idxs", "block_auto_adjust_ff_dim"}),
    windows="kept",
    attention=False,
    activation="",
)


# Qwen3-Next: gated delta rule in turns with gated attention.
def _delta_rows(gate: bool) -> Order:
    def order(config: Config, outputs: int) -> np.ndarray:
        groups, keys = config["linear_num_key_heads"], config["linear_key_head_dim"]
        values = config["linear_num_value_heads"] // groups * config["linear_value_head_dim"]
        rows = np.arange(outputs).reshape(groups, -1)
        if gate:
            return rows[:, 2 * keys + values :].reshape(-1)
        cuts = (rows[:, :keys], rows[:, keys : 2 * keys], rows[:, 2 * keys : 2 * keys + values])
        return np.concatenate([cut.reshape(-1) for cut in cuts])

    return order


_PLUS_ONE: Final = Form(change=Change.PLUS_ONE)
_QKVZ: Final = "linear_attn.in_proj_qkvz"


def _next_layer() -> tuple[Entry, ...]:
    plain = """
input_layernorm.weight
post_attention_layernorm.weight -> ATTN_POST_NORM.weight
linear_attn.in_proj_ba.weight~
linear_attn.conv1d.weight~
linear_attn.dt_bias~ -> SSM_DT.bias
linear_attn.A_log~ -> SSM_A
linear_attn.norm.weight~
linear_attn.out_proj.weight~
self_attn.q_proj.weight~
self_attn.k_proj.weight~
self_attn.v_proj.weight~
self_attn.o_proj.weight~
self_attn.q_norm.weight~
self_attn.k_norm.weight~
mlp.gate.weight
mlp.shared_expert.gate_proj.weight
mlp.shared_expert.up_proj.weight
mlp.shared_expert.down_proj.weight
mlp.shared_expert_gate.weight -> FFN_GATE_INP_SHEXP.weight
"""
    forms = {
        "input_layernorm": _PLUS_ONE,
        "post_attention_layernorm": _PLUS_ONE,
        "self_attn.q_norm": _PLUS_ONE,
        "self_attn.k_norm": _PLUS_ONE,
        "linear_attn.conv1d": SQUEEZED,
        "linear_attn.A_log": DECAY,
    }
    return (
        *entries(plain, forms),
        *entries(f"{_QKVZ}.weight~ -> ATTN_QKV.weight", {_QKVZ: Form(_delta_rows(False))}),
        *entries(f"{_QKVZ}.weight~ -> ATTN_GATE.weight", {_QKVZ: Form(_delta_rows(True))}),
        *experts("mlp.experts"),
    )


_INTERVAL: Final = 4


def _next_kinds(layers: int) -> list[str]:
    return ["full_attention" if (layer + 1) % _INTERVAL == 0 else "linear_attention" for layer in range(layers)]


def _write_next(config: Config) -> Mapping[str, Any]:
    kinds = _next_kinds(config["num_hidden_layers"])
    if list(config["layer_types"]) != kinds:
        raise UnsupportedError(
            f"config.json: layer_types is {', '.join(config['layer_types'])}; llama.cpp's qwen3next attends in every "
            f"{_INTERVAL}th layer"
        )
    return {
        "ssm.inner_size": config["linear_value_head_dim"] * config["linear_num_value_heads"],
        "full_attention_interval": _INTERVAL,
    }


def _read_next(file: Reading) -> Mapping[str, Any]:
    inner, heads = file.get("ssm.inner_size"), file.config["linear_num_value_heads"]
    return {
        "linear_value_head_dim": inner // heads,
        "layer_types": _next_kinds(file.layers),
    }


QWEN3_NEXT: Final = GgufArchitecture(
    "qwen3next",
    "qwen3_next",
    "Qwen3NextForCausalLM",
    outer(norm=_PLUS_ONE),
    _next_layer(),
    (
        Setting("context_length", "max_position_embeddings"),
        Setting("embedding_length", "hidden_size"),
        Setting("block_count", "num_hidden_layers"),
        Setting("feed_forward_length", "intermediate_size"),
        Setting("attention.head_count", "num_attention_heads"),
        Setting(RMS_EPS, "rms_norm_eps", float),
        Setting("expert_count", "num_experts"),
        Setting("expert_used_count", "num_experts_per_tok"),
        Setting("expert_feed_forward_length", "moe_intermediate_size"),
        Setting("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
        Setting("ssm.conv_kernel", "linear_conv_kernel_dim"),
        Setting("ssm.state_size", "linear_key_head_dim"),
        Setting("ssm.group_count", "linear_num_key_heads"),
        Setting("ssm.time_step_rank", "linear_num_value_heads"),
    ),
    always={"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    write=_write_next,
    read=_read_next,
    windows="kept",
    rotary="part",
)
ARCHITECTURES: Final = (LFM2, LFM2_MOE, QWEN3_NEXT)
