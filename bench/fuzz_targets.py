"""Inputs of :mod:`fuzz`: how each kind of file that comes with a model is made wrong, and what reads it."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llmconvert.api import quantize_model
from llmconvert.convert.inspection import describe_model
from llmconvert.convert.source import open_source
from llmconvert.engine.evaluation import stream_logits
from llmconvert.errors import LlmconvertError
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.storage.directory import INDEX_NAME, SINGLE_NAME
from llmconvert.text.chat import ChatRenderer, ChatTemplate
from llmconvert.text.tokenizer import load_tokenizer, tokenizer_errors

__all__ = ["TARGETS", "Target"]

# JSON -----------------------------------------------------------------------------------------------------------------

_NUMBERS: Sequence[Any] = (
    *(0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**9, 10**18, 10**300, 0.0, -0.0, 0.5, 1e-30, 1e308, -1.0),
    *(float("inf"), float("-inf"), float("nan")),
)
_STRINGS = ("", "x", "\0", "a\nb", "../../etc/passwd", "/dev/zero", "\x1b[31m", "é" * 300, "default", "llama", "yarn")
_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.sampled_from(_NUMBERS) | st.sampled_from(_STRINGS) | st.text(max_size=8),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=6), inside, max_size=3),
    max_leaves=6,
)
_RAW = st.binary(max_size=64) | st.sampled_from(
    [b"[" * 2000, b'{"a":' * 2000, b"9" * 6000, b"\0" * 64, b"\xff\xfe{}", b"nul", b"{}", b"[]", b""]
)


@st.composite
def _changed(draw: st.DrawFn, value: Any, changes: int = 3) -> Any:
    """``value`` with a few of its parts replaced, removed, doubled or moved."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, changes))):
        paths = list(_paths(value))
        if not paths:
            break
        *path, last = draw(st.sampled_from(paths))
        owner = value
        for part in path:
            owner = owner[part]
        how = draw(st.sampled_from(["replace", "replace", "number", "remove", "wrap", "other"]))
        if how == "replace":
            owner[last] = draw(_ANYTHING)
        elif how == "number":
            owner[last] = draw(st.sampled_from(_NUMBERS))
        elif how == "remove":
            del owner[last]
        elif how == "wrap":
            owner[last] = draw(st.sampled_from([[owner[last]], {"a": owner[last]}, str(owner[last])]))
        else:
            source = value
            for part in draw(st.sampled_from(paths)):
                source = source[part] if isinstance(source, list | dict) and _has(source, part) else source
            owner[last] = copy.deepcopy(source)
    return value


def _has(container: Any, part: Any) -> bool:
    return part in container if isinstance(container, dict) else isinstance(part, int) and part < len(container)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for number, (key, part) in enumerate(entries):
        if number < 64:
            yield (*path, key)
            yield from _paths(part, (*path, key))


def _json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


