"""Whether two models speak of the same tokens: if not, nothing measured on token ids means anything."""

from __future__ import annotations

import json
from pathlib import Path

from llmconvert.engine.architecture.config import declared_number
from llmconvert.errors import UsageError
from llmconvert.gguf.checkpoint import open_artifact
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["check_vocabularies"]


def check_vocabularies(artifact: Path, reference: Checkpoint) -> None:
    """Refuse to compare models whose token ids mean different things, before any of the long work.

    Raises:
        UsageError: their vocabularies differ in size, or their tokenizers give a token different ids.
    """
    with open_artifact(artifact) as stored:
        sizes = _vocabulary_size(reference), _vocabulary_size(stored)
        before, after = _tokens(reference), _tokens(stored)
    if None not in sizes and sizes[0] != sizes[1]:
        raise UsageError(
            f"the reference has a vocabulary of {sizes[0]:,} tokens, the artifact one of {sizes[1]:,}; models with "
            "different vocabularies cannot be compared token by token; name the model that the artifact was made from"
        )
    if before and after and before != after:
        token = next(token for token in {**before, **after} if before.get(token) != after.get(token))
        raise UsageError(
            f"the reference's tokenizer gives token {token!r} the id {before.get(token)}, the artifact's "
            f"{after.get(token)}; name the model that the artifact was made from, or measure without a reference"
        )


def _vocabulary_size(checkpoint: Checkpoint) -> int | None:
    return declared_number(checkpoint.config, "vocab_size")


def _tokens(checkpoint: Checkpoint) -> dict[str, int] | None:
    """Token → id of a checkpoint's ``tokenizer.json``; None without one, or with one of another kind of model."""
    if "tokenizer.json" not in checkpoint.files:
        return None
    try:
        vocabulary = json.loads(checkpoint.read_file("tokenizer.json"))["model"]["vocab"]
    except (ValueError, KeyError, TypeError):
        return None
    return vocabulary if isinstance(vocabulary, dict) else None
