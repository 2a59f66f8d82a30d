"""How a student is trained: what :mod:`llmconvert.training.loop` has to be told."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TrainingOptions"]


@dataclass(frozen=True)
class TrainingOptions:
    """Steps, text and schedule of a training.

    Attributes:
        steps: of the optimizer.
        batch: windows per step.
        learning_rate: at its highest, after the warm-up; falls to zero along half a cosine.
        warmup: share of the steps in which the rate rises from zero.
        clip: largest norm of a step's gradient.
        stride: one of so many positions has its predictions compared, the others have their turn later. Output heads
            are a third of a step's work in small models, but what the skipped positions would teach is worth more.
        hidden: weight of the hidden states' error beside the divergence of predictions.
        held_out: windows that are not learned from and tell when to stop.
        evaluate_every: steps between looks at them.
        patience: stop after so many looks in the second half of the steps without a new best.
        save_every: steps between states on disk.
        seed: of the order of windows.
    """

    steps: int = 200
    batch: int = 2
    learning_rate: float = 3e-3
    warmup: float = 0.05
    clip: float = 1.0
    stride: int = 1
    hidden: float = 0.5
    held_out: int = 8
    evaluate_every: int = 25
    patience: int = 3
    save_every: int = 25
    seed: int = 0
