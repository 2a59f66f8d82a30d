"""Windows as long as the text fills: asked for at a length, and at half of it as often as the text is too short."""

from __future__ import annotations

from collections.abc import Callable

from llmconvert.errors import DatasetError
from llmconvert.text.datasets import load_dataset_text
from llmconvert.text.tokenizer import load_tokenizer
from llmconvert.text.tokens import TokenWindows, draw_windows
from llmconvert.validate.measurement import Subject

__all__ = ["SHORTEST", "longest_windows"]

#: Tokens of the shortest window that says anything about long inputs.
SHORTEST = 64


def longest_windows(
    subject: Subject, dataset: str, count: int, length: int, note: Callable[[str], object] = lambda _: None
) -> TokenWindows:
    """The first ``count`` windows of a dataset, of ``length`` tokens of the subject's tokenizer or fewer.

    Args:
        note: told of each length that the text does not fill.

    Raises:
        DatasetError: it fills not even a window of :data:`SHORTEST` tokens, or there is none such.
    """
    tokenizer, corpus = load_tokenizer(subject.stored), load_dataset_text(dataset)
    while True:
        try:
            return draw_windows(tokenizer, corpus, samples=count, length=length, order="sequential")
        except DatasetError:
            if length <= SHORTEST:
                raise
            note(f"the text does not fill a window of {length:,} tokens")
            length //= 2
