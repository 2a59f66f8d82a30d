"""Calibration text from several datasets, each with its share of the windows, through its own chat template or as text.

Windows are drawn from every source as from one alone, by the same seed, and then stand in an order of that seed: the
same settings give the same windows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmconvert.errors import DatasetError
from llmconvert.text.datasets import Corpus
from llmconvert.text.shares import MixedSource, windows_by_share
from llmconvert.text.tokens import Order, TokenWindows, WindowSource, draw_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["MixedCorpus", "draw_mixture"]


@dataclass(frozen=True)
class MixedCorpus:
    """The texts of a mixture: a source and its corpus each."""

    parts: tuple[tuple[MixedSource, Corpus], ...]

    @property
    def dataset(self) -> str:
        """The name of all together."""
        return " + ".join(f"{100 * source.share:g} % {corpus.dataset}" for source, corpus in self.parts)

    @property
    def digest(self) -> str:
        """Of all texts, in their order."""
        return hashlib.sha256("\0".join(corpus.digest for _, corpus in self.parts).encode()).hexdigest()


def draw_mixture(
    tokenizer: PreTrainedTokenizerBase,
    corpus: MixedCorpus,
    *,
    samples: int,
    length: int,
    order: Order = "shuffled",
    seed: int = 0,
    vocab_size: int | None = None,
) -> TokenWindows:
    """Draw ``samples`` windows of ``length`` tokens, from each source its share.

    With ``sequential`` order they are the first of each, one source after the other.

    Raises:
        DatasetError: shares don't add up, a source has too little text for its share, two are the same text, or see
            :func:`~llmconvert.text.tokens.draw_windows`.
    """
    counts = windows_by_share([source for source, _ in corpus.parts], samples)
    seen: dict[str, str] = {}
    for source, text in corpus.parts:
        if text.digest in seen:
            raise DatasetError(
                f"calibration mix: {seen[text.digest]} and {source.dataset} are the same text, of which the same "
                "windows would be drawn; give it one share"
            )
        seen[text.digest] = source.dataset
    drawn: list[TokenWindows] = []
    for (source, text), count in zip(corpus.parts, counts, strict=True):
        found = draw_windows(
            tokenizer,
            text,
            samples=count,
            length=length,
            order=order,
            seed=seed,
            vocab_size=vocab_size,
            template=source.template,
        )
        if found.drawn < count:
            raise DatasetError(
                f"calibration mix: {text.dataset} fills {found.drawn} windows of {length:,} tokens, and its "
                f"{100 * source.share:g} % are {count}; give it a smaller share, or draw fewer or shorter windows"
            )
        drawn.append(found)
    windows = [window for part in drawn for window in part.windows]
    if order == "shuffled":
        windows = [windows[index] for index in np.random.default_rng(seed).permutation(len(windows))]
    digest = hashlib.sha256(b"".join(window.numpy().astype("<i8").tobytes() for window in windows)).hexdigest()
    return replace(
        drawn[0],
        windows=tuple(windows),
        requested=samples,
        tokens_total=sum(part.tokens_total for part in drawn),
        dataset=corpus.dataset,
        corpus_digest=corpus.digest,
        digest=digest,
        sources=tuple(
            WindowSource(
                part.dataset, part.corpus_digest, part.drawn, torch.cat(part.windows).numel(), part.tokens_total
            )
            for part in drawn
        ),
    )
