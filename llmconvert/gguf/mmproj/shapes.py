"""That the tensors of a decoder's file and of the one beside it are those of the model that both are read as."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmconvert.engine.architecture.config import build_config
from llmconvert.engine.architecture.expert_storage import Conversions
from llmconvert.engine.architecture.model import build_meta_model
from llmconvert.engine.architecture.names import map_names
from llmconvert.errors import CheckpointError

__all__ = ["check_shapes"]


def check_shapes(path: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """See that transformers' class finds each of its tensors among some, in the shape that it has there.

    Args:
        path: named in the refusal.
        config: the model's ``config.json``.
        shapes: of all tensors, by the checkpoint's names.

    Raises:
        CheckpointError: one is missing, or has another shape than the class of these settings.
    """
    model = build_meta_model(build_config(config), torch.float32, "sdpa")
    try:
        names = map_names(Conversions(model), shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    for parameter, state in model.state_dict().items():
        stored = names.get(parameter)
        if stored is not None and shapes[stored] != tuple(state.shape):
            raise CheckpointError(
                f"{path}: tensor {stored!r} is read in shape {list(shapes[stored])}, the metadata asks for "
                f"{list(state.shape)}; the file is inconsistent"
            )
