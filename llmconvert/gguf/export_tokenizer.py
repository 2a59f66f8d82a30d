"""From the tokenizer that transformers builds to GGUF metadata, proven by tokenizing with both.

llama.cpp knows splitting rules by name only (``tokenizer.ggml.pre``). The name is found by behaviour: the rule that
splits probing texts as the tokenizer does. In the end the metadata is read back as any reader would, and must give the
same ids for the same texts (:mod:`~llmconvert.gguf.proof`); a tokenizer that cannot be told to llama.cpp is refused
rather than told wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from tokenizers import Tokenizer

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.pretokenizers import PRE_TOKENIZERS
from llmconvert.gguf.proof import PROBES, prove_tokenizer
from llmconvert.gguf.tokenizer import PHI3_KEEPING_SPACE, PHI3_TOKENS, TokenType, is_phi3
from llmconvert.gguf.unigram import unigram_metadata
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.text.files import universal_newlines
from llmconvert.text.tokenizer import load_tokenizer, tokenizer_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ExportedTokenizer", "export_tokenizer"]

_TEMPLATES: Final = "additional_chat_templates/"


@dataclass(frozen=True, slots=True)
class ExportedTokenizer:
    """A tokenizer as GGUF metadata.

    Attributes:
        name: of the model: llama.cpp reads from it how Phi-3's tokens behave.
        metadata: the tokenizer's keys.
        notes: where llama.cpp gives other ids than transformers although the model can be used, a sentence each.
    """

    name: str
    metadata: Mapping[str, Any]
    notes: tuple[str, ...]


def export_tokenizer(source: Checkpoint, config: Mapping[str, Any], name: str) -> ExportedTokenizer:
    """The tokenizer's part of the metadata.

    Args:
        source: the checkpoint, for its tokenizer files.
        config: with transformers' defaults filled in.
        name: of the model.

    Raises:
        UnsupportedError: a kind of tokenizer that llama.cpp does not have.
        SourceError: there is none, or transformers cannot load it.
        CheckpointError: it has more tokens than the embedding has rows.
    """
    loaded = load_tokenizer(source)
    tokenizer = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(tokenizer, Tokenizer):
        raise UnsupportedError(
            f"the model's tokenizer is a {type(loaded).__name__}, which runs in Python alone; "
            "llama.cpp is told BPE and Unigram that the tokenizers library runs"
        )
    parts: dict[str, Any] = json.loads(tokenizer.to_str())
    kind = parts["model"]["type"]
    if kind not in ("BPE", "Unigram"):
        raise UnsupportedError(
            f"the tokenizer's model is {kind!r}; llama.cpp is told BPE, byte-level or SentencePiece, and Unigram"
        )
    rows = config["vocab_size"]
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if max(vocabulary.values(), default=-1) >= rows:
        raise CheckpointError(f"the tokenizer has the id {max(vocabulary.values()):,}, the embedding {rows:,} rows")
    tokens = _tokens(tokenizer, vocabulary, rows)
    label = _name(name, parts, vocabulary)
    if kind == "Unigram":
        model = unigram_metadata(tokenizer, parts, tokens)
    elif "ByteLevel" in json.dumps(parts.get("pre_tokenizer")):
        model = _byte_level(tokenizer, parts)
    else:
        model = _sentencepiece(tokenizer, parts, tokens)
    metadata = {
        **model,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": _types(parts, vocabulary, rows),
        **_special_ids(source, loaded, config, vocabulary),
    }
    metadata |= _ends(loaded, metadata) | _templates(source)
    notes = prove_tokenizer(loaded, parts, {"general.name": label, **metadata}, rows)
    return ExportedTokenizer(label, metadata, notes)


def _tokens(tokenizer: Tokenizer, vocabulary: Mapping[str, int], rows: int) -> list[str]:
    """The text of every id. Rows that no token names get a name that no token has."""
    tokens = []
    for index in range(rows):
        token = tokenizer.id_to_token(index)
        if token is None:
            token = f"[PAD{index}]"
            while token in vocabulary:
                token = f"[{token}]"
        tokens.append(token)
    return tokens


def _name(name: str, parts: Mapping[str, Any], vocabulary: Mapping[str, int]) -> str:
    """The model's name, so that llama.cpp sees Phi-3 in it where special tokens swallow white space, and only there."""
    swallowing = [token for token in parts.get("added_tokens", ()) if token["rstrip"] and token["special"]]
    swallowing = [token["content"] for token in swallowing if token["content"] not in PHI3_KEEPING_SPACE]
    if not swallowing:
        return re.sub(r"(?i)(phi)-?3", r"\1 3", name)
    missing = [token for token in PHI3_TOKENS if token not in vocabulary]
    if missing:
        raise UnsupportedError(
            f"the tokenizer's added token {swallowing[0]!r} takes white space after it along (rstrip), which llama.cpp "
            f"does for Phi-3's vocabulary alone; this one has no {' and no '.join(map(repr, missing))}"
        )
    return name if is_phi3(name) else f"{name} (Phi-3)"


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
            "the tokenizer splits text in a way that has no name in llama.cpp (tokenizer.ggml.pre); "
            f"known are {', '.join(PRE_TOKENIZERS)}"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"]["merges"]]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}


