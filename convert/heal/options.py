"""How a merged model is healed, and which of its weights learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmconvert.training.options import TrainingOptions

__all__ = ["HealOptions", "TrainedWeights"]

#: Which weights are trained: those of attention, all of floats, or low-rank adapters of all linears in the blocks.
TrainedWeights = Literal["attention", "all", "lora"]


@dataclass(frozen=True)
class HealOptions(TrainingOptions):
    """Steps, text and schedule, and what is trained.

    Attributes:
        train: which weights.
        rank: of the adapters, where these are trained.
        alpha: what adapters are multiplied by, times their rank.
    """

    train: TrainedWeights = "attention"
    rank: int = 16
    alpha: float = 32.0
