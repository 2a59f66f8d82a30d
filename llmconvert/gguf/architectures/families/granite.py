"""Granite: Llama with four multipliers; its mixtures hold a layer's experts in two tensors."""

from __future__ import annotations

from typing import Final

from llmconvert.gguf.architectures.architecture import GgufArchitecture, Setting, outer
from llmconvert.gguf.architectures.entries import Form, entries
from llmconvert.gguf.architectures.families.llama import ATTENTION, MLP, NORMS, RMS, TURNED
from llmconvert.gguf.architectures.orders import part

__all__ = ["ARCHITECTURES", "MIXTURE", "SCALES", "SHARED"]

SCALES: Final = (
    Setting("attention.scale", "attention_multiplier", float, default=0.0),
    Setting("embedding_scale", "embedding_multiplier", float, default=0.0),
    Setting("residual_scale", "residual_multiplier", float, default=0.0),
    Setting("logit_scale", "logits_scaling", float, default=0.0),
)
_INPUT: Final = "block_sparse_moe.input_linear"
MIXTURE: Final = (
    *entries(
        "block_sparse_moe.router.layer.weight~\nblock_sparse_moe.output_linear.weight~",
        {"block_sparse_moe.output_linear": Form(whole=True)},
    ),
    *entries(f"{_INPUT}.weight~ -> FFN_GATE_EXP.weight", {_INPUT: Form(part(0, 2), whole=True)}),
    *entries(f"{_INPUT}.weight~ -> FFN_UP_EXP.weight", {_INPUT: Form(part(1, 2), whole=True)}),
)
SHARED: Final = (
    *entries("shared_mlp.output_linear.weight~ -> FFN_DOWN_SHEXP.weight"),
    *entries("shared_mlp.input_linear.weight~ -> FFN_GATE_SHEXP.weight", {"shared_mlp.input_linear": Form(part(0, 2))}),
    *entries("shared_mlp.input_linear.weight~ -> FFN_UP_SHEXP.weight", {"shared_mlp.input_linear": Form(part(1, 2))}),
)
_EXPERTS: Final = (
    Setting("expert_count", "num_local_experts"),
    Setting("expert_used_count", "num_experts_per_tok"),
)

GRANITE: Final = GgufArchitecture(
    "granite",
    "granite",
    "GraniteForCausalLM",
    outer(),
    entries(NORMS + ATTENTION + MLP, TURNED),
    (*RMS, *SCALES),
    always={"attention_bias": False, "mlp_bias": False},
    stated_heads="",
)
GRANITE_MOE: Final = GgufArchitecture(
    "granitemoe",
    "granitemoe",
    "GraniteMoeForCausalLM",
    outer(),
    (*entries(NORMS + ATTENTION, TURNED), *MIXTURE),
    (*RMS, *SCALES, *_EXPERTS),
    always={"attention_bias": False},
    stated_heads="",
    experts="num_local_experts",
    described=lambda header: not header.metadata.get("granitemoe.expert_shared_feed_forward_length"),
)
GRANITE_MOE_SHARED: Final = GgufArchitecture(
    "granitemoe",
    "granitemoeshared",
    "GraniteMoeSharedForCausalLM",
    outer(),
    (*entries(NORMS + ATTENTION, TURNED), *MIXTURE, *SHARED),
    (*RMS, *SCALES, *_EXPERTS, Setting("expert_shared_feed_forward_length", "shared_intermediate_size")),
    always={"attention_bias": False},
    stated_heads="",
    experts="num_local_experts",
)
ARCHITECTURES: Final = (GRANITE, GRANITE_MOE, GRANITE_MOE_SHARED)
