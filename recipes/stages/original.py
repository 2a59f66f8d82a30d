"""What an artifact is measured against: the model in the recipe's dtype, on this disk or on the Hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmconvert.convert.cast import CastView
from llmconvert.convert.source import Source
from llmconvert.recipes.schema.recipe import Recipe
from llmconvert.recipes.stages.steps import DTYPES
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint

__all__ = ["Original"]


@dataclass(frozen=True, slots=True)
class Original:
    """The model that an artifact is made from.

    Attributes:
        key: identifies its contents.
        open: opens it; it can be opened more than once.
        note: what reading it costs, where that is worth saying.
    """

    key: str
    open: Callable[[], Checkpoint]
    note: str = ""

    @classmethod
    def on_disk(cls, key: str, directory: Path) -> Original:
        """Converted, in a directory."""
        return cls(key, lambda: SafetensorsCheckpoint(directory))

    @classmethod
    def on_the_hub(cls, key: str, source: Source, recipe: Recipe) -> Original:
        """As converting it would write it, each tensor downloaded whenever it is read."""
        settings, validation = recipe.convert, recipe.validation
        note = ""
        if validation is not None:
            # The inventory, the predictions and the continuations each read every tensor once.
            passes = 1 + (validation.perplexity is not None) + (validation.generation is not None)
            traffic = passes * source.checkpoint.nbytes
            note = f"the original is not on this disk and is read from the Hub again, {traffic:,} bytes in all"
        return cls(key, lambda: CastView(source.checkpoint, DTYPES[settings.dtype], settings.overflow), note)
