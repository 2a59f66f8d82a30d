"""Mamba 2 in turns with attention, or beside it: Granite 4, Nemotron-H and Falcon-H1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.architectures.architecture import GgufArchitecture, Reading, Setting, outer
from llmconvert.gguf.architectures.entries import Config, Form, entries
from llmconvert.gguf.architectures.families.granite import MIXTURE, SCALES, SHARED
from llmconvert.gguf.architectures.families.llama import TURNED
from llmconvert.gguf.architectures.families.state_spaces import (
    BACKBONE,
    BACKBONE_OUTER,
    MAMBA2_TENSORS,
    RMS_EPS,
    UNUSED,
    attending,
    kv_heads,
    mamba2_forms,
)
from llmconvert.gguf.architectures.orders import part
from llmconvert.gguf.rope import rope_metadata, rope_parameters

__all__ = ["ARCHITECTURES"]

# Granite 4: Mamba 2 in turns with attention, and a mixture or one shared MLP.
_GRANITE_ATTENTION: Final = """
input_layernorm.weight
post_attention_layernorm.weight
self_attn.q_proj.weight~
self_attn.k_proj.weight~
self_attn.v_proj.weight~
self_attn.o_proj.weight~
"""
_GRANITE_LAYER: Final = (
    *entries(_GRANITE_ATTENTION, TURNED),
    *entries(MAMBA2_TENSORS.replace("mixer.", "mamba."), mamba2_forms("mamba", "mamba_n_groups")),
)
_GRANITE_SETTINGS: Final = (
    Setting("context_length", "max_position_embeddings"),
    Setting("embedding_length", "hidden_size"),
    Setting("block_count", "num_hidden_layers"),
    Setting("attention.head_count", "num_attention_heads"),
    Setting(RMS_EPS, "rms_norm_eps", float),
    *SCALES,
    Setting("ssm.conv_kernel", "mamba_d_conv"),
    Setting("ssm.state_size", "mamba_d_state"),
    Setting("ssm.group_count", "mamba_n_groups"),
    Setting("ssm.time_step_rank", "mamba_n_heads"),
)


def _write_granite_hybrid(config: Config) -> Mapping[str, Any]:
    turned = config.get("position_embedding_type") == "rope"
    rope = config.get("rope_parameters") or {}
    experts = bool(config.get("num_local_experts"))
    return {
        "attention.head_count_kv": kv_heads(
            config, [kind in ("attention", "full_attention") for kind in config["layer_types"]]
        ),
        "ssm.inner_size": config["mamba_n_heads"] * config["mamba_d_head"],
        "rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "rope.scaling.finetuned": turned,
        **rope_metadata(config, "granitehybrid", ()),
        "feed_forward_length": config["intermediate_size"] if experts else config["shared_intermediate_size"],
        **(
            {
                "expert_count": config["num_local_experts"],
                "expert_used_count": config["num_experts_per_tok"],
                "expert_shared_feed_forward_length": config["shared_intermediate_size"],
            }
            if experts
            else {}
        ),
    }


def _read_granite_hybrid(file: Reading) -> Mapping[str, Any]:
    layers, heads = attending(file)
    inner, width = file.get("ssm.inner_size"), file.get("feed_forward_length")
    experts = file.get("expert_count", 0)
    return {
        "num_key_value_heads": heads,
        "layer_types": ["attention" if one else "mamba" for one in layers],
        "position_embedding_type": "rope" if file.get("rope.scaling.finetuned", True) else None,
        "rope_parameters": rope_parameters(file.header.metadata, file.arch),
        "mamba_d_head": inner // file.config["mamba_n_heads"],
        "mamba_expand": inner // file.config["hidden_size"],
        "intermediate_size": width,
        "shared_intermediate_size": file.get("expert_shared_feed_forward_length", width),
        "num_local_experts": experts,
        "num_experts_per_tok": file.get("expert_used_count", 0),
    }


def _granite_hybrid(*, experts: bool) -> GgufArchitecture:
    dense = "shared_mlp.input_linear.weight"
    shared = (
        *entries("shared_mlp.output_linear.weight -> FFN_DOWN.weight"),
        *entries(f"{dense} -> FFN_GATE.weight", {"shared_mlp.input_linear": Form(part(0, 2))}),
        *entries(f"{dense} -> FFN_UP.weight", {"shared_mlp.input_linear": Form(part(1, 2))}),
    )
    return GgufArchitecture(
        "granitehybrid",
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        outer(),
        (*_GRANITE_LAYER, *((*MIXTURE, *SHARED) if experts else shared)),
        _GRANITE_SETTINGS,
        always={"attention_bias": False, "mamba_conv_bias": True, "mamba_proj_bias": False},
        write=_write_granite_hybrid,
        read=_read_granite_hybrid,
        inert=UNUSED | (frozenset() if experts else {"intermediate_size", "num_experts_per_tok"}),
        windows="kept",
        attention=False,
        experts="num_local_experts",
        known=frozenset({"expert_count"}),
        described=lambda header: bool(header.metadata.get("granitehybrid.expert_count")) == experts,
        chosen=lambda config: bool(config.get("num_local_experts", 8)) == experts,
    )


# Nemotron-H: one mixer a layer: Mamba 2, attention, an MLP or a mixture.
_NEMOTRON_TENSORS: Final = """
norm.weight
mixer.q_proj.weight~
mixer.k_proj.weight~
mixer.v_proj.weight~
mixer.o_proj.weight~
mixer.up_proj.weight~
mixer.down_proj.weight~
mixer.gate.weight~ -> FFN_GATE_INP.weight
mixer.gate.e_score_correction_bias~ -> FFN_EXP_PROBS_B.bias
mixer.experts.#.up_proj.weight~ -> FFN_UP_EXP.weight
mixer.experts.#.down_proj.weight~ -> FFN_DOWN_EXP.weight
mixer.shared_experts.up_proj.weight~ -> FFN_UP_SHEXP.weight
mixer.shared_experts.down_proj.weight~ -> FFN_DOWN_SHEXP.weight
"""
_MLP, _MOE = ("mlp",), ("moe",)


def _write_nemotron(moe: bool) -> Callable[[Config], Mapping[str, Any]]:
    def write(config: Config) -> Mapping[str, Any]:
        kinds = list(config["layers_block_type"])
        if moe and set(kinds) & set(_MLP):
            raise UnsupportedError(
                "config.json: layers_block_type has both mlp and moe; llama.cpp's nemotron_h_moe has mixtures alone"
            )
        width = config["moe_intermediate_size"] if moe else config["intermediate_size"]
        widths = [width if kind in (_MOE if moe else _MLP) else 0 for kind in kinds]
        found: dict[str, Any] = {
            "attention.head_count_kv": kv_heads(config, [kind in ("attention", "full_attention") for kind in kinds]),
            "attention.key_length": config["head_dim"],
            "attention.value_length": config["head_dim"],
            "feed_forward_length": np.array(widths, np.int32),
            "ssm.inner_size": config["mamba_num_heads"] * config["mamba_head_dim"],
            # llama.cpp asks for both, and norms by the root mean square.
            "attention.layer_norm_epsilon": float(config["layer_norm_epsilon"]),
        }
        if moe:
            found |= {
                "expert_count": config["n_routed_experts"],
                "expert_used_count": config["num_experts_per_tok"],
                "expert_feed_forward_length": width,
                "expert_shared_feed_forward_length": config["moe_shared_expert_intermediate_size"],
                "expert_shared_count": config["n_shared_experts"],
                "expert_weights_norm": bool(config["norm_topk_prob"]),
                "expert_weights_scale": float(config["routed_scaling_factor"]),
                "expert_group_count": config["n_group"],
            }
        return found

    return write


def _read_nemotron(file: Reading) -> Mapping[str, Any]:
    layers, heads = attending(file)
    widths = np.broadcast_to(np.asarray(file.get("feed_forward_length")), (file.layers,))
    moe = bool(file.get("expert_count", 0))
    kinds = [
        "attention" if one else (("moe" if moe else "mlp") if width else "mamba")
        for one, width in zip(layers, widths, strict=True)
    ]
    found: dict[str, Any] = {
        "num_key_value_heads": heads,
        "head_dim": file.get("attention.key_length"),
        "layers_block_type": kinds,
        "mamba_head_dim": file.get("ssm.inner_size") // file.config["mamba_num_heads"],
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
    }
    if not moe:
        return found | {"intermediate_size": int(widths.max())}
    return found | {
        "n_routed_experts": file.get("expert_count"),
        "num_experts_per_tok": file.get("expert_used_count"),
        "moe_intermediate_size": file.get("expert_feed_forward_length"),
        "moe_shared_expert_intermediate_size": file.get("expert_shared_feed_forward_length"),
        "n_shared_experts": file.get("expert_shared_count"),
        "norm_topk_prob": file.get("expert_weights_norm"),
        "routed_scaling_factor": file.get("expert_weights_scale"),
        "n_group": file.get("expert_group_count", 1),
    }


def _is_mixture(config: Config) -> bool:
    kinds = config.get("layers_block_type") or config.get("hybrid_override_pattern") or ()
    return "moe" in kinds or "E" in kinds


def _nemotron_h(*, moe: bool) -> GgufArchitecture:
    mixture = {
        *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size"),
        *("n_shared_experts", "norm_topk_prob", "routed_scaling_factor", "n_group", "num_local_experts"),
    }
    idle = {"intermediate_size"} if moe else mixture
    return GgufArchitecture(
        "nemotron_h_moe" if moe else "nemotron_h",
        "nemotron_h",
        "NemotronHForCausalLM",
        BACKBONE_OUTER,
        entries(_NEMOTRON_TENSORS + MAMBA2_TENSORS, mamba2_forms("mixer", "n_groups"), prefix=BACKBONE),
        (
            Setting("context_length", "max_position_embeddings"),
            Setting("embedding_length", "hidden_size"),
            Setting("block_count", "num_hidden_layers"),
            Setting("attention.head_count", "num_attention_heads"),
            Setting(RMS_EPS, "layer_norm_epsilon", float),
            Setting("ssm.conv_kernel", "conv_kernel"),
            Setting("ssm.state_size", "ssm_state_size"),
            Setting("ssm.group_count", "n_groups"),
            Setting("ssm.time_step_rank", "mamba_num_heads"),
        ),
        always={
            "attention_bias": False,
            "mlp_bias": False,
            "use_bias": False,
            "use_conv_bias": True,
            "mamba_proj_bias": False,
        },
        write=_write_nemotron(moe),
        read=_read_nemotron,
        inert=UNUSED
        | idle
        | {"moe_shared_expert_overlap", "num_nextn_predict_layers", "mtp_layers_block_type", "num_hidden_layers"},
        windows="kept",
        attention=False,
        activation="",
        experts="n_routed_experts",
        known=frozenset({"expert_count"}),
        chosen=lambda config: _is_mixture(config) == moe,
    )


# Falcon-H1: attention and Mamba 2 side by side; its multipliers are part of the weights in a file.
def _times(name: str, *more: tuple[str, int | None]) -> Form:
    """Rows times one multiplier, or several."""

    def factor(config: Config, rows: int) -> np.ndarray:
        value = float(config[name])
        for other, index in more:
            value *= float(config[other] if index is None else config[other][index])
        return np.full(rows, value)

    return Form(factor=factor)


def _times_one_of(name: str, index: int) -> Form:
    return Form(factor=lambda config, rows: np.full(rows, float(config[name][index])))


def _ssm_factors(config: Config, rows: int) -> np.ndarray:
    inner, state = config["mamba_d_ssm"], config["mamba_n_groups"] * config["mamba_d_state"]
    gate, hidden, keys, values, step = (float(one) for one in config["ssm_multipliers"])
    counts = (inner, inner, state, state, rows - 2 * inner - 2 * state)
    return np.repeat((gate, hidden, keys, values, step), counts) * float(config["ssm_in_multiplier"])


_FALCON_FORMS: Final = {
    **mamba2_forms("mamba", "mamba_n_groups"),
    "self_attn.q_proj": _times("attention_in_multiplier"),
    "self_attn.k_proj": _times("key_multiplier", ("attention_in_multiplier", None)),
    "self_attn.v_proj": _times("attention_in_multiplier"),
    "self_attn.o_proj": _times("attention_out_multiplier"),
    "feed_forward.gate_proj": _times_one_of("mlp_multipliers", 0),
    "feed_forward.down_proj": _times_one_of("mlp_multipliers", 1),
    "mamba.in_proj": Form(factor=_ssm_factors),
    "mamba.out_proj": _times("ssm_out_multiplier"),
}
_ONES: Final = {
    **dict.fromkeys(
        (
            *("attention_in_multiplier", "attention_out_multiplier", "key_multiplier", "ssm_in_multiplier"),
            *("ssm_out_multiplier", "lm_head_multiplier", "embedding_multiplier"),
        ),
        1.0,
    ),
    "mlp_multipliers": [1.0, 1.0],
    "ssm_multipliers": [1.0] * 5,
}


def _write_falcon_h1(config: Config) -> Mapping[str, Any]:
    return {
        "ssm.inner_size": config["mamba_d_ssm"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "rope.dimension_count": config["head_dim"],
        "rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        **rope_metadata(config, "falcon-h1", ()),
    }


def _read_falcon_h1(file: Reading) -> Mapping[str, Any]:
    inner = file.get("ssm.inner_size")
    return {
        **_ONES,
        "num_key_value_heads": file.get("attention.head_count_kv"),
        "head_dim": file.get("attention.key_length"),
        "rope_parameters": rope_parameters(file.header.metadata, file.arch),
        "mamba_d_ssm": inner,
        "mamba_d_head": inner // file.config["mamba_n_heads"],
        "mamba_rms_norm": file.has("ssm_norm.weight"),
    }


FALCON_H1: Final = GgufArchitecture(
    "falcon-h1",
    "falcon_h1",
    "FalconH1ForCausalLM",
    entries(
        "model.embed_tokens.weight\nmodel.final_layernorm.weight\nlm_head.weight?",
        {"model.embed_tokens": _times("embedding_multiplier"), "lm_head": _times("lm_head_multiplier")},
        prefix="",
    ),
    entries(
        """
