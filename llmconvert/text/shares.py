"""Shares of datasets in a calibration mix, and the windows that each gives.

Its share of all windows, rounded so that the sum is what was asked for (largest remainders first): settled before a
text is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmconvert.errors import DatasetError

__all__ = ["DEFAULT_TEMPLATE", "MixedSource", "windows_by_share"]

#: The chat template that renders conversations if none is named.
DEFAULT_TEMPLATE = "default"
# How far shares may be off their sum, as written with a few digits.
_ROUNDING = 1e-3


@dataclass(frozen=True, slots=True)
class MixedSource:
    """One dataset of a mixture.

    Attributes:
        dataset: its name.
        share: of all windows, above 0.
        template: which of the tokenizer's chat templates renders conversations; ``none`` takes what is said in them as
            text.
    """

    dataset: str
    share: float
    template: str = DEFAULT_TEMPLATE


def windows_by_share(sources: Sequence[MixedSource], samples: int) -> list[int]:
    """How many of ``samples`` windows each source gives.

    Raises:
        DatasetError: shares don't add up to the whole, or one comes to no window.
    """
    total = math.fsum(source.share for source in sources)
    if abs(total - 1) > _ROUNDING:
        said = " + ".join(f"{100 * source.share:g} %" for source in sources)
        raise DatasetError(f"calibration mix: the shares {said} add up to {100 * total:g} %, not to 100 %")
    exact = [source.share / total * samples for source in sources]
    counts = [int(number) for number in exact]
    largest = sorted(range(len(sources)), key=lambda index: (counts[index] - exact[index], index))
    for index in largest[: samples - sum(counts)]:
        counts[index] += 1
    for source, count in zip(sources, counts, strict=True):
        if count < 1:
            raise DatasetError(
                f"calibration mix: {100 * source.share:g} % of {samples} windows is none of {source.dataset}; draw "
                "more windows (samples), or leave it out"
            )
    return counts
