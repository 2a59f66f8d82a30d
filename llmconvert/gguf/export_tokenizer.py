"""From ``tokenizer.json`` to GGUF metadata, proven by tokenizing with both.

llama.cpp knows splitting rules by name only (``tokenizer.ggml.pre``). The name is found by behaviour: the rule that
splits probing texts as the tokenizer does. In the end the metadata is read back as any reader would, and must give the
same ids for the same texts; a tokenizer that cannot be told to llama.cpp is refused rather than told wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from tokenizers import Tokenizer

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.header import Metadata
from llmconvert.gguf.pretokenizers import PRE_TOKENIZERS
from llmconvert.gguf.tokenizer import TokenType, build_tokenizer
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["export_tokenizer"]

#: Texts on which splitting rules differ. Composed characters only: llama.cpp does not normalize.
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


def export_tokenizer(source: Checkpoint, config: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The tokenizer's part of the metadata.

    Args:
        source: the checkpoint, for its tokenizer files.
        config: with transformers' defaults filled in.

    Returns:
        The metadata, and whether special tokens swallow the white space after them, which llama.cpp does for models
        with Phi-3 in their name.

    Raises:
        UnsupportedError: a kind of tokenizer that llama.cpp does not have.
        CheckpointError: there is no ``tokenizer.json``, or it has more tokens than the embedding.
    """
    if "tokenizer.json" not in source.files:
        raise CheckpointError("the checkpoint has no tokenizer.json; a GGUF file needs its tokenizer")
    raw = source.read_file("tokenizer.json")
    tokenizer, parts = Tokenizer.from_str(raw.decode()), json.loads(raw)
    if parts["model"]["type"] != "BPE":
        raise UnsupportedError(
            f"tokenizer.json: model {parts['model']['type']!r}; llama.cpp is told BPE, byte-level or SentencePiece"
        )
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    rows = config["vocab_size"]
    if max(vocabulary.values()) >= rows:
        raise CheckpointError(f"tokenizer.json: has the id {max(vocabulary.values()):,}, the embedding {rows:,} rows")
    tokens = [f"[PAD{index}]" for index in range(rows)]
    for token, index in vocabulary.items():
        tokens[index] = token
    byte_level = "ByteLevel" in json.dumps(parts.get("pre_tokenizer"))
    metadata = {
        **(_byte_level(tokenizer, parts) if byte_level else _sentencepiece(parts, tokens)),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": _types(parts, vocabulary, rows),
        **_special_ids(source, config, vocabulary),
    }
    metadata |= _ends(tokenizer, metadata) | _templates(source)
    swallow = any(token["rstrip"] and token["special"] for token in parts.get("added_tokens", ()))
    _prove(tokenizer, metadata, rows, swallow)
    return metadata, swallow


