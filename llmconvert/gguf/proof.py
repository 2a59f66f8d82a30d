"""Proof that a tokenizer told to llama.cpp is the one that transformers runs: both tokenize the same texts.

Tried are texts on which splitting rules differ, and every added token, inside words, between spaces and before line
ends. Two differences are part of llama.cpp and don't keep a model from being used: they come back as notes. It does not
compose characters, and it puts SentencePiece's leading space before every piece of text between special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.header import Metadata
from llmconvert.gguf.tokenizer import build_tokenizer
from llmconvert.text.tokenizer import tokenizer_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PROBES", "prove_tokenizer"]

#: Texts on which splitting rules differ, in composed characters.
PROBES: Final = (
    "Hello world, it's 2024 and I'LL don't they're We'Ve 'S",
    "  two   spaces\tand\ttabs  \n\n\nnewlines \r\n \n end   ",
    "1 12 123 1234 12345 1234567 3.14159 0xFF 1,000,000 10:30",
    "def f(x):\n    return x ** 2 + [1, 2, 3][0]  # ok\n\n\treturn\n",
    "na\u00efve caf\u00e9 \u00dcn\u00efc\u00f6d\u00e9 \u0391\u0392 \u03b1\u03b2\u03b3 \u041f\u0440\u0438",
    "\u65e5\u672c\u8a9e \u4e2d\u6587\u5b57 \ud55c\uad6d \u0627\u0644\u0639 \u0661\u0662",
    "a/b/c http://x.org/?q=1&r=2 C:\\dir\\file.txt user@example.com --flag=-1 ++i; //x",
    "camelCase PascalCase HTTPServer snake_case kebab-case ALLCAPS iPhone McDonald",
    "'s 't 're 've 'm 'll 'd x's  'x ''s 's's $100 50% #tag !!! ??? ...",
    "\u00a0non\u2003breaking\u3000space \U0001f600\U0001f44d \u201cquotes\u201d \u2026 \u2014 \u2013",
    "(((nested))) {a: [b]} ^~`|<>=+\n",
    "a",
    " a ",
)
_DECOMPOSED: Final = "e\u0301a n\u0303o"
_COMPOSING: Final = (
    "llama.cpp does not compose characters, as the tokenizer does (its normalizer): text with decomposed accents gets "
    "other ids there"
)
_SPACES: Final = (
    "llama.cpp puts a space before text after special tokens and keeps those that a text begins with, as SentencePiece "
    "does and transformers does not: such texts get other ids there"
)
_FLAGS: Final = ("lstrip", "rstrip", "single_word", "normalized")


def prove_tokenizer(
    loaded: PreTrainedTokenizerBase, parts: Mapping[str, Any], metadata: Mapping[str, Any], rows: int
) -> tuple[str, ...]:
    """Refuse metadata that tokenizes differently when it is read back.

    Args:
        loaded: the tokenizer as transformers runs it.
        parts: its ``tokenizer.json``.
        metadata: of the file.
        rows: of the embedding.

    Returns:
        A sentence on each difference that llama.cpp makes of every such tokenizer.

    Raises:
        UnsupportedError: a text, or an added token, gets other ids, or two added tokens overlap.
        SourceError: the tokenizer itself fails.
    """
    again = build_tokenizer(Metadata(Path("the tokenizer, written as GGUF"), metadata), rows)
    added = {token["content"]: token for token in parts.get("added_tokens", ())}
    special = {token.content: index for index, token in again.get_added_tokens_decoder().items()}
    _check_overlaps(tuple(special))
    texts: dict[str, str | None] = dict.fromkeys((*PROBES, *(text.lstrip() for text in PROBES), _DECOMPOSED))
    texts |= {around(token): token for token in (*added, *special)}
    segments = _Segments(metadata["tokenizer.ggml.tokens"], special.values())
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", False)
    composing = parts.get("normalizer") is not None
    notes: dict[str, None] = {}
    for ends in (False, True):
        with tokenizer_errors():
            expected = loaded(list(texts), add_special_tokens=ends).input_ids
        found = [encoding.ids for encoding in again.encode_batch(list(texts), add_special_tokens=ends)]
        for (text, token), wanted, given in zip(texts.items(), expected, found, strict=True):
            if wanted == given:
                continue
            if text == _DECOMPOSED and composing:
                notes[_COMPOSING] = None
            elif prefixed and (text != text.lstrip() or token is not None) and segments.agree(wanted, given):
                notes[_SPACES] = None
            else:
                raise UnsupportedError(_refusal(text, wanted, given, added.get(token) if token else None))
    return tuple(notes)


def around(token: str) -> str:
    """A text with a token at every kind of place."""
    return f"a{token}b c {token} d  {token}\n{token}{token}\n\ne"


def _check_overlaps(tokens: Sequence[str]) -> None:
    """Refuse tokens of which one may begin in another: transformers takes the first in a text, llama.cpp the longest.

    Runs of one character overlap too, but there both take the longest first.
    """
    beginning: dict[str, list[str]] = {}
    for token in tokens:
        beginning.setdefault(token[:1], []).append(token)
    for first in tokens:
        for cut in range(1, len(first)):
            for second in beginning.get(first[cut], ()):
                if len(second) < len(first) or second == first or not second.startswith(first[cut:]):
                    continue
                text = first[:cut] + second
                inside = sorted((token for token in tokens if token in text), key=len, reverse=True)
                if _first_found(text, inside) != _longest_found(text, inside):
                    raise UnsupportedError(
                        f"the tokenizer cannot be written as GGUF: of its tokens {first!r} and {second!r} in {text!r} "
                        "transformers takes the first, llama.cpp the longer one"
                    )


def _first_found(text: str, tokens: Sequence[str]) -> list[str]:
    return re.split(f"({'|'.join(map(re.escape, tokens))})", text)


def _longest_found(text: str, tokens: Sequence[str]) -> list[str]:
    """``text`` cut at the tokens, in their order."""
    pieces = [text]
    for token in tokens:
        pieces = [
            part
            for index, piece in enumerate(pieces)
            for part in (re.split(f"({re.escape(token)})", piece) if index % 2 == 0 else (piece,))
        ]
    return pieces


class _Segments:
    """The texts between special tokens, without the spaces that they begin with."""

    def __init__(self, tokens: Sequence[str], special: Iterable[int]) -> None:
        self._tokens = tokens
        self._special = frozenset(special)

    def agree(self, first: Sequence[int], second: Sequence[int]) -> bool:
        """Whether ids stand for the same special tokens, and for the same text but for leading spaces."""
        return self._of(first) == self._of(second)

    def _of(self, ids: Sequence[int]) -> str:
        joined = "".join(f"\0{index}\0" if index in self._special else self._tokens[index] for index in ids)
        return re.sub("(^|\0)\u2581+", r"\1", joined)


def _refusal(text: str, wanted: Sequence[int], given: Sequence[int], token: Mapping[str, Any] | None) -> str:
    first = next((i for i, pair in enumerate(zip(wanted, given, strict=False)) if pair[0] != pair[1]), 0)
    differing = f"{text!r} would have other ids in llama.cpp, {given[first:][:4]} for {wanted[first:][:4]} at {first}"
    if token is None:
        return f"the tokenizer cannot be written as GGUF: {differing}"
    flags = " and ".join(flag for flag in _FLAGS if token[flag]) or "an added one"
    return f"the tokenizer cannot be written as GGUF: its token {token['content']!r} is {flags}, and {differing}"
