"""From GGUF metadata to ``tokenizer.json``, ``tokenizer_config.json`` and the chat template.

Three kinds of tokenizer are rebuilt, with llama.cpp (``llama-vocab.cpp``) as the reference for what tokens come out:
``gpt2``, byte-level BPE with a pre-tokenizer named by the file; ``llama``, SentencePiece BPE, where a token's score
says how early it is merged, spaces are U+2581, and what is no token falls back to bytes; and ``t5``, SentencePiece's
Unigram (:mod:`~llmconvert.gguf.unigram`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from llmconvert.errors import CheckpointError
from llmconvert.gguf.header import Metadata, shown
from llmconvert.gguf.pretokenizers import UnknownTokenizerError, find_pre_tokenizer
from llmconvert.gguf.unigram import build_unigram

__all__ = [
    "PHI3_KEEPING_SPACE",
    "PHI3_TOKENS",
    "TokenType",
    "UnknownTokenizerError",
    "build_tokenizer",
    "is_phi3",
    "tokenizer_files",
]


class TokenType(IntEnum):
    """Values of ``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_SPACE: Final = "\u2581"
_PLAIN: Final = re.compile(r"[^\s:$]+")
# Every cut of a token is looked at; real ones have up to some hundred characters.
_LONGEST_TOKEN: Final = 2048
# Tokens that llama.cpp takes for control tokens whatever the file says: converters got these wrong.
_ALWAYS_CONTROL: Final = frozenset(
    {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>"}
    | {"</s>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "<end_of_utterance>", "<｜end▁of▁sentence｜>"}
)
#: Phi-3's special tokens swallow the white space after them, except these.
PHI3_KEEPING_SPACE: Final = frozenset(("<unk>", "<s>", "<|endoftext|>"))
#: Tokens that llama.cpp cannot load a model with Phi-3 in its name without.
PHI3_TOKENS: Final = ("<unk>", "<s>", "</s>", "<|endoftext|>")


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """The tokens of a file in order of their ids, with their types."""

    tokens: Sequence[str]
    types: Sequence[int]

    @property
    def ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}


def is_phi3(name: str) -> bool:
    """Whether llama.cpp takes a model of this name for Phi-3, and lets its special tokens swallow white space."""
    return "phi-3" in name.lower() or "phi3" in name.lower()


def tokenizer_files(metadata: Metadata, vocab_size: int) -> dict[str, bytes]:
    """Every tokenizer file of a Hugging Face model directory, by name.

    Args:
        metadata: of the GGUF file.
        vocab_size: rows of the embedding.

    Raises:
        CheckpointError: the metadata is incomplete or contradicts itself.
        UnknownTokenizerError: a kind of tokenizer or pre-tokenizer that cannot be rebuilt.
    """
    tokenizer = build_tokenizer(metadata, vocab_size)
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(_tokenizer_config(metadata), indent=2, ensure_ascii=False).encode(),
    }
    if template := metadata.text("tokenizer.chat_template", ""):
        files["chat_template.jinja"] = template.encode()
    return files


def build_tokenizer(metadata: Metadata, vocab_size: int) -> Tokenizer:
    """The tokenizer that ``metadata`` describes; arguments and errors as of :func:`tokenizer_files`."""
    kind = metadata.text("tokenizer.ggml.model")
    if kind not in _BUILT:
        raise UnknownTokenizerError(
            f"{metadata.path}: tokenizer.ggml.model is {shown(kind)}; supported are gpt2 (byte-level BPE), llama "
            "(SentencePiece BPE) and t5 (Unigram)"
        )
    vocabulary = _read_vocabulary(metadata, vocab_size)
    tokenizer = _BUILT[kind](metadata, vocabulary)
    _add_special_tokens(tokenizer, metadata, vocabulary)
    _add_ends(tokenizer, metadata, vocabulary)
    return tokenizer


def _read_vocabulary(metadata: Metadata, vocab_size: int) -> _Vocabulary:
    tokens = _texts(metadata)
    if not 0 < len(tokens) <= vocab_size:
        raise CheckpointError(
            f"{metadata.path}: tokenizer.ggml.tokens has {len(tokens):,} tokens, the embedding {vocab_size:,} rows"
        )
    if len(set(tokens)) != len(tokens):
        (twice, _), *_ = Counter(tokens).most_common(1)
        raise CheckpointError(f"{metadata.path}: tokenizer.ggml.tokens holds {shown(twice)} twice; the file is corrupt")
    longest = max(tokens, key=len)
    if len(longest) > _LONGEST_TOKEN:
        raise CheckpointError(
            f"{metadata.path}: tokenizer.ggml.tokens holds one of {len(longest):,} characters, {shown(longest)}; "
            "the file is corrupt"
        )
    types = metadata.numbers("tokenizer.ggml.token_type", len(tokens))
    return _Vocabulary(tokens, [TokenType.NORMAL] * len(tokens) if types is None else types.tolist())


def _texts(metadata: Metadata) -> list[str]:
    """The tokens. llama.cpp gives empty ones a name too; a vocabulary cannot hold the same text twice."""
    return [token or f"[EMPTY_{index}]" for index, token in enumerate(metadata.strings("tokenizer.ggml.tokens"))]


