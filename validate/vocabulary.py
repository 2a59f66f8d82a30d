"""Vocabulary check: models whose token ids mean different things can't be compared token by token."""

from __future__ import annotations

import json
from dataclasses import dataclass

from llmconvert.engine.architecture.config import declared_number
from llmconvert.errors import UsageError
from llmconvert.report.report import Check
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.validate.measurement import Measurement, Subject

__all__ = ["VocabularyCheck"]


@dataclass(frozen=True, slots=True)
class VocabularyCheck(Measurement):
    """Refuses an original with other token ids than the artifact's, before long measurements begin."""

    def measure(self, subject: Subject) -> list[Check]:
        """No check.

        Raises:
            UsageError: the models' vocabularies differ in size, or their tokenizers give a token different ids.
        """
        if subject.reference is not None:
            _require_same(subject.reference, subject.stored)
        return []


def _require_same(reference: Checkpoint, stored: Checkpoint) -> None:
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
