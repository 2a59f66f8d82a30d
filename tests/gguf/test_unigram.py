"""SentencePiece's Unigram, told to llama.cpp and read back, token by token."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.llama_cpp import LlamaCpp
from support.tiny_gguf import model_metadata, stored_tensors, tiny_model, write_gguf
from support.tiny_vocabularies import TRICKY, prose, sentencepiece_pieces
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.checkpoint import open_gguf
from llmconvert.gguf.ggml.mix import MIXES
from llmconvert.gguf.header import read_gguf_header
from llmconvert.gguf.tokenizer import build_tokenizer
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.passes.run import QuantizeResult
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

SPECIAL = ("<pad>", "</s>", "<unk>", "<think>")
TEXTS = [
    *TRICKY,
    "".join(prose())[:20_000],
    "Hello <think> 12 </s>\n x<think></s>  y <pad> z",
    "½ Ａ e\u0301a n\u0303o …",
]
#: SentencePiece's table of a few rules (white space to spaces, ``e`` and U+0301 to ``é``, ``½`` to ``1/2``, …),
#: as its trainer makes one of ``normalization_rule_tsv``.
TABLE = zlib.decompress(
    base64.b64decode(
        "eNol03mQz2UcB/DP/kaNNbvTP8Y4qy0hw66rkqQoV5codLlKhkyS6CDabRElOjZHFrvuLSp3sRU2HWZLjhLlamuqmY0OlKu8vnxnXt/383w/zz"
        "zzfL/P94kqEXFpRHp6RLULIrlyyzNSkVkrIk8/I+lXTUV+ZsRF2kVZERfK3CqpSMn85m7auV0jSnNTUVzPPB5VN9GHQyJqSFNFTepQG0OiLpdw"
        "MVnnlxCXcxlXUJ+GNOBKGrH41YjGsilNyCEbS4hmtKQFV9GKa7iaa2nNdbThetpyA+1oz43cRAc6cjOd6YRXiy7cyi3czm104w66cyd30YOe3E"
        "1venEv93A/99GHB+hHXwbQn4d4kIcZyLBJqRgkfcYYzFAe4dFkTEEqHkvG8DjDeYIRjGIkT/Ekz/A0YxjNWJ7lOcaRl2w6+TzPBMbzAhOZzCRe"
        "4kVeZgrTmIptiVd4ndd4gwJmMJ1ZzGQ2bzKHQuYxl2KKWMB8FrGQJcmeU8JS3uYtlrOMd3mHFbzHKlayhtWsYy0f8D4bWJ/8l5TyMR+xiY2UsZ"
        "ktfMJnfMoXfJ7UxqfFVvkl5WzjK7bzNTvZwTfsYjffsofv+J697OMHDrCfQxykgh/5mZ/4hSP10+I3+WtSK0yLisq0+F27MqlxmD/5g7/5i2Mc"
        "5R+Oc4J/OcVJznCa//nv3NnLzs6O5jktnISykihbEWcBLPOUDg=="
    )
)
pytestmark = pytest.mark.filterwarnings("ignore")


def unigram() -> Tokenizer:
    """As T5's: white space merged, a space before the text and none behind it. The scores are seeded: the library's
    trainer gives others each time."""
    generator = np.random.default_rng(0)
    pieces = [piece for piece, _, kind in sentencepiece_pieces(700) if kind == 1]
    scores = generator.uniform(-12, -4, len(pieces)).astype(np.float32).tolist()
    scored = list(zip(pieces, scores, strict=True))
    tokenizer = Tokenizer(models.Unigram([*((token, 0.0) for token in SPECIAL), *scored], SPECIAL.index("<unk>")))
    tokenizer.add_special_tokens([token for token in SPECIAL if token != "<think>"])
    space = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Precompiled(TABLE), normalizers.Strip(), space])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    ends = [("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=ends
    )
    return tokenizer


def directory_of(tokenizer: Tokenizer, path: Path, rows: int = 1200) -> Path:
    tiny_model("llama", vocab_size=rows, num_hidden_layers=1).save_pretrained(path)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(path)
    return path


def written(directory: Path) -> QuantizeResult:
    with SafetensorsCheckpoint(directory) as source:
        output = directory.with_suffix(".gguf")
        return quantize_checkpoint(source, output, method="rtn", scheme=MIXES["f32"], format="gguf", name="tiny")


def test_llama_cpp_and_what_is_read_back_give_the_tokens_of_transformers(tmp_path: Path) -> None:
    """Rows that no token names are there too, and what no piece covers is the unknown token in all three."""
    directory = directory_of(unigram(), tmp_path / "model")
    path = written(directory).output
    original, theirs = AutoTokenizer.from_pretrained(directory), LlamaCpp(path)
    with open_gguf(path) as checkpoint:
        again = Tokenizer.from_str(checkpoint.read_file("tokenizer.json").decode())
    header = read_gguf_header(path)
    assert header.metadata.text("tokenizer.ggml.model") == "t5"
    unknown = original.unk_token_id
    counted = 0
    for text in TEXTS:
        if "<think>" in text:
            continue
        for ends in (False, True):
            expected = original(text, add_special_tokens=ends).input_ids
            counted += expected.count(unknown)
            assert theirs.tokenize(text, special=ends) == expected, text[:60]
            assert again.encode(text, add_special_tokens=ends).ids == expected, text[:60]
    assert counted > 10


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_a_files_tokens_are_llama_cpps(merge: bool, prefix: bool, tmp_path: Path) -> None:
    tokenizer = json.loads(unigram().to_str())
    tokens = [piece for piece, _ in tokenizer["model"]["vocab"]]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [score for _, score in tokenizer["model"]["vocab"]],
        "tokenizer.ggml.token_type": [
            {"<think>": 4, "<unk>": 2}.get(token, 3 if token in SPECIAL else 1) for token in tokens
        ],
        "tokenizer.ggml.unknown_token_id": tokens.index("<unk>"),
        "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
        "tokenizer.ggml.remove_extra_whitespaces": merge,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    model = tiny_model("llama", vocab_size=len(tokens), num_hidden_layers=1)
    path = write_gguf(tmp_path / "t.gguf", model_metadata(model) | metadata, stored_tensors(model))
    ours, theirs = build_tokenizer(read_gguf_header(path).metadata, len(tokens)), LlamaCpp(path)
    for text in TEXTS:
        for special in (False, True):
            expected = theirs.tokenize(text, special=special)
            assert ours.encode(text, add_special_tokens=special).ids == expected, text[:60]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("bytes", "Unigram with byte fallback; llama.cpp's Unigram has an unknown token instead"),
        ("case", "normalizer 'Lowercase' cannot be told to llama.cpp, which takes SentencePiece's table alone"),
        ("prefix", "the tokenizer cannot be written as GGUF: .* would have other ids in llama.cpp"),
    ],
)
def test_what_llama_cpp_does_otherwise_is_refused(change: str, message: str, tmp_path: Path) -> None:
    tokenizer = unigram()
    parts = json.loads(tokenizer.to_str())
    if change == "bytes":
        parts["model"]["byte_fallback"] = True
    elif change == "case":
        parts["normalizer"]["normalizers"].append({"type": "Lowercase"})
    else:  # digits apart, which no setting of a file says
        parts["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [parts["pre_tokenizer"], {"type": "Digits", "individual_digits": True}],
        }
    directory = directory_of(Tokenizer.from_str(json.dumps(parts)), tmp_path / "model")
    with pytest.raises(UnsupportedError, match=message):
        written(directory)
