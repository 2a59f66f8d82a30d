"""Orders of rows that a GGUF file has otherwise than the checkpoint: of heads, of fused projections, of halves.

Each takes the config and the number of outputs, and gives the checkpoint's output that each row of the file is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llmconvert.gguf.architectures.entries import Config

__all__ = ["Order", "by_group", "by_head", "every_other", "head_dim", "interleaved", "part"]

Order = Callable[[Config, int], np.ndarray]


def head_dim(config: Config) -> int:
    """Dimensions of a head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def interleaved(heads: str) -> Order:
    """Pairs (i, i + half) of each head side by side, as llama.cpp turns those of Llama.

    Args:
        heads: the setting that counts them.
    """

    def order(config: Config, outputs: int) -> np.ndarray:
        count = _count(config, heads)
        rows = np.arange(outputs).reshape(count, 2, outputs // count // 2)
        return rows.swapaxes(1, 2).reshape(-1)

    return order


def by_head(heads: str) -> Order:
    """All queries, all keys, all values, of a projection that has those of each head together (GPT-NeoX, BLOOM)."""

    def order(config: Config, outputs: int) -> np.ndarray:
        count = _count(config, heads)
        return np.arange(outputs).reshape(count, 3, outputs // count // 3).swapaxes(0, 1).reshape(-1)

    return order


def by_group(groups: Callable[[Config], int], size: Callable[[Config], int]) -> Order:
    """All queries, all keys, all values, of a projection that has, for each key-value head, its queries, it and its
    values together (Falcon).

    Args:
        groups: key-value heads.
        size: dimensions of a head.
    """

    def order(config: Config, outputs: int) -> np.ndarray:
        rows = np.arange(outputs).reshape(groups(config), -1, size(config))
        return np.concatenate([rows[:, :-2].reshape(-1), rows[:, -2].reshape(-1), rows[:, -1].reshape(-1)])

    return order


def part(index: int, count: int) -> Order:
    """One of as many equal parts, one behind the other."""

    def order(config: Config, outputs: int) -> np.ndarray:
        size = outputs // count
        return np.arange(index * size, (index + 1) * size)

    return order


def every_other(first: int) -> Order:
    """One of two halves that come in turns."""

    def order(config: Config, outputs: int) -> np.ndarray:
        return np.arange(first, outputs, 2)

    return order


def _count(config: Config, name: str) -> int:
    value: Any = config.get(name)
    return int(value or config["num_attention_heads"])