input_layernorm.weight
pre_ff_layernorm.weight -> FFN_NORM
self_attn.q_proj.weight
self_attn.k_proj.weight
self_attn.v_proj.weight
self_attn.o_proj.weight
feed_forward.gate_proj.weight
feed_forward.up_proj.weight
feed_forward.down_proj.weight
"""
        + MAMBA2_TENSORS.replace("mixer.", "mamba."),
        _FALCON_FORMS,
    ),
    (
        Setting("context_length", "max_position_embeddings"),
        Setting("embedding_length", "hidden_size"),
        Setting("block_count", "num_hidden_layers"),
        Setting("feed_forward_length", "intermediate_size"),
        Setting("attention.head_count", "num_attention_heads"),
        Setting(RMS_EPS, "rms_norm_eps", float),
        Setting("ssm.conv_kernel", "mamba_d_conv"),
        Setting("ssm.state_size", "mamba_d_state"),
        Setting("ssm.group_count", "mamba_n_groups"),
        Setting("ssm.time_step_rank", "mamba_n_heads"),
    ),
    always={
        "attention_bias": False,
        "mlp_bias": False,
        "projectors_bias": False,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    },
    write=_write_falcon_h1,
    read=_read_falcon_h1,
    # A file has them in its weights; read back, they are ones.
    inert=UNUSED | frozenset(_ONES) | {"mamba_norm_before_gate"},
    windows="kept",
    attention=False,
)


ARCHITECTURES: Final = (
    _granite_hybrid(experts=True),
    _granite_hybrid(experts=False),
    _nemotron_h(moe=False),
    _nemotron_h(moe=True),
    FALCON_H1,
)
