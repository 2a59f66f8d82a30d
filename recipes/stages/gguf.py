"""``format: gguf`` in a recipe: the steps from its settings to a file.

The scheme is one of llama.cpp's types (``q4_k_m``), or one whose codes a GGUF type holds as they are
(``w4a16-g32-sym``).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from llmconvert.gguf.ggml.mix import GgmlMix
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.formats.gguf import Gguf
from llmconvert.quantize.gguf_job import GgufResult, check_gguf_output, write_gguf
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.methods.base import METHODS, needs_calibration
from llmconvert.recipes.schema.recipe import QuantizeSettings
from llmconvert.report.steps import QuantizeReport
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint

__all__ = ["GGUF", "calibrates", "quantize_gguf"]

#: The format's name in a recipe.
GGUF: Final = "gguf"


def calibrates(settings: QuantizeSettings) -> bool:
    """Whether the section's method or budget reads calibration text."""
    return settings.budget is not None or (settings.method in METHODS and needs_calibration(settings.method))


def quantize_gguf(
    source: Checkpoint,
    output: Path,
    settings: QuantizeSettings,
    *,
    name: str,
    windows: Sequence[torch.Tensor] = (),
    identity: str = "",
    device: torch.device,
    memory: int | None,
    progress: Progress = SILENT,
) -> QuantizeReport:
    """Write ``source`` as GGUF, or go on where an earlier call was stopped.

    Args:
        output: a ``.gguf`` file, or a directory for one.
        name: of the model.
        windows, identity, device, memory: as in :func:`llmconvert.quantize.job.quantize_checkpoint`.
    """
    if isinstance(settings.scheme, GgmlMix):
        written = write_gguf(
            source,
            output,
            mix=settings.scheme,
            name=name,
            windows=windows if needs_calibration(settings.method) else (),
            device=device,
            memory_budget=memory,
            identity=identity,
            progress=progress,
        )
        return _report(written)
    # The codes come first, as an artifact of their own; it goes when the file is whole.
    mix = Gguf().mix_of(settings.scheme)
    check_gguf_output(output, name, mix)
    codes = output.absolute().parent / f".{output.name}.codes"
    if not codes.exists():
        quantize_checkpoint(
            source,
            codes,
            method=settings.method,
            options=settings.options,
            scheme=settings.scheme,
            windows=windows,
            device=device,
            memory_budget=memory,
            identity=identity,
            progress=progress,
        )
    with SafetensorsCheckpoint(codes) as quantized:
        written = write_gguf(open_dense(quantized), output, mix=mix, name=name, identity=identity, progress=progress)
    shutil.rmtree(codes)
    return _report(written)


def _report(written: GgufResult) -> QuantizeReport:
    return QuantizeReport(
        file=written.path.name,
        layers=sum(count for kind, count in written.types.items() if kind not in ("F32", "F16", "BF16")),
        types=dict(written.types),
        bytes=written.nbytes,
        seconds=round(written.seconds, 3),
        resumed_tensors=written.resumed_tensors,
    )
