"""Models whose key-value heads are redundant, with the redundancy hidden behind every symmetry attention has.

A small model's key-value heads are each written down several times; then every copy is transformed by a random
invertible matrix (values), random complex numbers per frequency (rotated keys) or another random matrix (keys that are
not rotated), the queries and output columns so that nothing changes, and the heads are shuffled. Norms leave keys fewer
ways to hide: signs and sizes, where weights are even turns, where heads have weights of their own what these can take
back. The model computes what it computed before, and a merge must find its way back.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from support.tiny_architectures import VOCABULARY
from transformers import AutoConfig, AutoModelForCausalLM

from llmconvert.convert.gqa.geometry import AttentionGeometry, Projections, Rotary, read_geometry
from llmconvert.convert.gqa.weights import LayerWeights, attention_tensors, layer_tensors, read_layer
from llmconvert.engine.architecture.config import with_kv_heads
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.storage.directory import SINGLE_NAME
from llmconvert.storage.writer import write_json

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
            weights = _transform(weights, geometry, layer, copies, generator)
            if geometry.movable:
                weights = _shuffle(weights, generator)
            wide = replace(geometry, kv_heads=geometry.kv_heads * copies, projections=_named(geometry, copies))
            tensors.update(layer_tensors(checkpoint, wide, layer, weights))
            assert set(attention_tensors(checkpoint, geometry, layer)) <= set(tensors)
        save_file(tensors, directory / SINGLE_NAME, metadata={"format": "pt"})
        config = with_kv_heads(checkpoint.config, geometry.kv_heads * copies)
        if geometry.multi_query_only and copies > 1:
            config["multi_query"] = False
        write_json(directory / "config.json", config)
    return directory


def logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    """What transformers computes, in float64."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the grouped matrix products know no float64
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return result


def random_layer(kv_heads: int = 4, ratio: int = 2, dim: int = 4, inputs: int = 12, seed: int = 0) -> LayerWeights:
    """A layer in float64 whose heads have nothing in common."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    heads = kv_heads * ratio
    return LayerWeights(
        normal(heads, dim, inputs), normal(kv_heads, dim, inputs), normal(kv_heads, dim, inputs), normal(heads, 10, dim)
    )


def _named(geometry: AttentionGeometry, copies: int) -> tuple[Projections, ...]:
    """Projections with a norm for every copy, where heads have modules of their own."""
    if geometry.norm is None or geometry.norm.weights != "modules":
        return geometry.projections
    heads = range(geometry.kv_heads * copies)
    stems = [names.key_norm[0].removesuffix(".0") for names in geometry.projections]
    return tuple(
        replace(names, key_norm=tuple(f"{stem}.{head}" for head in heads))
        for names, stem in zip(geometry.projections, stems, strict=True)
    )


def _repeat(weights: LayerWeights, copies: int) -> LayerWeights:
    key, value = weights.key.repeat_interleave(copies, 0), weights.value.repeat_interleave(copies, 0)
    norm = weights.key_norm.repeat_interleave(copies, 0) if weights.key_norm is not None else None
    return replace(weights, key=key, value=value, key_norm=norm)


def _transform(
    weights: LayerWeights, geometry: AttentionGeometry, layer: int, copies: int, generator: torch.Generator
) -> LayerWeights:
    rotary, ratio = geometry.rotary[layer], weights.queries_per_kv
    query, key, value = weights.query.clone(), weights.key.clone(), weights.value.clone()
    output = weights.output.clone()
    norms = [norm.clone() if norm is not None else None for norm in (weights.query_norm, weights.key_norm)]
    hidden = replace(weights, query=query, key=key, value=value, output=output, query_norm=norms[0], key_norm=norms[1])
    shares = torch.rand(weights.kv_heads, geometry.head_dim // 2, generator=generator, dtype=torch.float64) + 0.5
    shares = shares.unflatten(0, (-1, copies))
    shares = (shares / shares.square().mean(1, keepdim=True).sqrt()).flatten(0, 1)
    for head in range(weights.kv_heads):
        users = slice(head * ratio, (head + 1) * ratio)
        matrix = _invertible(geometry.head_dim, generator)
        value[head] = matrix @ value[head]
        output[users] = output[users] @ torch.linalg.inv(matrix)
        if geometry.norm is None:
            matrix = _commuting(rotary, geometry.head_dim, generator)
            key[head] = matrix @ key[head]
            query[users] = torch.linalg.inv(matrix).T @ query[users]
        elif geometry.norm.scope == "layer":
            _hide_from_layer_norm(hidden, rotary, head, users, shares[head], generator)
        elif geometry.norm.weights == "shared":
            _hide_from_head_norm(hidden, rotary, head, users, generator)
        else:
            _hide_from_own_norm(hidden, rotary, head, users, generator)
    return hidden


def _pairs(rotary: Rotary) -> list[tuple[int, int]]:
    half = rotary.dims // 2
    return [(pair, pair + half) if rotary.pairing == "half" else (2 * pair, 2 * pair + 1) for pair in range(half)]


def _hide_from_layer_norm(
    weights: LayerWeights, rotary: Rotary, head: int, users: slice, shares: torch.Tensor, generator: torch.Generator
) -> None:
    """Quarter turns, sizes that the copies' sum does not show, and factors that norm weights take back."""
    assert weights.key_norm is not None and weights.query_norm is not None
    for (first, second), share in zip(_pairs(rotary), shares, strict=True):
        pair = [first, second]
        quarter = torch.linalg.matrix_power(
            torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64),
            int(torch.randint(4, (), generator=generator)),
        )
        factor = 0.5 + torch.rand((), generator=generator, dtype=torch.float64)
        weights.key[head, pair] = quarter @ weights.key[head, pair] * share
        weights.query[users, first : second + 1 : second - first] = quarter @ weights.query[users][:, pair]
        weights.key_norm[head, pair] = quarter.abs() @ weights.key_norm[head, pair] * factor / share
        weights.query_norm[users, first : second + 1 : second - first] = (
            weights.query_norm[users][:, pair] @ quarter.abs().T / factor
        )