def _byte_level(tokenizer: Tokenizer, parts: Mapping[str, Any]) -> dict[str, Any]:
    whole_words = bool(parts["model"].get("ignore_merges"))
    expected = [tokenizer.pre_tokenizer.pre_tokenize_str(text) for text in PROBES]
    matching = (
        name
        for name, rule in PRE_TOKENIZERS.items()
        if rule.whole_words == whole_words and [rule.build().pre_tokenize_str(text) for text in PROBES] == expected
    )
    name = next(matching, None)
    if name is None:
        raise UnsupportedError(
            "tokenizer.json: splits text in a way that has no name in llama.cpp (tokenizer.ggml.pre); "
            f"known are {', '.join(PRE_TOKENIZERS)}"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"]["merges"]]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}


def _sentencepiece(parts: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Scores from the order of merges: llama.cpp joins the pair that makes the token with the highest score."""
    if not parts["model"].get("byte_fallback"):
        raise UnsupportedError("tokenizer.json: neither byte-level nor with byte fallback; llama.cpp has no such BPE")
    merged: dict[str, int] = {}
    for rank, merge in enumerate(parts["model"]["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        merged.setdefault(left + right, rank)
    count = len(parts["model"]["merges"])
    scores = np.array([-float(merged.get(token, count)) for token in tokens], np.float32)
    normalizer = json.dumps([parts.get("normalizer"), parts.get("pre_tokenizer")], ensure_ascii=False)
    prefix = '"Prepend"' in normalizer or '"prepend_scheme": "first"' in normalizer or '"always"' in normalizer
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _types(parts: Mapping[str, Any], vocabulary: Mapping[str, int], rows: int) -> np.ndarray:
    types = np.full(rows, TokenType.UNUSED, np.int32)
    types[list(vocabulary.values())] = TokenType.NORMAL
    if parts["model"].get("byte_fallback"):
        types[[index for byte in range(256) if (index := vocabulary.get(f"<0x{byte:02X}>")) is not None]] = (
            TokenType.BYTE
        )
    for token in parts.get("added_tokens", ()):
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    unknown = parts["model"].get("unk_token")
    if unknown in vocabulary:
        types[vocabulary[unknown]] = TokenType.UNKNOWN
    return types


def _special_ids(source: Checkpoint, config: Mapping[str, Any], vocabulary: Mapping[str, int]) -> dict[str, Any]:
    declared = _json(source, "tokenizer_config.json")
    ids: dict[str, Any] = {}
    for name, key, fallback in (
        ("bos", "bos_token", "bos_token_id"),
        ("eos", "eos_token", "eos_token_id"),
        ("unknown", "unk_token", None),
        ("padding", "pad_token", "pad_token_id"),
    ):
        token = declared.get(key)
        index = vocabulary.get(token["content"] if isinstance(token, Mapping) else token) if token else None
        if index is None and fallback is not None and token is None:
            value = config.get(fallback)
            index = value[0] if isinstance(value, list) else value
        if index is not None and 0 <= index < config["vocab_size"]:
            ids[f"tokenizer.ggml.{name}_token_id"] = index
    # Generation may end at more tokens than one: the end of a turn is llama.cpp's name for the second.
    ends = _json(source, "generation_config.json").get("eos_token_id")
    others = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
    others = [end for end in others if end != ids.get("tokenizer.ggml.eos_token_id") and end < config["vocab_size"]]
    for name, end in zip(("eot", "eom"), others, strict=False):
        ids[f"tokenizer.ggml.{name}_token_id"] = end
    return ids


def _ends(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> dict[str, bool]:
    """Whether the tokenizer marks the ends of a text, seen from what it does."""
    plain, marked = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
    bos, eos = metadata.get("tokenizer.ggml.bos_token_id"), metadata.get("tokenizer.ggml.eos_token_id")
    return {
        "tokenizer.ggml.add_bos_token": bos is not None and marked[: 1 + len(plain)] == [bos, *plain],
        "tokenizer.ggml.add_eos_token": eos is not None and marked[-1 - len(plain) :] == [*plain, eos],
    }


def _templates(source: Checkpoint) -> dict[str, str]:
    if "chat_template.jinja" in source.files:
        return {"tokenizer.chat_template": source.read_file("chat_template.jinja").decode()}
    declared = _json(source, "tokenizer_config.json").get("chat_template")
    if isinstance(declared, str):
        return {"tokenizer.chat_template": declared}
    named = {entry["name"]: entry["template"] for entry in declared or ()}
    return {"tokenizer.chat_template" + ("" if name == "default" else f".{name}"): text for name, text in named.items()}


def _prove(tokenizer: Tokenizer, metadata: Mapping[str, Any], rows: int, swallow: bool) -> None:
    """Refuse metadata that tokenizes differently when it is read back."""
    named = {**metadata, "general.name": "phi-3" if swallow else ""}
    again = build_tokenizer(Metadata(Path("tokenizer.json"), named), rows)
    texts = [*PROBES, *(f"{text}{token}{text}" for token in _marks(metadata)[:8] for text in PROBES[:2])]
    for text in texts:
        for special in (False, True):
            expected = tokenizer.encode(text, add_special_tokens=special).ids
            found = again.encode(text, add_special_tokens=special).ids
            if expected != found:
                first = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), 0)
                raise UnsupportedError(
                    f"tokenizer.json: {text!r} would have other ids in llama.cpp, {found[first:][:4]} instead of "
                    f"{expected[first:][:4]} at {first}; this tokenizer cannot be written as GGUF"
                )


def _marks(metadata: Mapping[str, Any]) -> list[str]:
    types = metadata["tokenizer.ggml.token_type"]
    return [metadata["tokenizer.ggml.tokens"][index] for index in np.flatnonzero(types == TokenType.CONTROL)]


def _json(source: Checkpoint, name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(source.read_file(name)) if name in source.files else {}
    return values
