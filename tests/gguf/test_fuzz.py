"""Fuzzing of GGUF headers: whatever a file says, it opens, or ends in one line of ours, at a bounded cost.

A longer run: ``FUZZ_EXAMPLES=5000 pytest tests/gguf/test_fuzz.py``, so many of each test.
"""

from __future__ import annotations

import os
import struct
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.gguf_bytes import header, string
from support.tiny_gguf import byte_level_metadata, model_metadata, stored_tensors, tiny_model, write_gguf
from support.tiny_vocabularies import sentencepiece_metadata

from llmconvert.errors import LlmconvertError
from llmconvert.gguf.checkpoint import open_gguf
from llmconvert.gguf.header import read_gguf_header

#: Executions of each test; the suite's are few.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
SECONDS = 5.0
LONGEST_MESSAGE = 2000
fuzzed = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES == 40
)
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}


class Target:
    """A valid file, as its metadata, its table of tensors and its data."""

    def __init__(self, path: Path, family: str, changes: dict[str, Any], tensors: dict[str, Any]) -> None:
        model = tiny_model(family, **SIZES, vocab_size=len(changes["tokenizer.ggml.tokens"]))
        write_gguf(path, model_metadata(model) | changes, stored_tensors(model) | tensors)
        self.path = path.with_suffix(".fuzzed.gguf")
        self.raw = path.read_bytes()
        parsed = read_gguf_header(path)
        self.keys = list(parsed.metadata)
        self.data = min(tensor.offset for tensor in parsed.tensors.values())
        self.table = min(self.raw.index(string(name)) for name in parsed.tensors)
        self.table_end = self.table + sum(
            24 + len(name) + 8 * len(found.shape) for name, found in parsed.tensors.items()
        )
        starts = [self.raw.index(string(key)) for key in self.keys]
        #: Each key's type and value as they are stored.
        self.pairs = {
            key: self.raw[start + len(string(key)) : end]
            for key, start, end in zip(self.keys, starts, [*starts[1:], self.table], strict=True)
        }

    def written_with(self, pairs: dict[str, bytes]) -> bytes:
        """The file with other metadata; the tensors stay where they were, from the data's new beginning on."""
        count = struct.unpack("<Q", self.raw[8:16])[0]
        body = header(
            [string(key) + value for key, value in pairs.items()],
            [self.raw[self.table : self.table_end]],
            tensors=count,
        )
        return body + self.raw[self.data :]

    def run(self, raw: bytes) -> None:
        """Open, read a little of everything, and see that nothing but success or an error of ours comes of it."""
        self.path.write_bytes(raw)
        begin = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with open_gguf(self.path) as checkpoint:
                    for name, info in checkpoint.infos.items():
                        checkpoint.read_rows(name, 0, 1)
                        checkpoint.read_rows(name, info.shape[0] - 1, info.shape[0])
            except LlmconvertError as error:
                message = str(error)
                assert str(self.path) in message
                assert len(message) < LONGEST_MESSAGE and message.replace(str(self.path), "").isprintable(), message
        assert time.process_time() - begin < SECONDS


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> list[Target]:
    directory = tmp_path_factory.mktemp("fuzz")
    factors = {f"rope_factors_{kind}.weight": np.linspace(1, 4, 4, dtype=np.float32) for kind in ("long", "short")}
    divisors = {"rope_freqs.weight": np.array([1, 2, 8, 8], np.float32)}
    plain, pieces = byte_level_metadata(), sentencepiece_metadata()
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.attn_factor": 1.5,
        "llama.rope.scaling.original_context_length": 64,
    }
    return [
        Target(directory / "llama.gguf", "llama", plain | yarn, {}),
        Target(directory / "pieces.gguf", "llama-tied", pieces, divisors),
        Target(directory / "phi3.gguf", "phi3", plain | {"phi3.rope.scaling.type": "longrope"}, factors),
        Target(directory / "gemma2.gguf", "gemma2", plain, {}),
    ]


numbers = st.one_of(
    st.integers(0, 300),
    st.sampled_from([2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]),
    st.integers(0, 2**64 - 1),
)
floats = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 3.4e38, float("inf"), float("-inf"), float("nan")]))
text = st.one_of(
    st.sampled_from(
        ["", " ", "\0", "a\0b", "\x1b[31m", "\n", "</s>", "$A:0", "a:0 b", "phi-3", "none", "yarn", "linear"]
    ),
    st.text(max_size=20),
    st.sampled_from(["llama", "gpt2", "qwen2", "smollm", "default"]),
)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


