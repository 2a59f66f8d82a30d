"""The protocol of a measurement, and the subject it is made on; everything in a report comes from a list of these.

One file under ``validate/`` holds a frozen dataclass with its settings and the methods of :class:`Measurement`; one
line in ``recipes/stages/measurements.py`` makes it from the recipe. What it returns appears everywhere by itself: in
``report.json``, in the terminal, on the page and on the model card. What one measurement needs of another it finds
among :attr:`Subject.checks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch

from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.context import Context
from llmconvert.engine.evaluation import stream_logits
from llmconvert.engine.skeleton import Skeleton
from llmconvert.needs import Needs
from llmconvert.progress import SILENT, Progress
from llmconvert.report.report import Check
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.directory import read_config
from llmconvert.text.tokens import TokenWindows

__all__ = ["Measurement", "Planned", "Subject", "why_not_loadable"]


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        artifact: the artifact's directory, or its GGUF file.
        stored: it as it is on disk.
        dense: it with dequantized weights.
        reference: the original as stored; None if there is none to compare with.
        original: the original as dense weights.
        windows: evaluation text; None if the recipe names none.
        device: where to compute.
        dtype: what to compute in; the checkpoints' own if None.
        memory: bytes that may be used; what is free if None.
        kept: bytes of the process up to which comparing keeps what it frees.
        seed: of whatever is drawn.
        progress: where long work is shown.
        checks: what was measured before, in order.
        ranks: the processes that measure together; all but the first give no checks.
    """

    artifact: Path
    stored: Checkpoint
    dense: Checkpoint
    reference: Checkpoint | None
    original: Checkpoint | None
    windows: TokenWindows | None
    device: torch.device
    dtype: torch.dtype | None = None
    memory: int | None = None
    kept: int = 0
    seed: int = 0
    progress: Progress = SILENT
    checks: tuple[Check, ...] = ()
    ranks: Ranks = ALONE

    @property
    def unloadable(self) -> str:
        """Why transformers does not read the artifact; empty where it does."""
        return why_not_loadable(self.artifact)

    def check(self, name: str) -> Check | None:
        """The check of that name among those that were measured before; None without one."""
        return next((check for check in self.checks if check.name == name), None)

    def logits(
        self, model: Checkpoint, windows: Sequence[torch.Tensor], *, passed: Callable[[Skeleton], None] | None = None
    ) -> Iterator[torch.Tensor]:
        """Of dense weights, ``[1, length, vocabulary]`` per window, in the arithmetic that quality is measured in.

        See :func:`~llmconvert.engine.evaluation.stream_logits`.
        """
        return stream_logits(
            model,
            windows,
            device=self.device,
            dtype=self.dtype,
            progress=self.progress,
            passed=passed,
            products="wide",
        )


@dataclass(frozen=True)
class Planned:
    """What will be measured, as far as headers tell.

    Attributes:
        dense: the weights of the original, or of the artifact where there is none; the artifact is taken to be like it.
        windows: evaluation text; None if the recipe names none.
        compared: whether there is an original beside the artifact.
        loadable: whether the artifact is a directory that transformers reads, neither a GGUF file nor MLX's.
        stored: bytes of the artifact's weight files.
        cached: whether the artifact has scales for its key-value cache.
        context: device and memory.
        dtype: what is computed in; the checkpoints' own if None.
        build: builds a model on shapes.
    """

    dense: Checkpoint
    windows: TokenWindows | None
    compared: bool
    loadable: bool
    stored: int
    cached: bool
    context: Context
    dtype: torch.dtype | None = None
    build: Callable[..., Skeleton] = Skeleton


def why_not_loadable(artifact: Path) -> str:
    """Why transformers does not read an artifact, which other runtimes do; empty where it does.

    mlx-lm's config says what is quantized, and not by which method, without which transformers loads nothing.
    """
    if not (artifact / "config.json").exists():
        return "the artifact is GGUF, which transformers does not run as it is"
    config = read_config(artifact)
    own, declared = config.get("quantization"), config.get("quantization_config")
    if isinstance(own, dict) and not (isinstance(declared, dict) and "quant_method" in declared):
        return "the artifact is MLX's, which transformers does not run; validate.serve asks mlx-lm"
    return ""


class Measurement(Protocol):
    """Something to measure on every artifact: a frozen dataclass of settings that derives from this."""

    #: Whether several processes measure it together; the first one alone measures everything else.
    together: ClassVar[bool] = False

    def require(self) -> None:
        """Refuse, before any work, what can't be done in this environment; by default nothing is needed.

        Raises:
            UnsupportedError: with what is missing, and how to get it.
        """
        return

    def accept(self, original: Checkpoint) -> None:
        """Refuse, before any work, a model on whose artifact this can't be measured; by default every one is taken.

        Args:
            original: as stored; only what is quick to try is tried.

        Raises:
            LlmconvertError: with what the model lacks or what fails.
        """
        return

    def needs(self, planned: Planned) -> Needs:
        """What :meth:`measure` takes of this process beyond what comparing the two models takes; by default nothing.

        What it does in a process of its own is not counted: that keeps to the memory that is left.
        """
        return Needs()

    def measure(self, subject: Subject) -> Sequence[Check]:
        """Its checks, in order. A number that could not be had is a check without a value, whose text says why.

        Nothing where the subject lacks what it is about: text, or an original. A missing package or a model that is too
        large is not a failure of the artifact; NaN is.

        Raises:
            UsageError: original and artifact can't be compared at all.
            SourceError: files cannot be read, or the original computes NaN or infinity.
        """