def _sentencepiece(tokenizer: Tokenizer, parts: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    """Scores from the order of merges: llama.cpp joins the pair that makes the token with the highest score."""
    if not parts["model"].get("byte_fallback"):
        raise UnsupportedError(
            "the tokenizer is BPE, neither byte-level nor with byte fallback; llama.cpp has no such tokenizer"
        )
    merged: dict[str, int] = {}
    for rank, merge in enumerate(parts["model"]["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        merged.setdefault(left + right, rank)
    count = len(parts["model"]["merges"])
    scores = np.array([-float(merged.get(token, count)) for token in tokens], np.float32)
    first = tokenizer.encode("a", add_special_tokens=False).tokens
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": bool(first) and first[0].startswith("\u2581"),
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
    index = vocabulary.get(unknown) if unknown is not None else parts["model"].get("unk_id")
    if index is not None:
        types[index] = TokenType.UNKNOWN
    return types


def _special_ids(
    source: Checkpoint, loaded: PreTrainedTokenizerBase, config: Mapping[str, Any], vocabulary: Mapping[str, int]
) -> dict[str, Any]:
    ids: dict[str, Any] = {}
    for name, key, fallback in (
        ("bos", "bos_token", "bos_token_id"),
        ("eos", "eos_token", "eos_token_id"),
        ("unknown", "unk_token", None),
        ("padding", "pad_token", "pad_token_id"),
    ):
        token = getattr(loaded, key, None)
        index: Any = vocabulary.get(str(token)) if token is not None else None
        if token is None and fallback is not None:
            value = config.get(fallback)
            index = value[0] if isinstance(value, list) and value else value
        if isinstance(index, int) and 0 <= index < config["vocab_size"]:
            ids[f"tokenizer.ggml.{name}_token_id"] = index
    # Generation may end at more tokens than one: the end of a turn is llama.cpp's name for the second.
    ends = _json(source, "generation_config.json").get("eos_token_id")
    others = [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]
    taken = ids.get("tokenizer.ggml.eos_token_id")
    others = [end for end in others if end != taken and 0 <= end < config["vocab_size"]]
    for name, end in zip(("eot", "eom"), others, strict=False):
        ids[f"tokenizer.ggml.{name}_token_id"] = end
    return ids


def _ends(loaded: PreTrainedTokenizerBase, metadata: Mapping[str, Any]) -> dict[str, bool]:
    """Whether the tokenizer marks the ends of a text, seen from what it does."""
    with tokenizer_errors():
        plain, marked = loaded("a", add_special_tokens=False).input_ids, loaded("a").input_ids
    bos, eos = metadata.get("tokenizer.ggml.bos_token_id"), metadata.get("tokenizer.ggml.eos_token_id")
    return {
        "tokenizer.ggml.add_bos_token": bos is not None and marked[: 1 + len(plain)] == [bos, *plain],
        "tokenizer.ggml.add_eos_token": eos is not None and marked[-1 - len(plain) :] == [*plain, eos],
    }


def _templates(source: Checkpoint) -> dict[str, str]:
    """The chat templates: of newer checkpoints files, of older ones an entry of the tokenizer's config."""
    declared = _json(source, "tokenizer_config.json").get("chat_template")
    named: dict[str, str] = {}
    if isinstance(declared, str):
        named["default"] = declared
    elif isinstance(declared, list):
        named = {entry["name"]: entry["template"] for entry in declared if {"name", "template"} <= entry.keys()}
    for file in source.files:
        if file == "chat_template.jinja":
            named["default"] = _text(source, file)
        elif file.startswith(_TEMPLATES) and file.endswith(".jinja"):
            named[file.removeprefix(_TEMPLATES).removesuffix(".jinja")] = _text(source, file)
    return {"tokenizer.chat_template" + ("" if name == "default" else f".{name}"): text for name, text in named.items()}


def _text(source: Checkpoint, name: str) -> str:
    try:
        return universal_newlines(source.read_file(name).decode())
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{name}: is not UTF-8 ({error.reason} at byte {error.start})") from None


def _json(source: Checkpoint, name: str) -> dict[str, Any]:
    if name not in source.files:
        return {}
    try:
        values = json.loads(source.read_file(name))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: is not JSON that can be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{name}: holds a JSON {type(values).__name__}, expected an object")
    return values