@st.composite
def scalars(draw: st.DrawFn, kind: int) -> bytes:
    if kind in (6, 12):
        return struct.pack(f"<{SCALARS[kind]}", draw(st.one_of(floats, st.floats(width=32))))
    size = struct.calcsize(SCALARS[kind])
    return (draw(numbers) % 2 ** (8 * size)).to_bytes(size, "little")


@st.composite
def values(draw: st.DrawFn) -> bytes:
    """Type and value of a metadata entry, mostly as the format has them."""
    kind = draw(st.sampled_from([*SCALARS, 8, 8, 9, 9]))
    if kind in SCALARS:
        return struct.pack("<I", kind) + draw(scalars(kind))
    if kind == 8:
        return struct.pack("<I", kind) + string(draw(text))
    item = draw(st.sampled_from([*SCALARS, 8, 9, 13]))
    count = draw(st.integers(0, 5))
    items = [string(draw(text)) if item == 8 else draw(scalars(item)) if item in SCALARS else b"" for _ in range(count)]
    claimed = draw(st.one_of(st.just(count), st.just(count), numbers))
    return struct.pack("<IIQ", 9, item, claimed) + b"".join(items)


@given(data=st.data())
@fuzzed
def test_other_values(targets: list[Target], data: st.DataObject) -> None:
    """Entries of the metadata hold anything, are gone, or are there that were not."""
    target = data.draw(st.sampled_from(targets))
    pairs = dict(target.pairs)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.one_of(st.sampled_from(target.keys), st.sampled_from(EXTRA), text))
        if key in pairs and data.draw(st.integers(0, 5)) == 0:
            del pairs[key]
        else:
            pairs[key] = data.draw(values())
    target.run(target.written_with(pairs))


EXTRA = [
    *("general.alignment", "split.count", "split.no", "split.tensors.count", "general.name", "tokenizer.ggml.pre"),
    *("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.eot_token_id"),
    *(
        "llama.rope.scale_linear",
        "llama.expert_count",
        "llama.attention.sliding_window",
        "phi3.attention.sliding_window",
    ),
    *("tokenizer.chat_template", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.unknown_token_id"),
    *("llama.rope.scaling.yarn_beta_fast", "gemma2.attention.sliding_window", "llama.attention.scale"),
]


@given(data=st.data())
@fuzzed
def test_other_tokens(targets: list[Target], data: st.DataObject) -> None:
    """Tokens, merges, scores and types of a vocabulary are others, some of them."""
    target = data.draw(st.sampled_from(targets))
    raw = bytearray(target.raw)
    key = data.draw(st.sampled_from([key for key in target.keys if key.startswith("tokenizer.ggml.")]))
    start = raw.index(string(key)) + len(string(key))
    end = start + len(target.pairs[key])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(start, end - 1))
        raw[at] = data.draw(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 9, 10, 32, 36, 58, 97, 195, 255]))
    target.run(bytes(raw))


@given(data=st.data())
@fuzzed
def test_damage(targets: list[Target], data: st.DataObject) -> None:
    """Bytes flipped, cut out, put in and cut off, and lengths anywhere in the header."""
    target = data.draw(st.sampled_from(targets))
    raw = bytearray(target.raw)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, target.data - 1))
        change = data.draw(st.sampled_from(["flip", "flip", "length", "short", "remove", "insert", "cut"]))
        if change == "flip":
            raw[at % len(raw)] ^= 1 << data.draw(st.integers(0, 7))
        elif change in ("length", "short"):
            size = 8 if change == "length" else 4
            raw[at : at + size] = (data.draw(numbers) % 2 ** (8 * size)).to_bytes(size, "little")
        elif change == "remove":
            del raw[at : at + data.draw(st.integers(1, 16))]
        elif change == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=16))
        else:
            del raw[max(at, 5) :]
    target.run(bytes(raw))


@given(data=st.data())
@fuzzed
def test_other_tensors(targets: list[Target], data: st.DataObject) -> None:
    """Dimensions, types and offsets of the table."""
    target = data.draw(st.sampled_from(targets))
    raw = bytearray(target.raw)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(target.table, target.table_end - 8))
        size = data.draw(st.sampled_from([1, 4, 8]))
        raw[at : at + size] = (data.draw(numbers) % 2 ** (8 * size)).to_bytes(size, "little")
    target.run(bytes(raw))
