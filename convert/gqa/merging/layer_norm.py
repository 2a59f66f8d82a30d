"""Merging keys under a norm that goes over all heads of a layer at once (OLMo 2), each head with weights of its own.

Such a norm divides by ``rms² = xᵀ (Σ_h K_hᵀ K_h) x / n``, and multiplies with the weights w afterwards. What meets the
queries is ``E_h = w_h ∘ K_h``, and any rows ``K = E / w`` with other weights give the same logits as long as the sum
above stays. So a merge of E as without a norm is exact where the merged rows can be given weights that keep the sum:
per rotary pair the heads contribute ``e*ᵀ S e`` with a 2×2 matrix S in terms of the shared pair e, and weights stand on
its diagonal. The phase of the shared pair is free: it is chosen so that S is diagonal, for the keys and for all query
heads at once as far as that goes (Cardoso & Souloumiac 1996 for the angle). What is left off the diagonal, and what the
shared rows don't reach, changes the norm by a factor that varies from token to token: that is the approximation.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from llmconvert.convert.gqa.geometry import Rotary
from llmconvert.convert.gqa.merging.keys import KeyMerge, PlainKeys, join_pairs, nonzero, split_pairs
from llmconvert.convert.gqa.weights import LayerWeights

__all__ = ["LayerNormedKeys"]

# Off-diagonal energy, as a share, up to which a norm counts as kept.
_EXACT = 1e-8


class LayerNormedKeys:
    """Keys normalized over the whole layer.

    Args:
        weights: of the layer, with its norms.
        moments: second moments of its input, ``[inputs, inputs]``.
        rotary: its position embedding, over whole heads.
    """

    def __init__(self, weights: LayerWeights, moments: torch.Tensor, rotary: Rotary) -> None:
        assert weights.query_norm is not None and weights.key_norm is not None
        self._rotary = rotary
        self._moments = moments
        query_norm, key_norm = nonzero(weights.query_norm), nonzero(weights.key_norm)
        effective = replace(weights, query=weights.query * query_norm[..., None], key=weights.key * key_norm[..., None])
        self._plain = PlainKeys(effective, moments, rotary)
        self._key_norm = _pairs(key_norm, rotary)
        ratio = weights.queries_per_kv
        self._query_norm = _pairs(query_norm, rotary).view(weights.kv_heads, ratio, -1, 2)
        rows = weights.key
        self._key_energy = torch.einsum("gid,de,gie->gi", rows, moments, rows)
        queries = weights.query.view(weights.kv_heads, ratio, *weights.query.shape[1:])
        self._query_energy = torch.einsum("grid,de,grie->gri", queries, moments, queries)

    def loss(self, group: tuple[int, ...]) -> tuple[float, float]:
        return self._plain.loss(group)

    def merge(self, group: tuple[int, ...]) -> KeyMerge:
        index, rotary = list(group), self._rotary
        turned, still = self._plain.solve(group)
        # The Gram matrices of each head's own rows in terms of the shared pair and of the new queries.
        keys = _normal(_matrix(turned.back) / self._key_norm[index][..., :, None])
        inverse = torch.where(turned.back.abs() > 0, 1 / turned.back.conj(), 1)
        queries = _normal(_matrix(inverse)[:, None] / self._query_norm[index][..., :, None])
        shared = turned.shared
        query = split_pairs(self._plain.query[index], rotary) * turned.back.conj()[:, None, :, None]
        moments = self._moments.to(shared.dtype)
        own_key = (shared @ moments * shared.conj()).sum(-1).real
        own_query = torch.einsum("grfd,de,grfe->grf", query, moments, query.conj()).real
        total = keys.sum(0)
        angle, left = _diagonal(
            torch.cat([total[None], queries.flatten(0, 1)]),
            torch.cat(
                [
                    (own_key / _positive(self._key_energy.sum()))[None],
                    (own_query / _positive(self._query_energy.sum())).flatten(0, 1),
                ]
            ),
        )
        turn = torch.polar(torch.ones_like(angle), angle)
        key_rows = join_pairs(shared * turn.conj()[:, None], rotary)
        query_rows = join_pairs(query * turn.conj()[:, None], rotary)
        key_weights = self._weights(key_rows, _rotated(total, angle), self._key_energy[index].sum(0), len(group))
        query_weights = self._weights(query_rows, _rotated(queries, angle), self._query_energy[index], 1)
        lost, whole = turned.lost + still.lost, turned.total + still.total
        return KeyMerge(
            key_rows / key_weights[:, None],
            query_rows / query_weights[..., None],
            lost,
            whole,
            key_weights,
            query_weights,
            exact=left < _EXACT,
        )

    def _weights(self, rows: torch.Tensor, gram: torch.Tensor, energy: torch.Tensor, heads: int) -> torch.Tensor:
        """Norm weights of ``rows`` that keep what ``heads`` heads put into the norm, per frequency.

        Args:
            rows: ``[…, head_dim, inputs]``, weights multiplied in.
            gram: what each pair was worth in terms of ``rows``, ``[…, frequencies, 2, 2]``.
            energy: what each row was worth, ``[…, head_dim]``, summed over heads.
            heads: how many share ``rows``; the mean goes over so many times fewer rows.
        """
        inverse = _flat(gram.diagonal(dim1=-2, dim2=-1), self._rotary)
        own = torch.einsum("...id,de,...ie->...i", rows, self._moments, rows)
        counted = _pairs(inverse * own, self._rotary).sum(-1, keepdim=True)
        wanted = _pairs(energy, self._rotary).sum(-1, keepdim=True)
        ratio = torch.where(counted > 0, wanted / _positive(counted), 1)
        squares = inverse * _flat(ratio.expand(*ratio.shape[:-1], 2), self._rotary) / heads
        return torch.where(squares > 0, _positive(squares).rsqrt(), 1)


def _positive(values: torch.Tensor) -> torch.Tensor:
    return values.clamp_min(torch.finfo(values.dtype).tiny)


def _pairs(values: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Numbers by dimension ``[…, head_dim]`` as ``[…, frequencies, 2]``."""
    if rotary.pairing == "half":
        return torch.stack(values.chunk(2, dim=-1), dim=-1)
    return values.reshape(*values.shape[:-1], -1, 2)


