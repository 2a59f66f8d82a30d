"""KV cache size by context, batch and dtype, from the config alone: grouped, latent (MLA) and sliding-window attention.

A layer caches keys and values for every token of the context (full attention), for the last ``window - 1`` of them
(sliding window, as transformers keeps it: the newest token brings its own), a compressed latent (MLA, DeepSeek-V2,
arXiv 2405.04434; what a runtime with its kernels keeps, transformers expands it), or nothing that grows with
the text (linear attention, attention to images).
"""

from __future__ import annotations

from dataclasses import dataclass

from llmconvert.engine.architecture.decoder import Architecture

__all__ = ["CacheLayer", "CacheLayout", "cache_layout"]


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """One layer: numbers cached per token, and the most tokens it keeps (None: all)."""

    values: int
    tokens: int | None = None

    def kept(self, context: int) -> int:
        """Tokens in the cache after ``context`` tokens."""
        return context if self.tokens is None else min(context, self.tokens)


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """The caches of all layers, in order."""

    layers: tuple[CacheLayer, ...]

    def nbytes(self, context: int, batch: int = 1, itemsize: int = 2) -> int:
        """Bytes after ``context`` tokens in each of ``batch`` sequences."""
        return batch * itemsize * sum(layer.values * layer.kept(context) for layer in self.layers)

    def bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes that a token adds while no sliding window is full."""
        return itemsize * sum(layer.values for layer in self.layers)


def cache_layout(architecture: Architecture, kv_heads: int | None = None) -> CacheLayout:
    """The layout of a decoder's cache; without attention it is empty.

    Args:
        kv_heads: another number of key-value heads than the config's, for what would be.
    """
    if not architecture.has_attention:
        return CacheLayout(())
    kinds = architecture.layer_kinds[: architecture.caching_layers]
    return CacheLayout(tuple(_layer(architecture.layer(index), kind, kv_heads) for index, kind in enumerate(kinds)))


def _layer(architecture: Architecture, kind: str, kv_heads: int | None) -> CacheLayer:
    values = architecture.latent_size or 2 * (kv_heads or architecture.kv_heads) * architecture.head_dim
    grows = kind.endswith("attention") and not kind.startswith(("linear", "cross"))
    reach = architecture.reach(kind)
    return CacheLayer(values if grows else 0, None if reach is None else reach - 1)
