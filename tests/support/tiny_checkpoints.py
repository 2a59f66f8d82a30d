"""A tiny seeded checkpoint of any class that transformers has, with the structure of the real one.

The settings are those that the class has by default, made small: two to six layers, chosen so that every kind of layer
is among them, a hidden size of 64, a few experts; what is tied, gated, shared or counted by group stays so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

__all__ = ["FIRST_TEXT_TOKEN", "VOCABULARY", "save_tiny_checkpoint", "tiny_config"]

VOCABULARY = 256
#: Smaller token ids may stand for images and the like.
FIRST_TEXT_TOKEN = 96

_LAYERS = 4
_HIDDEN = 64
_HEAD = 16

# Names of settings with the value that they get, wherever in a config they are whole numbers.
_TABLE = """
64: hidden_size d_model n_embd dim embed_dim embedding_size attention_hidden_size word_embed_proj_dim lru_width
64: model_dim out_hidden_size text_hidden_size projection_dim encoder_hidden_size cross_attention_hidden_size
64: hidden_dim embedding_dim output_hidden_size backbone_hidden_size output_dim text_embed_dim projector_output_dim
64: n_embed lm_hidden_size hidden_size_global hidden_size_local vision_hidden_size output_proj_dim adapter_out_dim
64: adapter_in_dim output_size input_embedding_size multimodal_hidden_size index_topk codebook_size audio_vocab_size
64: adapter_input_size
4: num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_heads attention_heads
4: swa_num_attention_heads num_decoder_attention_heads num_encoder_attention_heads conf_num_attention_heads
4: linear_num_heads linear_attn_num_heads linear_num_value_heads index_n_heads
16: head_dim qk_nope_head_dim v_head_dim d_kv linear_key_head_dim linear_value_head_dim swa_head_dim kv_channels
16: attention_head_size linear_head_dim dim_head attention_head_dim global_head_dim mamba_head_dim mamba_d_head
16: swa_v_head_dim state_size mamba_d_state ssm_state_size query_pre_attn_scalar resampler_head_dim index_head_dim
128: intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size mlp_dim d_ff dff dim_ff
128: feed_forward_size intermediate_size_mlp dense_intermediate_size mlp_hidden_size mamba_d_ssm
32: moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size
32: moe_shared_expert_intermediate_size shared_experts_intermediate_size hidden_size_per_layer_input
32: kv_lora_rank q_lora_rank o_lora_rank mamba_dt_rank time_step_rank gated_norm_rank
8: num_local_experts num_experts n_routed_experts moe_num_experts zero_expert_num num_routed_experts
8: sliding_window attention_chunk_size sliding_window_size attention_window_size local_attention window_size_text
8: qk_rope_head_dim mamba_num_heads mamba_n_heads mamba_chunk_size chunk_size rotary_dim
2: num_experts_per_tok moe_topk moe_k moe_top_k num_experts_per_token n_group num_expert_group topk_group
2: moe_num_shared_experts n_shared_experts linear_num_key_heads encoder_layers num_encoder_layers depth
256: vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size
512: max_position_embeddings n_positions n_ctx max_seq_len model_max_length seq_length encoder_hash_byte_group_vocab
24: qk_head_dim
"""
_SIZES: Mapping[str, int] = {
    name: int(value)
    for value, names in (line.split(":") for line in _TABLE.split("\n") if line)
    for name in names.split()
}
_DEPTHS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"),
    *("layers", "conf_num_hidden_layers"),
)
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "multi_query_group_num")
# Lists with the numbers of layers.
_LAYER_NUMBERS = (
    *("mlp_only_layers", "moe_layers", "full_attn_idxs", "hybrid_layer_ids", "cross_attention_layers"),
    *("attn_layer_indices", "ple_layer_ids", "deepstack_visual_indexes", "fullatt_block_indexes"),
    *("intermediate_layers_indices", "global_attn_indexes", "sparse_layers"),
)
# Settings that real checkpoints always have, and whose default is none.
_FILLED = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts")
_HEADS = ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim")
_KEPT = ("id2label", "label2id", "task_specific_params", "quantization_config")
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_CONVOLUTIONS = ["conv", "conv", "full_attention", "conv"]
_ZAMBA = ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid"]
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_INKLING = {"n_routed_experts": 16, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
_IMAGES = {"<image>": 5, "IMGIMGAAZ": 6, "IMGIMGBBZ": 7}


def _sectioned(*sections: int) -> Mapping[str, Any]:
    """Rotary dimensions per axis, of a decoder that is a part."""
    return {"text_config": {"rope_parameters": {"mrope_section": list(sections)}}}


# Where defaults have no small twin, or are no model: model type → settings in the place of those.
_OTHERS: Mapping[str, Mapping[str, Any]] = {
    "chameleon": {"vocabulary_map": _IMAGES},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _ROPE}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}},
    "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32}},
    "dots3_note": {"text_config": {"head_dim": 24}, "vision_config": {"adapter_in_dim": 64}},
    "dots3_note_text": {"head_dim": 24},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "emu3": {"vocabulary_map": _IMAGES},
    "ernie4_5_vl_moe": _sectioned(3, 3, 2),
    "gemma3n": {"text_config": {"intermediate_size": 128}},
    "gemma3n_text": {"intermediate_size": 128},
    "glm46v": _sectioned(2, 3, 3),
    "glmga": _sectioned(2, 3, 3),
    "glm4v": _sectioned(2, 3, 3),
    "glm4v_moe": _sectioned(2, 1, 1),
    "glm5_next": {"text_config": {"linear_head_dim": 32}},
    "glm_ocr": _sectioned(2, 3, 3),
    "granite4_vision": {"deepstack_layer_map": [[0, 0], [1, 1]], "downsample_rate": "1/2"},
    "hunyuan_vl": _sectioned(2, 2, 2, 2),
    "inkling_mm_model": {"text_config": _INKLING},
    "inkling_text": _INKLING,
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 32},
    "lfm2_moe": {"layer_types": _CONVOLUTIONS, "num_dense_layers": 1},
    "mistral4": {"qk_nope_head_dim": 8, "qk_head_dim": 16, "head_dim": 16},
    "molmo2": {"adapter_config": {"vision_feature_layer": [3, 1]}},
    "paddleocr_vl": _sectioned(2, 3, 3),
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_pe_core_tiny_patch16_384",
            "model_args": {"embed_dim": 64, "depth": 2, "num_heads": 4},
        }
    },
    "qwen2_5_omni_thinker": _sectioned(2, 3, 3),
    "qwen2_5_vl": _sectioned(2, 3, 3),
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "qwen2_vl": _sectioned(2, 3, 3),
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [4, 8],
        "axial_pos_embds_dim": [16, 48],
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
    },
    "step3p7": {"text_config": {"sliding_window": 8}},
    "unlimited_ocr": {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}},
    "xlnet": {"d_head": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": _ZAMBA,
        "n_mamba_heads": 2,
        "mamba_dt_rank": 4,
        "mamba_d_state": 4,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": _ZAMBA,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "hybrid_layer_ids": [2, 4, 5],
        "attention_hidden_size": 128,
    },
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """The settings of a tiny model of that type."""
    kind: type[PretrainedConfig] = CONFIG_MAPPING[model_type]
    return kind.from_dict(_merged(_Shrinking().settings(kind().to_dict()), _OTHERS.get(model_type, {})))


def _merged(settings: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    parts = {
        name: _merged(settings.get(name) or {}, value) if isinstance(value, Mapping) else value
        for name, value in others.items()
    }
    return {**settings, **parts}


def save_tiny_checkpoint(directory: Path, model_type: str, class_name: str, *, seed: int = 0) -> Path:
    """Save a random model of that class in float32, all parameters random; returns ``directory``."""
    kind: type[PreTrainedModel] = getattr(transformers, class_name)
    config = tiny_config(model_type)
    text = config.get_text_config(decoder=True)
    if kind.config_class is not None and not isinstance(config, kind.config_class):
        config = text if isinstance(text, kind.config_class) else config
    torch.manual_seed(seed)
    model = kind(config).to(torch.float32)
    _randomize(model, torch.Generator().manual_seed(seed))
    model.save_pretrained(directory)
    return directory


def _randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Let no vector be a constant, and no matrix zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif parameter.is_floating_point():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * max(parameter.shape[-1], 4) ** -0.5)


class _Shrinking:
    """Makes a config small; counts the token ids that it hands out."""

    def __init__(self) -> None:
        self._token = 0

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A config, or a part of one."""
        depth = next((given[name] for name in _DEPTHS if isinstance(given.get(name), int)), given.get("depth"))
        layers = self._layers(given, depth) if isinstance(depth, int) else []
        small: dict[str, Any] = {}
        for name, value in given.items():
            if isinstance(name, str):
                small[name] = self._value(name, value, given, depth, layers)
            else:
                small[name] = value
        return small

    @staticmethod
    def _layers(given: Mapping[str, Any], depth: int) -> list[int]:
        """The layers that stay: one of every kind that there is, and then from the first."""
        kinds: dict[Any, int] = {}
        for layer in range(depth):
            kind: list[Any] = []
            for name, value in given.items():
                if name in _LAYER_NUMBERS and isinstance(value, list):
                    kind.append(layer in value)
                elif isinstance(value, list) and len(value) == depth:
                    kind.append(repr(value[layer]))
                elif name == "per_layer_config" and value:
                    kind.append(repr({int(number): part for number, part in value.items()}.get(layer)))
            kinds.setdefault(tuple(kind), layer)
        chosen = set(list(kinds.values())[:6])
        for layer in range(depth):
            if len(chosen) < min(_LAYERS, depth):
                chosen.add(layer)
        return sorted(chosen)

    def _layer(self, own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """What a layer has otherwise than the rest."""
        names = [name for name in _HEADS if name in given and name not in own]
        small = self.settings({**own, **{name: given[name] for name in names}})
        if own.get("head_dim", 0) > given.get("head_dim", 0) and "qk_nope_head_dim" not in own:
            small["head_dim"] = 2 * _HEAD
        return {name: small[name] for name in own}

    def _value(self, name: str, value: Any, given: Mapping[str, Any], depth: Any, layers: list[int]) -> Any:
        if isinstance(value, Mapping):
            if name == "per_layer_config":
                own = {int(layer): part for layer, part in value.items()}
                return {place: self._layer(own[layer], given) for place, layer in enumerate(layers) if layer in own}
            if name in ("rope_parameters", "rope_scaling"):
                return _rope(value, given)
            return value if name in _KEPT else self.settings(value)
        if isinstance(value, list):
            if name in _LAYER_NUMBERS:
                return [place for place, layer in enumerate(layers) if layer in value]
            return [value[layer] for layer in layers] if len(value) == depth and depth > 1 else value
        if value is None and name in _FILLED:
            return _SIZES.get(name, 4)
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        if name in ("head_dim", "global_head_dim") and value and value == given.get("qk_rope_head_dim"):
            return _SIZES["qk_rope_head_dim"]
        if name == "head_dim" and value == given.get("qk_nope_head_dim", -1) + given.get("qk_rope_head_dim", 64):
            return _SIZES["qk_head_dim"]
        if name == "num_heads" and "expand" in given:
            return 2 * _HIDDEN // _HEAD
        if name in _DEPTHS:
            return len(layers)
        if name in _KEY_VALUE_HEADS:
            queries = next((given[key] for key in ("num_attention_heads", "n_head") if key in given), None)
            return min(value, 4 if value == queries else 2)
        if name.endswith(("_token_id", "_token_index", "_token_ids")) and value >= 0:
            if name.startswith(("eos", "bos", "pad", "decoder_start", "forced", "sep", "cls", "mask")):
                return 0
            self._token += 1
            return self._token
        if name in ("first_k_dense_replace", "num_dense_layers", "num_kv_shared_layers", "moe_layer_start_index"):
            return min(value, 1)
        if name in _SIZES:
            return _SIZES[name] if value > 2 or name in ("vocab_size",) else value
        return value


def _rope(value: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of rotary dimensions sum up to half of them."""
    small: dict[str, Any] = {
        name: _rope(part, given) if isinstance(part, Mapping) else part for name, part in value.items()
    }
    sections = small.get("mrope_section")
    half = int(_HEAD * float(small.get("partial_rotary_factor") or 1)) // 2
    if sections and sum(sections) > half:
        rest = half - 2 * (half // 3)
        small["mrope_section"] = [rest, half // 3, half // 3][: len(sections)]
    return small
