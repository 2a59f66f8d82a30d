"""A tiny model of any causal language model that transformers knows, from one table of small sizes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

__all__ = ["STREAMED", "save_tiny"]

_NAMES = """
apertus arcee bamba beam bert bitnet bloom camembert codegen cohere cohere2 cwm data2vec-text diffllama doge
ernie ernie4_5 exaone4 falcon falcon_h1 falcon_mamba gemma gemma2 gemma3_text gemma4_text gemma4_unified_text
glm glm4 gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gptj granite granite_swa helium hunyuan_v1_dense
hyperclovax internlm3 iquestcoder jais2 lfm2 lfm3 llama llama4_text mamba mamba2 ministral ministral3 mistral
modernbert-decoder moshi mpt nanochat nemotron olmo olmo2 olmo3 opt persimmon phi phi3 qwen2 qwen3
qwen3_5_text recurrent_gemma roberta rwkv seed_oss smollm3 stablelm starcoder2 trocr vaultgemma xglm
xlm-roberta xlm-roberta-xl xlstm
"""
#: Model types whose streamed logits are the resident model's, bit for bit.
STREAMED: tuple[str, ...] = tuple(_NAMES.split())

_SMALL: Mapping[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "attention_hidden_size": 64,
    "word_embed_proj_dim": 64,
    "lru_width": 64,
    "num_hidden_layers": 3,
    "n_layer": 3,
    "n_layers": 3,
    "decoder_layers": 3,
    "encoder_layers": 1,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "moe_intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128,
    # State spaces.
    "expand": 2,
    "mamba_expand": 2,
    "num_heads": 8,
    "mamba_num_heads": 8,
    "mamba_n_heads": 8,
    "mamba_head_dim": 16,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "state_size": 16,
    "mamba_d_state": 16,
    "n_groups": 1,
    "mamba_n_groups": 1,
    "conv_kernel": 4,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "time_step_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def save_tiny(directory: Path, model_type: str) -> Path:
    """Save a random model of that type, with sizes of the table wherever its config has them; returns ``directory``."""
    kind: type[PretrainedConfig] = CONFIG_MAPPING[model_type]
    names = set(kind().to_dict()) | set(kind.attribute_map)
    # A setting with two names is given under its own.
    given = {
        name: value for name, value in _SMALL.items() if name in names and kind.attribute_map.get(name) not in _SMALL
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(kind(**given), dtype=torch.float32).save_pretrained(directory)
    return directory