def _byte_level(metadata: Metadata, vocabulary: _Vocabulary) -> Tokenizer:
    pre_tokenizer = find_pre_tokenizer(_pre(metadata), str(metadata.path))
    ids = vocabulary.ids
    merges: dict[tuple[str, str], None] = {}
    for index, merge in enumerate(metadata.strings("tokenizer.ggml.merges")):
        # A part may itself be a space in theory, so the separator is the first one after the first character.
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or left not in ids or right not in ids or left + right not in ids:
            raise CheckpointError(
                f"{metadata.path}: merge {index} of tokenizer.ggml.merges, {shown(merge)}, does not join two tokens "
                "into a third; the file is corrupt"
            )
        merges.setdefault((left, right))
    tokenizer = Tokenizer(BPE(vocab=ids, merges=list(merges), ignore_merges=pre_tokenizer.whole_words))
    tokenizer.pre_tokenizer = pre_tokenizer.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Metadata, vocabulary: _Vocabulary) -> Tokenizer:
    scores = metadata.numbers("tokenizer.ggml.scores", len(vocabulary.tokens))
    if scores is None:
        raise CheckpointError(f"{metadata.path}: metadata has no tokenizer.ggml.scores; the file is incomplete")
    unknown = metadata.integer("tokenizer.ggml.unknown_token_id", 0)
    if not 0 <= unknown < len(vocabulary.tokens):
        raise CheckpointError(f"{metadata.path}: tokenizer.ggml.unknown_token_id is {unknown}, which is no token")
    ids = vocabulary.ids
    tokenizer = Tokenizer(
        BPE(
            vocab=ids,
            merges=_merges_by_score(ids, scores),
            unk_token=vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    escape = normalizers.Replace(" ", _SPACE)
    # As a normalizer, the space also goes in front of text after a special token; llama.cpp puts it there too.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), escape]) if prefix else escape
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _unigram(metadata: Metadata, vocabulary: _Vocabulary) -> Tokenizer:
    return build_unigram(metadata, vocabulary.tokens, [kind == TokenType.UNUSED for kind in vocabulary.types])


_BUILT: Final[Mapping[str, Callable[[Metadata, _Vocabulary], Tokenizer]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "t5": _unigram,
}


def _merges_by_score(ids: Mapping[str, int], scores: np.ndarray) -> list[tuple[str, str]]:
    """The merges that a SentencePiece BPE vocabulary implies: every pair of tokens that makes a third, best first."""
    merges: list[tuple[float, int, int, str, str]] = []
    for token, index in ids.items():
        score = -float(scores[index])
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                merges.append((score, ids[left], ids[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _add_special_tokens(tokenizer: Tokenizer, metadata: Metadata, vocabulary: _Vocabulary) -> None:
    """Tokens that are matched in the text before anything else: control tokens, and plain ones users defined."""
    swallow = is_phi3(metadata.text("general.name", ""))
    special: list[AddedToken] = []
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        control = kind in (TokenType.CONTROL, TokenType.UNKNOWN) or token in _ALWAYS_CONTROL
        if control or kind == TokenType.USER_DEFINED:
            rstrip = swallow and token not in PHI3_KEEPING_SPACE
            special.append(AddedToken(token, normalized=False, special=control, rstrip=rstrip))
    before = tokenizer.get_vocab_size(with_added_tokens=False)
    tokenizer.add_tokens(special)
    if tokenizer.get_vocab_size() != before:  # each of them has its id already
        raise CheckpointError(f"{metadata.path}: its special tokens are not all in its vocabulary; the file is corrupt")


def _add_ends(tokenizer: Tokenizer, metadata: Metadata, vocabulary: _Vocabulary) -> None:
    """Make the tokenizer put the beginning- and end-of-sequence tokens where the file wants them."""
    bos, eos = (_special(metadata, name) if wanted else None for name, wanted in _ends(metadata).items())
    if bos is None and eos is None:
        return
    ids = vocabulary.ids
    # In a template a token goes by its text, if that could be no part of the template's own language.
    names = {token: token if _PLAIN.fullmatch(token) else f"token {ids[token]}" for token in (bos, eos) if token}
    parts = [*(names[token] for token in (bos,) if token), "$A", *(names[token] for token in (eos,) if token)]
    single = [f"{part}:0" for part in parts]
    pair = [*single, *(f"{'$B' if part == '$A' else part}:1" for part in parts)]
    tokens = [{"id": name, "ids": [ids[token]], "tokens": [token]} for token, name in names.items()]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens)


def _ends(metadata: Metadata) -> dict[str, bool]:
    """Whether the beginning and the end of a sequence are marked."""
    kind = metadata.text("tokenizer.ggml.model")
    default = find_pre_tokenizer(_pre(metadata), str(metadata.path)).add_bos if kind == "gpt2" else kind == "llama"
    return {
        "bos": metadata.flag("tokenizer.ggml.add_bos_token", default),
        "eos": metadata.flag("tokenizer.ggml.add_eos_token", kind == "t5"),
    }


def _pre(metadata: Metadata) -> str:
    return metadata.text("tokenizer.ggml.pre", "") or "default"


def _special(metadata: Metadata, name: str) -> str | None:
    """The text of the token whose id is under ``tokenizer.ggml.<name>_token_id``; None without a valid one."""
    tokens = _texts(metadata)
    index = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else None


def _tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    arch = metadata.text("general.architecture")
    ends = _ends(metadata)
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    tokens = {key: _special(metadata, name) for key, name in named.items()}
    return {
        # The class that takes tokenizer.json as it is. The model families' own classes build theirs anew.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": ends["bos"] and tokens["bos_token"] is not None,
        "add_eos_token": ends["eos"] and tokens["eos_token"] is not None,
        **{key: token for key, token in tokens.items() if token is not None},
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.integer(f"{arch}.context_length"),
    }
