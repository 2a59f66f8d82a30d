"""A checkpoint seen with fewer key-value heads, layer by layer as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from llmconvert.convert.gqa.geometry import AttentionGeometry, read_geometry, require_kv_heads
from llmconvert.convert.gqa.merging.layer import MergedLayer, Method, merge_layer
from llmconvert.convert.gqa.weights import attention_tensors, layer_tensors, read_layer
from llmconvert.engine.architecture.config import with_kv_heads
from llmconvert.storage.checkpoint import Checkpoint, CheckpointView

__all__ = ["MergedAttention"]


class MergedAttention(CheckpointView):
    """``base`` with its attention merged from the weights alone: every input direction counts the same.

    Args:
        base: dense weights.
        kv_heads: key-value heads per layer that remain.
        method: see :func:`~llmconvert.convert.gqa.merging.layer.merge_layer`.

    Raises:
        UnsupportedError: an architecture or a number of heads that can't be merged.
        CheckpointError: tensors are missing or contradict the config.
    """

    def __init__(self, base: Checkpoint, kv_heads: int, method: Method = "svd") -> None:
        super().__init__(base)
        self.geometry = read_geometry(base)
        require_kv_heads(self.geometry, kv_heads)
        self.kv_heads = kv_heads
        self.method: Method = method
        self.config = with_kv_heads(base.config, kv_heads)
        self._layer_of = {
            name: layer
            for layer in range(self.geometry.layers)
            for name in attention_tensors(base, self.geometry, layer)
        }
        gone = _gone(self.geometry, kv_heads)
        self.infos = {
            name: replace(info, shape=_merged_shape(self.geometry, kv_heads, name, info.shape))
            if name in self._layer_of
            else info
            for name, info in base.infos.items()
            if name not in gone
        }
        self._current: tuple[int, MergedLayer] | None = None
        self._tensors: Mapping[str, torch.Tensor] | None = None

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        layer = self._layer_of.get(name)
        if layer is None:
            return self.base.read_rows(name, start, stop)
        self.merge(layer)
        assert self._tensors is not None
        return self._tensors[name][start:stop].clone()

    def merge(self, layer: int) -> MergedLayer:
        """How ``layer`` is merged; the last one asked for is kept."""
        if self._current is not None and self._current[0] == layer:
            return self._current[1]
        weights = read_layer(self.base, self.geometry, layer)
        moments = torch.eye(weights.key.shape[-1], dtype=weights.key.dtype)
        merged = merge_layer(
            weights,
            moments,
            self.kv_heads,
            method=self.method,
            rotary=self.geometry.rotary[layer],
            norm=self.geometry.norm,
            movable=self.geometry.movable,
        )
        self._tensors = layer_tensors(self.base, self.geometry, layer, merged.weights)
        self._current = layer, merged
        return merged


def _gone(geometry: AttentionGeometry, kv_heads: int) -> frozenset[str]:
    """Tensors that have no successor: norms of single heads."""
    stems = (stem for names in geometry.projections for stem in names.key_norm[kv_heads:])
    return frozenset(f"{stem}.weight" for stem in stems)


def _merged_shape(geometry: AttentionGeometry, kv_heads: int, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of an attention tensor after the merge: key and value lose rows, wherever they are."""
    stem = name.rpartition(".")[0]
    if any(stem in p.key_norm for p in geometry.projections):
        own = geometry.norm is not None and geometry.norm.weights == "own"
        return (shape[0] * kv_heads // geometry.kv_heads, *shape[1:]) if own else shape
    if any(stem in p.query_norm for p in geometry.projections):
        return shape
    projections = next(p for p in geometry.projections if stem in (p.query, p.key, p.value, p.output))
    fewer = (geometry.kv_heads - kv_heads) * geometry.head_dim
    if stem == projections.output or (stem == projections.query and geometry.fusion == "separate"):
        return shape
    parts = 2 if geometry.fusion != "separate" else 1
    return (shape[0] - parts * fewer, *shape[1:])
