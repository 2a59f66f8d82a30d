"""Models whose key-value heads are redundant, with the redundancy hidden behind every symmetry attention has.

A small model's key-value heads are each written down several times; then every copy is transformed by a random
invertible matrix (values), random complex numbers per frequency (rotated keys), another random matrix (keys that are
not rotated) or a random sign (normalized keys), the queries and output columns so that nothing changes, and the
heads are shuffled. The model computes what it computed before, and a merge must find its way back.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_architectures import VOCABULARY
from transformers import AutoConfig, AutoModelForCausalLM

from llmconvert.checkpoint import SINGLE_NAME, SafetensorsCheckpoint
from llmconvert.convert.attention import AttentionGeometry, Rotary, read_geometry
from llmconvert.convert.attention_weights import (
    LayerWeights,
    attention_tensors,
    config_with_kv_heads,
    layer_tensors,
    read_layer,
)
from llmconvert.writer import write_json

SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def grouped_model(directory: Path, model_type: str, *, kv_heads: int = 2, seed: int = 0, **config: object) -> Path:
    """Save a tiny model, every parameter random, with ``kv_heads`` key-value heads for its 8 query heads."""
    settings = AutoConfig.for_model(model_type, **{**SHARED, "num_key_value_heads": kv_heads, **config})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(directory)
    return directory


def disguise(source: Path, directory: Path, copies: int, *, seed: int = 1) -> Path:
    """Write the model in ``source`` with ``copies`` disguised copies of each of its key-value heads."""
    generator = torch.Generator().manual_seed(seed)
    directory.mkdir()
    with SafetensorsCheckpoint(source) as checkpoint:
        geometry = read_geometry(checkpoint)
        tensors = dict(checkpoint)
        for layer in range(geometry.layers):
            weights = _repeat(read_layer(checkpoint, geometry, layer), copies)
            weights = _transform(weights, geometry, layer, generator)
            if geometry.movable:
                weights = _shuffle(weights, generator)
            wide = replace(geometry, kv_heads=geometry.kv_heads * copies)
            tensors.update(layer_tensors(checkpoint, wide, layer, weights))
            assert set(attention_tensors(checkpoint, geometry, layer)) <= set(tensors)
        save_file(tensors, directory / SINGLE_NAME, metadata={"format": "pt"})
        config = config_with_kv_heads(checkpoint.config, geometry.kv_heads * copies)
        if config.get("multi_query") and copies > 1 and not config.get("new_decoder_architecture"):
            config["multi_query"] = False
        write_json(directory / "config.json", config)
    return directory


def logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    """What transformers computes, in float64."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return result


def _repeat(weights: LayerWeights, copies: int) -> LayerWeights:
    return replace(
        weights, key=weights.key.repeat_interleave(copies, 0), value=weights.value.repeat_interleave(copies, 0)
    )


def _transform(
    weights: LayerWeights, geometry: AttentionGeometry, layer: int, generator: torch.Generator
) -> LayerWeights:
    rotary, ratio = geometry.rotary[layer], weights.queries_per_kv
    query, key, value = weights.query.clone(), weights.key.clone(), weights.value.clone()
    output = weights.output.clone()
    for head in range(weights.kv_heads):
        users = slice(head * ratio, (head + 1) * ratio)
        matrix = _invertible(geometry.head_dim, generator)
        value[head] = matrix @ value[head]
        output[users] = output[users] @ torch.linalg.inv(matrix)
        if geometry.head_norm:
            sign = 1.0 if torch.rand((), generator=generator) < 0.5 else -1.0
            key[head], query[users] = sign * key[head], sign * query[users]
        else:
            matrix = _commuting(rotary, geometry.head_dim, generator)
            key[head] = matrix @ key[head]
            query[users] = torch.linalg.inv(matrix).T @ query[users]
    return LayerWeights(query, key, value, output)


def _shuffle(weights: LayerWeights, generator: torch.Generator) -> LayerWeights:
    order = torch.randperm(weights.kv_heads, generator=generator)
    ratio = weights.queries_per_kv
    users = (order[:, None] * ratio + torch.arange(ratio)).flatten()
    return LayerWeights(weights.query[users], weights.key[order], weights.value[order], weights.output[users])


def _invertible(size: int, generator: torch.Generator) -> torch.Tensor:
    """A random matrix of condition 9."""
    left, right = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0] for _ in range(2)
    )
    return left @ torch.diag(torch.linspace(1 / 3, 3, size, dtype=torch.float64)) @ right


def _commuting(rotary: Rotary, head_dim: int, generator: torch.Generator) -> torch.Tensor:
    """A random matrix that commutes with the rotation: a scaled turn per pair, anything on what is not rotated."""
    matrix = torch.zeros(head_dim, head_dim, dtype=torch.float64)
    half = rotary.dims // 2
    for pair in range(half):
        first, second = (pair, pair + half) if rotary.pairing == "half" else (2 * pair, 2 * pair + 1)
        angle = 6.28 * torch.rand((), generator=generator, dtype=torch.float64)
        size = 0.5 + torch.rand((), generator=generator, dtype=torch.float64)
        matrix[first, first] = matrix[second, second] = size * angle.cos()
        matrix[second, first], matrix[first, second] = size * angle.sin(), -size * angle.sin()
    rest = head_dim - rotary.dims
    if rest:
        matrix[rotary.dims :, rotary.dims :] = _invertible(rest, generator)
    return matrix
