"""Importance matrix (llama.cpp's ``llama-imatrix``): GGML blocks whose errors are weighted by the mean squared inputs.

An error in a weight changes the output by the error times the input, so the mean squared error of an output is
``Σ importance · error²`` as far as inputs are uncorrelated, where importance is the mean square of a column's inputs:
the diagonal of the linear's Hessian. llama.cpp calls the whole an importance matrix. It is measured on calibration
text, or read from a file that llama.cpp or this package has made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.errors import CalibrationError, SourceError
from llmconvert.gguf.ggml.blocks import Codec
from llmconvert.gguf.records.importance import ImportanceMatrix, read_importance
from llmconvert.quantize.methods.base import Calibration, Method, Numbers

__all__ = ["Imatrix", "mean_squares", "weighs"]


@dataclass(frozen=True, repr=False)
class Imatrix:
    """The method.

    Attributes:
        file: an importance matrix of llama.cpp's, in GGUF or as .dat, in the place of calibration text.
    """

    file: str = ""

    calibration: ClassVar[Calibration] = "squares"
    original: ClassVar[bool] = False
    numbers: ClassVar[Numbers] = "none"

    def __post_init__(self) -> None:
        if self.file:
            # What is read asks for no text: this one's calibration is another than its class's.
            object.__setattr__(self, "calibration", "none")
            object.__setattr__(self, "_found", None)

    def __repr__(self) -> str:
        """With the contents of the file, which decide what is made."""
        return f"Imatrix({hashlib.sha256(self._bytes()).hexdigest() if self.file else ''})"

    @property
    def read(self) -> ImportanceMatrix | None:
        """What the file holds; None without one.

        Raises:
            CheckpointError: it is no importance matrix.
        """
        if not self.file:
            return None
        found: ImportanceMatrix | None = self.__dict__["_found"]
        if found is None:
            found = read_importance(Path(self.file))
            object.__setattr__(self, "_found", found)
        return found

    def encode(self, codec: Codec, rows: torch.Tensor, squares: torch.Tensor | None) -> torch.Tensor:
        """As :class:`~llmconvert.quantize.methods.base.GgmlQuantizer` says."""
        return torch.from_numpy(codec.encode(rows.numpy(), None if squares is None else squares.numpy()))

    def _bytes(self) -> bytes:
        try:
            return Path(self.file).read_bytes()
        except OSError as error:
            raise SourceError(f"{self.file}: the importance matrix cannot be read: {error.strerror}") from error


def weighs(method: Method) -> bool:
    """Whether a method knows which columns matter, from calibration text or from a file."""
    return method.calibration != "none" or (isinstance(method, Imatrix) and method.read is not None)


def mean_squares(name: str, inputs: Iterable[torch.Tensor], columns: int, ranks: Ranks = ALONE) -> torch.Tensor:
    """Mean square of each column of a linear's inputs, summed in float64.

    Args:
        name: of the linear, for errors.
        inputs: ``[tokens, columns]`` each.
        columns: of them.
        ranks: the processes, each of which has a part of the inputs.

    Returns:
        float32 ``[columns]``.

    Raises:
        CalibrationError: they are not finite.
    """
    total, tokens = torch.zeros(columns, dtype=torch.float64), 0
    for rows in inputs:
        total += rows.float().square().sum(0, dtype=torch.float64).cpu()
        tokens += len(rows)
    total, tokens = ranks.sum_(total), ranks.sum_number(tokens)
    mean = (total / max(tokens, 1)).float()
    if not torch.isfinite(mean).all():
        raise CalibrationError(f"{name}: its calibration inputs are not finite")
    return mean
