"""Causal attention that is learned through on a processor: flash attention forward, its gradients in tiles of queries.

A tile's probabilities are made again from its scores, as in flash attention's own backward pass (Dao et al. 2022, arXiv
2205.14135), so that none are kept. torch's kernel does it in pieces of 32 keys that cost more to lay out than to
multiply, and sees keys repeated for every query head that reads them. Here heads that share keys are the rows of one
matrix, and what they say of a key is summed in float32. Scores are rounded to 16 bits, as in a model that attends
``eager``, and normalized as they were rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = ["attend", "rows_of_tile"]

_TILE_QUERIES = 128
# Scores of a tile, of all heads; they should stay close to the processor.
_TILE_SCORES = 1 << 21


def rows_of_tile(heads: int, length: int) -> int:
    """How many queries are taken at a time."""
    return max(1, min(_TILE_QUERIES, _TILE_SCORES // (heads * length)))


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Causal attention that gradients pass through.

    Args:
        query: ``[batch, heads, length, head size]``, on a CPU.
        key, value: ``[batch, key heads, length, head size]`` of the same dtype; query heads share them in order.
        scaling: of the scores.

    Returns:
        ``[batch, heads, length, head size]``.
    """
    attended: torch.Tensor = _Attention.apply(query, key, value, scaling)
    return attended


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        shared = query.shape[1] // key.shape[1]
        keys, values = (part if shared == 1 else part.repeat_interleave(shared, 1) for part in (key, value))
        ctx.save_for_backward(query, key, value)
        ctx.scaling = scaling
        return functional.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        query, key, value = ctx.saved_tensors
        _, heads, length, size = query.shape
        # Of every key head: the queries that read it, as ``[heads, length, …]``.
        groups = key.shape[0] * key.shape[1]
        queries, slopes = (part.reshape(groups, -1, length, size) for part in (query, gradient))
        keys, values = (part.reshape(groups, length, size) for part in (key, value))
        of_queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
        of_keys, of_values = (torch.zeros((groups, length, size)) for _ in range(2))
        rows = rows_of_tile(heads, length)
        later = torch.full((rows, rows), -torch.inf).triu_(1)
        for start in range(0, length, rows):
            end = min(start + rows, length)
            some, slope = (part[:, :, start:end].reshape(groups, -1, size) for part in (queries, slopes))
            shape = (groups, -1, end - start, end)
            scores = torch.bmm(some, keys[:, :end].mT).float().view(shape).mul_(ctx.scaling)
            scores[..., start:] += later[: end - start, : end - start]
            shares = scores.softmax(-1)
            moved = torch.bmm(slope, values[:, :end].mT).float().view(shape)
            moved = torch._softmax_backward_data(moved, shares, -1, torch.float32).mul_(ctx.scaling)
            shares, moved = (part.to(query.dtype).view(groups, -1, end) for part in (shares, moved))
            of_values[:, :end] += torch.bmm(shares.mT, slope)
            of_keys[:, :end] += torch.bmm(moved.mT, some)
            of_queries[:, :, start:end] = torch.bmm(moved, keys[:, :end]).view(groups, -1, end - start, size)
        return (
            of_queries.view_as(query),
            of_keys.to(key.dtype).view_as(key),
            of_values.to(value.dtype).view_as(value),
            None,
        )
