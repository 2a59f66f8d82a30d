"""SentencePiece's Unigram both ways: the most likely pieces of a text, ``tokenizer.ggml.model`` ``t5``.

llama.cpp (``llm_tokenizer_ugm``) normalizes by SentencePiece's own table (``precompiled_charsmap``), may merge spaces,
and looks for the pieces with the highest sum of scores. What is no piece is the unknown token there; no bytes take its
place.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, normalizers
from tokenizers.models import Unigram

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.header import Metadata

__all__ = ["build_unigram", "unigram_metadata"]

_SPACE: Final = "\u2581"
_CHARSMAP: Final = "tokenizer.ggml.precompiled_charsmap"
# Of rows that no token names: no text is ever worth that.
_NEVER: Final = -1e6
# Normalizers that are told: the table, and what spaces become, which is found out by behaviour.
_TOLD: Final = ("Sequence", "Precompiled", "Replace", "Strip", "Prepend")


def unigram_metadata(tokenizer: Tokenizer, parts: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    """The model's part of the metadata of a tokenizer.

    Args:
        tokenizer: as the library runs it.
        parts: its ``tokenizer.json``.
        tokens: the text of every id.

    Raises:
        UnsupportedError: it falls back to bytes, has no unknown token, or normalizes otherwise than by a table.
    """
    model = parts["model"]
    if model.get("byte_fallback"):
        raise UnsupportedError(
            "the tokenizer is Unigram with byte fallback; llama.cpp's Unigram has an unknown token instead of bytes"
        )
    if model.get("unk_id") is None:
        raise UnsupportedError("the tokenizer is Unigram without an unknown token, which llama.cpp's needs")
    kinds = list(_normalizers(parts.get("normalizer")))
    if other := next((one["type"] for one in kinds if one["type"] not in _TOLD), None):
        raise UnsupportedError(
            f"the tokenizer's normalizer {other!r} cannot be told to llama.cpp, which takes SentencePiece's table "
            "alone (Precompiled)"
        )
    scores = np.full(len(tokens), _NEVER, np.float32)
    scores[: len(model["vocab"])] = [score for _, score in model["vocab"]]
    added = [token["id"] for token in parts.get("added_tokens", ())]
    scores[[index for index in added if index >= len(model["vocab"])]] = 0.0

    def pieces(text: str) -> list[str]:
        found: list[str] = tokenizer.encode(text, add_special_tokens=False).tokens
        return found

    first = pieces("a")
    said: dict[str, Any] = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.unknown_token_id": int(model["unk_id"]),
        "tokenizer.ggml.add_space_prefix": bool(first) and first[0].startswith(_SPACE),
        "tokenizer.ggml.remove_extra_whitespaces": pieces("a  a") == pieces("a a"),
    }
    tables = [one["precompiled_charsmap"] for one in kinds if one["type"] == "Precompiled"]
    if tables and tables[0]:
        said[_CHARSMAP] = np.frombuffer(base64.b64decode(tables[0]), np.uint8)
    return said


def _normalizers(described: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A normalizer of ``tokenizer.json`` and those inside it."""
    if described is not None:
        yield described
        for inside in described.get("normalizers", ()):
            yield from _normalizers(inside)


def build_unigram(metadata: Metadata, tokens: Sequence[str], unused: Sequence[bool]) -> Tokenizer:
    """The tokenizer of a file, without its special tokens.

    Args:
        metadata: of the file.
        tokens: in order of their ids.
        unused: whether each stands for nothing.

    Raises:
        CheckpointError: scores or the unknown token are missing, or the table is none.
    """
    scores = metadata.numbers("tokenizer.ggml.scores", len(tokens))
    if scores is None:
        raise CheckpointError(f"{metadata.path}: metadata has no tokenizer.ggml.scores; the file is incomplete")
    unknown = metadata.integer("tokenizer.ggml.unknown_token_id", 2)
    if not 0 <= unknown < len(tokens):
        raise CheckpointError(f"{metadata.path}: tokenizer.ggml.unknown_token_id is {unknown}, which is no token")
    # llama.cpp reckons what an unknown character costs from tokens that are used; the library from all.
    least = min((float(score) for score, idle in zip(scores, unused, strict=True) if not idle), default=0.0)
    count = len(tokens)
    while count > unknown + 1 and unused[count - 1]:
        count -= 1
    vocabulary = [(token, max(float(score), least)) for token, score in zip(tokens[:count], scores, strict=False)]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=unknown, byte_fallback=False))
    merge = metadata.flag("tokenizer.ggml.remove_extra_whitespaces", False)
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    steps: list[normalizers.Normalizer] = []
    if table := _table(metadata):
        steps.append(normalizers.Precompiled(table))
    if merge:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if merge or prefix:  # before the first character that is no space
        steps.append(normalizers.Replace(Regex(r"\A(?= *[^ ])"), _SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    decoding = [decoders.Replace(_SPACE, " "), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*decoding, decoders.Strip(" ", 1, 0)] if merge or prefix else decoding)
    return tokenizer


def _table(metadata: Metadata) -> bytes:
    found = metadata.get(_CHARSMAP)
    if found is None:
        return b""
    if not isinstance(found, np.ndarray) or found.dtype.itemsize != 1:
        raise CheckpointError(f"{metadata.path}: {_CHARSMAP} is no array of bytes")
    return found.tobytes()
