"""Refit of queries and keys to the original's attention logits, weighted by its probabilities.

The divergence between two attention distributions is, to second order, half the variance of the difference of their
logits under the original distribution: adding a constant to a row of logits changes nothing, and what is not attended
to doesn't matter. A change of logits moves a head's output by at most its spread around the row's mean logit times the
spread of the values around theirs, so rows are weighted by the latter, as the output projection sees it: where all
values say the same, it does not matter where a head looks. With the keys fixed that is a linear least-squares problem
in the queries' weights, and the other way round, so the two take turns, each a few steps of conjugate gradients.
Nothing is differentiated, and no other layer is involved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from llmconvert.convert.gqa.geometry import Rotary
from llmconvert.convert.gqa.refit.solve import conjugate_gradients
from llmconvert.convert.gqa.weights import LayerWeights

__all__ = ["LogitFit", "LogitSamples", "half_order"]

# Damping of the preconditioner, as shares of mean diagonals.
_MOMENT_DAMPING = 1e-2
_ROW_DAMPING = 1e-3
_RIDGE = 1e-3


@dataclass(frozen=True, slots=True)
class LogitSamples:
    """What the fit sees of a layer.

    Attributes:
        original: inputs of the original layer, one tensor ``[tokens, inputs]`` per window.
        merged: inputs of the merged layer for the same tokens.
        rows: query positions looked at, per window.
        cosines: of the rotary angles, ``[tokens, dims / 2]`` up to the longest window.
        sines: likewise.
        scaling: factor of the logits.
        window: how many tokens back a query may look; None for all.
        softcap: bound of the logits, or None.
        importance: how much an error of the output counts at each position, ``[tokens]`` per window; equally if empty.
    """

    original: tuple[torch.Tensor, ...]
    merged: tuple[torch.Tensor, ...]
    rows: tuple[torch.Tensor, ...]
    cosines: torch.Tensor
    sines: torch.Tensor
    scaling: float
    window: int | None = None
    softcap: float | None = None
    importance: tuple[torch.Tensor, ...] = ()


class LogitFit:
    """One layer's queries and keys fitted to the original's attention.

    Args:
        samples: on the device where to compute.
        original: the original weights, float32, its query heads in the order of the merged layer's.
        key_of: the original key-value head of each query head, in that order.
        moments: second moments of the merged layer's input, float32 ``[inputs, inputs]``.
        rotary: the layer's position embedding.
    """

    def __init__(
        self,
        samples: LogitSamples,
        original: LayerWeights,
        key_of: torch.Tensor,
        moments: torch.Tensor,
        rotary: Rotary,
    ) -> None:
        self._samples = samples
        self._half = rotary.dims // 2
        self._order = half_order(rotary, original.query.shape[1]).to(moments.device)
        self._count = sum(len(rows) for rows in samples.rows)
        self._rows = [inputs[rows] for inputs, rows in zip(samples.merged, samples.rows, strict=True)]
        self._power = float(moments.diagonal().mean())
        identity = torch.eye(len(moments), device=moments.device)
        self._inverse: torch.Tensor = torch.linalg.inv(moments + _MOMENT_DAMPING * self._power * identity)
        query, key = original.query[:, self._order], original.key[:, self._order]
        self._original, self._key_of = original, key_of
        self._targets: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []
        spreads: list[torch.Tensor] = []
        metric = original.output.mT @ original.output
        for index, (inputs, rows) in enumerate(zip(samples.original, samples.rows, strict=True)):
            queries = self._turn(inputs[rows] @ query.mT * samples.scaling, rows)
            keys = self._turn(inputs @ key.mT, None)[key_of]
            logits = queries @ keys.mT
            self._targets.append(logits)
            self._weights.append(self._attend(logits, rows))
            spread = _spread(self._weights[-1], (inputs @ original.value.mT)[key_of], metric)
            spreads.append(spread * samples.importance[index][rows] if samples.importance else spread)
        mean = torch.stack([spread.mean() for spread in spreads]).mean().clamp_min(torch.finfo(torch.float32).tiny)
        self._spreads = [(spread / mean)[..., None] for spread in spreads]

    def fit(self, weights: LayerWeights, rounds: int, steps: int) -> LayerWeights:
        """``weights`` with queries and keys refitted, in turns of ``steps`` steps each."""
        query, key = weights.query[:, self._order].float(), weights.key[:, self._order].float()
        for _ in range(rounds):
            query = query + self._fit_query(query, key, steps)
            key = key + self._fit_key(query, key, steps)
        back = torch.argsort(self._order)
        return replace(weights, query=query[:, back], key=key[:, back])

    def divergence(self, weights: LayerWeights) -> float:
        """Mean divergence of the attention from the original's per query and head, in nats, to second order."""
        query, key = weights.query[:, self._order].float(), weights.key[:, self._order].float()
        total = count = 0.0
        for batch, rows in enumerate(self._samples.rows):
            difference = self._targets[batch] - self._logits(batch, query, key)
            total += float((difference * self._centred(batch, difference)).sum()) / 2
            count += len(rows) * len(query)
        return total / count

    def attended(self, weights: LayerWeights) -> Iterator[torch.Tensor]:
        """What the heads of ``weights`` attend to: means of the merged layer's inputs, ``[rows, heads, inputs]``."""
        query, key = weights.query[:, self._order].float(), weights.key[:, self._order].float()
        samples = self._samples
        for batch, rows in enumerate(samples.rows):
            yield (self._attend(self._logits(batch, query, key), rows) @ samples.merged[batch]).transpose(0, 1)

    def original_outputs(self) -> list[torch.Tensor]:
        """What the original layer's attention adds, ``[rows, hidden]`` per window."""
        original = self._original
        found = []
        for attention, inputs in zip(self._weights, self._samples.original, strict=True):
            heads = attention @ (inputs @ original.value.mT)[self._key_of]
            found.append(torch.einsum("hnd,hod->no", heads, original.output))
        return found

    def _fit_query(self, query: torch.Tensor, key: torch.Tensor, steps: int) -> torch.Tensor:
        keys = [self._per_query(self._turn(inputs @ key.mT, None), query) for inputs in self._samples.merged]

        def logits(batch: int, change: torch.Tensor) -> torch.Tensor:
            return self._queries(batch, change) @ keys[batch].mT

        def adjoint(batch: int, change: torch.Tensor) -> torch.Tensor:
            rows = self._samples.rows[batch]
            by_row = change @ keys[batch] * (self._samples.scaling * self._spreads[batch])
            turned = self._turn(by_row, rows, back=True)
            return turned.mT @ self._rows[batch]

        scale = self._row_scale(keys)
        return self._solve(lambda batch: self._logits(batch, query, key), logits, adjoint, scale, steps)

    def _fit_key(self, query: torch.Tensor, key: torch.Tensor, steps: int) -> torch.Tensor:
        queries = [self._queries(batch, query) for batch in range(len(self._samples.rows))]
        spread = [queries * spreads for queries, spreads in zip(queries, self._spreads, strict=True)]

        def logits(batch: int, change: torch.Tensor) -> torch.Tensor:
            keys = self._turn(self._samples.merged[batch] @ change.mT, None)
            return queries[batch] @ self._per_query(keys, query).mT

        def adjoint(batch: int, change: torch.Tensor) -> torch.Tensor:
            by_head = change.mT @ spread[batch]
            summed = by_head.view(len(key), -1, *by_head.shape[1:]).sum(1)
            return self._turn(summed, None, back=True).mT @ self._samples.merged[batch]

        scale = self._row_scale(queries).view(len(key), -1, query.shape[1]).sum(1) / self._samples.scaling**2
        return self._solve(lambda batch: self._logits(batch, query, key), logits, adjoint, scale, steps)

    def _solve(
        self,
        current: Callable[[int], torch.Tensor],
        logits: Callable[[int, torch.Tensor], torch.Tensor],
        adjoint: Callable[[int, torch.Tensor], torch.Tensor],
        scale: torch.Tensor,
        steps: int,
    ) -> torch.Tensor:
        """The change of weights that brings the logits closest to the original's.

        Args:
            current: a window's logits as they are.
            logits: how a window's logits change with the weights.
            adjoint: the transposed map, its rows weighted by how much their outputs depend on where they look.
            scale: mean square of what each weight row meets, ``[heads, head_dim]``.
            steps: of conjugate gradients.
        """
        batches = range(len(self._samples.rows))
        damping = _RIDGE * scale.mean() * self._power

        def normal(change: torch.Tensor) -> torch.Tensor:
            mapped = (adjoint(batch, self._centred(batch, logits(batch, change))) for batch in batches)
            return sum(mapped, start=damping * change)

        def precondition(residual: torch.Tensor) -> torch.Tensor:
            scaled = residual / (scale + _ROW_DAMPING * scale.mean())[..., None]
            result: torch.Tensor = scaled @ self._inverse
            return result

        errors = (adjoint(b, self._centred(b, self._targets[b] - current(b))) for b in batches)
        first = next(errors)
        return conjugate_gradients(normal, sum(errors, start=first), precondition, steps)

    def _queries(self, batch: int, query: torch.Tensor) -> torch.Tensor:
        """Queries of the rows, times the factor of the logits."""
        return self._turn(self._rows[batch] @ query.mT * self._samples.scaling, self._samples.rows[batch])

    def _logits(self, batch: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        keys = self._turn(self._samples.merged[batch] @ key.mT, None)
        return self._queries(batch, query) @ self._per_query(keys, query).mT

    def _centred(self, batch: int, logits: torch.Tensor) -> torch.Tensor:
        """Logits ``[heads, rows, tokens]`` without their mean, weighted by the original's attention.

        ``w (x - Σ w x)`` is what a softmax makes of a gradient, and there is a kernel for that.
        """
        centred: torch.Tensor = torch._softmax_backward_data(logits, self._weights[batch], -1, torch.float32)
        return centred

    def _attend(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The original's attention, ``[heads, rows, tokens]``."""
        samples = self._samples
        if samples.softcap is not None:
            logits = samples.softcap * torch.tanh(logits / samples.softcap)
        distance = rows[:, None] - torch.arange(logits.shape[-1], device=rows.device)
        hidden = distance < 0
        if samples.window is not None:
            hidden = hidden | (distance >= samples.window)
        return logits.masked_fill(hidden, float("-inf")).softmax(-1)

    def _turn(self, heads: torch.Tensor, rows: torch.Tensor | None, *, back: bool = False) -> torch.Tensor:
        """Rotate ``[heads, tokens, head_dim]`` in half order, at positions ``rows`` or all; ``back`` undoes it."""
        half = self._half
        if half == 0:
            return heads
        positions = rows if rows is not None else slice(heads.shape[1])
        cosines, sines = self._samples.cosines[positions], self._samples.sines[positions]
        if back:
            sines = -sines
        real, imaginary, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
        return torch.cat([real * cosines - imaginary * sines, imaginary * cosines + real * sines, rest], dim=-1)

    @staticmethod
    def _per_query(keys: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return keys.repeat_interleave(len(query) // len(keys), 0)

    def _row_scale(self, met: Sequence[torch.Tensor]) -> torch.Tensor:
        """Mean square of the logits per unit of each row's output; equal within a rotated pair."""
        tokens = sum(part.shape[1] for part in met)
        mean = sum((part.square().sum(1) for part in met[1:]), start=met[0].square().sum(1)) / tokens
        half = self._half
        pairs = (mean[:, :half] + mean[:, half : 2 * half]) / 2
        return torch.cat([pairs, pairs, mean[:, 2 * half :]], dim=1) * (self._samples.scaling**2 * self._count)


def _spread(attention: torch.Tensor, values: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """Variance of the values under a row's attention, in the measure of the output projection: ``[heads, rows]``.

    Args:
        attention: ``[heads, rows, tokens]``.
        values: ``[heads, tokens, head_dim]``.
        metric: ``OᵀO`` of every head, ``[heads, head_dim, head_dim]``.
    """
    energy = (values @ metric * values).sum(-1, keepdim=True)
    mean = attention @ values
    return ((attention @ energy)[..., 0] - (mean @ metric * mean).sum(-1)).clamp_min(0)


def half_order(rotary: Rotary, head_dim: int) -> torch.Tensor:
    """The order of a head's rows in which rotated pairs stand as in ``half`` pairing."""
    rows = torch.arange(head_dim)
    turned = rows[: rotary.dims]
    if rotary.pairing == "interleaved":
        turned = torch.cat([turned[0::2], turned[1::2]])
    return torch.cat([turned, rows[rotary.dims :]])
