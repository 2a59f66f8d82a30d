"""Dense decoders beside Llama's and their mixtures: SmolLM3, OLMo, Command-R, StableLM, EXAONE, Hunyuan and others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.architectures.architecture import SIZES, GgufArchitecture, Reading, Setting, outer
from llmconvert.gguf.architectures.entries import Config, entries
from llmconvert.gguf.architectures.families.llama import (
    ATTENTION,
    BIASES,
    MLP,
    NORMS,
    RMS,
    TURNED,
    experts,
    llama3_scaling,
)
from llmconvert.gguf.architectures.windows import read_windows, write_windows
from llmconvert.gguf.rope import rope_metadata, rope_parameters

__all__ = ["ARCHITECTURES"]

_HEAD_NORMS: Final = "self_attn.q_norm.weight\nself_attn.k_norm.weight\n"
_POST_NORMS: Final = """
post_attention_layernorm.weight hidden -> ATTN_POST_NORM.weight
post_feedforward_layernorm.weight hidden
"""
_PLAIN: Final = {"attention_bias": False, "mlp_bias": False}
_LLAMA3: Final = frozenset({"linear", "yarn", "llama3"})
_FREQUENCIES: Final = frozenset({"rope_freqs.weight"})


def _eps(name: str) -> Setting:
    return Setting("attention.layer_norm_epsilon", name, float)


def _smollm3_rotary(file: Reading) -> Mapping[str, Any]:
    # llama.cpp leaves every fourth layer unturned.
    return {"no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(file.layers)], **llama3_scaling(file)}


SMOLLM3: Final = GgufArchitecture(
    "smollm3",
    "smollm3",
    "SmolLM3ForCausalLM",
    outer(),
    entries(NORMS + ATTENTION + MLP, TURNED),
    RMS,
    always={**_PLAIN, "use_sliding_window": False, "sliding_window": None},
    read=_smollm3_rotary,
    inert=frozenset({"no_rope_layer_interval"}),
    scalings=_LLAMA3,
    stated_heads="",
    consumed=_FREQUENCIES,
)
ARCEE: Final = GgufArchitecture(
    "arcee",
    "arcee",
    "ArceeForCausalLM",
    outer(),
    entries(NORMS + ATTENTION + "mlp.up_proj.weight inner hidden\nmlp.down_proj.weight hidden inner", TURNED),
    RMS,
    always=_PLAIN,
    read=llama3_scaling,
    scalings=_LLAMA3,
    activation="relu2",
    consumed=_FREQUENCIES,
)
OLMO: Final = GgufArchitecture(
    "olmo",
    "olmo",
    "OlmoForCausalLM",
    entries("model.embed_tokens.weight\nlm_head.weight?", prefix=""),
    entries(ATTENTION + MLP, TURNED),
    (*SIZES, Setting("attention.clamp_kqv", "clip_qkv", float, zero=True)),
    always={"attention_bias": False},
    # The class has no weights for its norms, nor a setting for what they add to a variance.
    write=lambda config: {"attention.layer_norm_epsilon": 1e-5},
    stated_heads="",
)
OLMO2: Final = GgufArchitecture(
    "olmo2",
    "olmo2",
    "Olmo2ForCausalLM",
    outer(),
    entries(_POST_NORMS + ATTENTION + MLP + _HEAD_NORMS),
    RMS,
    always={"attention_bias": False},
    stated_heads="",
)


def _write_olmo3(config: Config) -> Mapping[str, Any]:
    sets = config["rope_parameters"]
    full = {**config, "rope_parameters": sets["full_attention"]}
    base = float(sets["full_attention"]["rope_theta"])
    return {
        "rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
        "rope.freq_base": base,
        **rope_metadata(full, "olmo2", ("yarn",)),
        **write_windows("olmo2", 4, told=False)(config),
    }


def _read_olmo3(file: Reading) -> Mapping[str, Any]:
    full = rope_parameters(file.header.metadata, file.arch)
    sliding = {"rope_type": "default", "rope_theta": full["rope_theta"]}
    rope = {"full_attention": full, "sliding_attention": sliding}
    return {"rope_parameters": rope, **read_windows(file, 4)}


OLMO3: Final = GgufArchitecture(
    "olmo2",
    "olmo3",
    "Olmo3ForCausalLM",
    outer(),
    entries(_POST_NORMS + ATTENTION + MLP + _HEAD_NORMS),
    RMS,
    always={"attention_bias": False},
    write=_write_olmo3,
    read=_read_olmo3,
    windows="kept",
    rotary="own",
    stated_heads="",
    described=lambda header: bool(header.metadata.get("olmo2.attention.sliding_window")),
)


def _as_many_keys(config: Config) -> Mapping[str, Any]:
    if config["num_key_value_heads"] != config["num_attention_heads"]:
        raise UnsupportedError(
            f"config.json: num_key_value_heads is {config['num_key_value_heads']}; llama.cpp's olmoe norms as many "
            f"keys as queries, {config['num_attention_heads']}"
        )
    return {}


OLMOE: Final = GgufArchitecture(
    "olmoe",
    "olmoe",
    "OlmoeForCausalLM",
    outer(),
    entries(NORMS + ATTENTION + _HEAD_NORMS + "mlp.gate.weight") + experts("mlp.experts"),
    (*RMS, Setting("expert_count", "num_experts"), Setting("expert_used_count", "num_experts_per_tok")),
    always={"attention_bias": False, "clip_qkv": None, "norm_topk_prob": False},
    write=_as_many_keys,
    stated_heads="",
)
COHERE: Final = GgufArchitecture(
    "command-r",
    "cohere",
    "CohereForCausalLM",
    outer(head=False),
    entries("input_layernorm.weight hidden\n" + ATTENTION + MLP + "self_attn.q_norm.weight?\nself_attn.k_norm.weight?"),
    (*SIZES, _eps("layer_norm_eps"), Setting("logit_scale", "logit_scale", float)),
    always={"attention_bias": False},
    read=lambda file: {"use_qk_norm": file.has("attn_q_norm.weight")},
    stated_heads="",
)
COHERE2: Final = GgufArchitecture(
    "cohere2",
    "cohere2",
    "Cohere2ForCausalLM",
    outer(head=False),
    entries("input_layernorm.weight hidden\n" + ATTENTION + MLP),
    (*SIZES, _eps("layer_norm_eps"), Setting("logit_scale", "logit_scale", float)),
    always={"attention_bias": False},
    write=write_windows("cohere2", 4),
    read=lambda file: read_windows(file, 4),
    windows="kept",
)


def _read_stablelm(file: Reading) -> Mapping[str, Any]:
    return {
        "use_qkv_bias": file.has("attn_q.bias"),
        "qk_layernorm": False,
        "use_parallel_residual": not file.has("ffn_norm.weight"),
    }


STABLELM: Final = GgufArchitecture(
    "stablelm",
    "stablelm",
    "StableLmForCausalLM",
    outer(bias=True),
    entries(
        "input_layernorm.weight\ninput_layernorm.bias\n"
        "post_attention_layernorm.weight?\npost_attention_layernorm.bias?\n"
        + ATTENTION
        + BIASES.replace(".bias", ".bias?")
        + MLP
    ),
    (*SIZES, _eps("layer_norm_eps")),
    write=lambda config: {"use_parallel_residual": bool(config["use_parallel_residual"])},
    read=_read_stablelm,
    rotary="part",
    stated_heads="",
)


def _exaone4_kinds(file: Reading) -> Mapping[str, Any]:
    return {**read_windows(file, 4), **llama3_scaling(file)}


# llama.cpp knows the one size that has windows by its number of layers.
_EXAONE4_32B_LAYERS: Final = 64


def _write_exaone4(config: Config) -> Mapping[str, Any]:
    found = write_windows("exaone4", 4, told=False)(config)
    if found and config["num_hidden_layers"] != _EXAONE4_32B_LAYERS:
        raise UnsupportedError(
            f"config.json: sliding_window is {config['sliding_window']}; llama.cpp's exaone4 has windows in models of "
            f"{_EXAONE4_32B_LAYERS} layers alone"
        )
    return found


EXAONE4: Final = GgufArchitecture(
    "exaone4",
    "exaone4",
    "Exaone4ForCausalLM",
    outer(),
    entries(_POST_NORMS + ATTENTION + MLP + _HEAD_NORMS),
    RMS,
    write=_write_exaone4,
    read=_exaone4_kinds,
    inert=frozenset({"sliding_window_pattern"}),
    scalings=_LLAMA3,
    windows="kept",
    consumed=_FREQUENCIES,
)
_HUNYUAN_NORMS: Final = "self_attn.query_layernorm.weight\nself_attn.key_layernorm.weight\n"
HUNYUAN: Final = GgufArchitecture(
    "hunyuan-dense",
    "hunyuan_v1_dense",
    "HunYuanDenseV1ForCausalLM",
    outer(),
    entries(NORMS + ATTENTION + MLP + _HUNYUAN_NORMS),
    RMS,
    always={"attention_bias": False},
    inert=frozenset({"eod_token_id"}),
)
HUNYUAN_MOE: Final = GgufArchitecture(
    "hunyuan-moe",
    "hunyuan_v1_moe",
    "HunYuanMoEV1ForCausalLM",
    outer(),
    entries(
        NORMS
        + ATTENTION
        + _HUNYUAN_NORMS
        + """
