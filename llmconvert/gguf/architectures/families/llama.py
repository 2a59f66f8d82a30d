"""Llama and what llama.cpp runs with its class: Mistral and Mixtral; and classes that differ from it in little."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.architectures.architecture import SIZES, GgufArchitecture, Reading, Setting, outer
from llmconvert.gguf.architectures.entries import Config, Entry, Form, entries
from llmconvert.gguf.architectures.orders import head_dim, interleaved, part
from llmconvert.gguf.header import GgufHeader, Metadata
from llmconvert.gguf.rope import llama3_parameters

__all__ = [
    "ARCHITECTURES",
    "ATTENTION",
    "BIASES",
    "MLP",
    "NORMS",
    "RMS",
    "TURNED",
    "experts",
    "llama3_scaling",
]

RMS: Final = (*SIZES, Setting("attention.layer_norm_rms_epsilon", "rms_norm_eps", float))

NORMS: Final = """
input_layernorm.weight hidden
post_attention_layernorm.weight hidden
"""
ATTENTION: Final = """
self_attn.q_proj.weight query hidden
self_attn.k_proj.weight key hidden
self_attn.v_proj.weight key hidden
self_attn.o_proj.weight hidden query
"""
BIASES: Final = """
self_attn.q_proj.bias query
self_attn.k_proj.bias key
self_attn.v_proj.bias key
"""
MLP: Final = """
mlp.gate_proj.weight inner hidden
mlp.up_proj.weight inner hidden
mlp.down_proj.weight hidden inner
"""
_OPTIONAL: Final = """
self_attn.q_proj.bias? query
self_attn.k_proj.bias? key
self_attn.v_proj.bias? key
self_attn.o_proj.bias? hidden
mlp.gate_proj.bias? inner
mlp.up_proj.bias? inner
mlp.down_proj.bias? hidden
"""
#: llama.cpp turns neighbours, transformers the halves of a head.
TURNED: Final = {
    "self_attn.q_proj": Form(interleaved("num_attention_heads")),
    "self_attn.k_proj": Form(interleaved("num_key_value_heads")),
}


def experts(module: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> tuple[Entry, ...]:
    """A layer's experts: a matrix each, or, as their class holds them, all in one tensor.

    Args:
        module: that holds them.
        names: of an expert's matrices.
    """
    targets = ("FFN_GATE_EXP.weight", "FFN_UP_EXP.weight", "FFN_DOWN_EXP.weight")
    each = "".join(f"{module}.#.{name}.weight~ -> {target}\n" for name, target in zip(names, targets, strict=True))
    found = entries(each)
    for name, target, form in (
        ("gate_up_proj", targets[0], Form(part(0, 2), whole=True)),
        ("gate_up_proj", targets[1], Form(part(1, 2), whole=True)),
        ("down_proj", targets[2], Form(whole=True)),
    ):
        found += entries(f"{module}.{name}~ -> {target}", {f"{module}.{name}": form}, read=False)
    return found


def _is_mistral(metadata: Metadata) -> bool:
    keys = ("general.name", "general.basename", "general.base_model.0.name")
    return any("mistral" in str(metadata.get(key, "")).lower() for key in keys)


def _has_window(header: GgufHeader) -> bool:
    return bool(header.metadata.get("llama.attention.sliding_window"))


def _has_experts(header: GgufHeader) -> bool:
    return bool(header.metadata.get("llama.expert_count")) and "blk.0.ffn_gate_inp.weight" in header.tensors


def _is_biased(header: GgufHeader) -> bool:
    return any(name.startswith("blk.0.") and name.endswith(".bias") for name in header.tensors)


def _read_llama(file: Reading) -> dict[str, Any]:
    attention = _biased(file, ("attn_q", "attn_k", "attn_v", "attn_output"))
    mlp = _biased(file, ("ffn_gate", "ffn_up", "ffn_down"))
    if (attention or mlp) and _has_window(file.header):
        raise UnsupportedError(f"{file.header.path}: a llama model with a sliding window and biases is not supported")
    return {"attention_bias": attention, "mlp_bias": mlp, **llama3_scaling(file)}


def llama3_scaling(file: Reading) -> dict[str, Any]:
    """``rope_parameters`` where a file has Llama 3's scaling, as the tensor that llama.cpp keeps it in."""
    if "rope_freqs.weight" not in file.header.tensors:
        return {}
    where = f"{file.header.path}: rope_freqs.weight"
    plain, divisors = file.config["rope_parameters"], file.tensor("rope_freqs.weight")
    return {"rope_parameters": llama3_parameters(divisors, plain, head_dim(file.config), where)}


def _biased(file: Reading, stems: tuple[str, ...]) -> bool:
    """Whether these linears have biases, which transformers' Llama switches on and off together."""
    having = [stem for stem in stems if f"blk.0.{stem}.bias" in file.header.tensors]
    if having and len(having) != len(stems):
        raise UnsupportedError(
            f"{file.header.path}: has biases on {', '.join(having)} but not on all of {', '.join(stems)}; "
            "transformers' Llama cannot express that"
        )
    return bool(having)


_LLAMA3: Final = frozenset({"linear", "yarn", "llama3"})
_FREQUENCIES: Final = frozenset({"rope_freqs.weight"})
_WINDOW: Final = Setting("attention.sliding_window", "sliding_window", zero=True)

