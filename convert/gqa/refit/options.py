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
        ridge: strength of the output refit, as a share of the mean second moment.
        residual: share of what the hidden state has lost before that a layer's attention is to make up for.
        sample_nbytes: memory for attention weights and inputs of the logit refit.
        windows: at most so many windows go into the logit refit.
    """

    outputs: bool = True
    logits: bool = True
    rounds: int = 1
    steps: int = 6
    ridge: float = 1e-3
    residual: float = 1.0
    sample_nbytes: int = 180_000_000
    windows: int = 64
