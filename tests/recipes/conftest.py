"""Recipes over the tiny model and two short texts, quick enough to run whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

RecipeWriter = Callable[..., Path]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two different English texts of about 6 kB, for calibration and evaluation."""
    from pydoc_data.topics import topics

    directory = tmp_path_factory.mktemp("texts")
    paths = directory / "train.txt", directory / "test.txt"
    for path, keys in zip(paths, (("assignment", "while"), ("class", "import")), strict=True):
        path.write_text("\n\n".join(topics[key] for key in keys)[:6000])
    return paths


@pytest.fixture
def write_recipe(tmp_path: Path, tiny_llama: Path, texts: tuple[Path, Path]) -> RecipeWriter:
    """Writes ``NAME.yaml`` for the tiny model; keyword arguments replace sections, None removes them.

    What no one reads is left out.
    """

    def write(name: str = "tiny", **sections: Any) -> Path:
        values: dict[str, Any] = {
            "model": str(tiny_llama),
            "calibrate": {"dataset": str(texts[0]), "samples": 4, "length": 64},
            "quantize": {"method": "gptq", "scheme": "w4a16-g32"},
            "validate": {"perplexity": {"dataset": str(texts[1]), "window": 64, "max_windows": 4}},
            "work_dir": str(tmp_path / "work"),
        }
        values = {key: value for key, value in {**values, **sections}.items() if value is not None}
        quantize = values.get("quantize", {})
        reads = quantize.get("method") not in ("rtn", "hqq", None) or "attention" in values
        reads = reads or bool({"budget", "kv_cache"} & quantize.keys())
        if "calibrate" not in sections and not reads:
            del values["calibrate"]
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write
