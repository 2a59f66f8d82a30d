"""How much of merged attention is refitted."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RefitOptions"]


@dataclass(frozen=True, slots=True)
class RefitOptions:
    """How much is refitted.

    Attributes:
        outputs: whether the output projections are, and with queries and keys the values.
        logits: whether queries and keys are.
        rounds: turns of queries and keys.
        steps: of conjugate gradients per turn.
        ridge: how strongly values and output projections are drawn to what they were, as a share of mean second
            moments; with a hundredth of it merged attention fits text of the calibration's kind no better, and other
            text much worse (``bench/results/2026-11-30-kv-heads-epyc.md``).
        residual: share of what the hidden state has lost before that a layer's attention is to make up for.
        sample_nbytes: memory for attention weights and inputs of the logit refit.
        windows: at most so many windows go into the logit refit.
    """

    outputs: bool = True
    logits: bool = True
    rounds: int = 1
    steps: int = 6
    ridge: float = 0.1
    residual: float = 1.0
    sample_nbytes: int = 180_000_000
    windows: int = 64
