"""A short way into the job of quantizing tiny models, and into its refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.tiny_architectures import ids

from llmconvert.errors import LlmconvertError
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.passes.run import QuantizeResult
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

__all__ = ["WINDOWS", "quantize", "refused"]

WINDOWS = ids((24, 16, 24))


def quantize(source: Path, output: Path, name: str = "w4a16-g32", **options: Any) -> QuantizeResult:
    settings: dict[str, Any] = {"method": "gptq", "windows": WINDOWS, **options}
    if settings["method"] == "rtn":
        settings["windows"] = ()
    return quantize_checkpoint(SafetensorsCheckpoint(source), output, scheme=Scheme.parse(name), **settings)


def refused(tmp_path: Path, error: type[LlmconvertError], match: str, source: Path, **options: Any) -> None:
    """The job is refused, and neither output nor work files are there afterwards."""
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(error, match=match):
        quantize(source, place / "out", **options)
    assert list(place.iterdir()) == []
