"""Qwen 2 and 3, their mixtures of experts, and the decoders of their models for images.

Those turn heads by positions in time, height and width (M-RoPE), which of text are one and the same: read back alone, a
file is a Qwen 2 or 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.architectures.architecture import GgufArchitecture, Reading, Setting, outer
from llmconvert.gguf.architectures.entries import EXPERT, Config, Entry, entries, transposable
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
# What a part of a head may turn less in llama.cpp over the whole context, in radians.
_ANGLE: Final = 0.25


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


def _sections(config: Config) -> dict[str, Any]:
    """How many frequencies of a head turn with time, with height and with width; llama.cpp has room for a fourth."""
    found = (config.get("rope_parameters") or {}).get("mrope_section")
    if not found:
        raise UnsupportedError("config.json: rope_parameters has no mrope_section; llama.cpp needs one of such models")
    return {"rope.dimension_sections": np.array([*found, 0, 0][:4], np.int32)}


def _read_sections(file: Reading) -> Mapping[str, Any]:
    """The sections of a decoder that is read as part of its model; alone, it has one position."""
    found = file.get("rope.dimension_sections")
    if found is None or not file.config["model_type"].endswith("_text"):
        return {}
    return {"rope_parameters": {**file.config["rope_parameters"], "mrope_section": [int(one) for one in found[:3]]}}


def _for_images(arch: GgufArchitecture, name: str, model_type: str) -> GgufArchitecture:
    """The decoder of a model for images that computes a text as an architecture does."""
    read_type = arch.model_type
    return replace(arch, name=name, model_type=model_type, read_type=read_type, write=_sections, read=_read_sections)


def _unturned(config: Config) -> tuple[list[int], float]:
    """The frequencies of a head that llama.cpp's interleaved M-RoPE gives to none of the three positions of a text, and
    what the fastest of them turns by over the model's context, in radians.

    Frequency ``i`` belongs to position ``i % 3`` as long as that has frequencies left (``ggml_mrope_cache_init``);
    transformers turns the others with time.
    """
    found = config["rope_parameters"]["mrope_section"]
    rest = [index for index in range(config["head_dim"] // 2) if index >= 3 * found[index % 3]]
    if not rest:
        return [], 0.0
    slowness = config["rope_parameters"]["rope_theta"] ** (-2 * rest[0] / config["head_dim"])
    return rest, float(config["max_position_embeddings"] * slowness)


def _experts_together(layer: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """A layer's tensors as checkpoints of Qwen3-VL have them: all experts in one."""
    return tuple(replace(entry, read=True) for entry in layer if EXPERT not in entry.name)


def _write_qwen3_vl(config: Config) -> dict[str, Any]:
    found = _sections(config)
    rest, angle = _unturned(config)
    if angle > _ANGLE:
        raise UnsupportedError(
            f"config.json: mrope_section is {config['rope_parameters']['mrope_section']}; llama.cpp does not turn "
            f"frequencies {', '.join(map(str, rest))} of a head then, by up to {angle:.2g} radians within the context"
        )
    # Its towers hand features of several of their layers to the first layers of the decoder.
    deepstack = (config.get("vision_config") or {}).get("deepstack_visual_indexes")
    return {**found, **({"n_deepstack_layers": len(deepstack)} if deepstack else {})}


def _qwen3_vl_notes(config: Config) -> tuple[str, ...]:
    rest, angle = _unturned(config)
    if not rest:
        return ()
    return (
        f"llama.cpp does not turn frequencies {', '.join(map(str, rest))} of a head, which the model turns by "
        f"{angle:.2g} radians at most within its context",
    )


ARCHITECTURES: Final = (
    *(QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE),
    _for_images(QWEN2, "qwen2vl", "qwen2_vl_text"),
    _for_images(QWEN2, "qwen2vl", "qwen2_5_vl_text"),
    replace(_for_images(QWEN3, "qwen3vl", "qwen3_vl_text"), write=_write_qwen3_vl, notes=_qwen3_vl_notes),
    replace(
        _for_images(QWEN3_MOE, "qwen3vlmoe", "qwen3_vl_moe_text"),
        layer=transposable(QWEN3_MOE.layer, "moe_intermediate_size"),
        inside=_experts_together(QWEN3_MOE.layer),
        write=_write_qwen3_vl,
        notes=_qwen3_vl_notes,
    ),
)
