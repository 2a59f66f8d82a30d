"""One attention layer with fewer key-value heads, in closed form, from its weights and its input's second moments.

Query heads (with the columns of the output projection that belong to them) move along with the key-value head that
they use, so any heads can form a group.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from llmconvert.convert.attention import Rotary
from llmconvert.convert.attention_weights import LayerWeights
from llmconvert.convert.gqa_group import balanced_groups
from llmconvert.convert.gqa_svd import Merge, merge_rotary, merge_signed, merge_subspace

__all__ = ["METHODS", "MergedLayer", "Method", "merge_layer"]

#: ``svd`` merges with the least loss, ``mean`` averages neighbouring heads, ``first`` keeps the first of them.
Method = Literal["svd", "mean", "first"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True, slots=True)
class MergedLayer:
    """A layer after the merge.

    Attributes:
        weights: with fewer key-value heads.
        groups: the key-value heads that became one, by their old numbers.
        key_loss: share of the attention logits' energy that was lost; None for methods that don't know.
        value_loss: share of the values' energy, as the output projection sees it, that was lost.
    """

    weights: LayerWeights
    groups: tuple[tuple[int, ...], ...]
    key_loss: float | None
    value_loss: float | None


def merge_layer(
    weights: LayerWeights,
    moments: torch.Tensor,
    kv_heads: int,
    *,
    method: Method,
    rotary: Rotary,
    head_norm: bool = False,
    movable: bool = True,
) -> MergedLayer:
    """Merge a layer's key-value heads to ``kv_heads``, which divides their number.

    Args:
        weights: in float64 for a lossless merge of redundant heads.
        moments: second moments of the layer's input, ``[inputs, inputs]``, the column for biases included.
        kv_heads: how many remain.
        method: how.
        rotary: the layer's position embedding.
        head_norm: whether query and key heads are normalized after the projection.
        movable: whether heads may change places; if not, neighbours are merged.
    """
    if method != "svd":
        return _merge_plainly(weights, kv_heads, method)
    layer = _Grams(weights, moments, rotary, head_norm)
    neighbours = _neighbours(weights.kv_heads, kv_heads)
    return layer.merge(balanced_groups(layer.costs(), kv_heads) if movable else neighbours)


def _merge_plainly(weights: LayerWeights, kv_heads: int, method: Method) -> MergedLayer:
    size = weights.kv_heads // kv_heads

    def pool(rows: torch.Tensor) -> torch.Tensor:
        grouped = rows.view(kv_heads, size, *rows.shape[1:])
        return grouped.mean(1) if method == "mean" else grouped[:, 0]

    return MergedLayer(
        replace(weights, key=pool(weights.key), value=pool(weights.value)),
        _neighbours(weights.kv_heads, kv_heads),
        None,
        None,
    )


def _neighbours(heads: int, count: int) -> tuple[tuple[int, ...], ...]:
    size = heads // count
    return tuple(tuple(range(start, start + size)) for start in range(0, heads, size))


class _Grams:
    """A layer with the Gram matrices of its heads, from which every group's merge follows."""

    def __init__(self, weights: LayerWeights, moments: torch.Tensor, rotary: Rotary, head_norm: bool) -> None:
        self._weights = weights
        self._rotary = rotary
        self._normed = head_norm
        count, ratio = weights.kv_heads, weights.queries_per_kv
        key, value = weights.key, weights.value
        query = weights.query.view(count, ratio, *weights.query.shape[1:])
        output = weights.output.view(count, ratio, *weights.output.shape[1:])
        self._values = torch.einsum("gid,de,hje->gihj", value, moments, value)
        self._value_metrics = torch.einsum("grdi,grdj->gij", output, output)
        if head_norm:
            self._keys = torch.einsum("gid,de,hie->gh", key, moments, key)
            return
        turned, still = _split(key, rotary), key[:, rotary.dims :]
        self._turned_keys = torch.einsum("gfd,de,hfe->fgh", turned, moments.to(turned.dtype), turned.conj())
        # A rotated product is the real part of a complex one: on the average half its energy.
        turned_query = _split(query, rotary)
        energies = torch.einsum("grfd,de,grfe->gf", turned_query, moments.to(turned.dtype), turned_query.conj())
        self._turned_metrics = energies.real.clamp_min(0) / 2
        self._still_keys = torch.einsum("gid,de,hje->gihj", still, moments, still)
        still_query = query[:, :, rotary.dims :]
        self._still_metrics = torch.einsum("grid,de,grje->gij", still_query, moments, still_query)

    def costs(self) -> torch.Tensor:
        """Loss of merging any two heads: the share of the values' energy plus that of the logits'."""
        count = self._weights.kv_heads
        costs = torch.zeros(count, count, dtype=torch.float64)
        whole = tuple(range(count))
        value_total = self._value(whole).total or 1.0
        key_total = sum(merge.total for merge in self._key(whole)) or 1.0
        for pair in itertools.combinations(whole, 2):
            lost = self._value(pair).lost / value_total + sum(merge.lost for merge in self._key(pair)) / key_total
            costs[pair] = costs[pair[::-1]] = lost
        return costs

    def merge(self, groups: tuple[tuple[int, ...], ...]) -> MergedLayer:
        """The layer with each group merged to one head."""
        weights, ratio = self._weights, self._weights.queries_per_kv
        query = weights.query.view(-1, ratio, *weights.query.shape[1:]).clone()
        output = weights.output.view(-1, ratio, *weights.output.shape[1:]).clone()
        keys, values = [], []
        lost_keys = lost_values = total_keys = total_values = 0.0
        for group in groups:
            index = list(group)
            value, key = self._value(group), self._key(group)
            values.append(value.shared)
            output[index] = output[index] @ value.back[:, None]
            shared, query[index] = self._fold(key, query[index])
            keys.append(shared)
            lost_values, total_values = lost_values + value.lost, total_values + value.total
            lost_keys, total_keys = lost_keys + sum(m.lost for m in key), total_keys + sum(m.total for m in key)
        order = [head for group in groups for head in group]
        query, output = query[order].flatten(0, 1), output[order].flatten(0, 1)
        merged = LayerWeights(query, torch.stack(keys), torch.stack(values), output)
        return MergedLayer(merged, groups, _share(lost_keys, total_keys), _share(lost_values, total_values))

    def _value(self, group: tuple[int, ...]) -> Merge:
        index = list(group)
        gram = self._values[index][:, :, index]
        return merge_subspace(self._weights.value[index], gram, self._value_metrics[index])

    def _key(self, group: tuple[int, ...]) -> tuple[Merge, ...]:
        """The merge of the rotated part and of the rest, or of the whole where keys are normalized."""
        index = list(group)
        key = self._weights.key[index]
        if self._normed:
            return (merge_signed(key, self._keys[index][:, index]),)
        turned, still = _split(key, self._rotary), key[:, self._rotary.dims :]
        return (
            merge_rotary(turned, self._turned_keys[:, index][:, :, index], self._turned_metrics[index]),
            merge_subspace(still, self._still_keys[index][:, :, index], self._still_metrics[index]),
        )

    def _fold(self, merges: tuple[Merge, ...], query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The shared key, and a group's queries ``[heads, queries, head_dim, inputs]`` that go with it."""
        if self._normed:
            (merge,) = merges
            return merge.shared, query * merge.back[:, None, None, None]
        turned, still = merges
        rotated = _split(query, self._rotary) * turned.back.conj()[:, None, :, None]
        rest = still.back.mT[:, None] @ query[:, :, self._rotary.dims :]
        return (
            torch.cat([_join(turned.shared, self._rotary), still.shared]),
            torch.cat([_join(rotated, self._rotary), rest], dim=2),
        )


def _split(rows: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """The rotated rows of heads ``[…, head_dim, inputs]`` as complex ``[…, dims / 2, inputs]``."""
    turned = rows[..., : rotary.dims, :]
    half = rotary.dims // 2
    if rotary.pairing == "half":
        return torch.complex(turned[..., :half, :], turned[..., half:, :])
    return torch.complex(turned[..., 0::2, :], turned[..., 1::2, :])


def _join(rows: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """The opposite of :func:`_split`."""
    if rotary.pairing == "half":
        return torch.cat([rows.real, rows.imag], dim=-2)
    return torch.stack([rows.real, rows.imag], dim=-2).flatten(-3, -2)


def _share(lost: float, total: float) -> float:
    return lost / total if total else 0.0
