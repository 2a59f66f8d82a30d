"""Mixtures with shared experts, leading dense layers and sigmoid routers: DeepSeek, GLM-4.5 and others; and gpt-oss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from llmconvert.gguf.architectures.architecture import GgufArchitecture, Reading, Setting, outer
from llmconvert.gguf.architectures.entries import Config, Form, entries
from llmconvert.gguf.architectures.families.llama import ATTENTION, BIASES, NORMS, RMS, experts
from llmconvert.gguf.architectures.orders import Order, every_other
from llmconvert.gguf.architectures.windows import read_windows, write_windows
from llmconvert.gguf.rope import latent_rope_metadata, rope_parameters

__all__ = ["ARCHITECTURES"]

_DENSE: Final = """
mlp.gate_proj.weight~
mlp.up_proj.weight~
mlp.down_proj.weight~
"""
_SHARED: Final = """
mlp.gate.weight~
mlp.shared_experts.gate_proj.weight~
mlp.shared_experts.up_proj.weight~
mlp.shared_experts.down_proj.weight~
"""
_CORRECTION: Final = "mlp.gate.e_score_correction_bias~ -> FFN_EXP_PROBS_B.bias\n"
_SOFTMAX, _SIGMOID = 1, 2
_EXPERTS: Final = (
    Setting("leading_dense_block_count", "first_k_dense_replace", default=0, least=0),
    Setting("expert_count", "n_routed_experts"),
    Setting("expert_used_count", "num_experts_per_tok"),
    Setting("expert_feed_forward_length", "moe_intermediate_size"),
    Setting("expert_shared_count", "n_shared_experts", default=0, least=0),
    Setting("expert_weights_scale", "routed_scaling_factor", float, default=1.0),
    Setting("expert_weights_norm", "norm_topk_prob", bool, default=False),
)
_GROUPS: Final = (
    Setting("expert_group_count", "n_group", default=1),
    Setting("expert_group_used_count", "topk_group", default=1),
)
_PREDICTED: Final = frozenset({"num_nextn_predict_layers", "num_mtp_layers"})


# Latent attention (MLA): llama.cpp keeps what makes keys and values of the latent apart, the first turned around.
def _head_rows(first: bool) -> Order:
    def order(config: Config, outputs: int) -> np.ndarray:
        keys = int(config["qk_nope_head_dim"])
        rows = np.arange(outputs).reshape(int(config["num_attention_heads"]), -1)
        return (rows[:, :keys] if first else rows[:, keys:]).reshape(-1)

    return order


def _heads(config: Config) -> int:
    return int(config["num_attention_heads"])


_KV_B: Final = "self_attn.kv_b_proj"
_LATENT: Final = (
    *entries(
        """
