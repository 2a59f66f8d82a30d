"""The model that an artifact is measured against, wherever it lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmconvert.checkpoint import Checkpoint, SafetensorsCheckpoint
from llmconvert.stages import StageResult

__all__ = ["Original"]


@dataclass(frozen=True, slots=True)
class Original:
    """What the artifact is measured against, the model in the recipe's dtype: what identifies it, how to open it, and
    what that costs, where it is not on this disk."""

    key: str
    open: Callable[[], Checkpoint]
    note: str = ""

    @classmethod
    def of(cls, stage: StageResult) -> Original:
        return cls(stage.key, lambda: SafetensorsCheckpoint(stage.path / "model"))
