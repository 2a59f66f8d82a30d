"""Qwen 2 and 3, and their mixtures of experts."""

from __future__ import annotations

from typing import Any, Final

from llmconvert.gguf.architectures.architecture import GgufArchitecture, Setting, outer
from llmconvert.gguf.architectures.entries import entries
from llmconvert.gguf.architectures.families.llama import ATTENTION, BIASES, MLP, NORMS, RMS, experts

__all__ = ["ARCHITECTURES"]

_HEAD_NORMS: Final = "self_attn.q_norm.weight head\nself_attn.k_norm.weight head\n"
_NO_WINDOW: Final = {"use_sliding_window": False, "sliding_window": None}
_EVERY_LAYER: Final = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_MIXTURE: Final = (
    Setting("expert_count", "num_experts"),
    Setting("expert_used_count", "num_experts_per_tok"),
    Setting("expert_feed_forward_length", "moe_intermediate_size"),
)


def _qwen2(name: str, model_type: str, model_class: str, **more: Any) -> GgufArchitecture:
    return GgufArchitecture(
        name,
        model_type,
        model_class,
        outer(),
        **{"settings": RMS, "always": _NO_WINDOW, "stated_heads": "other", **more},
    )


QWEN2: Final = _qwen2("qwen2", "qwen2", "Qwen2ForCausalLM", layer=entries(NORMS + ATTENTION + BIASES + MLP))
QWEN3: Final = GgufArchitecture(
    "qwen3",
    "qwen3",
    "Qwen3ForCausalLM",
    outer(),
    entries(NORMS + ATTENTION + MLP + _HEAD_NORMS),
    RMS,
    always={**_NO_WINDOW, "attention_bias": False},
)
QWEN2_MOE: Final = GgufArchitecture(
    "qwen2moe",
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    outer(),
    entries(
        NORMS
        + ATTENTION
        + BIASES
        + """
mlp.gate.weight
mlp.shared_expert.gate_proj.weight
mlp.shared_expert.up_proj.weight
mlp.shared_expert.down_proj.weight
mlp.shared_expert_gate.weight -> FFN_GATE_INP_SHEXP.weight
"""
    )
    + experts("mlp.experts"),
    (*RMS, *_MIXTURE, Setting("expert_shared_feed_forward_length", "shared_expert_intermediate_size")),
    always={**_NO_WINDOW, **_EVERY_LAYER, "norm_topk_prob": False, "qkv_bias": True},
    stated_heads="other",
)
QWEN3_MOE: Final = GgufArchitecture(
    "qwen3moe",
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    outer(),
    entries(NORMS + ATTENTION + _HEAD_NORMS + "mlp.gate.weight") + experts("mlp.experts"),
    (*RMS, *_MIXTURE),
    always={**_NO_WINDOW, **_EVERY_LAYER, "norm_topk_prob": True, "attention_bias": False},
)
ARCHITECTURES: Final = (QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE)
