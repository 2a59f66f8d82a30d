"""Merging the keys of a layer whose queries and keys are not normalized: rotary frequencies and the rest apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from llmconvert.convert.gqa.geometry import Rotary
from llmconvert.convert.gqa.merging.svd import Merge, merge_rotary, merge_subspace
from llmconvert.convert.gqa.weights import LayerWeights

__all__ = ["KeyMerge", "Keys", "PlainKeys", "join_pairs", "nonzero", "split_pairs"]


@dataclass(frozen=True, slots=True)
class KeyMerge:
    """A group of key heads replaced by one.

    Attributes:
        key: the one head's rows, ``[head_dim, inputs]``.
        query: of the group's query heads, ``[heads, queries, head_dim, inputs]``.
        lost: squared error of the logits.
        total: squared logits, in the same measure.
        key_norm: weights of the one head's norm, ``[head_dim]``; None without a norm.
        query_norm: likewise, ``[heads, queries, head_dim]``.
        exact: whether nothing but symmetries of the layer was used, so that what was lost is the heads' own difference.
    """

    key: torch.Tensor
    query: torch.Tensor
    lost: float
    total: float
    key_norm: torch.Tensor | None = None
    query_norm: torch.Tensor | None = None
    exact: bool = True


class Keys(Protocol):
    """The keys and queries of a layer, ready to be merged by any groups."""

    def loss(self, group: tuple[int, ...]) -> tuple[float, float]:
        """What merging ``group`` loses, and the total, as in :class:`KeyMerge`."""

    def merge(self, group: tuple[int, ...]) -> KeyMerge:
        """``group`` merged."""


class PlainKeys:
    """Keys that meet queries right after the projection, or after rotation.

    Args:
        weights: of the layer.
        moments: second moments of its input, ``[inputs, inputs]``.
        rotary: its position embedding.
    """

    def __init__(self, weights: LayerWeights, moments: torch.Tensor, rotary: Rotary) -> None:
        self._rotary = rotary
        key = weights.key
        self.query = weights.query.view(weights.kv_heads, weights.queries_per_kv, *weights.query.shape[1:])
        self.turned, self.still = split_pairs(key, rotary), key[:, rotary.dims :]
        self.turned_gram = torch.einsum(
            "gfd,de,hfe->fgh", self.turned, moments.to(self.turned.dtype), self.turned.conj()
        )
        # A rotated product is the real part of a complex one: on the average half its energy.
        turned_query = split_pairs(self.query, rotary)
        energies = torch.einsum("grfd,de,grfe->gf", turned_query, moments.to(turned_query.dtype), turned_query.conj())
        self.turned_metrics = energies.real.clamp_min(0) / 2
        self.still_gram = torch.einsum("gid,de,hje->gihj", self.still, moments, self.still)
        still_query = self.query[:, :, rotary.dims :]
        self.still_metrics = torch.einsum("grid,de,grje->gij", still_query, moments, still_query)

    def solve(self, group: tuple[int, ...]) -> tuple[Merge, Merge]:
        """The merges of the rotated part and of the rest."""
        index = list(group)
        return (
            merge_rotary(self.turned[index], self.turned_gram[:, index][:, :, index], self.turned_metrics[index]),
            merge_subspace(self.still[index], self.still_gram[index][:, :, index], self.still_metrics[index]),
        )

    def fold(self, group: tuple[int, ...], turned: Merge, still: Merge) -> tuple[torch.Tensor, torch.Tensor]:
        """The shared key, and the group's queries that go with it."""
        query = self.query[list(group)]
        rotated = split_pairs(query, self._rotary) * turned.back.conj()[:, None, :, None]
        rest = still.back.mT[:, None] @ query[:, :, self._rotary.dims :]
        return (
            torch.cat([join_pairs(turned.shared, self._rotary), still.shared]),
            torch.cat([join_pairs(rotated, self._rotary), rest], dim=2),
        )

    def loss(self, group: tuple[int, ...]) -> tuple[float, float]:
        turned, still = self.solve(group)
        return turned.lost + still.lost, turned.total + still.total

    def merge(self, group: tuple[int, ...]) -> KeyMerge:
        turned, still = self.solve(group)
        key, query = self.fold(group, turned, still)
        return KeyMerge(key, query, turned.lost + still.lost, turned.total + still.total)


def nonzero(weights: torch.Tensor) -> torch.Tensor:
    """Norm weights that can be divided by: what a zero hides is given next to none of the logits instead."""
    mean = weights.abs().mean()
    floor = torch.where(mean > 0, 1e-6 * mean, 1)
    return torch.where(weights.abs() < floor, floor, weights)


def split_pairs(rows: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """The rotated rows of heads ``[…, head_dim, inputs]`` as complex ``[…, dims / 2, inputs]``."""
    turned = rows[..., : rotary.dims, :]
    half = rotary.dims // 2
    if rotary.pairing == "half":
        return torch.complex(turned[..., :half, :], turned[..., half:, :])
    return torch.complex(turned[..., 0::2, :], turned[..., 1::2, :])


def join_pairs(rows: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """The opposite of :func:`split_pairs`."""
    if rotary.pairing == "half":
        return torch.cat([rows.real, rows.imag], dim=-2)
    return torch.stack([rows.real, rows.imag], dim=-2).flatten(-3, -2)
