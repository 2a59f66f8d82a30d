"""Decoders from before Llama, and those that kept their ways: fused projections, norms that subtract a mean, ALiBi."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.architectures.architecture import SIZES, GgufArchitecture, Reading, Setting, outer
from llmconvert.gguf.architectures.entries import Change, Config, Entry, Form, entries
from llmconvert.gguf.architectures.families.llama import ATTENTION, BIASES
from llmconvert.gguf.architectures.orders import by_group, by_head

__all__ = ["ARCHITECTURES"]

_EPS: Final = "attention.layer_norm_epsilon"
_H: Final = "transformer.h.*."


def _both(*names: str, prefix: str = "model.layers.*.", forms: Mapping[str, Form] | None = None) -> tuple[Entry, ...]:
    """Weights with their biases."""
    return entries("".join(f"{name}.weight\n{name}.bias\n" for name in names), forms, prefix=prefix)


def _to(found: tuple[Entry, ...], stored: str) -> tuple[Entry, ...]:
    """Weight and bias under a name that the package's table does not have for them."""
    return tuple(replace(entry, stored=f"{stored}.{entry.name.rpartition('.')[2]}") for entry in found)


# GPT-2: weights are stored [inputs, outputs].
_TRANSPOSED: Final = Form(transposed=True)
_CONV1D: Final = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_GPT2_LAYER: Final = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
_GPT2_OUTER: Final = entries(
    "transformer.wte.weight\ntransformer.wpe.weight\ntransformer.ln_f.weight\ntransformer.ln_f.bias\nlm_head.weight?",
    prefix="",
)
_GPT2_SIZES: Final = (
    Setting("context_length", "n_positions"),
    Setting("embedding_length", "n_embd"),
    Setting("block_count", "n_layer"),
    Setting("attention.head_count", "n_head"),
    Setting(_EPS, "layer_norm_epsilon", float),
)
_GPT2_ALWAYS: Final = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
}


def _inner(config: Config) -> Mapping[str, Any]:
    return {"feed_forward_length": config.get("n_inner") or 4 * config["n_embd"]}


def _read_inner(file: Reading) -> Mapping[str, Any]:
    return {"n_inner": file.get("feed_forward_length")}


