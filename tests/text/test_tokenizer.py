"""Tokenizers that come with a model: used as transformers loads them, or one line, whatever they do."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import tiny_tokenizer

from llmconvert.errors import SourceError
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.text import confinement
from llmconvert.text.tokenizer import load_tokenizer, tokenizer_errors, try_tokenizer

SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
#: Parts of a tokenizer.json that some tokenizers fail on, with what is said.
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "a pattern without end": (
        {"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "(x+x+)+y|(.+)+\\d{9}"}}},
        "PanicException: Onig: Regex search error: retry-limit|takes more than",
    ),
    "no pattern": ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "("}}}, "Exception: Oniguruma error"),
    "a table that is none": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA////"}},
        r"ends the process that runs it \(SIGABRT\)",
    ),
    "ten billion tokens of padding": (
        {
            "padding": {"strategy": {"Fixed": 10**10}, "direction": "Right", "pad_to_multiple_of": None}
            | {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
        },
        r"ends the process that runs it \(SIGABRT\)",
    ),
    "a token that is nowhere": (
        {
            "post_processor": {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
            | {"single": [{"SpecialToken": {"id": "x", "type_id": 0}}]}
        },
        "PanicException: no entry found for key",
    ),
    "another model": ({"model": {"type": "Oracle"}}, "Exception"),
}


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


def change(model: Path, parts: dict[str, Any]) -> None:
    path = model / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **copy.deepcopy(parts)}))


@pytest.mark.parametrize("case", HOSTILE)
def test_a_tokenizer_that_fails_is_one_line(model: Path, case: str) -> None:
    parts, reason = HOSTILE[case]
    change(model, parts)
    with (
        SafetensorsCheckpoint(model) as checkpoint,
        pytest.raises(SourceError, match=f"tokenizer cannot be used: ({reason})") as caught,
    ):
        load_tokenizer(checkpoint)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 5000, '{"a": ' + "9" * 6000 + "}", "\0"])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_no_tokenizers_is_one_line(model: Path, file: str, content: str) -> None:
    (model / file).write_text(content)
    with SafetensorsCheckpoint(model) as checkpoint:
        if (file, content) == ("tokenizer_config.json", "{}"):
            assert load_tokenizer(checkpoint)("hi")["input_ids"]
            return
        with pytest.raises(SourceError, match="tokenizer cannot be used: ") as caught:
            load_tokenizer(checkpoint)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_tokenizer_is_tried_once_and_is_the_models(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SafetensorsCheckpoint(model) as checkpoint:
        expected = tiny_tokenizer()("Some text.")["input_ids"]
        assert load_tokenizer(checkpoint)("Some text.")["input_ids"] == expected
        monkeypatch.setattr(confinement, "_CHILD", model / "nothing.py")
        assert load_tokenizer(checkpoint)("Some text.")["input_ids"] == expected
        try_tokenizer(model / "tokenizer.json")


def test_panics_are_errors_and_interruptions_stay() -> None:
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(SourceError, match="cannot be used: PanicException: index out of bounds"), tokenizer_errors():
        raise panic("index out\nof bounds")
    with pytest.raises(KeyboardInterrupt), tokenizer_errors():
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="disk"), tokenizer_errors():
        raise OSError(5, "disk")
