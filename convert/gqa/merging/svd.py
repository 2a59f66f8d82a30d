"""Merging key-value heads by truncated SVD, modulo the symmetries of attention: least loss, in closed form.

Attention stays the same under symmetries that fold into its weights: ``V → M V, O → O M⁻¹`` for any invertible M per
head, and the like for queries and keys; under rotary embedding, where M has to commute with the rotation, it is one
complex factor per frequency. A group of heads is merged by the truncated SVD of what they do, modulo the symmetry,
measured on the second moments of the attention's input. All it takes is the Gram matrix of the heads' rows in that
measure, ``rows · moments · rowsᴴ``, whatever the hidden size.

Jin et al. 2024 (arXiv 2412.20677) align heads by orthogonal transforms and then average; Ainslie et al. 2023
(arXiv 2305.13245) average as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Merge", "merge_rotary", "merge_subspace"]

# Directions whose share of the largest is below this are rounding noise and carry nothing.
_RANK_TOLERANCE = 1e-12


@dataclass(frozen=True, slots=True)
class Merge:
    """Heads replaced by one: head g was ``rows[g]`` and becomes ``back[g] @ shared``.

    Attributes:
        shared: the one head's rows, ``[head_dim, inputs]``.
        back: what leads from it to each head, ``[heads, head_dim, head_dim]``.
        lost: squared output error.
        total: squared output, in the same measure.
    """

    shared: torch.Tensor
    back: torch.Tensor
    lost: float
    total: float


def merge_subspace(rows: torch.Tensor, gram: torch.Tensor, metrics: torch.Tensor) -> Merge:
    """Merge heads that may be transformed by any invertible matrix: values, and keys without positions.

    Minimizes ``Σ_g ‖metrics[g]^½ (rows[g] − back[g] shared) moments^½‖²``.

    Args:
        rows: ``[heads, r, inputs]``.
        gram: of all rows, ``[heads, r, heads, r]``.
        metrics: per head how much its r outputs matter, ``[heads, r, r]``; for values ``Σ OᵀO`` over the query
            heads that use it.
    """
    count, rank, inputs = rows.shape
    if rank == 0:
        return Merge(rows[0], metrics, 0.0, 0.0)
    values, vectors = torch.linalg.eigh(metrics)
    values = values.clamp_min(0)
    values = torch.where(values > values.amax() * _RANK_TOLERANCE, values, 0)
    root = vectors * values.sqrt()[:, None, :] @ vectors.mT
    # The pseudo-inverse: what a head sends where nobody looks is free to change.
    inverse = vectors * torch.where(values > 0, values.rsqrt(), 0)[:, None, :] @ vectors.mT
    weighted = torch.einsum("gij,gjhk,hkl->gihl", root, gram, root).reshape(count * rank, count * rank)
    energies, basis = torch.linalg.eigh(weighted)
    kept = basis[:, -rank:]
    shared = kept.mT @ (root @ rows).reshape(count * rank, inputs)
    back = inverse @ kept.view(count, rank, rank)
    shared, back = _balanced(shared, back, rows)
    return Merge(shared, back, float(energies[:-rank].clamp_min(0).sum()), float(energies.clamp_min(0).sum()))


def merge_rotary(rows: torch.Tensor, gram: torch.Tensor, metrics: torch.Tensor) -> Merge:
    """Merge keys under rotary embedding: heads may be multiplied by one complex number per frequency.

    Args:
        rows: complex, one row per frequency, ``[heads, frequencies, inputs]``.
        gram: of the heads' rows for each frequency, complex, ``[frequencies, heads, heads]``.
        metrics: energy of the queries that meet each row, ``[heads, frequencies]``.

    Returns:
        ``shared`` is complex, and ``back`` ``[heads, frequencies]``: row f of head g becomes ``back[g, f] shared[f]``.
    """
    if rows.shape[1] == 0:
        return Merge(rows[0], metrics, 0.0, 0.0)
    weights = metrics.sqrt()
    energies, basis = torch.linalg.eigh(gram * weights.T[:, :, None] * weights.T[:, None, :])
    leading = basis[..., -1]
    shared = torch.einsum("fg,gf,gfd->fd", leading.conj(), weights.to(rows.dtype), rows)
    back = torch.where(weights > 0, leading.T / weights, 0)
    # One complex number per row is free: give the shared row the mean norm of those it replaces.
    norm = rows.abs().square().sum(-1).mean(0).sqrt()
    scale = norm / torch.linalg.vector_norm(shared, dim=-1).clamp_min(torch.finfo(norm.dtype).tiny)
    scale = torch.where(scale > 0, scale, 1)
    lost = energies[:, :-1].clamp_min(0).sum()
    return Merge(shared * scale[:, None], back / scale, float(lost), float(energies.clamp_min(0).sum()))


def _balanced(shared: torch.Tensor, back: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the size of those they replace; quantization then meets what it met before."""
    norms = torch.linalg.vector_norm(shared, dim=-1)
    target = torch.linalg.vector_norm(rows, dim=-1).square().mean().sqrt()
    scale = torch.where(norms > 0, target / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1)
    return shared * scale[:, None], back / scale