def _flat(values: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """The opposite of :func:`_pairs`."""
    if rotary.pairing == "half":
        return torch.cat([values[..., 0], values[..., 1]], dim=-1)
    return values.flatten(-2)


def _matrix(numbers: torch.Tensor) -> torch.Tensor:
    """Complex numbers as the real 2×2 matrices of multiplying with them."""
    return torch.stack(
        [torch.stack([numbers.real, -numbers.imag], dim=-1), torch.stack([numbers.imag, numbers.real], dim=-1)], dim=-2
    )


def _normal(matrices: torch.Tensor) -> torch.Tensor:
    return matrices.mT @ matrices


def _rotated(gram: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Gram matrices of pairs that are turned back by ``angle``."""
    turn = _matrix(torch.polar(torch.ones_like(angle), angle))
    return turn.mT @ gram @ turn


def _diagonal(gram: torch.Tensor, energy: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Per frequency the angle that best diagonalizes many 2×2 matrices, and the share that stays off the diagonals.

    Args:
        gram: ``[matrices, frequencies, 2, 2]``.
        energy: how much each counts, ``[matrices, frequencies]``.
    """
    spread = torch.complex((gram[..., 0, 0] - gram[..., 1, 1]) / 2, gram[..., 0, 1])
    pull = (energy.square() * spread.square()).sum(0)
    angle = pull.angle() / 4
    off = _rotated(gram, angle)[..., 0, 1]
    size = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    share = (energy * off).abs().sum() / _positive((energy * size).sum())
    return angle, float(share)
