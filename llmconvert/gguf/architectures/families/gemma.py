"""Gemma: norms that add one, tied embeddings, windows in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.architectures.architecture import GgufArchitecture, Reading, Setting, outer
from llmconvert.gguf.architectures.entries import Change, Config, Form, entries
from llmconvert.gguf.architectures.families.llama import ATTENTION, MLP, NORMS, RMS
from llmconvert.gguf.architectures.windows import read_windows, write_windows
from llmconvert.gguf.rope import rope_metadata, rope_parameters, shortest

__all__ = ["ARCHITECTURES"]

_PLUS_ONE: Final = Form(change=Change.PLUS_ONE)
_FOUR_NORMS: Final = """
input_layernorm.weight hidden
post_attention_layernorm.weight hidden -> ATTN_POST_NORM.weight
pre_feedforward_layernorm.weight hidden
post_feedforward_layernorm.weight hidden
"""
_NORM_FORMS: Final = dict.fromkeys(
    (
        *("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        *("self_attn.q_norm", "self_attn.k_norm"),
    ),
    _PLUS_ONE,
)
_GELU: Final = "gelu_pytorch_tanh"
_27B_LAYERS: Final = 46
_WINDOW: Final = 4096


def _query_scalar(config: Config) -> int:
    """What Gemma 2 scales queries by, under a root.

    Of its sizes only the 27B does not take its head size, and the file does not say so; llama.cpp, too, knows it by its
    number of layers.
    """
    if config["num_hidden_layers"] == _27B_LAYERS:
        return int(config["hidden_size"]) // int(config["num_attention_heads"])
    return int(config["head_dim"])


def _write_gemma2(config: Config) -> Mapping[str, Any]:
    for layer, kind in enumerate(config.get("layer_types") or ()):
        computed = ("sliding_attention", "full_attention")[layer % 2]
        if kind != computed:
            raise UnsupportedError(
                f"config.json: layer_types[{layer}] is {kind!r}; llama.cpp's gemma2 computes {computed!r}"
            )
    assumed = _query_scalar(config)
    if config["query_pre_attn_scalar"] != assumed:
        raise UnsupportedError(
            f"config.json: query_pre_attn_scalar is {config['query_pre_attn_scalar']}; llama.cpp scales queries "
            f"of this gemma2 by {assumed}"
        )
    caps = {key: config.get(key) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    missing = [key for key, value in caps.items() if not value]
    if missing:
        raise UnsupportedError(f"config.json: {missing[0]} is not set; llama.cpp's gemma2 always caps")
    window = {"attention.sliding_window": config["sliding_window"]} if config.get("sliding_window") else {}
    return {**window, **{key: float(value) for key, value in caps.items() if value}}


def _read_gemma2(file: Reading) -> Mapping[str, Any]:
    metadata = file.header.metadata
    return {
        "hidden_activation": _GELU,
        "query_pre_attn_scalar": _query_scalar(file.config),
        "attn_logit_softcapping": shortest(metadata.number("gemma2.attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": shortest(metadata.number("gemma2.final_logit_softcapping", 30.0)),
    }


GEMMA2: Final = GgufArchitecture(
    "gemma2",
    "gemma2",
    "Gemma2ForCausalLM",
    # llama.cpp's class always takes the embedding, and does not load a file with a head of its own.
    outer(head=False, norm=_PLUS_ONE),
    entries(_FOUR_NORMS + ATTENTION + MLP, _NORM_FORMS),
    (
        *RMS,
        Setting("attention.sliding_window", "sliding_window", default=_WINDOW),
        Setting("attn_logit_softcapping", "attn_logit_softcapping", float, default=50.0),
        Setting("final_logit_softcapping", "final_logit_softcapping", float, default=30.0),
    ),
    always={"attention_bias": False},
    write=_write_gemma2,
    read=_read_gemma2,
    windows="kept",
    activation=_GELU,
)
GEMMA: Final = GgufArchitecture(
    "gemma",
    "gemma",
    "GemmaForCausalLM",
    outer(head=False, norm=_PLUS_ONE),
    entries(NORMS + ATTENTION + MLP, _NORM_FORMS),
    RMS,
    always={"attention_bias": False},
    activation=_GELU,
)
_GEMMA3_27B_LAYERS: Final = 62
_GEMMA3_PERIOD: Final = 6


def _gemma3_scalar(config: Config) -> int:
    if config["num_hidden_layers"] == _GEMMA3_27B_LAYERS:
        return int(config["hidden_size"]) // int(config["num_attention_heads"])
    return int(config["head_dim"])


def _write_gemma3(config: Config) -> Mapping[str, Any]:
    sets = config["rope_parameters"]
    full = {**config, "rope_parameters": sets["full_attention"]}
    return {
        "rope.dimension_count": config["head_dim"],
        "rope.freq_base": float(sets["full_attention"]["rope_theta"]),
        "rope.freq_base_swa": float(sets["sliding_attention"]["rope_theta"]),
        **rope_metadata(full, "gemma3", ("linear",)),
        **write_windows("gemma3", _GEMMA3_PERIOD)(config),
        **({"final_logit_softcapping": float(cap)} if (cap := config.get("final_logit_softcapping")) else {}),
    }


def _read_gemma3(file: Reading) -> Mapping[str, Any]:
    metadata = file.header.metadata
    local = shortest(metadata.number("gemma3.rope.freq_base_swa", 10000.0))
    cap = shortest(metadata.number("gemma3.final_logit_softcapping", 0.0))
    return {
        "hidden_activation": _GELU,
        "query_pre_attn_scalar": _gemma3_scalar(file.config),
        "rope_parameters": {
            "full_attention": rope_parameters(metadata, "gemma3"),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        "final_logit_softcapping": cap or None,
        **read_windows(file, _GEMMA3_PERIOD),
    }


GEMMA3: Final = GgufArchitecture(
    "gemma3",
    "gemma3_text",
    "Gemma3ForCausalLM",
    outer(head=False, norm=_PLUS_ONE),
    entries(_FOUR_NORMS + ATTENTION + MLP + "self_attn.q_norm.weight\nself_attn.k_norm.weight", _NORM_FORMS),
    RMS,
    always={"attention_bias": False, "attn_logit_softcapping": None},
    write=_write_gemma3,
    read=_read_gemma3,
    windows="kept",
    rotary="own",
    activation=_GELU,
    known=frozenset({"final_logit_softcapping"}),
)
ARCHITECTURES: Final = (GEMMA, GEMMA2, GEMMA3)