GPT2: Final = GgufArchitecture(
    "gpt2",
    "gpt2",
    "GPT2LMHeadModel",
    _GPT2_OUTER,
    _both(*_GPT2_LAYER, prefix=_H, forms=dict.fromkeys(_CONV1D, _TRANSPOSED)),
    _GPT2_SIZES,
    always=_GPT2_ALWAYS,
    write=_inner,
    read=_read_inner,
    inert=frozenset({"n_ctx", "n_inner", "reorder_and_upcast_attn", "gradient_checkpointing"}),
    rotary="none",
    activation="",
    kv_heads="",
    stated_heads="",
)
STARCODER: Final = GgufArchitecture(
    "starcoder",
    "gpt_bigcode",
    "GPTBigCodeForCausalLM",
    _GPT2_OUTER,
    _both(*_GPT2_LAYER, prefix=_H),
    _GPT2_SIZES,
    always={"activation_function": "gelu_pytorch_tanh", "scale_attn_weights": True, "multi_query": True},
    write=_inner,
    read=_read_inner,
    inert=frozenset(
        {
            *("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "n_inner", "inference_runner"),
            *(
                "validate_runner_input",
                "pre_allocate_kv_cache",
                "max_sequence_length",
                "max_batch_size",
                "pad_key_length",
            ),
        }
    ),
    rotary="none",
    activation="",
    kv_heads="",
    stated_heads="",
)


def _rope_neox(config: Config) -> Mapping[str, Any]:
    return {"use_parallel_residual": bool(config["use_parallel_residual"])}


_NEOX: Final = "gpt_neox.layers.*."
_BY_HEAD: Final = Form(by_head("num_attention_heads"))
GPT_NEOX: Final = GgufArchitecture(
    "gptneox",
    "gpt_neox",
    "GPTNeoXForCausalLM",
    entries(
        "gpt_neox.embed_in.weight\ngpt_neox.final_layer_norm.weight\ngpt_neox.final_layer_norm.bias\nembed_out.weight?",
        prefix="",
    ),
    _both(
        *("input_layernorm", "post_attention_layernorm", "attention.query_key_value", "attention.dense"),
        *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        prefix=_NEOX,
        forms={"attention.query_key_value": _BY_HEAD},
    ),
    (*SIZES, Setting(_EPS, "layer_norm_eps", float)),
    always={"attention_bias": True, "is_decoder": False},
    write=_rope_neox,
    read=lambda file: {"use_parallel_residual": bool(file.get("use_parallel_residual", True))},
    rotary="part",
    activation="gelu",
    kv_heads="",
    stated_heads="",
)
_BLOOM_HEADS: Final = Form(by_head("n_head"))
BLOOM: Final = GgufArchitecture(
    "bloom",
    "bloom",
    "BloomForCausalLM",
    entries("transformer.word_embeddings.weight\nlm_head.weight?", prefix="")
    + _to(_both("transformer.word_embeddings_layernorm", prefix=""), "token_embd_norm")
    + _both("transformer.ln_f", prefix=""),
    _both(
        *("input_layernorm", "self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h"),
        "mlp.dense_4h_to_h",
        prefix=_H,
        forms={"self_attention.query_key_value": _BLOOM_HEADS},
    )
    + _to(_both("post_attention_layernorm", prefix=_H), "blk.*.ffn_norm"),
    (
        Setting("embedding_length", "hidden_size"),
        Setting("block_count", "n_layer"),
        Setting("attention.head_count", "n_head"),
        Setting(_EPS, "layer_norm_epsilon", float),
    ),
    always={"apply_residual_connection_post_layernorm": False},
    write=lambda config: {
        # ALiBi knows no longest input; the class doesn't say one.
        "context_length": int(config.get("seq_length") or 2048),
        "feed_forward_length": 4 * config["hidden_size"],
    },
    inert=frozenset({"slow_but_exact", "seq_length", "n_embed"}),
    rotary="none",
    activation="",
    kv_heads="",
    stated_heads="",
)


def _write_mpt(config: Config) -> Mapping[str, Any]:
    attention = config["attn_config"]
    if not attention.get("alibi") or attention.get("qk_ln") or attention.get("softmax_scale"):
        raise UnsupportedError("config.json: attn_config is not plain ALiBi; llama.cpp's mpt computes that")
    clip = attention.get("clip_qkv")
    return {
        # Whatever the setting says, transformers' class has four times as many.
        "feed_forward_length": 4 * config["d_model"],
        "attention.max_alibi_bias": float(attention["alibi_bias_max"]),
        **({"attention.clamp_kqv": float(clip)} if clip else {}),
    }


def _read_mpt(file: Reading) -> Mapping[str, Any]:
    return {
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": int(file.get("attention.max_alibi_bias", 8)),
            "clip_qkv": file.get("attention.clamp_kqv"),
        },
    }


_MPT_NAMES: Final = """
attn_impl attn_type attn_uses_sequence_id init_device learned_pos_emb norm_type embedding_fraction prefix_lm
verbose expansion_ratio
"""
_MPT_INERT: Final = frozenset(_MPT_NAMES.split())
MPT: Final = GgufArchitecture(
    "mpt",
    "mpt",
    "MptForCausalLM",
    entries("transformer.wte.weight\ntransformer.norm_f.weight\nlm_head.weight?", prefix=""),
    entries(
        """
norm_1.weight
attn.Wqkv.weight
attn.out_proj.weight
norm_2.weight
ffn.up_proj.weight
ffn.down_proj.weight
""",
        prefix="transformer.blocks.*.",
    ),
    (
        Setting("context_length", "max_seq_len"),
        Setting("embedding_length", "d_model"),
        Setting("block_count", "n_layers"),
        Setting("attention.head_count", "n_heads"),
        Setting(_EPS, "layer_norm_epsilon", float),
    ),
    always={"no_bias": True, "logit_scale": None},
    write=_write_mpt,
    read=_read_mpt,
    inert=_MPT_INERT,
    rotary="none",
    activation="",
    kv_heads="",
    stated_heads="",
    known=frozenset({"attention.max_alibi_bias", "attention.clamp_kqv"}),
)


def _falcon_groups(config: Config) -> int:
    if config.get("new_decoder_architecture"):
        return int(config.get("num_kv_heads") or config["num_attention_heads"])
    return 1 if config.get("multi_query") else int(config["num_attention_heads"])