# What is fuzzed -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        inputs: how to make one.
        run: reads it in a fresh directory; what it raises is judged.
    """

    inputs: st.SearchStrategy[Any]
    run: Callable[[Any, Path], object]


def _header(raw: bytes, directory: Path) -> None:
    (directory / "config.json").write_text("{}")
    (directory / SINGLE_NAME).write_bytes(raw)
    with SafetensorsCheckpoint(directory) as checkpoint:
        for name in checkpoint:
            checkpoint[name]


@st.composite
def _headers(draw: st.DrawFn) -> bytes:
    data = bytes(96)
    entries = {
        "a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]},
        "b": {"dtype": "BF16", "shape": [16], "data_offsets": [64, 96]},
        "__metadata__": {"format": "pt"},
    }
    raw = draw(_RAW | _changed(entries).map(_json) | st.just(_json(entries)))
    length = draw(st.just(len(raw)) | st.sampled_from([0, 1, len(raw) - 1, len(raw) + 1, 2**40, 2**64 - 1]))
    file = (length % 2**64).to_bytes(8, "little") + raw + data[: draw(st.sampled_from([96, 95, 0, 64]))]
    return file[: draw(st.just(len(file)) | st.integers(0, len(file)))]


def _index(raw: bytes, directory: Path) -> None:
    (directory / "config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, directory / "model-1.safetensors")
    save_file({"b": torch.ones(2)}, directory / "model-2.safetensors")
    (directory / INDEX_NAME).write_bytes(raw)
    with SafetensorsCheckpoint(directory) as checkpoint:
        for name in checkpoint:
            checkpoint[name]


_INDEX = {"metadata": {"total_size": 16}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}

_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 64,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 1}
_YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 32,
}
_MODELS: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED, "rope_parameters": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0}
              | {"high_freq_factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}},
    "qwen2": {**_GROUPED, "use_sliding_window": True, "sliding_window": 8, "rope_parameters": _YARN},
    "phi3": {**_GROUPED, "rope_parameters": _LONGROPE, "pad_token_id": 0},
    "gemma2": {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "gemma3_text": {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "gpt_neox": _SMALL,
    "opt": {**_SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 64},
    "falcon": {**_SMALL, "alibi": False},
    "mamba": {**_SMALL, "state_size": 4, "time_step_rank": 32},
    "bamba": {**_GROUPED, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8},
}  # fmt: skip
_ROPES: Sequence[Any] = (
    *({"rope_type": kind, "rope_theta": 1e4} for kind in ("linear", "dynamic", "yarn", "longrope", "llama3", "spiral")),
    *({"rope_type": "linear", "factor": factor, "rope_theta": 1e4} for factor in (0, -1, 1e-9, 1e30, "2", None, [2])),
    {"full_attention": _YARN},
    {"type": "linear", "factor": 2.0},
    [],
    "yarn",
)


def _model(model_type: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config and the tensors of a tiny model, made once."""
    if model_type not in _MADE:
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **copy.deepcopy(_MODELS[model_type]))
        with tempfile.TemporaryDirectory() as directory:
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
            with SafetensorsCheckpoint(directory) as saved:
                _MADE[model_type] = dict(saved.config), {name: saved[name] for name in saved}
    return _MADE[model_type]


_MADE: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {}


@st.composite
def _configs(draw: st.DrawFn) -> tuple[str, bytes]:
    model_type = draw(st.sampled_from(sorted(_MODELS)))
    config = dict(_model(model_type)[0])
    if draw(st.booleans()):
        config["rope_parameters"] = draw(st.sampled_from(_ROPES))
    return model_type, draw(_changed(config).map(_json) | _RAW | st.just(_json(config)))


def _config(given: tuple[str, bytes], directory: Path) -> None:
    model_type, raw = given
    model = directory / "model"
    model.mkdir()
    save_file(_model(model_type)[1], model / SINGLE_NAME)
    (model / "config.json").write_bytes(raw)
    with open_source(str(model)).checkpoint as checkpoint, contextlib.suppress(LlmconvertError):
        describe_model(checkpoint)
    quantize_model(model, directory / "out", method="rtn", scheme="w8a16-g32")
    with open_source(str(model)).checkpoint as checkpoint:
        list(stream_logits(checkpoint, [torch.zeros((1, 12), dtype=torch.long)], device=torch.device("cpu")))


_PIECES = (
    "{{ messages }}",
    "{{ messages[0].content }}",
    "{{ bos_token }}",
    "{{ nothing }}",
    "{{ nothing.there }}",
    "text\n",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if m %}",
    "{% else %}",
    "{% endif %}",
    "{% break %}",
    "{{ m.role }}",
    "{{ raise_exception('no') }}",
    "{{ ''.__class__ }}",
    "{{ 1 / 0 }}",
    "{{ 9 ** 999 }}",
    "{{ 'x' * 99999999999 }}",
    "{% set ns = namespace(s='x') %}",
    "{% set ns.s = ns.s * 1000 %}",
    "{% for i in range(99999) %}",
    "{{ '\\ud800' }}",
    "{% macro f(x) %}",
    "{% endmacro %}",
    "{{ f(1) }}",
    "{{ m | tojson(indent=9999999) }}",
    "{{ strftime_now('%Y') }}",
    "{% include 'x' %}",
    "{% import 'os' as os %}",
    "{{ messages.append(1) }}",
    "{{ (1,) | sum }}",
    "{{ '%9999999d' % 1 }}",
    "{% generation %}",
    "{% endgeneration %}",
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "#}",
    "\x00",
    "\r\n",
    "{{ ''.join([1]) }}",
)
_MESSAGES = [{"role": "user", "content": "hi"}]
_RENDERER: list[ChatRenderer] = []


