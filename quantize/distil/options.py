"""How a quantized model is distilled."""

from __future__ import annotations

from dataclasses import dataclass

from llmconvert.training.options import TrainingOptions

__all__ = ["DistilOptions"]


@dataclass(frozen=True)
class DistilOptions(TrainingOptions):
    """Steps, text and schedule, and what is trained.

    Attributes:
        learning_rate: of scales and norms, as a share of their size.
        code_rate: of the codes, in steps between one code and the next; zero leaves codes as they are. No code moves
            further than to its neighbours.
        norms: whether the weights of norms are trained too.
    """

    steps: int = 150
    learning_rate: float = 1e-3
    code_rate: float = 0.0
    norms: bool = True
    hidden: float = 0.0

    @property
    def whole(self) -> tuple[str, ...]:
        """Settings asked for that take all weights of a model in memory together."""
        asked = (("code_rate", self.code_rate), ("hidden", self.hidden))
        return tuple(name for name, value in asked if value)
