"""The header parser on good, truncated, corrupt and hostile files."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support.gguf_bytes import header, pair, string, tensor
from support.tiny_gguf import byte_level_metadata, model_metadata, stored_tensors, tiny_gguf, tiny_model, write_gguf

from llmconvert.errors import CheckpointError, LlmconvertError, UnsupportedError
from llmconvert.gguf.checkpoint import open_gguf
from llmconvert.gguf.header import read_gguf_header


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("good") / "tiny.gguf", "llama-tied")[0]


def refused(tmp_path: Path, raw: bytes, message: str, error: type[LlmconvertError] = CheckpointError) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(error, match=message) as caught:
        read_gguf_header(path)
    assert str(path) in str(caught.value)


def test_it_agrees_with_the_gguf_packages_reader(good: Path) -> None:
    ours, theirs = read_gguf_header(good), gguf.GGUFReader(good)
    assert [(t.name, t.qtype, t.shape, t.offset, t.nbytes) for t in ours.tensors.values()] == [
        (t.name, t.tensor_type, tuple(t.shape.tolist())[::-1], t.data_offset, t.n_bytes) for t in theirs.tensors
    ]
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    found: dict[str, Any] = {
        key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in ours.metadata.items()
    }
    assert found == fields


def test_not_a_gguf_file(tmp_path: Path) -> None:
    refused(tmp_path, b"PK\x03\x04" + bytes(100), r"starts with b'PK.*expected b'GGUF'; not a GGUF file")
    refused(tmp_path, b"", "the magic number claims 4 bytes")
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_gguf_header(tmp_path / "absent.gguf")


def test_versions_and_byte_order(tmp_path: Path) -> None:
    refused(tmp_path, header([], [], version=1), "version 1; supported are 2 and 3", UnsupportedError)
    refused(tmp_path, b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian", UnsupportedError)


def test_absurd_counts_ask_for_no_memory(tmp_path: Path) -> None:
    huge = 1 << 60
    refused(tmp_path, header([], [], tensors=huge), "number of tensors is 1,152,921,504,606,846,976, which cannot fit")
    refused(tmp_path, header([], [], pairs=huge), "the number of metadata pairs is .* cannot fit")
    refused(tmp_path, header([struct.pack("<QQ", huge, 0)], []), "the length of metadata key 0 is .* cannot fit")
    strings = pair("tokens", 9, struct.pack("<IQ", 8, huge))
    refused(tmp_path, header([strings], []), "the length of metadata tokens is .* cannot fit")
    numbers = pair("scores", 9, struct.pack("<IQ", 6, huge))
    refused(tmp_path, header([numbers], []), "the length of metadata scores is .* cannot fit")
    refused(
        tmp_path, header([], [tensor("a", (1 << 62, 1 << 62), 0, 0)]), "'a' ends at byte .* the download was cut off"
    )
    refused(tmp_path, header([], [tensor("a", (0, 4), 0, 0)]), r"'a' has shape \[0, 4\]")
    many = string("a") + struct.pack("<I", 1 << 31) + bytes(64)
    refused(tmp_path, header([], [many]), "'a' has 2147483648 dimensions, expected 1 to 4")


def test_unknown_types(tmp_path: Path) -> None:
    refused(tmp_path, header([], [tensor("a", (4,), 999, 0)]) + bytes(64), "'a' has type number 999, which is unknown")
    refused(
        tmp_path, header([], [tensor("a", (4, 33), 8, 0)]) + bytes(64), r"'a' has shape \[4, 33\], impossible for Q8_0"
    )
    refused(tmp_path, header([pair("a", 77, bytes(8))], []), "metadata a has value type 77")
    nested = pair("a", 9, struct.pack("<IQ", 9, 1))
    refused(tmp_path, header([nested], []), "metadata a is an array of value type 9")


def test_contradictions(tmp_path: Path) -> None:
    twice = [tensor("a", (8,), 0, 0), tensor("a", (8,), 0, 32)]
    refused(tmp_path, header([], twice) + bytes(64), "'a' appears twice")
    gap = [tensor("a", (8,), 0, 0), tensor("b", (8,), 0, 64)]
    refused(tmp_path, header([], gap) + bytes(96), "'b' starts at byte 64 of the data, expected 32")
    key = pair("x", 7, b"\1")
    refused(tmp_path, header([key, key], []), "metadata x appears twice")
    alignment = pair("general.alignment", 4, struct.pack("<I", 24))
    refused(tmp_path, header([alignment], []), "general.alignment is 24, expected a power of two")
    refused(tmp_path, header([pair("x", 8, struct.pack("<Q", 2) + b"\xff\xfe")], []), "metadata x is not UTF-8")


def test_names_hide_nothing_and_messages_are_short(tmp_path: Path) -> None:
    refused(tmp_path, header([pair("a\x1b[31m", 7, b"\1")], []), r"metadata key 0, 'a\\x1b\[31m', is no name")
    refused(tmp_path, header([], [tensor("a\0b", (8,), 0, 0)]) + bytes(64), r"name of tensor 0, 'a\\x00b', is no name")
    long = header([pair("k" * 2000, 7, b"\1")], [])
    refused(tmp_path, long, "metadata key 0 is 2,000 bytes long; the file is corrupt")
    text = pair("general.alignment", 8, string("x" * 100_000))
    refused(tmp_path, header([text], []), "should be an integer, found 'x{79}…$")
    many = pair("general.alignment", 9, struct.pack("<IQ", 8, 5000) + string("y") * 5000)
    refused(tmp_path, header([many], []), r"should be an integer, found \['y', .*…$")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(CheckpointError, match=r"pipe.gguf: is no regular file"):
        read_gguf_header(tmp_path / "pipe.gguf")


def test_alignment_other_than_the_default(tmp_path: Path) -> None:
    alignment = pair("general.alignment", 4, struct.pack("<I", 64))
    raw = header([alignment], [tensor("a", (8,), 0, 0), tensor("b", (8,), 0, 64)])
    path = tmp_path / "aligned.gguf"
    raw += bytes(-len(raw) % 64)
    path.write_bytes(raw + bytes(96))
    found = read_gguf_header(path).tensors
    assert (found["a"].offset, found["b"].offset) == (len(raw), len(raw) + 64)


def test_truncated_anywhere(good: Path, tmp_path: Path) -> None:
    raw = good.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(0, 400, 13), len(raw) // 2, len(raw) - 33, len(raw) - 1]:
        path.write_bytes(raw[:size])
        with pytest.raises(CheckpointError, match=r"truncated|ends at byte"):
            open_gguf(path)


def test_metadata_values_are_checked(tmp_path: Path) -> None:
    model = tiny_model("llama")
    metadata, tensors = model_metadata(model) | byte_level_metadata(), stored_tensors(model)

    def opened(changes: dict[str, Any]) -> None:
        changed = {key: value for key, value in (metadata | changes).items() if value is not None}
        open_gguf(write_gguf(tmp_path / "t.gguf", changed, tensors)).close()

    for changes, message in (
        ({"llama.block_count": None}, "metadata has no llama.block_count"),
        ({"llama.block_count": "two"}, "llama.block_count should be an integer, found 'two'"),
        ({"llama.block_count": 4_000_000_000}, "llama.block_count is 4,000,000,000, with 21 tensors"),
        ({"llama.block_count": 3}, "9 of LlamaForCausalLM's tensors are missing, first 'blk.2.attn_norm.weight'"),
        ({"llama.attention.head_count": 0}, "head_count is 0, expected a positive number"),
        ({"llama.attention.head_count": 8}, r"shape \[64, 64\], the metadata asks for \[128, 64\] \(query × hidden\)"),
        ({"llama.attention.head_count_kv": 3}, "are no attention"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "metadata has no llama.attention.layer_norm_rms_epsilon"),
        ({"llama.rope.freq_base": float("nan")}, "freq_base should be a finite number"),
        ({"llama.rope.freq_base": -1.0}, "freq_base is -1.0, expected a positive number"),
        ({"tokenizer.ggml.tokens": None}, "no array of strings tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token should be true or false"),
        ({"tokenizer.ggml.model": 5}, "tokenizer.ggml.model should be a string"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token_type should be 320 numbers, found 2 of them"),
    ):
        with pytest.raises(CheckpointError, match=message):
            opened(changes)
    with pytest.raises(UnsupportedError, match=r"head_count differs between layers: \[4, 2\]"):
        opened({"llama.attention.head_count": [4, 2]})
    opened({"llama.attention.head_count": [4, 4]})
