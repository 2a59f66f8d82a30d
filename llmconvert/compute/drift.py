"""How far hidden states of two models are apart: sums over tokens, the same however many processes add them up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from llmconvert.compute.ranks.group import Ranks

__all__ = ["DriftSums", "join_drift"]


class DriftSums:
    """Sums over tokens of a block's relative squared error and cosine, and those of each window.

    Attributes:
        parts: of each window the sum of squared errors, the sum of cosines, and how many tokens it has.
        square, cosine, tokens, windows: of all of them.
    """

    def __init__(self, parts: Iterable[tuple[float, float, float]] = ()) -> None:
        self.parts: list[tuple[float, float, float]] = []
        self.square = self.cosine = 0.0
        self.tokens = self.windows = 0
        for part in parts:
            self._take(*part)

    def add(self, reference: torch.Tensor, artifact: torch.Tensor) -> None:
        """Add a window's hidden states, ``[1, length, hidden size]`` each."""
        ours, theirs = reference[0].float(), artifact[0].float()
        norm = ours.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        square = float(((theirs - ours).square().sum(-1) / norm).sum(dtype=torch.float64))
        self._take(square, float(torch.cosine_similarity(ours, theirs, dim=-1).sum(dtype=torch.float64)), len(ours))

    def _take(self, square: float, cosine: float, tokens: float) -> None:
        self.parts.append((square, cosine, tokens))
        self.square += square
        self.cosine += cosine
        self.tokens += int(tokens)
        self.windows += 1


def join_drift(sums: Sequence[DriftSums], ranks: Ranks) -> list[DriftSums]:
    """Those of all processes, each added up in the order of windows, as one process does it."""
    if ranks.alone:
        return list(sums)
    own = [torch.tensor(one.parts, dtype=torch.float64).reshape(-1, 3) for one in sums]
    everyone = ranks.exchange(own, torch.device("cpu"))
    return [DriftSums(torch.cat(parts).tolist()) for parts in zip(*everyone, strict=True)]
