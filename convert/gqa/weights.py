"""A layer's attention weights by head, out of a checkpoint's tensors and back into them.

A bias is one more column of its weight, for an input that is always one; then everything said about weights holds
for biases too. The output projection's bias stands outside and never changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llmconvert.convert.gqa.geometry import AttentionGeometry
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["LayerWeights", "attention_tensors", "layer_tensors", "read_layer"]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The weights of one attention layer; query heads stand in the order of the key-value heads that they use.

    Attributes:
        query: ``[heads, head_dim, inputs]``; inputs is the hidden size, plus one if any projection has a bias.
        key: ``[kv_heads, head_dim, inputs]``.
        value: like ``key``.
        output: ``[heads, hidden size, head_dim]``.
        query_norm: what the norm multiplies normalized queries with, ``[heads, head_dim]``; None without a norm.
        key_norm: likewise, ``[kv_heads, head_dim]``.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None

    @property
    def kv_heads(self) -> int:
        return self.key.shape[0]

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one key-value head."""
        return self.query.shape[0] // self.key.shape[0]

    def to(self, device: torch.device, dtype: torch.dtype) -> LayerWeights:
        """The same in another place and precision."""
        parts = (self.query, self.key, self.value, self.output, self.query_norm, self.key_norm)
        moved = (part.to(device, dtype) if part is not None else None for part in parts)
        return LayerWeights(*moved)  # type: ignore[arg-type]


def attention_tensors(checkpoint: Checkpoint, geometry: AttentionGeometry, layer: int) -> list[str]:
    """Names of the tensors that :func:`layer_tensors` gives for ``layer``."""
    names = geometry.projections[layer]
    stems = dict.fromkeys((names.query, names.key, names.value))
    inputs = [f"{stem}.{leaf}" for stem in stems for leaf in ("weight", "bias") if f"{stem}.{leaf}" in checkpoint]
    norms = [f"{stem}.weight" for stem in (*names.query_norm, *names.key_norm) if _owned(geometry)]
    return [*inputs, f"{names.output}.weight", *norms]


def _owned(geometry: AttentionGeometry) -> bool:
    """Whether every head has norm weights of its own; weights that heads share stay as they are."""
    return geometry.norm is not None and geometry.norm.weights != "shared"


def read_layer(
    checkpoint: Checkpoint, geometry: AttentionGeometry, layer: int, dtype: torch.dtype = torch.float64
) -> LayerWeights:
    """The attention weights of ``layer`` in ``dtype``, on the CPU."""
    names = geometry.projections[layer]
    stems = dict.fromkeys((names.query, names.key, names.value))
    biased = any(f"{stem}.bias" in checkpoint for stem in stems)

    def rows(stem: str) -> torch.Tensor:
        weight = checkpoint[f"{stem}.weight"].to(dtype)
        if not biased:
            return weight
        bias = checkpoint[f"{stem}.bias"].to(dtype) if f"{stem}.bias" in checkpoint else weight.new_zeros(len(weight))
        return torch.cat([weight, bias[:, None]], dim=1)

    query, key, value = split_rows(geometry, geometry.kv_heads, {stem: rows(stem) for stem in stems}, layer)
    output = checkpoint[f"{names.output}.weight"].to(dtype)
    by_head = output.view(geometry.hidden_size, geometry.query_heads, geometry.head_dim).permute(1, 0, 2)
    norms = (
        _norm_weights(checkpoint, geometry, stems, heads, dtype)
        for stems, heads in ((names.query_norm, geometry.query_heads), (names.key_norm, geometry.kv_heads))
    )
    return LayerWeights(query, key, value, by_head, *norms)


def _norm_weights(
    checkpoint: Checkpoint, geometry: AttentionGeometry, stems: tuple[str, ...], heads: int, dtype: torch.dtype
) -> torch.Tensor | None:
    if geometry.norm is None:
        return None
    if not stems:
        return torch.ones(heads, geometry.head_dim, dtype=dtype)
    stored = torch.cat([checkpoint[f"{stem}.weight"].to(dtype).flatten() for stem in stems])
    return (stored + geometry.norm.offset).view(-1, geometry.head_dim).expand(heads, -1)


def split_rows(
    geometry: AttentionGeometry, kv_heads: int, rows: Mapping[str, torch.Tensor], layer: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value by head, ``[heads, head_dim, inputs]``, from the rows of the tensors that hold them."""
    names, dim = geometry.projections[layer], geometry.head_dim
    if geometry.fusion == "separate":
        query, key, value = rows[names.query], rows[names.key], rows[names.value]
    elif geometry.fusion == "stacked":
        counts = [count * dim for count in (geometry.query_heads, kv_heads, kv_heads)]
        query, key, value = rows[names.query].split(counts)
    else:
        fused = rows[names.query]
        groups = fused.view(kv_heads, -1, dim, fused.shape[-1])
        query, key, value = groups[:, :-2], groups[:, -2], groups[:, -1]
    width = query.shape[-1]
    return query.reshape(-1, dim, width), key.reshape(-1, dim, width), value.reshape(-1, dim, width)


def layer_tensors(
    checkpoint: Checkpoint, geometry: AttentionGeometry, layer: int, weights: LayerWeights
) -> dict[str, torch.Tensor]:
    """The tensors that hold ``weights``, by their names in the checkpoint and in its dtypes."""
    names = geometry.projections[layer]
    query, key, value = (part.flatten(0, 1) for part in (weights.query, weights.key, weights.value))
    if geometry.fusion == "separate":
        rows = {names.query: query, names.key: key, names.value: value}
    elif geometry.fusion == "stacked":
        rows = {names.query: torch.cat([query, key, value])}
    else:
        groups = weights.query.view(weights.kv_heads, -1, *weights.query.shape[1:])
        fused = torch.cat([groups, weights.key[:, None], weights.value[:, None]], dim=1)
        rows = {names.query: fused.flatten(0, 2)}
    tensors: dict[str, torch.Tensor] = {}
    for stem, matrix in rows.items():
        tensors[f"{stem}.weight"] = matrix[:, : geometry.hidden_size]
        if f"{stem}.bias" in checkpoint:
            tensors[f"{stem}.bias"] = matrix[:, geometry.hidden_size]
    tensors[f"{names.output}.weight"] = weights.output.permute(1, 0, 2).flatten(1)
    stored = {name: tensor.to(checkpoint.infos[name].dtype).contiguous() for name, tensor in tensors.items()}
    if _owned(geometry):
        stored.update(_norm_tensors(checkpoint, geometry, names.query_norm, weights.query_norm))
        stored.update(_norm_tensors(checkpoint, geometry, names.key_norm, weights.key_norm))
    return stored


def _norm_tensors(
    checkpoint: Checkpoint, geometry: AttentionGeometry, stems: tuple[str, ...], weights: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    assert geometry.norm is not None and weights is not None
    info = checkpoint.infos[f"{stems[0]}.weight"]
    stored = (weights - geometry.norm.offset).to(info.dtype).contiguous()
    if geometry.norm.weights == "modules":  # one for each head that is left
        return {f"{stem}.weight": row.clone() for stem, row in zip(stems, stored, strict=False)}
    return {info.name: stored.flatten() if len(info.shape) == 1 else stored}
