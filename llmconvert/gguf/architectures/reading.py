"""From GGUF metadata to ``config.json`` and ``generation_config.json``, as transformers 5 reads them.

Key names: ``gguf.constants.Keys``. What a file leaves out takes llama.cpp's default, not the one of a transformers
config class, which describes one particular model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numpy as np

from llmconvert.errors import CheckpointError, UnsupportedError, one_line
from llmconvert.gguf.architectures.architecture import GgufArchitecture, Reading, Setting
from llmconvert.gguf.header import GgufHeader, Metadata, shown
from llmconvert.gguf.rope import rope_parameters, shortest

__all__ = ["FOREIGN", "build_generation_config", "count_layers", "read_config", "sensible_values"]

# Settings that change what a model computes, which an architecture must name to be read.
_REFUSED: Final = (
    "expert_count",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "attention.output_scale",
    "attention.temperature_scale",
    "attention.temperature_length",
    "attention.key_length_swa",
    "attention.shared_kv_layers",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "nextn_predict_layers",
)
_HEADS: Final = "attention.head_count"
#: What values of any kind, from a file, meet in an architecture's own arithmetic.
FOREIGN: Final = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


def read_config(header: GgufHeader, arch: GgufArchitecture, read_tensor: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """The model's ``config.json``.

    Args:
        header: the file.
        arch: what it holds.
        read_tensor: the float32 values of a stored tensor by GGUF name, for the settings that files keep as tensors.

    Raises:
        CheckpointError: a setting is missing, makes no sense or contradicts another.
        UnsupportedError: a setting that transformers' class of this model cannot express.
    """
    metadata = header.metadata
    _refuse_unknown(header, arch)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{header.path}: has no embedding matrix 'token_embd.weight'; the file is incomplete")
    vocab = embedding.shape[0]
    config: dict[str, Any] = {
        "architectures": [arch.model_class],
        "model_type": arch.read_type or arch.model_type,
        arch.vocabulary: vocab,
    }
    for setting in arch.settings:
        value = _read(metadata, arch.name, setting)
        if value is not None or setting.zero:
            config[setting.name] = value
    if arch.activation:
        config["hidden_act"] = arch.activation
    config |= {
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "dtype": _dominant_dtype(header),
        **_token_ids(metadata, vocab),
    }
    if arch.attention:
        config |= _heads(metadata, arch, config)
    config |= arch.always
    with sensible_values(header, arch):
        return config | dict(arch.read(Reading(header, arch.name, config, read_tensor)))


@contextmanager
def sensible_values(header: GgufHeader, arch: GgufArchitecture) -> Iterator[None]:
    """Where an architecture computes with what a file says: values of any kind end in an error of this package.

    Raises:
        CheckpointError: one is missing, or makes no sense.
    """
    try:
        yield
    except FOREIGN as error:
        raise CheckpointError(
            f"{header.path}: the metadata of {arch.name!r} lacks a value, or has one that makes no sense beside the "
            f"others ({type(error).__name__}: {one_line(error)}); the file is incomplete or corrupt"
        ) from error


def count_layers(header: GgufHeader, arch: GgufArchitecture) -> int:
    """Decoder layers that the metadata promises.

    Raises:
        CheckpointError: none, or more than there are tensors.
    """
    layers = _positive(header.metadata, f"{arch.name}.block_count")
    if layers > len(header.tensors):
        raise CheckpointError(
            f"{header.path}: {arch.name}.block_count is {layers:,}, with {len(header.tensors)} tensors"
        )
    return layers


def build_generation_config(config: Mapping[str, Any], metadata: Metadata) -> dict[str, Any]:
    """The model's ``generation_config.json``: its token ids, generation ending at the end of a turn too."""
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    vocab = config.get("vocab_size", 0)
    valid = list(dict.fromkeys(end for end in ends if isinstance(end, int) and 0 <= end < vocab))
    if len(valid) > 1:
        ids["eos_token_id"] = valid
    return ids


