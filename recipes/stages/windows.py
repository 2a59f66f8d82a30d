"""Token windows of a recipe: which text, which tokenizer, kept in a stage so that a run draws them once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save

from llmconvert.engine.architecture.config import declared_number
from llmconvert.errors import UsageError
from llmconvert.recipes.schema.recipe import CalibrateSettings, PerplexitySettings
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.writer import write_file
from llmconvert.text.datasets import Corpus, load_dataset_text
from llmconvert.text.tokenizer import load_tokenizer
from llmconvert.text.tokens import TokenWindows, draw_windows

__all__ = ["WindowRequest", "load_windows", "save_windows"]

_FILE = "windows.safetensors"
#: More windows than any text has.
_ALL = 1 << 40


@dataclass(frozen=True, slots=True)
class WindowRequest:
    """Windows to draw. ``setting`` is the recipe's section, for errors."""

    setting: str
    dataset: str
    samples: int
    length: int
    order: Literal["shuffled", "sequential"]
    seed: int
    stride: int | None = None

    @classmethod
    def calibration(cls, settings: CalibrateSettings) -> WindowRequest:
        """What ``calibrate`` asks for."""
        return cls("calibrate", settings.dataset, settings.samples, settings.length, settings.order, settings.seed)

    @classmethod
    def evaluation(cls, settings: PerplexitySettings) -> WindowRequest:
        """What ``validate.perplexity`` asks for: the first windows of the text."""
        samples = settings.max_windows or _ALL
        return cls("validate.perplexity", settings.dataset, samples, settings.window, "sequential", 0, settings.stride)

    def corpus(self) -> Corpus:
        """The text.

        Raises:
            DatasetError: it does not exist or cannot be read.
        """
        return load_dataset_text(self.dataset)

    def draw(self, checkpoint: Checkpoint, corpus: Corpus) -> TokenWindows:
        """Tokenize ``corpus`` with the model's tokenizer and cut the windows.

        Raises:
            UsageError: the model has fewer positions than a window.
            DatasetError: too little text, or text that does not go with the tokenizer.
            SourceError: the model has no usable tokenizer.
        """
        positions = declared_number(checkpoint.config, "max_position_embeddings")
        if positions is not None and self.length > positions:
            raise UsageError(
                f"{self.setting}: windows of {self.length:,} tokens don't fit the model's {positions:,} positions; "
                f"take {positions:,} tokens at most"
            )
        return draw_windows(
            load_tokenizer(checkpoint),
            corpus,
            samples=self.samples,
            length=self.length,
            stride=self.stride,
            order=self.order,
            seed=self.seed,
            vocab_size=declared_number(checkpoint.config, "vocab_size"),
        )


def save_windows(windows: TokenWindows, directory: Path) -> Mapping[str, Any]:
    """Write windows into a stage's directory; returns the rest of what :func:`load_windows` needs."""
    write_file(directory / _FILE, save({"ids": torch.cat(windows.windows)}))
    return {
        "requested": windows.requested,
        "drawn": windows.drawn,
        "tokens_total": windows.tokens_total,
        "dataset": windows.dataset,
        "corpus_digest": windows.corpus_digest,
        "digest": windows.digest,
        "bos": windows.bos,
        "stride": windows.stride,
    }


def load_windows(directory: Path, details: Mapping[str, Any]) -> TokenWindows:
    """What :func:`save_windows` wrote."""
    ids = load_file(directory / _FILE)["ids"]
    return TokenWindows(
        tuple(row.unsqueeze(0).clone() for row in ids),
        details["requested"],
        details["tokens_total"],
        details["dataset"],
        details["corpus_digest"],
        details["digest"],
        details["bos"],
        details["stride"],
    )