self_attn.q_proj.weight~
self_attn.q_a_proj.weight~
self_attn.q_a_layernorm.weight~
self_attn.q_b_proj.weight~
self_attn.kv_a_proj_with_mqa.weight
self_attn.kv_a_layernorm.weight
self_attn.o_proj.weight
"""
    ),
    *entries(f"{_KV_B}.weight -> ATTN_K_B.weight", {_KV_B: Form(_head_rows(True), heads=_heads, turned=True)}),
    *entries(f"{_KV_B}.weight -> ATTN_V_B.weight", {_KV_B: Form(_head_rows(False), heads=_heads)}),
)


def _write_latent(gate: int) -> Callable[[Config], Mapping[str, Any]]:
    def write(config: Config) -> Mapping[str, Any]:
        rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
        return {
            "attention.head_count_kv": 1,
            "attention.key_length": rank + rope,
            "attention.value_length": rank,
            "attention.key_length_mla": config["qk_nope_head_dim"] + rope,
            "attention.value_length_mla": config["v_head_dim"],
            "attention.kv_lora_rank": rank,
            **({"attention.q_lora_rank": config["q_lora_rank"]} if config.get("q_lora_rank") else {}),
            "rope.dimension_count": rope,
            "rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
            **latent_rope_metadata(config, "deepseek2"),
            "expert_gating_func": gate,
        }

    return write


def _read_latent(file: Reading) -> Mapping[str, Any]:
    rope, heads = file.get("rope.dimension_count"), file.config["num_attention_heads"]
    return {
        "num_key_value_heads": heads,
        "kv_lora_rank": file.get("attention.kv_lora_rank"),
        "q_lora_rank": file.get("attention.q_lora_rank"),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": file.get("attention.key_length_mla") - rope,
        "v_head_dim": file.get("attention.value_length_mla"),
        "rope_parameters": rope_parameters(file.header.metadata, file.arch, latent=True),
    }


_LATENT_LAYER: Final = (*entries(NORMS + _DENSE + _SHARED + _CORRECTION), *_LATENT, *experts("mlp.experts"))
DEEPSEEK3: Final = GgufArchitecture(
    "deepseek2",
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    outer(),
    _LATENT_LAYER,
    (*RMS, *_EXPERTS, *_GROUPS),
    always={"attention_bias": False, "rope_interleave": True},
    write=_write_latent(_SIGMOID),
    read=_read_latent,
    inert=_PREDICTED | {"head_dim", "qk_head_dim"},
    attention=False,
    described=lambda header: header.metadata.get("deepseek2.expert_gating_func") == _SIGMOID,
    experts="n_routed_experts",
)
DEEPSEEK2: Final = GgufArchitecture(
    "deepseek2",
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    outer(),
    _LATENT_LAYER,
    (*RMS, *_EXPERTS),
    always={"attention_bias": False, "mlp_bias": False, "topk_method": "greedy"},
    write=_write_latent(_SOFTMAX),
    read=_read_latent,
    inert=frozenset({"head_dim", "qk_head_dim", "n_group", "topk_group"}),
    attention=False,
    experts="n_routed_experts",
)
GLM4_MOE: Final = GgufArchitecture(
    "glm4moe",
    "glm4_moe",
    "Glm4MoeForCausalLM",
    outer(),
    entries(
        "input_layernorm.weight\npost_attention_layernorm.weight -> ATTN_POST_NORM.weight\n"
        + ATTENTION
        + BIASES.replace(".bias", ".bias?")
        + "self_attn.q_norm.weight?\nself_attn.k_norm.weight?\n"
        + _DENSE
        + _SHARED
        + _CORRECTION
    )
    + experts("mlp.experts"),
    (*RMS, *_EXPERTS, *_GROUPS),
    write=lambda config: {"expert_gating_func": _SIGMOID},
    read=lambda file: {
        "attention_bias": file.has("attn_q.bias"),
        "use_qk_norm": file.has("attn_q_norm.weight"),
        "num_nextn_predict_layers": 0,
    },
    inert=_PREDICTED,
    rotary="part",
    experts="n_routed_experts",
)
DOTS1: Final = GgufArchitecture(
    "dots1",
    "dots1",
    "Dots1ForCausalLM",
    outer(),
    entries(NORMS + ATTENTION + "self_attn.q_norm.weight\nself_attn.k_norm.weight\n" + _DENSE + _SHARED + _CORRECTION)
    + experts("mlp.experts"),
    (*RMS, *_EXPERTS),
    always={"attention_bias": False, "n_group": 1, "topk_group": 1},
    write=lambda config: {"expert_gating_func": _SIGMOID},
    inert=frozenset({"sliding_window"}),
    experts="n_routed_experts",
)
_GLM_LAYER: Final = """
input_layernorm.weight hidden
post_attention_layernorm.weight hidden
mlp.gate_up_proj.weight fused_inner hidden
mlp.down_proj.weight hidden inner
"""
GLM: Final = GgufArchitecture(
    "chatglm",
    "glm",
    "GlmForCausalLM",
    outer(),
    entries(_GLM_LAYER + ATTENTION + BIASES.replace(".bias", ".bias?")),
    RMS,
    read=lambda file: {"attention_bias": file.has("attn_q.bias")},
    rotary="part",
)
GLM4: Final = GgufArchitecture(
    "glm4",
    "glm4",
    "Glm4ForCausalLM",
    outer(),
    entries(
        _GLM_LAYER
        + ATTENTION
        + BIASES.replace(".bias", ".bias?")
        + "post_self_attn_layernorm.weight hidden\npost_mlp_layernorm.weight hidden"
    ),
    RMS,
    read=lambda file: {"attention_bias": file.has("attn_q.bias")},
    rotary="part",
)


# gpt-oss: experts lie [inputs, outputs] in one tensor, gate and up in turns.
_GATE_UP, _GATE_UP_BIAS = "mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias"
_OSS_EXPERTS: Final = (
    *entries(
        f"{_GATE_UP} -> FFN_GATE_EXP.weight\n{_GATE_UP_BIAS} -> FFN_GATE_EXP.bias",
        {
            _GATE_UP: Form(every_other(0), whole=True, transposed=True),
            _GATE_UP_BIAS: Form(every_other(0), whole=True),
        },
    ),
    *entries(
        f"{_GATE_UP} -> FFN_UP_EXP.weight\n{_GATE_UP_BIAS} -> FFN_UP_EXP.bias",
        {
            _GATE_UP: Form(every_other(1), whole=True, transposed=True),
            _GATE_UP_BIAS: Form(every_other(1), whole=True),
        },
    ),
    *entries(
        "mlp.experts.down_proj -> FFN_DOWN_EXP.weight\nmlp.experts.down_proj_bias -> FFN_DOWN_EXP.bias",
        {
            "mlp.experts.down_proj": Form(whole=True, transposed=True),
            "mlp.experts.down_proj_bias": Form(whole=True),
        },
    ),
)


def _write_oss(config: Config) -> Mapping[str, Any]:
    return {"expert_feed_forward_length": config["intermediate_size"], **write_windows("gpt-oss", 2)(config)}


def _read_oss(file: Reading) -> Mapping[str, Any]:
    rope = dict(file.config["rope_parameters"])
    if rope["rope_type"] == "yarn":
        rope["truncate"] = False
    return {"rope_parameters": rope, **read_windows(file, 2)}


GPT_OSS: Final = GgufArchitecture(
    "gpt-oss",
    "gpt_oss",
    "GptOssForCausalLM",
    outer(),
    (
        *entries(
            "input_layernorm.weight hidden\npost_attention_layernorm.weight hidden -> ATTN_POST_NORM.weight\n"
            + ATTENTION
            + BIASES
            + "self_attn.o_proj.bias hidden\nself_attn.sinks -> ATTN_SINKS.weight\n"
            + "mlp.router.weight\nmlp.router.bias"
        ),
        *_OSS_EXPERTS,
    ),
    (
        *RMS,
        Setting("expert_count", "num_local_experts"),
        Setting("expert_used_count", "num_experts_per_tok"),
    ),
    always={"attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    write=_write_oss,
    read=_read_oss,
    scalings=frozenset({"linear", "yarn", "open yarn"}),
    windows="kept",
    experts="num_local_experts",
)
ARCHITECTURES: Final = (DEEPSEEK3, DEEPSEEK2, GLM, GLM4, GLM4_MOE, DOTS1, GPT_OSS)