def _template(text: str, directory: Path) -> None:
    """In one child for all, as a dataset's conversations are; a new one after it was ended."""
    renderer = _RENDERER[0] if _RENDERER else ChatRenderer(ChatTemplate(text, ()))
    _RENDERER[:] = [renderer]
    renderer._template = ChatTemplate(text, (("bos_token", "<s>"),))
    renderer.render(_MESSAGES, prompt=True)


_TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": 9, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
    ],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Replace"}]}
    | {"normalizers": [{"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": " +"}, "content": "_"}]},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\w+|\\s"}, "behavior": "Isolated", "invert": False},
    "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "dropout": None, "unk_token": "<s>", "continuing_subword_prefix": None}
    | {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    | {"vocab": {"a": 0, "b": 1, "ab": 2, "h": 3, "i": 4, "hi": 5, "_": 6, "e": 7, "l": 8, "<s>": 9}}
    | {"merges": [["a", "b"], ["h", "i"]]},
}
_TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "model_max_length": 10**30}
_PARTS = st.sampled_from(
    [
        {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA////"},
        {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 1000},
        {"type": "Prepend", "prepend": "\0"},
        {"type": "Unigram", "unk_id": 99, "vocab": [["a", -1.0]], "byte_fallback": True},
        {"type": "Unigram", "unk_id": 0, "vocab": [["", 0.0], ["a", float("-inf")]]},
        {"type": "WordPiece", "unk_token": "?", "vocab": {}, "max_input_chars_per_word": 2**63},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": []},
        {"type": "Sequence", "pretokenizers": []},
        {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5},
        {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": ""},
    ]
)


_PLACES = ("normalizer", "pre_tokenizer", "model", "post_processor", "truncation", "padding")


@st.composite
def _tokenizers(draw: st.DrawFn) -> tuple[bytes, bytes]:
    parts = copy.deepcopy(_TOKENIZER)
    for _ in range(draw(st.integers(0, 2))):
        parts[
            draw(st.sampled_from(["normalizer", "pre_tokenizer", "model", "post_processor", "truncation", "padding"]))
        ] = draw(_PARTS)
    file = draw(_changed(parts).map(_json) | st.just(_json(parts)) | _RAW)
    return file, draw(st.just(_json(_TOKENIZER_CONFIG)) | _changed(_TOKENIZER_CONFIG).map(_json) | _RAW)


def _tokenizer(given: tuple[bytes, bytes], directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.ones(1)}, directory / SINGLE_NAME)
    (directory / "tokenizer.json").write_bytes(given[0])
    (directory / "tokenizer_config.json").write_bytes(given[1])
    with SafetensorsCheckpoint(directory) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
        with tokenizer_errors():
            tokenizer("hi there, a longer line: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab")


def _pickled(zipped: bool) -> bytes:
    file = io.BytesIO()
    tensors = {
        "a": torch.ones(3),
        "b": torch.ones(2, 2, dtype=torch.bfloat16).T,
        "c": torch.nn.Parameter(torch.ones(1)),
    }
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@st.composite
def _pickles(draw: st.DrawFn) -> bytes:
    raw = bytearray(draw(st.sampled_from([_pickled(True), _pickled(False)])))
    for _ in range(draw(st.integers(0, 6))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw[: draw(st.just(len(raw)) | st.integers(0, len(raw)))])


def _pickle(raw: bytes, directory: Path) -> None:
    (directory / "config.json").write_text("{}")
    (directory / "pytorch_model.bin").write_bytes(raw)
    with open_source(str(directory), allow_pickle=True).checkpoint as checkpoint:
        for name in checkpoint:
            checkpoint[name]


#: Name → target. Another kind of file that comes with a model, or that a user writes, is one more row.
TARGETS: dict[str, Target] = {
    "safetensors": Target(_headers(), _header),
    "pickle": Target(_pickles(), _pickle),
    "index": Target(_changed(_INDEX).map(_json) | _RAW, _index),
    "config": Target(_configs(), _config),
    "chat template": Target(st.lists(st.sampled_from(_PIECES), max_size=8).map("".join), _template),
    "tokenizer": Target(_tokenizers(), _tokenizer),
}