mlp.gate.wg.weight
mlp.shared_mlp.gate_proj.weight
mlp.shared_mlp.up_proj.weight
mlp.shared_mlp.down_proj.weight
"""
    )
    + experts("mlp.experts"),
    (*RMS, Setting("expert_count", "num_experts"), Setting("expert_used_count", "moe_topk")),
    always={"attention_bias": False},
    write=lambda config: {
        "expert_shared_feed_forward_length": config["intermediate_size"],
        "expert_feed_forward_length": config["intermediate_size"],
        "expert_shared_count": 1,
    },
    inert=frozenset({"eod_token_id", "num_experts_per_tok"}),
)
SEED_OSS: Final = GgufArchitecture(
    "seed_oss",
    "seed_oss",
    "SeedOssForCausalLM",
    outer(),
    entries(
        "input_layernorm.weight hidden\npost_attention_layernorm.weight hidden -> ATTN_POST_NORM.weight\n"
        + ATTENTION
        + BIASES.replace(".bias", ".bias?")
        + MLP
    ),
    RMS,
    always={"attention_out_bias": False, "mlp_bias": False},
    read=lambda file: {"attention_bias": file.has("attn_q.bias")},
)
ERNIE: Final = GgufArchitecture(
    "ernie4_5",
    "ernie4_5",
    "Ernie4_5ForCausalLM",
    outer(),
    entries(NORMS + ATTENTION + MLP),
    RMS,
    always={"use_bias": False},
)
ARCHITECTURES: Final = (
    *(SMOLLM3, ARCEE, OLMO, OLMO3, OLMO2, OLMOE, COHERE, COHERE2, STABLELM, EXAONE4),
    *(HUNYUAN, HUNYUAN_MOE, SEED_OSS, ERNIE),
)
