"""One attention layer with fewer key-value heads, in closed form, from its weights and its input's second moments.

Query heads (with the columns of the output projection that belong to them) move along with the key-value head that
they use, so any heads can form a group.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from llmconvert.convert.gqa.geometry import Norm, Rotary
from llmconvert.convert.gqa.merging.group import Groups, candidate_groups
from llmconvert.convert.gqa.merging.head_norm import HeadNormedKeys
from llmconvert.convert.gqa.merging.keys import Keys, PlainKeys
from llmconvert.convert.gqa.merging.layer_norm import LayerNormedKeys
from llmconvert.convert.gqa.merging.svd import Merge, merge_subspace
from llmconvert.convert.gqa.weights import LayerWeights

__all__ = ["METHODS", "MergedLayer", "Method", "merge_layer"]

#: ``svd`` merges with the least loss, ``mean`` averages neighbouring heads, ``first`` keeps the first of them.
Method = Literal["svd", "mean", "first"]
METHODS: tuple[str, ...] = get_args(Method)
#: Partitions of heads that are good pair by pair, of which the best as a whole is taken.
_CANDIDATES = 6


@dataclass(frozen=True, slots=True)
class MergedLayer:
    """A layer after the merge.

    Attributes:
        weights: with fewer key-value heads.
        groups: the key-value heads that became one, by their old numbers.
        key_loss: share of the attention logits' energy that was lost; None for methods that don't know.
        value_loss: share of the values' energy, as the output projection sees it, that was lost.
        symmetric: whether keys were brought together by symmetries of the layer alone; where its norms allow too few,
            transforms were used that the norms notice a little, because that lost less.
    """

    weights: LayerWeights
    groups: Groups
    key_loss: float | None
    value_loss: float | None
    symmetric: bool = True


def merge_layer(
    weights: LayerWeights,
    moments: torch.Tensor,
    kv_heads: int,
    *,
    method: Method,
    rotary: Rotary,
    norm: Norm | None = None,
    movable: bool = True,
) -> MergedLayer:
    """Merge a layer's key-value heads to ``kv_heads``, which divides their number.

    Args:
        weights: in float64 for a lossless merge of redundant heads.
        moments: second moments of the layer's input, ``[inputs, inputs]``, the column for biases included.
        kv_heads: how many remain.
        method: how.
        rotary: the layer's position embedding.
        norm: of queries and keys after the projection.
        movable: whether heads may change places; if not, neighbours are merged.
    """
    if method != "svd":
        return _merge_plainly(weights, kv_heads, method)
    layer = _Layer(weights, moments, rotary, norm)
    if not movable:
        return layer.merge(_neighbours(weights.kv_heads, kv_heads))
    candidates = candidate_groups(layer.costs(), kv_heads, _CANDIDATES)
    return layer.merge(min(candidates, key=layer.loss) if len(candidates) > 1 else candidates[0])


def _merge_plainly(weights: LayerWeights, kv_heads: int, method: Method) -> MergedLayer:
    size = weights.kv_heads // kv_heads

    def pool(rows: torch.Tensor) -> torch.Tensor:
        grouped = rows.view(kv_heads, size, *rows.shape[1:])
        return grouped.mean(1) if method == "mean" else grouped[:, 0]

    key_norm = pool(weights.key_norm) if weights.key_norm is not None else None
    return MergedLayer(
        replace(weights, key=pool(weights.key), value=pool(weights.value), key_norm=key_norm),
        _neighbours(weights.kv_heads, kv_heads),
        None,
        None,
    )


def _neighbours(heads: int, count: int) -> Groups:
    size = heads // count
    return tuple(tuple(range(start, start + size)) for start in range(0, heads, size))


class _Layer:
    """A layer with the Gram matrices of its heads, from which every group's merge follows."""

    def __init__(self, weights: LayerWeights, moments: torch.Tensor, rotary: Rotary, norm: Norm | None) -> None:
        self._weights = weights
        count, ratio = weights.kv_heads, weights.queries_per_kv
        output = weights.output.view(count, ratio, *weights.output.shape[1:])
        self._values = torch.einsum("gid,de,hje->gihj", weights.value, moments, weights.value)
        self._value_metrics = torch.einsum("grdi,grdj->gij", output, output)
        self._keys: Keys
        if norm is None:
            self._keys = PlainKeys(weights, moments, rotary)
        elif norm.scope == "layer":
            self._keys = LayerNormedKeys(weights, moments, rotary)
        else:
            self._keys = HeadNormedKeys(weights, moments, rotary, norm)
        self._value_total = sum(self._value((head,)).total for head in range(count)) or 1.0
        self._key_total = sum(self._keys.loss((head,))[1] for head in range(count)) or 1.0
        self._losses: dict[tuple[int, ...], float] = {}

    def costs(self) -> torch.Tensor:
        """Loss of merging any two heads: the share of the values' energy plus that of the logits'."""
        count = self._weights.kv_heads
        costs = torch.zeros(count, count, dtype=torch.float64)
        for pair in itertools.combinations(range(count), 2):
            costs[pair] = costs[pair[::-1]] = self._group_loss(pair)
        return costs

    def loss(self, groups: Groups) -> float:
        """The same for whole groups."""
        return sum(self._group_loss(group) for group in groups)

    def _group_loss(self, group: tuple[int, ...]) -> float:
        if group not in self._losses:
            value, (lost, _) = self._value(group), self._keys.loss(group)
            self._losses[group] = value.lost / self._value_total + lost / self._key_total
        return self._losses[group]

    def merge(self, groups: Groups) -> MergedLayer:
        """The layer with each group merged to one head."""
        weights, ratio = self._weights, self._weights.queries_per_kv
        output = weights.output.view(-1, ratio, *weights.output.shape[1:])
        values = [self._value(group) for group in groups]
        keys = [self._keys.merge(group) for group in groups]
        outputs = [output[list(group)] @ value.back[:, None] for group, value in zip(groups, values, strict=True)]
        merged = LayerWeights(
            torch.cat([key.query for key in keys]).flatten(0, 1),
            torch.stack([key.key for key in keys]),
            torch.stack([value.shared for value in values]),
            torch.cat(outputs).flatten(0, 1),
            _joined([key.query_norm.flatten(0, 1) for key in keys if key.query_norm is not None]),
            _joined([key.key_norm[None] for key in keys if key.key_norm is not None]),
        )
        return MergedLayer(
            merged,
            groups,
            _share(sum(key.lost for key in keys), sum(key.total for key in keys)),
            _share(sum(value.lost for value in values), sum(value.total for value in values)),
            all(key.exact for key in keys),
        )

    def _value(self, group: tuple[int, ...]) -> Merge:
        index = list(group)
        gram = self._values[index][:, :, index]
        return merge_subspace(self._weights.value[index], gram, self._value_metrics[index])


def _joined(parts: list[torch.Tensor]) -> torch.Tensor | None:
    return torch.cat(parts) if parts else None


def _share(lost: float, total: float) -> float:
    return lost / total if total else 0.0
