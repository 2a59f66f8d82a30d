"""Models and tokenizers that llama.cpp could be told wrong, judged by llama.cpp and transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.gguf_models import IDS, built, next_token
from support.llama_cpp import LlamaCpp
from support.tiny_gguf import tiny_model
from support.tiny_models import tiny_tokenizer
from support.tiny_vocabularies import TRICKY, sentencepiece_pieces
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer
from transformers.tokenization_utils_base import generate_merges

from llmconvert.errors import CheckpointError, SourceError, UnsupportedError
from llmconvert.gguf.checkpoint import open_gguf
from llmconvert.gguf.ggml.mix import MIXES
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.passes.run import QuantizeResult
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.storage.writer import write_json

ROWS = 330
TOLERANCE = 0.03
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def model_directory(path: Path, family: str = "llama", *, rows: int = 320, **changes: Any) -> Path:
    """A tiny model with its tokenizer, whose config has changes."""
    tiny_model(family, vocab_size=rows).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    change(path / "config.json", **changes)
    return path


def change(path: Path, **changes: Any) -> None:
    write_json(path, (json.loads(path.read_text()) if path.exists() else {}) | changes)


def written(directory: Path, mix: str = "f32", name: str = "tiny") -> QuantizeResult:
    output = directory.with_name(f"{directory.name}-{mix}.gguf")
    output.unlink(missing_ok=True)
    with SafetensorsCheckpoint(directory) as source:
        return quantize_checkpoint(source, output, method="rtn", scheme=MIXES[mix], format="gguf", name=name)


def refused(directory: Path, message: str, error: type[Exception] = UnsupportedError) -> None:
    with pytest.raises(error, match=message):
        written(directory)
    assert not list(directory.parent.glob("*.gguf"))


def replace_tensor(directory: Path, name: str, tensor: torch.Tensor) -> None:
    weights = load_file(directory / "model.safetensors")
    save_file(weights | {name: tensor.contiguous()}, directory / "model.safetensors", {"format": "pt"})


@torch.no_grad()
def transformers_predicts(directory: Path) -> torch.Tensor:
    return next_token(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval())


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_a_head_that_is_not_the_embedding_is_written_whatever_the_config_says(family: str, tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model", family, tie_word_embeddings=True)
    expected = transformers_predicts(directory)
    path = written(directory).output
    assert (LlamaCpp(path).log_probabilities(IDS[0].tolist(), 320) - expected).abs().max() < TOLERANCE
    with open_gguf(path) as checkpoint:
        assert checkpoint.config["tie_word_embeddings"] is False
    replace_tensor(directory, "lm_head.weight", load_file(directory / "model.safetensors")["model.embed_tokens.weight"])
    with open_gguf(written(directory).output) as checkpoint:
        assert checkpoint.config["tie_word_embeddings"] is True and "lm_head.weight" not in checkpoint


def test_gemma_2_has_no_head_of_its_own_in_llama_cpp(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model", "gemma2")
    replace_tensor(directory, "lm_head.weight", torch.ones(320, 64))
    refused(directory, r"'lm_head.weight' is not the embedding; llama.cpp's gemma2 has no head of its own")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "model.layers.1.mlp.up_proj.weight",
            (97, 64),
            r"has shape \[97, 64\], config.json asks for \[96, 64\] \(inner",
        ),
        (
            "model.layers.0.self_attn.k_proj.weight",
            (64, 64),
            r"\[64, 64\], config.json asks for \[32, 64\] \(key × hid",
        ),
        ("model.embed_tokens.weight", (300, 64), r"\[300, 64\], config.json asks for \[320, 64\] \(vocab × hidden"),
        ("model.norm.weight", (63,), r"shape \[63\], config.json asks for \[64\]"),
    ],
)
def test_shapes_that_contradict_the_config_are_refused(
    name: str, shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    directory = model_directory(tmp_path / "model")
    replace_tensor(directory, name, torch.zeros(shape))
    refused(directory, message, CheckpointError)


def test_a_bias_of_one_layer_alone_would_not_be_read(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model")
    replace_tensor(directory, "model.layers.1.self_attn.q_proj.bias", torch.ones(64))
    refused(directory, r"read back, it would be refused: .*only 1 of 2 layers have 'attn_q.bias'")


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(("key", "value"), [("beta_fast", 16.0), ("beta_slow", 2)])
def test_betas_of_yarn_that_llama_cpp_ignores_are_refused(key: str, value: float, tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model", rope_parameters={**YARN, key: value})
    refused(directory, rf"YaRN's {key} is {value}; llama.cpp computes with (32|1) whatever")
    change(directory / "config.json", rope_parameters={**YARN, "beta_fast": 32, "beta_slow": 1})
    expected = transformers_predicts(directory)
    path = written(directory).output
    assert (LlamaCpp(path).log_probabilities(IDS[0].tolist(), 320) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("family", "layers", "message"),
    [
        ("gemma2", ["full_attention", "full_attention"], r"layer_types\[0\] is 'full_.*gemma2 computes 'sliding_att"),
        ("qwen3", ["full_attention", "sliding_attention"], r"layer_types\[1\] is 'sliding_.*qwen3 computes 'full_att"),
    ],
)
def test_layers_of_other_kinds_are_refused(family: str, layers: list[str], message: str, tmp_path: Path) -> None:
    refused(model_directory(tmp_path / "model", family, layer_types=layers), message)


def test_a_window_that_llama_cpp_does_not_keep_to_is_said(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model", "mistral", sliding_window=64)
    assert any("attends to everything, the model to the last 64 tokens" in note for note in written(directory).notes)
    change(directory / "config.json", sliding_window=512)
    assert not written(directory).notes


@pytest.mark.parametrize("context", [64, 24, 100_000])
@pytest.mark.parametrize("factor", [8.0, 2.0])
def test_llama_3s_scaling_of_narrow_heads_comes_back(factor: float, context: int, tmp_path: Path) -> None:
    """Eight frequencies, of which none or one lies on the ramp."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": context,
    }
    directory = model_directory(tmp_path / "model", rope_parameters=rope, max_position_embeddings=2 * context)
    expected = transformers_predicts(directory)
    with open_gguf(written(directory).output) as checkpoint:
        torch.testing.assert_close(next_token(built(checkpoint)), expected, rtol=0, atol=1e-4)
        back = {**checkpoint.config, "vocab_size": 320}
    AutoConfig.for_model(**back)