_FALCON: Final = GgufArchitecture(
    "falcon",
    "falcon",
    "FalconForCausalLM",
    entries(
        "transformer.word_embeddings.weight\ntransformer.ln_f.weight\ntransformer.ln_f.bias\nlm_head.weight?", prefix=""
    ),
    (),
    (
        Setting("context_length", "max_position_embeddings"),
        Setting("embedding_length", "hidden_size"),
        Setting("block_count", "num_hidden_layers"),
        Setting("feed_forward_length", "ffn_hidden_size"),
        Setting("attention.head_count", "num_attention_heads"),
        Setting(_EPS, "layer_norm_epsilon", float),
    ),
    always={"alibi": False, "bias": False, "parallel_attn": True, "activation": "gelu"},
    inert=frozenset({"num_ln_in_parallel_attn", "num_kv_heads", "multi_query"}),
    activation="",
    kv_heads="",
    stated_heads="",
)
_FALCON_QKV: Final = {
    "self_attention.query_key_value": Form(
        by_group(_falcon_groups, lambda config: config["hidden_size"] // config["num_attention_heads"])
    )
}
_FALCON_LAYER: Final = """
self_attention.query_key_value.weight
self_attention.dense.weight
mlp.dense_h_to_4h.weight
mlp.dense_4h_to_h.weight
"""
_TWO_NORMS: Final = """
ln_mlp.weight -> ATTN_NORM.weight
ln_mlp.bias -> ATTN_NORM.bias
ln_attn.weight -> ATTN_NORM_2.weight
ln_attn.bias -> ATTN_NORM_2.bias
"""


def _has_two_norms(config: Config) -> bool:
    return bool(config.get("new_decoder_architecture")) and config.get("num_ln_in_parallel_attn") != 1


def _read_falcon(file: Reading) -> Mapping[str, Any]:
    heads = file.get("attention.head_count_kv", 1)
    new = file.has("attn_norm_2.weight")
    return {
        "new_decoder_architecture": new,
        "multi_query": heads == 1,
        "num_kv_heads": heads,
        **({"num_ln_in_parallel_attn": 2} if new else {}),
    }


FALCON: Final = replace(
    _FALCON,
    chosen=lambda config: not _has_two_norms(config),
    layer=entries("input_layernorm.weight\ninput_layernorm.bias\n" + _FALCON_LAYER, _FALCON_QKV, prefix=_H),
    read=_read_falcon,
    described=lambda header: "blk.0.attn_norm_2.weight" not in header.tensors,
)
FALCON_NEW: Final = replace(
    _FALCON, chosen=_has_two_norms, layer=entries(_TWO_NORMS + _FALCON_LAYER, _FALCON_QKV, prefix=_H), read=_read_falcon
)
PHI2: Final = GgufArchitecture(
    "phi2",
    "phi",
    "PhiForCausalLM",
    entries("model.embed_tokens.weight\nlm_head.weight?\nlm_head.bias?", prefix="")
    + _both("model.final_layernorm", prefix=""),
    _both(
        *("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"),
        *("mlp.fc1", "mlp.fc2"),
    ),
    (*SIZES, Setting(_EPS, "layer_norm_eps", float)),
    always={"qk_layernorm": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    rotary="part",
    activation="gelu_new",
    stated_heads="",
)
STARCODER2: Final = GgufArchitecture(
    "starcoder2",
    "starcoder2",
    "Starcoder2ForCausalLM",
    outer(bias=True),
    _both("input_layernorm", "post_attention_layernorm", "mlp.c_fc", "mlp.c_proj")
    + entries(ATTENTION + BIASES + "self_attn.o_proj.bias hidden"),
    (*SIZES, Setting(_EPS, "norm_epsilon", float), Setting("attention.sliding_window", "sliding_window", zero=True)),
    always={"use_bias": True},
    windows="ignored",
    activation="gelu_pytorch_tanh",
    stated_heads="",
)
_PLUS_ONE: Final = Form(change=Change.PLUS_ONE)
NEMOTRON: Final = GgufArchitecture(
    "nemotron",
    "nemotron",
    "NemotronForCausalLM",
    entries(
        "model.embed_tokens.weight\nmodel.norm.weight\nmodel.norm.bias\nlm_head.weight?",
        {"model.norm.weight": _PLUS_ONE},
        prefix="",
    ),
    entries(
        """
input_layernorm.weight
input_layernorm.bias
post_attention_layernorm.weight
post_attention_layernorm.bias
mlp.up_proj.weight
mlp.down_proj.weight
"""
        + ATTENTION,
        {"input_layernorm.weight": _PLUS_ONE, "post_attention_layernorm.weight": _PLUS_ONE},
    ),
    (*SIZES, Setting(_EPS, "norm_eps", float)),
    always={"attention_bias": False, "mlp_bias": False},
    rotary="part",
    activation="relu2",
)
ARCHITECTURES: Final = (*(GPT2, STARCODER, GPT_NEOX, BLOOM, MPT, FALCON, FALCON_NEW, PHI2, STARCODER2, NEMOTRON),)