def _hide_from_head_norm(
    weights: LayerWeights, rotary: Rotary, head: int, users: slice, generator: torch.Generator
) -> None:
    """A size, a sign per pair and per dimension that is not rotated, a turn where the pair's weights are the same."""
    assert weights.key_norm is not None and weights.query_norm is not None
    dim = weights.key.shape[1]
    matrix = torch.diag(torch.randint(2, (dim,), generator=generator, dtype=torch.float64) * 2 - 1)
    for pair in _pairs(rotary):
        even = all(norm[0, pair[0]].abs() == norm[0, pair[1]].abs() for norm in (weights.key_norm, weights.query_norm))
        angle = 6.28 * torch.rand((), generator=generator, dtype=torch.float64) if even else matrix[pair[0], pair[0]]
        cosine, sine = (angle.cos(), angle.sin()) if even else (angle, torch.zeros_like(angle))
        matrix[pair[0], pair[0]] = matrix[pair[1], pair[1]] = cosine
        matrix[pair[1], pair[0]], matrix[pair[0], pair[1]] = sine, -sine
    size = 0.5 + torch.rand((), generator=generator, dtype=torch.float64)
    weights.key[head] = size * matrix @ weights.key[head]
    weights.query[users] = matrix @ weights.query[users] / size


def _hide_from_own_norm(
    weights: LayerWeights, rotary: Rotary, head: int, users: slice, generator: torch.Generator
) -> None:
    """A sign, a size, a mean that is subtracted, and factors that the norm weights of queries take back."""
    assert weights.key_norm is not None and weights.query_norm is not None
    dim, inputs = weights.key.shape[1:]
    sign = 1.0 if torch.rand((), generator=generator) < 0.5 else -1.0
    size = 0.5 + torch.rand((), generator=generator, dtype=torch.float64)
    mean = torch.randn(inputs, generator=generator, dtype=torch.float64)
    factors = 0.5 + torch.rand(dim, generator=generator, dtype=torch.float64)
    for first, second in _pairs(rotary):
        factors[second] = factors[first]
    weights.key[head] = sign * size * weights.key[head] + mean
    weights.query[users] = weights.query[users] / size - mean
    weights.key_norm[head] = weights.key_norm[head] * factors
    weights.query_norm[users] = sign * weights.query_norm[users] / factors


def _shuffle(weights: LayerWeights, generator: torch.Generator) -> LayerWeights:
    order = torch.randperm(weights.kv_heads, generator=generator)
    ratio = weights.queries_per_kv
    users = (order[:, None] * ratio + torch.arange(ratio)).flatten()
    return LayerWeights(
        weights.query[users],
        weights.key[order],
        weights.value[order],
        weights.output[users],
        weights.query_norm[users] if weights.query_norm is not None else None,
        weights.key_norm[order] if weights.key_norm is not None else None,
    )


def _invertible(size: int, generator: torch.Generator) -> torch.Tensor:
    """A random matrix of condition 9."""
    left, right = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0] for _ in range(2)
    )
    return left @ torch.diag(torch.linspace(1 / 3, 3, size, dtype=torch.float64)) @ right


def _commuting(rotary: Rotary, head_dim: int, generator: torch.Generator) -> torch.Tensor:
    """A random matrix that commutes with the rotation: a scaled turn per pair, anything on what is not rotated."""
    matrix = torch.zeros(head_dim, head_dim, dtype=torch.float64)
    for first, second in _pairs(rotary):
        angle = 6.28 * torch.rand((), generator=generator, dtype=torch.float64)
        size = 0.5 + torch.rand((), generator=generator, dtype=torch.float64)
        matrix[first, first] = matrix[second, second] = size * angle.cos()
        matrix[second, first], matrix[first, second] = size * angle.sin(), -size * angle.sin()
    rest = head_dim - rotary.dims
    if rest:
        matrix[rotary.dims :, rotary.dims :] = _invertible(rest, generator)
    return matrix
