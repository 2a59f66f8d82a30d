"""An artifact against its original on the same text, as one value; of several artifacts in one pass of the original.

The pass is :class:`~llmconvert.engine.divergence.SideBySide`. What it gives for an artifact is the same, to the bit,
whichever others are compared beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict

from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.compute.saturation import Saturation
from llmconvert.engine.divergence import BlockDivergence, Pair, SideBySide
from llmconvert.errors import GateError, LlmconvertError
from llmconvert.memory import release_freed_memory
from llmconvert.progress import SILENT, Progress
from llmconvert.report.section import Value
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.writer import write_file
from llmconvert.text.tokens import TokenWindows
from llmconvert.validate.predictions.perplexity import Comparing, Comparison, require_all

__all__ = ["Compared", "compare_models"]


class Compared(Value):
    """What a pass of both models gave.

    Attributes:
        comparison: of their predictions.
        blocks: drift of the hidden state, block by block; empty if the models' blocks don't correspond.
        saturation: of linears with fixed scales for their inputs, what came in and what was cut off.
    """

    model_config = ConfigDict(ser_json_inf_nan="constants")

    comparison: Comparison
    blocks: tuple[BlockDivergence, ...]
    saturation: tuple[Saturation, ...] = ()

    def write(self, path: Path) -> None:
        """Keep it, every number exactly."""
        write_file(path, self.model_dump_json().encode())

    @classmethod
    def read(cls, path: Path) -> Compared:
        """What :meth:`write` has kept."""
        return cls.model_validate_json(path.read_bytes())


def compare_models(
    original: Checkpoint,
    artifacts: Sequence[Checkpoint],
    text: TokenWindows,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
    ranks: Ranks = ALONE,
) -> list[Compared | LlmconvertError]:
    """Compare artifacts with the original, block by block in the memory of two, in one pass of the original.

    Args:
        original: dense weights.
        artifacts: dense weights of each.
        text: to predict.
        device: where to compute.
        dtype: of weights and activations; each checkpoint's own by default.
        seed: of the bootstrap.
        progress: one unit per block of each artifact.
        ranks: the processes, each of which runs a part of the text; several compare one artifact.

    Returns:
        for each artifact what was found, or why it could not be compared.

    Raises:
        CalibrationError: the original computes NaN or infinity.
        LlmconvertError: what is wrong with the last artifact, where nothing could be found for any.
    """
    sums = [Comparing(text.windows, scored=text.scored, seed=seed, ranks=ranks) for _ in artifacts]
    about: dict[str, Any] = {"device": device, "dtype": dtype, "progress": progress, "ranks": ranks}
    with ExitStack() as stack:
        failed, models = "", list[SideBySide]()
        try:
            models.append(stack.enter_context(SideBySide(original, artifacts, text.windows, **about)))
            pairs = models[0].logits()
            while _add_next(pairs, models[0], sums):
                pass
        except GateError as error:
            if ranks.alone:
                raise
            failed = str(error)
        require_all(failed, ranks)
        return [
            models[0].failures.get(number)
            or Compared(
                comparison=one.result(),
                blocks=models[0].divergences(number),
                saturation=models[0].saturation(number),
            )
            for number, one in enumerate(sums)
        ]


def _add_next(pairs: Iterator[Pair], models: SideBySide, sums: Sequence[Comparing]) -> bool:
    """Compare the next logits, which nothing holds any more when those after them are computed."""
    pair = next(pairs, None)
    if pair is None:
        return False
    with models.alone(pair.artifact):
        sums[pair.artifact].add(pair.ours, pair.theirs)
    # What is kept of a window would otherwise hold a piece of the heap that its logits went through: 4 MB for each.
    release_freed_memory()
    return True
