"""Vocabulary check: models whose token ids mean different things can't be compared token by token."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmconvert.engine.architecture.config import declared_number
from llmconvert.errors import UsageError
from llmconvert.report.report import Check
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.validate.measurement import Measurement, Subject

__all__ = ["VocabularyCheck", "require_same_vocabulary"]


@dataclass(frozen=True, slots=True)
class VocabularyCheck(Measurement):
    """Refuses an original with other token ids than the artifact's, before long measurements begin."""

    def measure(self, subject: Subject) -> list[Check]:
        """No check.

        Raises:
            UsageError: the models' vocabularies differ in size, or their tokenizers name an id differently.
        """
        if subject.reference is not None:
            require_same_vocabulary(subject.reference, subject.stored)
        return []


def require_same_vocabulary(reference: Checkpoint, stored: Checkpoint) -> None:
    """Compare what ids mean, of those that both models name.

    Raises:
        UsageError: the embeddings differ in size, or an id is one token here and another there.
    """
    sizes = _vocabulary_size(reference), _vocabulary_size(stored)
    if None not in sizes and sizes[0] != sizes[1]:
        raise UsageError(
            f"the reference has a vocabulary of {sizes[0]:,} tokens, the artifact one of {sizes[1]:,}; models with "
            "different vocabularies cannot be compared token by token; name the model that the artifact was made from"
        )
    # An embedding may have more rows than there are tokens. Some files name those rows too, others don't.
    before, after = _tokens(reference), _tokens(stored)
    both = sorted(before.keys() & after.keys())
    differing = next((index for index in both if _plain(before[index]) != _plain(after[index])), None)
    if differing is not None:
        raise UsageError(
            f"the id {differing} is token {before[differing]!r} in the reference's tokenizer, {after[differing]!r} in "
            "the artifact's; name the model that the artifact was made from, or measure without a reference"
        )


def _plain(token: str) -> str:
    """A token with ordinary spaces, as GGUF files spell tokens that users defined; SentencePiece has U+2581."""
    return token.replace("\u2581", " ")


def _vocabulary_size(checkpoint: Checkpoint) -> int | None:
    return declared_number(checkpoint.config, "vocab_size")


def _tokens(checkpoint: Checkpoint) -> dict[int, str]:
    """Id → token by the files of a checkpoint's tokenizer, of those that are JSON; what cannot be read is left out.

    Tokens that were added later may stand in any of four places; where two name one id, transformers takes the later.
    """
    whole, vocabulary = _json(checkpoint, "tokenizer.json"), _json(checkpoint, "vocab.json")
    model = whole.get("model")
    pieces = _entries(model.get("vocab") if isinstance(model, dict) else None, vocabulary)
    found = {index: token for token, index in pieces}
    added = whole.get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict):
            found |= _named(entry.get("id"), entry.get("content"))
    found |= {index: token for token, index in _entries(_json(checkpoint, "added_tokens.json"))}
    decoder = _json(checkpoint, "tokenizer_config.json").get("added_tokens_decoder")
    for index, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and index.isdecimal() and len(index) < 10:
            found |= _named(int(index), entry.get("content"))
    return found


def _entries(*vocabularies: object) -> Iterator[tuple[str, int]]:
    """Token and id of the first vocabulary that has any."""
    for vocabulary in vocabularies:
        if isinstance(vocabulary, dict) and vocabulary:
            yield from ((token, index) for token, index in vocabulary.items() if isinstance(index, int))
            return
        if isinstance(vocabulary, list) and vocabulary:  # Unigram's: pieces with scores, in order of their ids
            yield from (
                (piece[0], index) for index, piece in enumerate(vocabulary) if isinstance(piece, list) and piece
            )
            return


def _named(index: object, token: object) -> dict[int, str]:
    return {index: token} if isinstance(index, int) and isinstance(token, str) else {}


def _json(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    if name not in checkpoint.files:
        return {}
    try:
        values = json.loads(checkpoint.read_file(name))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
