"""Phi 3 and 4: fused projections, and positions scaled by factors that a file keeps as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llmconvert.errors import CheckpointError
from llmconvert.gguf.architectures.architecture import GgufArchitecture, Reading, Setting, outer
from llmconvert.gguf.architectures.entries import entries
from llmconvert.gguf.architectures.families.llama import ATTENTION, BIASES, NORMS, RMS, experts
from llmconvert.gguf.rope import shortest

__all__ = ["ARCHITECTURES"]

_FACTORS: Final = frozenset({"rope_factors_long.weight", "rope_factors_short.weight"})
_ORIGINAL: Final = "rope.scaling.original_context_length"


def _read_phi3(file: Reading) -> Mapping[str, Any]:
    header, metadata = file.header, file.header.metadata
    context = metadata.integer(f"{file.arch}.{_ORIGINAL}", file.config["max_position_embeddings"])
    if context < 1:
        raise CheckpointError(
            f"{header.path}: metadata {file.arch}.{_ORIGINAL} is {context}, expected a positive number"
        )
    rope = dict(file.config["rope_parameters"])
    heads, hidden = file.config["num_attention_heads"], file.config["hidden_size"]
    rotary = round(rope.get("partial_rotary_factor", 1.0) * (hidden // heads))
    names = [f"rope_factors_{length}.weight" for length in ("long", "short")]
    if any(name in header.tensors for name in names):
        long, short = (_factors(file, name, rotary) for name in names)
        rope |= {
            "rope_type": "longrope",
            "long_factor": long,
            "short_factor": short,
            "original_max_position_embeddings": context,
        }
    return {"rope_parameters": rope, "original_max_position_embeddings": context}


def _factors(file: Reading, name: str, rotary_dim: int) -> list[float]:
    header = file.header
    if name not in header.tensors or header.tensors[name].shape != (rotary_dim // 2,):
        raise CheckpointError(f"{header.path}: tensor {name!r} is missing or not of {rotary_dim // 2} elements")
    return [shortest(value) for value in file.tensor(name).tolist()]


PHI3: Final = GgufArchitecture(
    "phi3",
    "phi3",
    "Phi3ForCausalLM",
    outer(),
    entries(
        NORMS
        + """
self_attn.o_proj.weight hidden query
mlp.down_proj.weight hidden inner
self_attn.qkv_proj.weight fused_qkv hidden
mlp.gate_up_proj.weight fused_inner hidden
"""
    ),
    (*RMS, Setting("attention.sliding_window", "sliding_window", zero=True)),
    always={"resid_pdrop": 0.0, "embd_pdrop": 0.0},
    read=_read_phi3,
    scalings=frozenset({"linear", "yarn", "longrope"}),
    windows="ignored",
    rotary="part",
    stated_heads="",
    consumed=_FACTORS,
)


def _read_phimoe(file: Reading) -> Mapping[str, Any]:
    biases = {"attention_bias": file.has("attn_q.bias"), "lm_head_bias": "output.bias" in file.header.tensors}
    rope = _read_phi3(file)["rope_parameters"] if _FACTORS & set(file.header.tensors) else None
    return {**biases, **({"rope_parameters": rope} if rope else {})}


PHIMOE: Final = GgufArchitecture(
    "phimoe",
    "phimoe",
    "PhimoeForCausalLM",
    outer(bias=True) + entries("lm_head.bias?", prefix=""),
    entries(
        NORMS
        + "input_layernorm.bias\npost_attention_layernorm.bias\nblock_sparse_moe.gate.weight\n"
        + ATTENTION
        + BIASES.replace(".bias", ".bias?")
        + "self_attn.o_proj.bias?"
    )
    + experts("block_sparse_moe.experts", ("w1", "w3", "w2")),
    (*RMS, Setting("expert_count", "num_local_experts"), Setting("expert_used_count", "num_experts_per_tok")),
    read=_read_phimoe,
    scalings=frozenset({"longrope"}),
    windows="ignored",
    stated_heads="",
    consumed=_FACTORS,
    experts="num_local_experts",
    gap=(
        "llama.cpp's phimoe norms by the root mean square and weighs experts by their softmax; the model subtracts a "
        "mean, and routes by sparse mixing"
    ),
)
ARCHITECTURES: Final = (PHI3, PHIMOE)