LLAMA: Final = GgufArchitecture(
    "llama",
    "llama",
    "LlamaForCausalLM",
    outer(),
    entries(NORMS + ATTENTION + MLP + _OPTIONAL, TURNED),
    RMS,
    read=_read_llama,
    scalings=_LLAMA3,
    windows="ignored",
    consumed=_FREQUENCIES,
)
MISTRAL: Final = GgufArchitecture(
    "llama",
    "mistral",
    "MistralForCausalLM",
    outer(),
    entries(NORMS + ATTENTION + MLP, TURNED),
    (*RMS, _WINDOW),
    read=llama3_scaling,
    scalings=_LLAMA3,
    windows="ignored",
    consumed=_FREQUENCIES,
    # Llama with a window is what transformers calls Mistral; without one both compute the same.
    described=lambda header: (_has_window(header) or _is_mistral(header.metadata)) and not _is_biased(header),
    base="Mistral",
)
MIXTRAL: Final = GgufArchitecture(
    "llama",
    "mixtral",
    "MixtralForCausalLM",
    outer(),
    entries(NORMS + ATTENTION + "block_sparse_moe.gate.weight", TURNED)
    + experts("block_sparse_moe.experts", ("w1", "w3", "w2"))
    # As the class itself calls them.
    + entries("mlp.gate.weight~ -> FFN_GATE_INP.weight", read=False)
    + tuple(entry for entry in experts("mlp.experts") if not entry.read),
    (
        *RMS,
        _WINDOW,
        Setting("expert_count", "num_local_experts"),
        Setting("expert_used_count", "num_experts_per_tok"),
    ),
    windows="ignored",
    described=_has_experts,
    experts="num_local_experts",
)
# Llama 4: experts lie [inputs, outputs] in one tensor, gate and up one behind the other.
_GATE_UP, _DOWN = "feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"
_LLAMA4_LAYER: Final = (
    *entries(
        NORMS
        + ATTENTION
        + """
feed_forward.gate_proj.weight~
feed_forward.up_proj.weight~
feed_forward.down_proj.weight~
feed_forward.router.weight~
feed_forward.shared_expert.gate_proj.weight~
feed_forward.shared_expert.up_proj.weight~
feed_forward.shared_expert.down_proj.weight~
"""
    ),
    *entries(f"{_GATE_UP}~ -> FFN_GATE_EXP.weight", {_GATE_UP: Form(part(0, 2), whole=True, transposed=True)}),
    *entries(f"{_GATE_UP}~ -> FFN_UP_EXP.weight", {_GATE_UP: Form(part(1, 2), whole=True, transposed=True)}),
    *entries(f"{_DOWN}~ -> FFN_DOWN_EXP.weight", {_DOWN: Form(whole=True, transposed=True)}),
)
_CHUNK, _FLOOR, _NO_ROPE = 8192, 8192, 4


def _write_llama4(config: Config) -> Mapping[str, Any]:
    layers, step = config["num_hidden_layers"], config["interleave_moe_layer_step"]
    if list(config["moe_layers"]) != list(range(step - 1, layers, step)):
        raise UnsupportedError(
            f"config.json: moe_layers is {config['moe_layers']}; llama.cpp's llama4 has a mixture in every {step}th "
            "layer"
        )
    return {
        "feed_forward_length": config["intermediate_size_mlp"],
        "expert_feed_forward_length": config["intermediate_size"],
        "interleave_moe_layer_step": step,
    }


def _read_llama4(file: Reading) -> dict[str, Any]:
    layers, step = file.layers, file.get("interleave_moe_layer_step", 1)
    turned = [int((layer + 1) % _NO_ROPE != 0) for layer in range(layers)]
    return {
        "intermediate_size": file.get("expert_feed_forward_length"),
        "intermediate_size_mlp": file.get("feed_forward_length"),
        "interleave_moe_layer_step": step,
        "moe_layers": list(range(step - 1, layers, step)),
        "no_rope_layers": turned,
        "layer_types": ["chunked_attention" if one else "full_attention" for one in turned],
        **llama3_scaling(file),
    }


LLAMA4: Final = GgufArchitecture(
    "llama4",
    "llama4_text",
    "Llama4ForCausalLM",
    outer(),
    _LLAMA4_LAYER,
    (
        *(setting for setting in RMS if setting.name != "intermediate_size"),
        Setting("expert_count", "num_local_experts"),
        Setting("expert_used_count", "num_experts_per_tok"),
    ),
    # The chunk, the temperature of long texts and which layers are not turned are llama.cpp's own.
    always={
        "attention_bias": False,
        "use_qk_norm": True,
        "attention_chunk_size": _CHUNK,
        "attn_temperature_tuning": True,
        "floor_scale": _FLOOR,
        "attn_scale": 0.1,
    },
    write=_write_llama4,
    read=_read_llama4,
    inert=frozenset({"no_rope_layer_interval", "for_llm_compressor"}),
    scalings=_LLAMA3,
    windows="kept",
    consumed=_FREQUENCIES,
    experts="num_local_experts",
)
#: Of one name, the first that describes a file.
ARCHITECTURES: Final = (MIXTRAL, MISTRAL, LLAMA, LLAMA4)
