"""What a quantized key-value cache costs, by position, and the memory that it gains.

The artifact is run twice over the same long windows, with its cache in 16 bits and with the cache rounded by its own
scales as vLLM does it, which keeps it so (transformers has the values alone, and divides in the model's dtype); the
weights are the same, so what differs is the cache's.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass

import torch

from llmconvert.convert.inspection import describe_model
from llmconvert.convert.kv_cache import cache_layout
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.errors import DatasetError
from llmconvert.machine import of_machine
from llmconvert.memory import available_nbytes
from llmconvert.quantize.formats.dense_view import cached_by
from llmconvert.report.report import Check
from llmconvert.report.section import Cell, Column, Plot, Section, Series
from llmconvert.text.tokens import TokenWindows
from llmconvert.validate.long_inputs.windows import SHORTEST, longest_windows
from llmconvert.validate.measurement import Measurement, Subject

__all__ = ["CacheCostCheck"]

_NAME, _LABEL = "kv_cache.kl_mean", "KL divergence by the quantized cache alone"
_BINS = 8
# Of the memory that is free, for both logits of a window.
_USABLE = 0.25
# Rows of logits that are widened to float32 at a time.
_ROWS = 256


@dataclass(frozen=True, slots=True)
class CacheCostCheck(Measurement):
    """The cost of a quantized cache as a measurement; nothing where the artifact has no scales for one.

    Attributes:
        dataset: text.
        length: tokens per window at most; the model's trained length, the text and the memory may allow fewer.
        windows: how many.
    """

    dataset: str
    length: int = 4096
    windows: int = 2

    def measure(self, subject: Subject) -> list[Check]:
        """One check: the mean divergence in nats per token, with a table and a plot by position."""
        if not subject.dense.quantized_cache:
            return []
        try:
            windows = self._draw(subject)
        except DatasetError as error:
            if of_machine(error):
                raise
            return [Check.unmeasured(_NAME, str(error), asked=False, label=_LABEL, unit="nats", quiet=True)]
        plain = copy.copy(subject.dense)
        plain.quantized_cache = {}
        served = cached_by(subject.dense, "vllm")
        both = (subject.logits(view, windows.windows) for view in (plain, served))
        totals = torch.zeros((3, windows.length - 1), dtype=torch.float64)
        for window, before, after in zip(windows.windows, *both, strict=True):
            totals += _compared(window, before, after)
        divergence, nll_plain, nll = (totals / len(windows.windows)).tolist()
        return [_report(subject, windows, divergence, nll_plain, nll)]

    def _draw(self, subject: Subject) -> TokenWindows:
        limits = (Architecture.of(subject.dense.config).trained_length, describe_model(subject.dense).position_limit)
        length = min(self.length, *(limit for limit in limits if limit is not None))
        vocabulary = Architecture.of(subject.dense.config).vocab_size
        free = subject.memory if subject.memory is not None else available_nbytes(subject.device)
        while length > SHORTEST and 2 * length * vocabulary * torch.float32.itemsize > _USABLE * free:
            length //= 2
        return longest_windows(subject, self.dataset, self.windows, length)


def _compared(window: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Divergence and both negative log-likelihoods in nats, float64 ``[3, L - 1]``, of logits ``[1, L, V]``."""
    targets = window[0, 1:]
    found = torch.empty((3, len(targets)), dtype=torch.float64)
    for start in range(0, len(targets), _ROWS):
        rows = slice(start, min(start + _ROWS, len(targets)))
        plain, rounded = (logits[0, rows].float().cpu().log_softmax(-1) for logits in (before, after))
        found[0, rows] = (plain.exp() * (plain - rounded)).sum(-1).double()
        for index, scores in ((1, plain), (2, rounded)):
            found[index, rows] = -scores.gather(-1, targets[rows, None]).double()[:, 0]
    return found


def _report(
    subject: Subject, windows: TokenWindows, divergence: list[float], nll_plain: list[float], nll: list[float]
) -> Check:
    edges = [len(nll) * index // _BINS for index in range(_BINS + 1)]
    parts = [(low, high) for low, high in itertools.pairwise(edges) if high > low]

    def means(values: list[float]) -> list[float]:
        return [sum(values[low:high]) / (high - low) for low, high in parts]

    by_position, before, after = means(divergence), means(nll_plain), means(nll)
    mean, layout = sum(divergence) / len(divergence), cache_layout(Architecture.of(subject.dense.config))
    wide, narrow = (layout.nbytes(windows.length, 1, itemsize) for itemsize in (2, 1))
    rises = math.exp(sum(nll) / len(nll) - sum(nll_plain) / len(nll))
    text = (
        f"the cache alone changes perplexity by {100 * (rises - 1):+.2f} %: {by_position[0]:.2g} nats per token in the "
        f"first {parts[0][1]:,} predictions of a window, {by_position[-1]:.2g} in the last; {windows.length:,} tokens "
        f"take {narrow:,} bytes instead of {wide:,}"
    )
    rows: list[tuple[Cell, ...]] = [
        (f"{low:,} to {high:,}", cost, math.exp(plain), math.exp(rounded))
        for (low, high), cost, plain, rounded in zip(parts, by_position, before, after, strict=True)
    ]
    section = Section(
        name="cache-cost",
        title="Cost of the quantized cache",
        text="The artifact with its cache in 16 bits and by its own scales in E4M3, as vLLM rounds it on GPUs, "
        f"{len(windows.windows)} windows of "
        f"{windows.length:,} tokens; {text}.",
        columns=(
            Column(heading="predictions"),
            Column(heading="divergence", unit="nats"),
            Column(heading="perplexity, 16 bits"),
            Column(heading="perplexity, E4M3"),
        ),
        rows=tuple(rows),
        plot=Plot(
            caption="Divergence by the quantized cache alone, by position in the window.",
            x_label="tokens before",
            y_label="nats per token",
            series=(Series(label="E4M3 cache", x=tuple(float(low) for low, _ in parts), y=tuple(by_position)),),
        ),
        shown=("card",),
    )
    finite = math.isfinite(mean)
    detail = {"text": text, "windows": len(windows.windows), "length": windows.length, "perplexity_ratio": rises}
    return Check(
        name=_NAME,
        label=_LABEL,
        value=mean if finite else None,
        ok=finite,
        unit="nats",
        detail=detail,
        sections=(section,),
    )
