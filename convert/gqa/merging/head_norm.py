"""Merging keys that are normalized head by head between projection and rotation (Qwen3, Gemma 3, Command R+).

The norm takes a head's size away and leaves its directions, which then are weighted and turned. Four ways to bring a
group's heads together are tried, and the one is taken that loses least in the logits of inputs drawn from a normal
distribution with the layer's second moments, norms included:

- ``signs``: a sign per rotary pair (per dimension where nothing turns), and a turn of those pairs whose two norm
  weights are equal. No norm notices any of these, so heads that differ by them alone merge without loss.
- ``phases``: a turn of every pair. Norm weights of a pair that differ make it an approximation.
- ``factors``: a complex number per pair, a matrix for what does not turn: the closed form without a norm, on heads
  scaled to the same size. The norm then scales every token a little differently.
- ``weights``: where every head has norm weights of its own, a sign per head, and factors per pair that move from the
  keys' weights into the queries'. Exact, and the only way that a subtracted mean allows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from llmconvert.convert.gqa.geometry import Norm, Rotary
from llmconvert.convert.gqa.merging.keys import KeyMerge, PlainKeys, nonzero, split_pairs
from llmconvert.convert.gqa.merging.svd import Merge
from llmconvert.convert.gqa.weights import LayerWeights

__all__ = ["HeadNormedKeys"]

Way = Literal["signs", "phases", "factors", "weights"]
_SAMPLES = 256
_TURNS = 8
# Relative difference up to which two norm weights are the same.
_EVEN = 1e-6
_JITTER = 1e-10
# Share of the logits' energy that an approximation has to gain, so that rounding doesn't choose it.
_WORTH = 1e-6


class HeadNormedKeys:
    """Keys normalized per head.

    Args:
        weights: of the layer, with its norms.
        moments: second moments of its input, ``[inputs, inputs]``.
        rotary: its position embedding.
        norm: how it normalizes.
    """

    def __init__(self, weights: LayerWeights, moments: torch.Tensor, rotary: Rotary, norm: Norm) -> None:
        assert weights.query_norm is not None and weights.key_norm is not None
        self._rotary = rotary
        self._centred = norm.centred
        self._inputs = weights.key.shape[-1]
        drawn = _samples(moments)
        key, key_size = _unit(weights.key, moments, drawn, norm.centred)
        query, query_size = _unit(weights.query, moments, drawn, norm.centred)
        key_norm, query_norm = nonzero(weights.key_norm), nonzero(weights.query_norm)
        by_group = (weights.kv_heads, weights.queries_per_kv)
        self._key, self._query = key, query.unflatten(0, by_group)
        self._key_size, self._query_size = key_size, query_size.unflatten(0, by_group)
        self._key_norm, self._query_norm = key_norm, query_norm.unflatten(0, by_group)
        self._moments = moments
        effective = replace(weights, query=query * query_norm[..., None], key=key * key_norm[..., None])
        wide = torch.block_diag(moments, moments.new_zeros(_SAMPLES, _SAMPLES))
        self._plain = PlainKeys(effective, wide, rotary)
        if norm.weights != "shared":
            self._ways: tuple[Way, ...] = ("weights",)
        else:
            self._ways = ("signs",) if norm.after_rotary else ("signs", "phases", "factors")
        self._even = _even(key_norm[0], rotary) & _even(query_norm[0], rotary)

    def loss(self, group: tuple[int, ...]) -> tuple[float, float]:
        merge = self.merge(group)
        return merge.lost, merge.total

    def merge(self, group: tuple[int, ...]) -> KeyMerge:
        merges = [self._weigh(group) if way == "weights" else self._align(group, way) for way in self._ways]
        best = min(merges, key=lambda merge: merge.lost + (0.0 if merge.exact else _WORTH * merge.total))
        # Sizes mean nothing to a norm but for the epsilon in it: keep them.
        key = best.key[:, : self._inputs] * self._key_size[list(group)].square().mean().sqrt()
        query = best.query[..., : self._inputs] * self._query_size[list(group)][..., None, None]
        return replace(best, key=key, query=query)

    def _align(self, group: tuple[int, ...], way: Way) -> KeyMerge:
        """Heads brought together by factors that fold into projections."""
        plain, index = self._plain, list(group)
        if way == "factors":
            turned, still = plain.solve(group)
        else:
            gram = plain.turned_gram[:, index][:, :, index]
            free = self._even if way == "signs" else torch.ones_like(self._even)
            factors = _units(gram, plain.turned_metrics[index], free)
            turned = _averaged(plain.turned[index], factors, plain.turned_metrics[index])
            diagonal = plain.still_gram[index][:, :, index].diagonal(dim1=1, dim2=3).permute(2, 0, 1)
            metrics = plain.still_metrics[index].diagonal(dim1=1, dim2=2)
            signs = _units(diagonal, metrics, torch.zeros(len(diagonal), dtype=torch.bool))
            still = _averaged(plain.still[index], signs, metrics)
            still = replace(still, back=torch.diag_embed(still.back))
        turned = self._resized(turned, plain.turned_gram[:, index][:, :, index].diagonal(dim1=1, dim2=2).real)
        key, query = plain.fold(group, turned, still)
        key_norm, query_norm = self._key_norm[index[0]], self._query_norm[index]
        return self._judged(
            group, key / key_norm[:, None], query / query_norm[..., None], key_norm, query_norm, way == "signs"
        )

    def _resized(self, turned: Merge, sizes: torch.Tensor) -> Merge:
        """The shared rows at the mean size of those they replace, so that each frequency keeps its part of the norm.

        Args:
            sizes: of the heads' rows, ``[frequencies, heads]``.
        """
        rows = turned.shared[:, : self._inputs]
        size = (rows @ self._moments.to(rows.dtype) * rows.conj()).sum(-1).real
        scale = torch.where(size > 0, (sizes.mean(1) / size.clamp_min(torch.finfo(size.dtype).tiny)).sqrt(), 1)
        return replace(turned, shared=turned.shared * scale[:, None], back=turned.back / scale)

    def _weigh(self, group: tuple[int, ...]) -> KeyMerge:
        """Heads averaged up to their sign, their norm weights matched by a factor per pair."""
        index, rotary = list(group), self._rotary
        rows, weights = self._key[index], self._key_norm[index]
        queries = self._query[index] * self._query_norm[index][..., None]
        importance = torch.einsum(
            "grid,de,grie->gi", queries[..., : self._inputs], self._moments, queries[..., : self._inputs]
        )
        weighted = (rows * weights[..., None])[..., : self._inputs]
        gram = torch.einsum("gid,de,hie->gh", weighted * importance.mean(0)[:, None], self._moments, weighted)
        share = importance.sum(1)
        signs = _units(gram[None], share[:, None], torch.zeros(1, dtype=torch.bool))[:, 0].real
        mass = share / share.sum() if share.sum() > 0 else torch.full_like(share, 1 / len(share))
        key = torch.einsum("g,gid->id", signs * mass, rows)
        factors = torch.empty_like(weights)
        shared = torch.empty_like(weights[0])
        turning = torch.arange(rotary.dims)
        pairs = turning.view(2, -1).T if rotary.pairing == "half" else turning.view(-1, 2)
        for dims in (*pairs, *torch.arange(rotary.dims, len(shared))[:, None]):
            factors[:, dims], shared[dims] = _matched(weights[:, dims], importance[:, dims])
        query_norm = self._query_norm[index] * (signs[:, None] * factors)[:, None]
        return self._judged(group, key, self._query[index], shared, query_norm, True)

    def _judged(
        self,
        group: tuple[int, ...],
        key: torch.Tensor,
        query: torch.Tensor,
        key_norm: torch.Tensor,
        query_norm: torch.Tensor,
        exact: bool,
    ) -> KeyMerge:
        """A way's outcome with its loss on the drawn inputs."""
        index = list(group)
        lost, total = _logit_loss(
            self._normed(self._query[index], self._query_norm[index]),
            self._normed(self._key[index], self._key_norm[index])[:, None],
            self._normed(query, query_norm),
            self._normed(key, key_norm)[None, None],
            self._rotary,
        )
        return KeyMerge(key, query, lost, total, key_norm, query_norm, exact)

    def _normed(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What heads ``[…, head_dim, inputs + samples]`` make of the drawn inputs, ``[…, head_dim, samples]``."""
        values = rows[..., self._inputs :]
        if self._centred:
            values = values - values.mean(-2, keepdim=True)
        size = values.square().mean(-2, keepdim=True).sqrt().clamp_min(torch.finfo(values.dtype).tiny)
        return weights[..., None] * values / size


def _samples(moments: torch.Tensor) -> torch.Tensor:
    """Inputs ``[inputs, samples]`` drawn from a normal distribution with these second moments."""
    jitter = _JITTER * moments.diagonal().mean().clamp_min(torch.finfo(moments.dtype).tiny)
    identity = torch.eye(len(moments), dtype=moments.dtype)
    factor, failed = torch.linalg.cholesky_ex(moments + jitter * identity)
    while int(failed):
        jitter *= 100
        factor, failed = torch.linalg.cholesky_ex(moments + jitter * identity)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(len(moments), _SAMPLES, generator=generator, dtype=moments.dtype)
    return torch.mm(factor, drawn)


def _unit(
    rows: torch.Tensor, moments: torch.Tensor, drawn: torch.Tensor, centred: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads at mean square one (which their norm makes of them), with what they make of drawn inputs beside them.

    Returns:
        ``[heads, head_dim, inputs + samples]``, and the size that each head had, ``[heads]``.
    """
    if centred:
        rows = rows - rows.mean(1, keepdim=True)
    size = (torch.einsum("hid,de,hie->h", rows, moments, rows) / rows.shape[1]).clamp_min(0).sqrt()
    size = torch.where(size > 0, size, 1)
    rows = rows / size[:, None, None]
    return torch.cat([rows, rows @ drawn], dim=-1), size


def _even(weights: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Which pairs have two weights of the same size, ``[frequencies]``."""
    pairs = split_pairs(weights[:, None], rotary)[:, 0]
    return (pairs.real.abs() - pairs.imag.abs()).abs() <= _EVEN * pairs.abs()


def _units(gram: torch.Tensor, metrics: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
    """Numbers of modulus one, real where not ``free``, under which heads agree best: ``E_g ≈ numbers_g · shared``.

    From the leading eigenvector by coordinate ascent.

    Args:
        gram: ``[rows, heads, heads]``, real or complex.
        metrics: ``[heads, rows]``.

    Returns:
        ``[heads, rows]``, complex if ``gram`` is.
    """
    weights = metrics.T.sqrt()
    weighted = gram * weights[:, :, None] * weights[:, None, :]
    real = torch.where(free[:, None, None], weighted, weighted.real.to(weighted.dtype))
    if not len(real):
        return metrics.to(real.dtype)

    def unit(values: torch.Tensor) -> torch.Tensor:
        return torch.where(values.abs() > 0, values / values.abs().clamp_min(1e-300), 1)

    numbers = unit(torch.linalg.eigh(real)[1][..., -1])
    numbers = torch.where(free[:, None], numbers, torch.where(numbers.real < 0, -1.0, 1.0).to(numbers.dtype))
    others = real * (1 - torch.eye(real.shape[-1], dtype=metrics.dtype))
    for _ in range(_TURNS):
        for head in range(real.shape[-1]):
            numbers[:, head] = unit((others[:, head] * numbers).sum(-1))
    return numbers.T


def _averaged(rows: torch.Tensor, factors: torch.Tensor, metrics: torch.Tensor) -> Merge:
    """Heads averaged after being divided by their factors of modulus one."""
    mass = metrics + torch.finfo(metrics.dtype).tiny
    mass = mass / mass.sum(0)
    shared = torch.einsum("gf,gfd->fd", (factors.conj() * mass).to(rows.dtype), rows)
    return Merge(shared, factors, 0.0, 0.0)


def _matched(weights: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm weights of several heads as a factor per head times the weights of one.

    Args:
        weights: ``[heads, dims]``.
        importance: likewise.

    Returns:
        Factors ``[heads, 1]`` and weights ``[dims]``.
    """
    root = importance.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny).sqrt()
    left, singular, right = torch.linalg.svd(root * weights, full_matrices=False)
    scale = weights.square().sum(1).mean().sqrt()
    return left[:, :1] * singular[0] / root / scale, right[0] * scale


def _logit_loss(
    query: torch.Tensor, key: torch.Tensor, new_query: torch.Tensor, new_key: torch.Tensor, rotary: Rotary
) -> tuple[float, float]:
    """Mean squared error of the logits, and their mean square, for independent inputs at random distances.

    Args:
        query: ``[heads, queries, head_dim, samples]``.
        key: ``[heads, 1, head_dim, samples]``.
        new_query: like ``query``.
        new_key: ``[1, 1, head_dim, samples]``.
    """
    count = query.shape[-1]
    q, k, new_q, new_k = (split_pairs(values, rotary) for values in (query, key, new_query, new_key))
    before = q.abs().square().mean(-1) * k.abs().square().mean(-1)
    after = new_q.abs().square().mean(-1) * new_k.abs().square().mean(-1)
    both = (q.conj() * new_q).mean(-1) * (k * new_k.conj()).mean(-1)
    # A rotated product is the real part of a complex one: on the average half its energy.
    total = float(before.sum()) / 2
    lost = float((before + after - 2 * both.real).sum()) / 2
    q, k, new_q, new_k = (values[..., rotary.dims :, :] for values in (query, key, new_query, new_key))

    def energy(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> float:
        return float(((a @ b.mT) * (c @ d.mT)).sum()) / count**2

    plain = energy(q, q, k, k)
    rest = plain + energy(new_q, new_q, new_k, new_k) - 2 * energy(q, new_q, k, new_k)
    return max(0.0, lost + rest), total + plain
