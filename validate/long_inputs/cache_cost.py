"""What a quantized key-value cache costs, by position, and the memory that it gains.

The artifact is run twice over the same long windows, with its cache in 16 bits and with the cache rounded by its own
scales as vLLM does it, which keeps it so (transformers has the values alone, and divides in the model's dtype); the
weights are the same, so what differs is the cache's.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmconvert.context import Context
from llmconvert.convert.inspection import describe_model
from llmconvert.convert.kv_cache import cache_layout
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.engine.divergence import Pair, SideBySide
from llmconvert.engine.memory import kept_of
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import CalibrationError, DatasetError, GateError
from llmconvert.machine import of_machine
from llmconvert.memory import available_nbytes, keeping_freed_memory
from llmconvert.needs import Needs
from llmconvert.quantize.formats.dense_view import cached_by
from llmconvert.report.report import Check
from llmconvert.report.section import Cell, Column, Plot, Section, Series
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.text.tokens import TokenWindows
from llmconvert.validate.long_inputs.windows import SHORTEST, longest_windows
from llmconvert.validate.measurement import Measurement, Planned, Subject
from llmconvert.validate.predictions.needs import comparing_needs
from llmconvert.validate.predictions.perplexity import compare_window

__all__ = ["CacheCostCheck"]

_NAME, _LABEL = "kv_cache.kl_mean", "KL divergence by the quantized cache alone"
_BINS = 8


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

    def needs(self, planned: Planned) -> Needs:
        """That of comparing the artifact with itself on windows as long as they may be."""
        if not planned.cached:
            return Needs()
        return self._fitting(planned.dense, planned.context, planned.dtype, planned.build)[1]

    def measure(self, subject: Subject) -> list[Check]:
        """One check: the mean divergence in nats per token, with a table and a plot by position."""
        if not subject.dense.quantized_cache:
            return []
        context = Context(subject.device, subject.memory, progress=subject.progress)
        try:
            length, needs = self._fitting(subject.dense, context, subject.dtype, Skeleton)
            windows = longest_windows(subject, self.dataset, self.windows, length)
        except DatasetError as error:
            if of_machine(error):
                raise
            return [Check.unmeasured(_NAME, str(error), asked=False, label=_LABEL, unit="nats", quiet=True)]
        try:
            with keeping_freed_memory(kept_of(needs.memory, subject.device)):
                plain, rounded, divergence = _by_position(subject, windows)
        except GateError as error:
            return [_failed(str(error))]
        except CalibrationError as error:
            return [_failed(f"with its cache in 16 bits, {str(error).replace('the original', 'the artifact', 1)}")]
        return [_report(subject, windows, divergence, plain, rounded)]

    def _fitting(
        self, model: Checkpoint, context: Context, dtype: torch.dtype | None, build: Callable[..., Skeleton]
    ) -> tuple[int, Needs]:
        """Tokens of a window, and what comparing so many takes: half as often as the memory asks for it."""
        limits = (Architecture.of(model.config).trained_length, describe_model(model).position_limit)
        length = min(self.length, *(limit for limit in limits if limit is not None))
        free = context.memory if context.memory is not None else available_nbytes(context.device)
        while True:
            needs = comparing_needs(model, [length] * self.windows, 1, context, dtype, build)
            if needs.on(context.device) <= free or length <= SHORTEST:
                return length, needs
            length = max(SHORTEST, length // 2)


def _by_position(subject: Subject, windows: TokenWindows) -> list[list[float]]:
    """Losses with the cache in 16 bits and with it as it is served, and their divergence: nats, at each position."""
    plain = copy.copy(subject.dense)
    plain.quantized_cache = {}
    served = cached_by(subject.dense, "vllm")
    about: dict[str, Any] = {"device": subject.device, "dtype": subject.dtype, "progress": subject.progress}
    found: list[np.ndarray] = []
    with SideBySide(plain, [served], windows.windows, **about, drift=False) as models:
        pairs = models.logits()
        for index, window in enumerate(windows.windows):
            found.append(_compare_next(pairs, window, index))
    means: np.ndarray = np.mean(found, axis=0)[:, :3]
    return list(means.T.tolist())


def _compare_next(pairs: Iterator[Pair], window: torch.Tensor, index: int) -> np.ndarray:
    """Of the next logits, which nothing holds any more when those after them are computed."""
    pair = next(pairs)
    return compare_window(pair.ours, pair.theirs, window, index, window.shape[1] - 1)


def _failed(text: str) -> Check:
    return Check(name=_NAME, label=_LABEL, ok=False, unit="nats", detail={"text": text})


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
    detail = {"text": text, "windows": len(windows.windows), "length": windows.length, "perplexity_ratio": rises}
    return Check(
        name=_NAME,
        label=_LABEL,
        value=mean,
        ok=True,
        unit="nats",
        detail=detail,
        sections=(section,),
    )
