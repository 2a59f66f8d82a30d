"""Models that are tensors and files and nothing more, for what never runs them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llmconvert.storage.checkpoint import CheckpointView
from llmconvert.storage.directory import SINGLE_NAME


def make_model(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    directory.mkdir(parents=True)
    save_file(tensors, directory / SINGLE_NAME)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "generation_config.json").write_text('{"eos_token_id": 2}')
    return directory


class RowsOnly(CheckpointView):
    """A view that hides what it stands on, so that only ``read_rows`` is left."""


def make_sparse(directory: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, width: int) -> None:
    """A checkpoint of holes: large to read, nothing on disk."""
    header, position = {}, 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * width
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    raw = json.dumps(header).encode()
    directory.mkdir()
    with (directory / SINGLE_NAME).open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + position)
    (directory / "config.json").write_text("{}")
