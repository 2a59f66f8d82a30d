"""Tiny seeded GGUF files, written the way llama.cpp's ``convert_hf_to_gguf.py`` does.

Tensor names come from the ``gguf`` package's own table, so the files are an independent reference.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as QType
from support.tiny_models import VOCABULARY, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "llama-wide-heads": {"head_dim": 32},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    # transformers' own loader knows only the class's default head size.
    "qwen3": {"head_dim": 128},
    "phi3": {"num_key_value_heads": 4},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True, "sliding_window": 16},
}
Metadata = dict[str, Any]


@functools.cache
def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A random model of one of :data:`FAMILIES` in float32, its norms and biases random too."""
    model_type = family.split("-")[0]
    settings = {**SIZES, **FAMILIES[family], **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


Stored = np.ndarray | tuple[np.ndarray, QType]


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to the rows of Llama's query and key projections."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def stored_tensors(model: PreTrainedModel) -> dict[str, Stored]:
    """A model's tensors under llama.cpp's names and in its layout, in float32."""
    config = model.config
    arch = "llama" if config.model_type == "mistral" else config.model_type
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), config.num_hidden_layers
    )
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    stored: dict[str, Stored] = {}
    for name, value in state.items():
        stem, _, suffix = name.rpartition(".")
        if arch == "llama" and ".q_proj." in name:
            value = interleave(value, config.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            value = interleave(value, config.num_key_value_heads)
        if arch == "gemma2" and name.endswith("norm.weight"):
            value = value + 1
        stored[f"{names.get_name(stem)}.{suffix}"] = value
    return stored


def model_metadata(model: PreTrainedModel) -> Metadata:
    """The architecture's part of a model's metadata."""
    config = model.config
    arch = "llama" if config.model_type == "mistral" else config.model_type
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    metadata = {
        "general.architecture": arch,
        # Both references look into the name: llama.cpp for phi3, to want its tokens, transformers for mistral.
        "general.name": "mistral" if config.model_type == "mistral" else "tiny",
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        f"{arch}.rope.dimension_count": head_dim,
        f"{arch}.vocab_size": config.vocab_size,
    }
    if arch == "phi3":
        metadata["phi3.rope.scaling.original_context_length"] = config.original_max_position_embeddings
        metadata["phi3.rope.dimension_count"] = int(head_dim * config.rope_parameters["partial_rotary_factor"])
    if arch == "gemma2":
        metadata["gemma2.attention.sliding_window"] = config.sliding_window
        metadata["gemma2.attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        metadata["gemma2.final_logit_softcapping"] = float(config.final_logit_softcapping)
    return metadata


def byte_level_metadata(pre: str = "gpt-2") -> Metadata:
    """:func:`tiny_models.tiny_tokenizer` as metadata."""
    backend = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token.startswith("<|") else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in backend["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": tiny_tokenizer().chat_template,
    }


def write_gguf(
    path: Path,
    metadata: Metadata,
    tensors: Mapping[str, Stored],
    qtype: Callable[[str, np.ndarray], QType] = lambda name, value: QType.F32,
    **split: Any,
) -> Path:
    """Write a GGUF file.

    Args:
        path: where to.
        metadata: Python values; integers become uint32, or int32 when negative.
        tensors: float32 values, or a pair (bytes ``[rows, row bytes]``, type) of ones already quantized.
        qtype: chooses the type of each float32 tensor.
        split: how to split the file, as the package's writer names it.
    """
    writer = gguf.GGUFWriter(path, metadata["general.architecture"], **split)
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        _add(writer, key, value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            raw, kind = value
            writer.add_tensor(name, raw, raw_dtype=kind)
        else:
            kind = qtype(name, value)
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value) if value >= 0 else writer.add_int32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


def tiny_gguf(path: Path, family: str, **changes: Any) -> tuple[Path, PreTrainedModel]:
    """A float32 file of a tiny model with a byte-level tokenizer, and the model."""
    model = tiny_model(family, **changes)
    return write_gguf(path, model_metadata(model) | byte_level_metadata(), stored_tensors(model)), model


def installed_file(package: str, name: str) -> Path | None:
    """A file shipped inside an installed package, found without importing it; None without the package."""
    spec = importlib.util.find_spec(package)
    return Path(next(iter(spec.submodule_search_locations or ()))) / name if spec else None
