"""What the key-value cache holds: its size by context, batch and dtype, from the config alone.

A layer caches keys and values for every token of the context (full attention), for the last ``window - 1`` of them
(sliding window, as transformers keeps it: the newest token brings its own), a compressed latent (MLA, DeepSeek-V2,
arXiv 2405.04434; what a runtime with its kernels keeps, transformers expands it), or nothing that grows (linear
attention).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["CacheLayer", "CacheLayout", "cache_layout", "kv_head_count"]


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

    def longest_context(self, nbytes: int, batch: int = 1, itemsize: int = 2, limit: int = 1 << 24) -> int:
        """The longest context whose cache fits ``nbytes``; 0 if not even one token does, ``limit`` at most."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            if self.nbytes(middle, batch, itemsize) <= nbytes:
                low = middle
            else:
                high = middle - 1
        return low


def cache_layout(config: Any, kv_heads: int | None = None) -> CacheLayout:
    """The layout of a transformers config (of the language model).

    Args:
        kv_heads: another number of key-value heads than the config's, for what would be.
    """
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    layers = int(config.num_hidden_layers)
    shared = int(getattr(config, "num_kv_shared_layers", 0) or 0)
    rank = getattr(config, "kv_lora_rank", None)
    values = int(rank + config.qk_rope_head_dim) if rank else 2 * (kv_heads or kv_head_count(config)) * width
    kinds: Sequence[str] = getattr(config, "layer_types", None) or _uniform(config, layers)
    return CacheLayout(tuple(_layer(kind, values, config) for kind in kinds[: layers - shared]))


def kv_head_count(config: Any) -> int:
    """Key-value heads per layer, under whichever name the architecture has for them."""
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        return 1 if config.multi_query else int(config.num_attention_heads)
    if config.model_type == "gpt_bigcode":
        return 1 if config.multi_query else int(config.num_attention_heads)
    found = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    return int(found or config.num_attention_heads)


def _uniform(config: Any, layers: int) -> list[str]:
    window = getattr(config, "sliding_window", None)
    sliding = window and getattr(config, "use_sliding_window", True) is not False
    return ["sliding_attention" if sliding else "full_attention"] * layers


def _layer(kind: str, values: int, config: Any) -> CacheLayer:
    if kind in ("sliding_attention", "chunked_attention"):
        window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
        return CacheLayer(values, int(window) - 1 if window else None)
    grows = kind.endswith("attention") and not kind.startswith("linear")
    return CacheLayer(values if grows else 0)
