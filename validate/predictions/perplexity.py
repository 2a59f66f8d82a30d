"""Perplexity with its bootstrap interval, and KL divergence and top-1 agreement of two models on the same text.

A window of ``L`` tokens gives ``L - 1`` predictions. Where windows overlap, those at its end are scored that no window
before it has made, with the longest context there is. Perplexity is the exponential of the mean negative
log-likelihood; its interval is a bootstrap over windows (Efron 1979), because tokens of one window are not independent.
The divergence is KL(reference ‖ artifact) in nats over the whole vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.errors import CalibrationError, GateError, LlmconvertError, UsageError

__all__ = [
    "COMPARING_NBYTES",
    "Comparing",
    "Comparison",
    "PerplexityResult",
    "WorstToken",
    "compare_logits",
    "compare_window",
    "perplexity",
    "require_all",
]

T = TypeVar("T")

_RESAMPLES = 10_000
_WORST = 10
# Elements of a float32 working copy: 4 MB stays in the cache.
_CHUNK_ELEMENTS = 1 << 20
#: What comparing two models' logits takes beside them: pieces of both, their difference, and one as it is made.
COMPARING_NBYTES = 5 * 4 * _CHUNK_ELEMENTS


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """How well a model predicts a text.

    Attributes:
        nll: mean negative log-likelihood per token, in nats.
        tokens: predictions scored.
        window_nlls: mean of each window, in nats.
        low, high: 95 % bootstrap interval of the perplexity; None with fewer than two windows.
    """

    nll: float
    tokens: int
    window_nlls: tuple[float, ...] = field(repr=False)
    low: float | None
    high: float | None

    @property
    def ppl(self) -> float:
        """Perplexity: exp of the mean negative log-likelihood."""
        return math.exp(self.nll)


@dataclass(frozen=True, slots=True)
class WorstToken:
    """A prediction that changed: after ``position`` of ``window``, with both models' loss on the true next token."""

    window: int
    position: int
    kl: float
    reference_nll: float
    artifact_nll: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same windows.

    Attributes:
        increase: relative increase of the perplexity, 0.05 for 5 %.
        increase_low, increase_high: its 95 % interval by a paired bootstrap; None with fewer than two windows.
        kl_mean, kl_p99, kl_p999: KL(reference ‖ artifact) per prediction in nats: mean, 99th and 99.9th percentile.
        top1_agreement: share of predictions whose most likely token is the same.
        worst: the predictions with the largest divergence, largest first.
    """

    reference: PerplexityResult
    artifact: PerplexityResult
    increase: float
    increase_low: float | None
    increase_high: float | None
    kl_mean: float
    kl_p99: float
    kl_p999: float
    top1_agreement: float
    worst: tuple[WorstToken, ...]


def perplexity(
    logits: Iterable[torch.Tensor],
    windows: Sequence[torch.Tensor],
    *,
    scored: Sequence[int] | None = None,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> PerplexityResult:
    """Score ``windows`` (int64 ``[1, L]``) by a model's ``logits`` for them (``[1, L, V]``, any float dtype, in order).

    Args:
        scored: of each window, how many predictions at its end count; all by default.
        ranks: the processes, each of which has the logits of its share of the windows; all get the result.

    Raises:
        GateError: logits that are not finite, with window and position.
        ValueError: logits and windows don't belong together.
    """
    parts, counts = iter(logits), _counts(windows, scored)
    failed, nlls = "", list[np.ndarray]()
    try:
        for index in ranks.share(len(windows)):
            pieces = _scored(_next(parts), windows[index], index, "artifact", counts[index])
            nlls.append(torch.cat([_nll(*piece) for piece in pieces]).double().cpu().numpy())
        _require_end(parts)
    except GateError as error:
        if ranks.alone:
            raise
        failed = str(error)
    require_all(failed, ranks)
    return _result(_of_all(nlls, ranks), seed)


def require_all(failed: str, ranks: Ranks) -> None:
    """Fail in all processes if the artifact has failed in one.

    Args:
        failed: why, here; empty where it has not.
        ranks: the processes.

    Raises:
        GateError: with why it has in the first of them.
    """
    for said in ranks.ask(failed):
        if said:
            raise GateError(said)


def _of_all(parts: list[np.ndarray], ranks: Ranks) -> list[np.ndarray]:
    """What comes of every window, in order, whichever process has scored it."""
    if ranks.alone:
        return parts
    everyone = ranks.exchange([torch.from_numpy(part) for part in parts], torch.device("cpu"))
    return [part.numpy() for tensors in everyone for part in tensors]


def compare_logits(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]],
    windows: Sequence[torch.Tensor],
    *,
    scored: Sequence[int] | None = None,
    seed: int = 0,
) -> Comparison:
    """Walk the logits of two models, (reference, artifact), over the same windows side by side.

    Only one window's logits of each model are held, and a few 4 MB pieces of them in float32.

    Args:
        scored: of each window, how many predictions at its end count, for every number; all by default.

    Raises:
        GateError: the artifact's logits are not finite.
        CalibrationError: the reference's are not.
        UsageError: the vocabularies differ.
        ValueError: logits and windows don't belong together.
    """
    compared = Comparing(windows, scored=scored, seed=seed)
    both = iter(pairs)
    for _ in windows:
        compared.add(*_next(both))
    _require_end(both)
    return compared.result()


class Comparing:
    """A comparison under way: takes the logits of two models window after window.

    Args:
        windows, scored, seed: see :func:`compare_logits`.
        ranks: the processes, each of which takes its share of the windows; all get the result.
    """

    def __init__(
        self,
        windows: Sequence[torch.Tensor],
        *,
        scored: Sequence[int] | None = None,
        seed: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self._windows, self._counts, self._seed = windows, _counts(windows, scored), seed
        self._ranks, self._first = ranks, ranks.share(len(windows)).start
        self._parts: list[np.ndarray] = []

    def add(self, reference: torch.Tensor, artifact: torch.Tensor) -> None:
        """The logits of both, ``[1, L, V]``, for the next window.

        Raises:
            LlmconvertError: see :func:`compare_logits`.
        """
        index = self._first + len(self._parts)
        self._parts.append(compare_window(reference, artifact, self._windows[index], index, self._counts[index]))

    def result(self) -> Comparison:
        """When all windows were there."""
        parts, counts, seed = _of_all(self._parts, self._ranks), self._counts, self._seed
        reference_result = _result([part[:, 0] for part in parts], seed)
        artifact_result = _result([part[:, 1] for part in parts], seed)
        differences = np.array(artifact_result.window_nlls) - np.array(reference_result.window_nlls)
        low, high = _interval(differences, np.array(counts), seed)
        divergence = np.concatenate([part[:, 2] for part in parts])
        return Comparison(
            reference=reference_result,
            artifact=artifact_result,
            increase=math.expm1(artifact_result.nll - reference_result.nll),
            increase_low=None if low is None else math.expm1(low),
            increase_high=None if high is None else math.expm1(high),
            kl_mean=float(divergence.mean()),
            kl_p99=float(np.quantile(divergence, 0.99)),
            kl_p999=float(np.quantile(divergence, 0.999)),
            top1_agreement=float(np.concatenate([part[:, 3] for part in parts]).mean()),
            worst=_worst(parts, self._windows),
        )


def _next(parts: Iterator[T]) -> T:
    """The next window's logits: under no name in a loop, nor in a ``zip``, which would hold them while those of the
    window after it are computed. With a large vocabulary they are most of what a comparison holds."""
    try:
        return next(parts)
    except StopIteration:
        raise ValueError("there are fewer logits than windows") from None


def _require_end(parts: Iterator[object]) -> None:
    if next(parts, None) is not None:
        raise ValueError("there are more logits than windows")


def _counts(windows: Sequence[torch.Tensor], scored: Sequence[int] | None) -> list[int]:
    """How many predictions of each window count."""
    everything = [window.shape[1] - 1 for window in windows]
    if any(count < 1 for count in everything):
        raise ValueError("a window of one token holds no prediction")
    if scored is None:
        return everything
    if any(not 1 <= count <= most for count, most in zip(scored, everything, strict=True)):
        raise ValueError(f"windows of {everything} predictions can't be scored on {list(scored)}")
    return list(scored)


def compare_window(
    reference: torch.Tensor, artifact: torch.Tensor, window: torch.Tensor, index: int, count: int
) -> np.ndarray:
    """Two models on one window, prediction by prediction.

    Args:
        reference, artifact: logits ``[1, L, V]``.
        window: token ids ``[1, L]``.
        index: its number, for what is said when something is wrong with it.
        count: how many predictions at its end are scored.

    Returns:
        float64 ``[count, 4]``: loss of the reference and of the artifact and divergence in nats, and whether the most
        likely token is the same (0 or 1).

    Raises:
        LlmconvertError: see :func:`compare_logits`.
    """
    if reference.shape[-1] != artifact.shape[-1]:
        raise UsageError(
            f"the reference predicts {reference.shape[-1]:,} tokens, the artifact {artifact.shape[-1]:,}; "
            "models with different vocabularies cannot be compared token by token"
        )
    # Filled in place: many small tensors would settle in the holes that the large pieces leave, which then fit none.
    found = torch.empty((count, 4), dtype=torch.float64)
    end = 0
    pairs = zip(
        _scored(reference, window, index, "reference", count),
        _scored(artifact, window, index, "artifact", count),
        strict=True,
    )
    for (ours, targets), (theirs, _) in pairs:
        theirs = theirs.to(ours.device)
        agreement = ours.argmax(-1) == theirs.argmax(-1)
        losses = _nll(ours, targets), _nll(theirs, targets)
        # p · (log p − log q), in place: the pieces are large.
        difference = ours - theirs
        divergence = difference.mul_(ours.exp_()).sum(-1)
        begin, end = end, end + len(targets)
        for column, values in enumerate((*losses, divergence, agreement)):
            found[begin:end, column] = values
    return found.numpy()


def _scored(
    logits: torch.Tensor, window: torch.Tensor, index: int, who: str, count: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Log-probabilities (float32 ``[rows, V]``, fresh memory) and true next tokens ``[rows]`` of the last ``count``
    predictions, some rows at a time."""
    if logits.ndim != 3 or tuple(logits.shape[:2]) != tuple(window.shape) or window.shape[0] != 1:
        raise ValueError(f"logits {tuple(logits.shape)} don't belong to a window of shape {tuple(window.shape)}")
    length, vocabulary = logits.shape[1:]
    rows = max(1, _CHUNK_ELEMENTS // vocabulary)
    for start in range(length - 1 - count, length - 1, rows):
        stop = min(start + rows, length - 1)
        scores = torch.log_softmax(logits[0, start:stop].float(), dim=-1)
        # Any logit that is not finite shows in the sum of its row.
        bad = (~torch.isfinite(scores.sum(-1))).nonzero()
        if len(bad):
            raise _not_finite(who, index, start + int(bad[0]))
        yield scores, window[0, start + 1 : stop + 1].to(scores.device)


def _nll(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -scores.gather(1, targets.unsqueeze(1)).squeeze(1)


def _not_finite(who: str, window: int, position: int) -> LlmconvertError:
    error = CalibrationError if who == "reference" else GateError
    return error(
        f"the {who}'s logits are not finite at token {position} of window {window}: the model computes NaN or inf; "
        "check its dtype (float16 overflows where bfloat16 does not) and its weights (the inventory names bad tensors)"
    )


def _result(parts: Sequence[np.ndarray], seed: int) -> PerplexityResult:
    if not parts:
        raise ValueError("no windows to score")
    counts = np.array([len(part) for part in parts])
    means = np.array([part.mean() for part in parts])
    low, high = _interval(means, counts, seed)
    return PerplexityResult(
        nll=float(np.average(means, weights=counts)),
        tokens=int(counts.sum()),
        window_nlls=tuple(means.tolist()),
        low=None if low is None else math.exp(low),
        high=None if high is None else math.exp(high),
    )


def _interval(means: np.ndarray, counts: np.ndarray, seed: int) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of the token-weighted mean, resampling windows."""
    if len(means) < 2:
        return None, None
    chosen = np.random.default_rng(seed).integers(0, len(means), (_RESAMPLES, len(means)))
    resampled = (means * counts)[chosen].sum(1) / counts[chosen].sum(1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)


def _worst(parts: Sequence[np.ndarray], windows: Sequence[torch.Tensor]) -> tuple[WorstToken, ...]:
    firsts = [windows[index].shape[1] - 1 - len(part) for index, part in enumerate(parts)]
    candidates = [
        WorstToken(window, firsts[window] + int(row), float(part[row, 2]), float(part[row, 0]), float(part[row, 1]))
        for window, part in enumerate(parts)
        for row in np.argsort(-part[:, 2])[:_WORST]
    ]
    return tuple(sorted(candidates, key=lambda token: -token.kl)[:_WORST])
