"""Bytes on disk and bits per weight, counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.validate.size import bits_per_weight, measure_sizes


def test_sizes(original: Path, quantized: Path, tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "model.safetensors.index.json").write_bytes(b"x" * 3)
    (tmp_path / "config.json").write_bytes(b"x" * 5)
    (tmp_path / "llmconvert").mkdir()
    (tmp_path / "llmconvert" / "plot.png").write_bytes(b"x" * 7)
    sizes = measure_sizes(tmp_path)
    assert (sizes.weights, sizes.total) == (13, 25)
    source = SafetensorsCheckpoint(original)
    assert bits_per_weight(source, source) == 16
    # 4 bits and a 16-bit scale for each 32 columns in the linears, 16 bits in the rest, and 8 bytes × 2 of shape each.
    linears = sum(source[name].numel() for name in source if "_proj" in name)
    numbers = sum(source[name].numel() for name in source)
    expected = (linears * 4.5 + (numbers - linears) * 16 + 14 * 128) / numbers
    assert bits_per_weight(source, SafetensorsCheckpoint(quantized)) == pytest.approx(expected)