def _refuse_unknown(header: GgufHeader, arch: GgufArchitecture) -> None:
    for key in _REFUSED:
        value = header.metadata.get(f"{arch.name}.{key}")
        if key not in arch.keys and value is not None and (not np.isscalar(value) or value != 0):
            raise UnsupportedError(
                f"{header.path}: {arch.name}.{key} is {shown(value)}; such {arch.name} models are not supported"
            )


def _read(metadata: Metadata, arch: str, setting: Setting) -> Any:
    key = f"{arch}.{setting.key}"
    if setting.kind is bool:
        return metadata.flag(key, bool(setting.default))
    if setting.kind is float:
        value: float = shortest(metadata.number(key, setting.default))
        return None if setting.zero and not value else value
    if setting.zero:
        return metadata.integer(key, 0) or None
    return _positive(metadata, key, setting.default, setting.least)


def _positive(metadata: Metadata, key: str, default: int | None = None, least: int = 1) -> int:
    value = metadata.integer(key, default)
    if value < least:
        raise CheckpointError(f"{metadata.path}: metadata {key} is {value}, expected a positive number")
    return value


def _heads(metadata: Metadata, arch: GgufArchitecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """How many heads there are and how long they are, and positions."""
    name = arch.name
    heads, hidden = _positive(metadata, f"{name}.{_HEADS}"), _positive(metadata, f"{name}.embedding_length")
    head_dim = _positive(metadata, f"{name}.attention.key_length", hidden // heads)
    kv_heads = _positive(metadata, f"{name}.attention.head_count_kv", heads)
    rotary_dim = _positive(metadata, f"{name}.rope.dimension_count", head_dim)
    if heads % kv_heads or (head_dim % 2 and arch.rotary != "none") or rotary_dim > head_dim:
        raise CheckpointError(
            f"{metadata.path}: {heads} heads of {head_dim} with {kv_heads} key-value heads and "
            f"{rotary_dim} rotary dimensions are no attention; the metadata is corrupt"
        )
    value_length = _positive(metadata, f"{name}.attention.value_length", head_dim)
    if value_length != head_dim or (rotary_dim != head_dim and arch.rotary == "all"):
        raise UnsupportedError(
            f"{metadata.path}: heads of {head_dim} with values of {value_length} and {rotary_dim} rotary "
            f"dimensions are not supported for {name}"
        )
    if not arch.stated_heads and head_dim * heads != hidden:
        raise UnsupportedError(f"{metadata.path}: {name} heads of {head_dim} do not add up to {hidden}")
    found: dict[str, Any] = {arch.kv_heads: kv_heads} if arch.kv_heads else {}
    if arch.stated_heads == "always" or (arch.stated_heads and head_dim * heads != hidden):
        found["head_dim"] = head_dim
    if arch.rotary in ("all", "part"):
        found["rope_parameters"] = rope_parameters(metadata, name)
    if arch.rotary == "part":
        found["rope_parameters"] |= {"partial_rotary_factor": rotary_dim / head_dim}
    return found


def _token_ids(metadata: Metadata, vocab: int) -> dict[str, int | None]:
    ids: dict[str, int | None] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        # llama.cpp ignores ids outside the vocabulary; some converters wrote -1, as unsigned, for "none".
        ids[f"{name}_token_id"] = value if isinstance(value, int) and 0 <= value < vocab else None
    return ids


def _dominant_dtype(header: GgufHeader) -> str:
    """The dtype that most of the weights have once read: norms are float32 whatever the matrices are."""
    elements: Counter[str] = Counter()
    names = {"F16": "float16", "BF16": "bfloat16"}
    for tensor in header.tensors.values():
        elements[names.get(tensor.qtype.name, "float32")] += int(np.prod(tensor.shape, dtype=np.float64))
    return elements.most_common(1)[0][0]
