"""Vocabularies that give every mistake in splitting text away: their merges run across spaces, digits and newlines."""

from __future__ import annotations

import functools
import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# Words, contractions in both cases, numbers of all lengths, runs of spaces and newlines, paths, scripts and marks.
TRICKY = [
    "Hello world, it's 2024 and I'LL don't they're We'Ve",
    "  two   spaces\tand\ttabs  \n\n\nnewlines \r\n \n end   ",
    "1 12 123 1234 12345 1234567 3.14159 0xFF 1,000,000 10:30",
    "def f(x):\n    return x ** 2 + [1, 2, 3][0]  # ok\n\n\treturn\n",
    "naïve café Ünïcödé São Paulo ß ñ İstanbul ΑΒΓ αβγ Привет мир",
    "日本語テスト 中文字符 한국어 ไทย हिन्दी العربية ١٢٣ ½ ² Ⅷ",
    "a/b/c http://x.org/?q=1&r=2 C:\\dir\\file.txt user@example.com --flag=-1 ++i; //x",
    "camelCase PascalCase HTTPServer snake_case kebab-case ALLCAPS iPhone McDonald",
    "\u00a0non\u2003breaking\u3000space e\u0301 combining \u200d joiner 😀👍🏽 “quotes” … — –",
    "'s 't 're 've 'm 'll 'd 'S 'T 'LL x's  'x ''s 's's",
    "$100 50% #tag @me ^~`|<>=+ (((nested))) {a: [b]} !!! ??? ...",
    "",
    " ",
    "\n",
    "   ",
    "a",
    " a ",
]


def prose() -> list[str]:
    """Lines of English prose with code in it, from the standard library."""
    from pydoc_data.topics import topics

    return [line for key in sorted(topics)[:12] for line in topics[key].splitlines(keepends=True)]


@functools.cache
def crossing_bpe(size: int = 1200) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tokens and merges of a byte-level BPE trained without any pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|bos|>", "<|end|>", "<think>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRICKY * 20 + prose(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return tuple(sorted(model["vocab"], key=model["vocab"].get)), tuple(" ".join(pair) for pair in model["merges"])


def crossing_metadata(pre: str | None) -> dict[str, Any]:
    """:func:`crossing_bpe` as GGUF metadata, with a control token and one that users defined."""
    tokens, merges = crossing_bpe()
    kinds = {"<|bos|>": 3, "<|end|>": 3, "<think>": 4}
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": [kinds.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    return metadata if pre is None else metadata | {"tokenizer.ggml.pre": pre}


@functools.cache
def sentencepiece_pieces(size: int = 1200) -> tuple[tuple[str, float, int], ...]:
    """A SentencePiece BPE vocabulary as (piece, score, token type): merged pieces in order, then characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, limit_alphabet=120)
    tokenizer.train_from_iterator(prose() + TRICKY[:5], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merged = list(dict.fromkeys(left + right for left, right in model["merges"]))
    characters = [token for token in sorted(model["vocab"], key=model["vocab"].get) if token not in set(merged)]
    special = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<think>", 0.0, 4)]
    raw = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    scored = [(piece, float(-rank), 1) for rank, piece in enumerate(merged + characters)]
    return tuple(special + raw + scored)


def sentencepiece_metadata() -> dict[str, Any]:
    """:func:`sentencepiece_pieces` as GGUF metadata."""
    pieces = sentencepiece_pieces()
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece for piece, _, _ in pieces],
        "tokenizer.ggml.scores": [score for _, score, _ in pieces],
        "tokenizer.ggml.token_type": [kind for _, _, kind in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
