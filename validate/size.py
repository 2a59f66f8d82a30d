"""Bytes on disk, and bits per weight with everything counted: scales, zero points, embeddings and norms too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from llmconvert.gguf.split import model_files
from llmconvert.report.report import Check
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint
from llmconvert.storage.directory import is_weight_file
from llmconvert.validate.measurement import Measurement, Subject

__all__ = ["SizeCheck", "Sizes", "bits_per_weight", "measure_sizes"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of a model directory on disk: its weight files with their index, and everything in it."""

    weights: int
    total: int


@dataclass(frozen=True, slots=True)
class SizeCheck(Measurement):
    """Bytes of the weight files, with a limit on them, and bits per weight.

    Attributes:
        max_bytes: what the weight files may take; None allows anything.
    """

    max_bytes: int | None = None

    def measure(self, subject: Subject) -> list[Check]:
        """Bytes of the weight files; against an original bits per number of it."""
        size = measure_sizes(subject.artifact).weights
        reference = subject.reference
        before: int | None = None
        if isinstance(reference, SafetensorsCheckpoint):
            before = measure_sizes(reference.directory).weights
        elif reference is not None:
            before = reference.nbytes
        ok = self.max_bytes is None or size <= self.max_bytes
        detail = {} if ok else {"text": f"the weights take {size:,} bytes, allowed are {self.max_bytes:,}"}
        checks = [
            Check(
                name="size_bytes",
                value=size,
                reference=before,
                limit=self.max_bytes,
                ok=ok,
                unit="bytes",
                detail=detail,
            )
        ]
        if subject.original is not None and reference is not None:
            bits = bits_per_weight(subject.original, subject.stored)
            whole = bits_per_weight(subject.original, reference)
            checks.append(Check(name="bits_per_weight", value=bits, reference=whole, unit="bits"))
        return checks


def measure_sizes(directory: Path) -> Sizes:
    """Add up the files of a model directory (regular files; links count as what they point to)."""
    if directory.is_file():  # a GGUF file is a model by itself, or with its other parts
        nbytes = sum(part.stat().st_size for part in model_files(directory))
        return Sizes(nbytes, nbytes)
    files = [path for path in directory.rglob("*") if path.is_file()]
    sizes = {path: path.stat().st_size for path in files}
    weights = sum(size for path, size in sizes.items() if path.parent == directory and is_weight_file(path.name))
    return Sizes(weights, sum(sizes.values()))


def bits_per_weight(source: Checkpoint, stored: Checkpoint) -> float:
    """Bits that ``stored`` spends per number of the source, over all tensors: scales, zero points, embeddings too."""
    numbers = sum(math.prod(info.shape) for info in source.infos.values())
    return 8 * stored.stored_nbytes / numbers
