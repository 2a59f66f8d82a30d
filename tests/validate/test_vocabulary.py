"""Which vocabularies may be compared: ids that both name, wherever a tokenizer's files name them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_gguf import tiny_model
from support.tiny_models import tiny_tokenizer

from llmconvert.errors import UsageError
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import parse_scheme
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint
from llmconvert.text.tokens import TokenWindows
from llmconvert.validate.artifact import validate_artifact
from llmconvert.validate.predictions.quality import QualityCheck
from llmconvert.validate.vocabulary import VocabularyCheck, require_same_vocabulary


class Files(Checkpoint):
    """A checkpoint that is nothing but a tokenizer's files."""

    def __init__(self, **files: Any) -> None:
        self.infos, self.config = {}, {"vocab_size": 10}
        self.files = {f"{name}.json": json.dumps(values).encode() for name, values in files.items()}

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        raise KeyError(name)


def whole(vocabulary: Mapping[str, int], **added: int) -> dict[str, Any]:
    entries = [{"id": index, "content": token} for token, index in added.items()]
    return {"model": {"vocab": dict(vocabulary)}, "added_tokens": entries}


PADDED = whole({"a": 0, "b": 1, "<x>": 2, "[PAD3]": 3})


@pytest.mark.parametrize(
    "original",
    [
        Files(tokenizer=whole({"a": 0, "b": 1, "<x>": 2})),
        Files(tokenizer=whole({"a": 0, "b": 1}, **{"<x>": 2})),
        Files(tokenizer=whole({"a": 0, "b": 1}), added_tokens={"<x>": 2}),
        Files(vocab={"a": 0, "b": 1}, tokenizer_config={"added_tokens_decoder": {"2": {"content": "<x>"}}}),
        Files(tokenizer={"model": {"vocab": [["a", 0.0], ["b", -1.0]]}}),
        Files(tokenizer={"model": None, "added_tokens": 7}, tokenizer_config=[], added_tokens="x"),
        Files(),
    ],
)
def test_rows_that_one_of_them_names_alone_are_no_difference(original: Files) -> None:
    require_same_vocabulary(original, Files(tokenizer=PADDED))
    require_same_vocabulary(Files(tokenizer=PADDED), original)


@pytest.mark.parametrize(
    "original",
    [
        Files(tokenizer=whole({"a": 0, "b": 1, "<y>": 2})),
        Files(tokenizer=whole({"a": 0, "b": 1}, **{"<y>": 2})),
        Files(tokenizer=whole({"a": 0, "b": 1}), added_tokens={"<y>": 2}),
        Files(vocab={"a": 0, "b": 1}, tokenizer_config={"added_tokens_decoder": {"2": {"content": "<y>"}}}),
        Files(tokenizer={"model": {"vocab": [["a", 0.0], ["b", -1.0], ["<y>", -2.0]]}}),
    ],
)
def test_an_id_that_is_another_token_is_refused(original: Files) -> None:
    with pytest.raises(UsageError, match="the id 2 is token '<y>' in the reference's tokenizer, '<x>' in the artifact"):
        require_same_vocabulary(original, Files(tokenizer=PADDED))


def test_spaces_may_be_spelled_as_sentencepiece_does() -> None:
    require_same_vocabulary(Files(vocab={"\u2581\u2581": 0}), Files(vocab={"  ": 0}))


def test_a_gguf_file_with_padded_rows_is_measured(tmp_path: Path) -> None:
    """Qwen's and Llama 3's layout: the embedding has rows that no token names, the special ones are added."""
    tiny_model("qwen2", vocab_size=352).save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    parts = json.loads(path.read_text())
    parts["added_tokens"].append({**parts["added_tokens"][0], "id": 320, "content": "<|late|>"})
    path.write_text(json.dumps(parts))
    ids = torch.arange(3, 43).reshape(1, 40)
    windows = TokenWindows((ids,), 1, 40, "text", "", "", bos=False, stride=40)
    with SafetensorsCheckpoint(tmp_path / "model") as source:
        quantize_checkpoint(source, tmp_path / "t.gguf", method="rtn", scheme=parse_scheme("f32"), format="gguf")
        checks = validate_artifact(
            tmp_path / "t.gguf",
            [VocabularyCheck(), QualityCheck(max_kl=1e-3)],
            reference=source,
            windows=windows,
            device=torch.device("cpu"),
        )
    assert all(check.ok is not False for check in checks) and any(check.name == "kl_mean" for check in checks)