def added(token: str, index: int, **flags: bool) -> dict[str, Any]:
    entry = {"id": index, "content": token, "special": True, "normalized": False}
    return entry | dict.fromkeys(("lstrip", "rstrip", "single_word"), False) | flags


def assert_same_tokens(path: Path, directory: Path, texts: tuple[str, ...]) -> None:
    ours, theirs = AutoTokenizer.from_pretrained(directory), LlamaCpp(path)
    for text in texts:
        assert theirs.tokenize(text) == ours(text, add_special_tokens=False).input_ids, text
        assert theirs.tokenize(text, special=True) == ours(text).input_ids, text


LATE = tuple(f"a<|late{number}|>b <|late{number}|> c\n<|late{number}|><|im_end|>" for number in (0, 9))


def in_tokenizer_json(directory: Path, tokens: list[dict[str, Any]]) -> None:
    path = directory / "tokenizer.json"
    parts = json.loads(path.read_text())
    write_json(path, parts | {"added_tokens": [*parts["added_tokens"], *tokens]})


def in_the_decoder(directory: Path, tokens: list[dict[str, Any]]) -> None:
    decoder = {str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in tokens}
    change(directory / "tokenizer_config.json", added_tokens_decoder=decoder)


def in_vocab_and_merges_with_added_tokens(directory: Path, tokens: list[dict[str, Any]]) -> None:
    """Files as they were before tokenizer.json."""
    parts = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").unlink()
    write_json(directory / "vocab.json", parts["model"]["vocab"])
    merges = ["#version: 0.2", *(" ".join(pair) for pair in parts["model"]["merges"])]
    (directory / "merges.txt").write_text("\n".join(merges) + "\n")
    write_json(directory / "added_tokens.json", {token["content"]: token["id"] for token in tokens})
    in_the_decoder(directory, [added("<|endoftext|>", 0), added("<|im_start|>", 1), added("<|im_end|>", 2), *tokens])
    change(directory / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", unk_token="<|endoftext|>")


PLACES = [in_tokenizer_json, in_the_decoder, in_vocab_and_merges_with_added_tokens]


@pytest.mark.parametrize("put", PLACES, ids=lambda place: place.__name__)
def test_added_tokens_are_written_wherever_they_stand(put: Any, tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model", rows=ROWS)
    put(directory, [added(f"<|late{number}|>", 320 + number) for number in range(10)])
    path = written(directory).output
    assert_same_tokens(path, directory, (*TRICKY[:8], *LATE, "<|im_start|>user\nHi<|im_end|>"))
    with open_gguf(path) as checkpoint:
        entries = json.loads(checkpoint.read_file("tokenizer.json"))["added_tokens"]
    assert {f"<|late{number}|>" for number in range(10)} <= {entry["content"] for entry in entries}


def test_rows_that_no_token_names_are_no_tokens(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model", rows=ROWS)
    in_tokenizer_json(directory, [added("[PAD325]", 320)])
    assert_same_tokens(written(directory).output, directory, ("a[PAD325]b [PAD326]",))


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_every_kind_of_added_token_is_tried(flag: str, special: bool, tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model", rows=ROWS)
    plain = [added(f"<|late{number}|>", 320 + number) for number in range(9)]
    in_tokenizer_json(directory, [*plain, added("<|odd|>", 329, special=special, **{flag: True})])
    refused(directory, rf"'<\|odd\|>' (is {flag}, and 'a<\|odd\|>|takes white space after it along)")


def test_added_tokens_that_overlap_are_refused_where_llama_cpp_prefers_the_longer(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model", rows=ROWS)
    runs = [added("\n" * (number + 2), 320 + number, special=False) for number in range(4)]
    in_tokenizer_json(directory, [*runs, added("abc|", 324), added("|de", 325)])
    assert_same_tokens(written(directory).output, directory, ("abc|de", "\n" * 9, "a\n\n\nb", "abc|\n\n\n\n\n|de"))
    other = model_directory(tmp_path / "other", rows=ROWS)
    in_tokenizer_json(other, [added("ab|", 320), added("|bcd", 321)])
    with pytest.raises(UnsupportedError, match=r"'ab\|' and '\|bcd' in 'ab\|bcd' transformers takes the first, llama"):
        written(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_position_embeddings": 10**12}, r"llama.context_length is 1000000000000, .*32 bits do not hold"),
        ({"rms_norm_eps": 1e-60}, r"rms_epsilon is 1e-60, which is out of float32's range"),
        ({"rms_norm_eps": 1e60}, r"rms_epsilon is 1e\+60, which is out of float32's range"),
    ],
)
def test_settings_that_a_file_cannot_hold(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(model_directory(tmp_path / "model", **changes), message)


def test_phi_3s_own_kind_of_tokenizer(tmp_path: Path) -> None:
    """Special tokens that swallow white space need the name; without all of its vocabulary they are refused."""
    directory = sentencepiece_directory(tmp_path / "model")
    path = directory / "tokenizer.json"
    parts = json.loads(path.read_text())
    rows = len(sentencepiece_pieces())
    tiny_model("llama", vocab_size=rows + 2).save_pretrained(directory)
    for token in parts["added_tokens"]:
        token["rstrip"] = token["content"] == "</s>"
    parts["added_tokens"] += [added("<|end|>", rows, rstrip=True)]
    write_json(path, parts)
    refused(directory, r"'</s>' takes white space after it along .*has no '<\|endoftext\|>'")
    parts["added_tokens"] += [added("<|endoftext|>", rows + 1)]
    write_json(path, parts)
    result = written(directory)
    with open_gguf(result.output) as checkpoint:
        assert vars(checkpoint)["general"]["general.name"] == "tiny (Phi-3)"
    assert_same_tokens(result.output, directory, ("Hello", "x = 1<|end|>"))


def test_a_token_that_llama_cpp_takes_for_a_control_token_is_tried_too(tmp_path: Path) -> None:
    """It is no added token here, so transformers finds it as the merges allow."""
    directory = model_directory(tmp_path / "model", rows=ROWS)
    path = directory / "tokenizer.json"
    parts = json.loads(path.read_text())
    parts["model"]["vocab"]["</s>"] = 320
    write_json(path, parts)
    refused(directory, r"cannot be written as GGUF: 'a</s>b c </s>")


@pytest.mark.parametrize("name", ["Phi-3-distilled", "tiny-phi3"])
def test_a_name_that_llama_cpp_would_take_for_phi_3_is_spelled_otherwise(name: str, tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model")
    path = written(directory, name=name).output
    assert_same_tokens(path, directory, ("<|im_end|>\n b", "a <|im_start|>  b"))
    with open_gguf(path) as checkpoint:
        assert isinstance(checkpoint.config, Mapping)
        assert "hi 3" in vars(checkpoint)["general"]["general.name"]


def sentencepiece_directory(path: Path, **settings: Any) -> Path:
    """A model with a SentencePiece tokenizer as transformers 5 saves it."""
    pieces = [piece for piece, _, _ in sentencepiece_pieces()]
    tiny_model("llama", vocab_size=len(pieces)).save_pretrained(path)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = generate_merges({piece: index for piece, index in vocabulary.items() if index >= 260})
    LlamaTokenizer(vocab=vocabulary, merges=merges, **settings).save_pretrained(path)
    return path


def test_sentencepiece_as_transformers_saves_it(tmp_path: Path) -> None:
    directory = sentencepiece_directory(tmp_path / "model")
    result = written(directory)
    assert [note for note in result.notes if "puts a space before text after special tokens" in note] == [*result.notes]
    texts = tuple(text.strip() for text in TRICKY if text.strip() and "\u0301" not in text)
    assert_same_tokens(result.output, directory, texts)
    # This is what the note says.
    ours, theirs = AutoTokenizer.from_pretrained(directory), LlamaCpp(result.output)
    assert ours.tokenize("<s>Hello") != ours.convert_ids_to_tokens(theirs.tokenize("<s>Hello"))


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_tokenizer_model_alone_needs_two_packages(tmp_path: Path) -> None:
    directory = sentencepiece_directory(tmp_path / "model")
    (directory / "tokenizer.json").rename(directory / "tokenizer.model")
    refused(directory, r"tokenizer.model alone, .*pip install sentencepiece protobuf", SourceError)


def test_sentencepiece_without_a_prefix_needs_no_note(tmp_path: Path) -> None:
    directory = sentencepiece_directory(tmp_path / "model", add_prefix_space=False)
    result = written(directory)
    assert not result.notes
    assert_same_tokens(result.output, directory, (*(text for text in TRICKY[:9] if text), " <s>a</s>  b"))


def test_a_tokenizer_that_composes_characters_is_said(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model")
    path = directory / "tokenizer.json"
    write_json(path, json.loads(path.read_text()) | {"normalizer": {"type": "NFC"}})
    (note,) = written(directory).notes
    assert note.startswith("llama.cpp does not compose characters")
    write_json(path, json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}})
    with pytest.raises(UnsupportedError, match=r"cannot be written as GGUF: \"Hello world"):
        written(directory, "q8_0")


def test_types_that_rows_do_not_allow_are_said(tmp_path: Path) -> None:
    result = written(model_directory(tmp_path / "model"), "q4_k_m")
    assert result.types == {"F32": 5, "Q8_0": 3, "Q5_0": 13}
    (note,) = result.notes
    assert note.startswith("q4_k_m: rows of 64, 96 weights are no whole blocks of its types")
    assert note.endswith("others take their place: 13 Q5_0 for Q4_K, 3 Q8_0 for Q6_K")
