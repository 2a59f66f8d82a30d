"""Written GGUF files against llama.cpp, which loads them, and against the checkpoints they were made from.

llama.cpp quantizes activations for its integer products: to 8 bits per 32 values (256 for K types), that is by up to
1/254 of the largest among them. Our forward multiplies the same weights in float32.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.gguf_models import IDS, built, next_token, round_inputs
from support.importance import collect_importance
from support.llama_cpp import LlamaCpp
from support.tiny_gguf import FAMILIES, tiny_model
from support.tiny_models import tiny_tokenizer
from support.tiny_vocabularies import TRICKY, sentencepiece_metadata, sentencepiece_pieces
from transformers import AutoModelForCausalLM

from llmconvert.convert.cast import CastView
from llmconvert.errors import CheckpointError, OutputError, UnsupportedError
from llmconvert.gguf.checkpoint import GgufCheckpoint, open_gguf
from llmconvert.gguf.ggml.mix import MIXES
from llmconvert.gguf.header import Metadata
from llmconvert.gguf.tokenizer import build_tokenizer, tokenizer_files
from llmconvert.quantize.formats.dense_view import QuantizedView, open_dense
from llmconvert.quantize.formats.gguf import GgufContainer
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.passes.run import QuantizeResult
from llmconvert.quantize.scheme import Scheme, parse_scheme
from llmconvert.storage.checkpoint import Checkpoint, CheckpointView, SafetensorsCheckpoint
from llmconvert.storage.writer import write_json

VOCABULARY = 320
#: Root mean square over log probabilities that llama.cpp's attention, in less than float32, is off by.
ATTENTION = 0.01
WINDOWS = [torch.randint(3, VOCABULARY, (1, 64), generator=torch.Generator().manual_seed(i)) for i in range(4)]
SIZES = {"hidden_size": 256, "intermediate_size": 512}


@functools.cache
def hugging_face(root: Path, family: str) -> Path:
    """A tiny model with its tokenizer in Hugging Face layout, wide enough for super-blocks."""
    directory = root / family
    model = tiny_model(family, **SIZES)
    model.save_pretrained(directory)
    tiny_tokenizer(VOCABULARY).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def write(source: Checkpoint, path: Path, scheme: str, **options: Any) -> QuantizeResult:
    settings: dict[str, Any] = {"method": "imatrix" if options.get("windows") else "rtn", **options}
    return quantize_checkpoint(source, path, scheme=parse_scheme(scheme), format="gguf", **settings)


def written(directory: Path, path: Path, mix: str, **options: Any) -> Path:
    with SafetensorsCheckpoint(directory) as source:
        return write(source, path, mix, **options).output


CASES = [(family, "q4_k_m") for family in FAMILIES] + [("llama", mix) for mix in MIXES if mix != "q4_k_m"]


@pytest.mark.parametrize(("family", "mix"), CASES)
def test_llama_cpp_computes_what_we_do(family: str, mix: str, models: Path, tmp_path: Path) -> None:
    directory = hugging_face(models, family)
    runs_in_llama_cpp(written(directory, tmp_path / "tiny.gguf", mix), directory)


def runs_in_llama_cpp(path: Path, directory: Path) -> None:
    theirs = LlamaCpp(path)
    found = theirs.log_probabilities(IDS[0].tolist(), VOCABULARY)
    with open_gguf(path) as checkpoint, SafetensorsCheckpoint(directory) as source:
        assert set(checkpoint) == set(source)
        model = built(checkpoint)
        exact = next_token(model)
        round_inputs(model, checkpoint)
    rounding = distance(exact, next_token(model))
    assert distance(exact, found) < 1.6 * rounding + ATTENTION
    assert distance(exact, found) < 0.1  # a wrong layout is off by more than 1
    text = "Hello, world! It's 123 <|im_start|>user\nnot\tspaces  "
    assert theirs.tokenize(text) == tiny_tokenizer(VOCABULARY)(text).input_ids


@pytest.mark.parametrize(
    ("method", "mix", "family"),
    [("gptq", "q2_k", "llama"), ("gptaq", "q4_k_m", "qwen2"), ("awq", "iq4_xs", "llama"), ("gptq", "q4_0", "gemma2")],
)
def test_error_feedback_fills_the_same_types(method: str, mix: str, family: str, models: Path, tmp_path: Path) -> None:
    directory = hugging_face(models, family)
    with SafetensorsCheckpoint(directory) as source:
        plain = write(source, tmp_path / "plain.gguf", mix, windows=WINDOWS, name="tiny")
        solved = write(source, tmp_path / "tiny.gguf", mix, windows=WINDOWS, name="tiny", method=method)
    assert solved.types == plain.types
    assert 0 <= plain.nbytes - solved.nbytes < 256  # what the other says of its importance matrix
    assert len(solved.layers) == 14 and all(layer.error is not None for layer in solved.layers)
    assert len({layer.scheme for layer in solved.layers}) == (1 if mix in ("q4_0", "iq4_xs") else 2)
    runs_in_llama_cpp(solved.output, directory)
    with (
        open_gguf(solved.output) as ours,
        open_gguf(plain.output) as theirs,
        SafetensorsCheckpoint(directory) as source,
    ):
        # One that is the head too is weighed by what comes to it, which differs.
        if not source.config["tie_word_embeddings"]:
            assert torch.equal(ours["model.embed_tokens.weight"], theirs["model.embed_tokens.weight"])
        lost = [logits_lost(found, source) for found in (ours, theirs)]
    assert method == "awq" or lost[0] < lost[1]


def logits_lost(found: Checkpoint, source: Checkpoint) -> float:
    """Mean square over the logits of the calibration windows."""
    models = [built(checkpoint) for checkpoint in (found, source)]
    with torch.no_grad():
        pairs = [[model(window).logits for model in models] for window in WINDOWS]
    return sum(float((ours - theirs).square().mean()) for ours, theirs in pairs)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt())


@pytest.mark.parametrize("family", FAMILIES)
def test_floats_come_back_as_they_were(family: str, models: Path, tmp_path: Path) -> None:
    directory = hugging_face(models, family)
    path = written(directory, tmp_path / "tiny.gguf", "f32")
    with SafetensorsCheckpoint(directory) as source, open_gguf(path) as back:
        assert set(back) == set(source)
        for name, tensor in source.items():
            rounding = 1e-6 if "gemma2" in family and "norm" in name else 0.0
            torch.testing.assert_close(back[name], tensor, rtol=0, atol=rounding)
        assert back.config["model_type"] == source.config["model_type"]
        assert back.read_file("chat_template.jinja") == source.read_file("chat_template.jinja")


def test_importance_changes_the_blocks_and_lowers_the_weighted_error(models: Path, tmp_path: Path) -> None:
    directory = hugging_face(models, "llama")
    plain = written(directory, tmp_path / "plain.gguf", "q4_k_s")
    weighed = written(directory, tmp_path / "weighed.gguf", "q4_k_s", windows=WINDOWS)
    with SafetensorsCheckpoint(directory) as source:
        importance = collect_importance(source, WINDOWS)
        assert set(importance) == {name for name in source if name.startswith("model.layers") and "proj" in name}
        for name, weights in importance.items():
            errors = []
            for path in (plain, weighed):
                with open_gguf(path) as checkpoint:
                    errors.append(float(((checkpoint[name] - source[name]).square() * weights).sum()))
            assert errors[1] < errors[0], name


def test_importance_is_the_diagonal_of_the_hessian(models: Path) -> None:
    directory = hugging_face(models, "qwen2")
    windows = [torch.randint(3, VOCABULARY, (1, 48), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(
                lambda _, values, name=name: seen.setdefault(f"{name}.weight", []).append(values[0][0])
            )
    with torch.no_grad():
        for window in windows:
            model(window)
    with SafetensorsCheckpoint(directory) as source:
        found = collect_importance(source, windows)
    assert set(found) == set(seen)
    for name, inputs in seen.items():
        every = torch.cat(inputs)
        torch.testing.assert_close(found[name], (every.T @ every / len(every)).diagonal(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("scheme", "qtype"), [("w4a16-g32-sym", "Q4_0"), ("w8a16-g32-sym", "Q8_0")])
def test_codes_of_gptq_carry_over_exactly(scheme: str, qtype: str, models: Path, tmp_path: Path) -> None:
    directory = hugging_face(models, "llama")
    with SafetensorsCheckpoint(directory) as source:
        bfloat16 = CastView(source, torch.bfloat16)
        quantize_checkpoint(bfloat16, tmp_path / "st", method="gptq", scheme=Scheme.parse(scheme), windows=WINDOWS)
        result = write(bfloat16, tmp_path / "tiny.gguf", scheme, method="gptq", windows=WINDOWS)
    assert len(result.layers) == 14 and all(layer.error is not None for layer in result.layers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["st", "tiny.gguf"]
    with SafetensorsCheckpoint(tmp_path / "st") as stored, open_gguf(tmp_path / "tiny.gguf") as found:
        assert isinstance(found, GgufCheckpoint)
        dense = open_dense(stored)
        assert isinstance(dense, QuantizedView) and len(dense.quantized) == 14
        kinds = {name: found.type_of(name).upper() for name in found}
        for name in dense.quantized:
            assert kinds[name] == qtype
            assert torch.equal(found[name], dense.read_quantized(name).dequantize(torch.float32))


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("imatrix", [False, True])
def test_a_resumed_run_takes_finished_tensors_over(
    imatrix: bool, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, options = hugging_face(models, "llama"), {"name": "tiny", "windows": WINDOWS if imatrix else ()}
    expected = written(directory, tmp_path / "whole.gguf", "q4_k_m", **options).read_bytes()
    copy, count = GgufContainer.copy, iter(range(15))  # three tensors outside the blocks, nine in each

    def failing(self: Any, *arguments: Any) -> None:
        if next(count, None) is None:
            raise StoppedError
        copy(self, *arguments)

    monkeypatch.setattr(GgufContainer, "copy", failing)
    with pytest.raises(StoppedError):
        written(directory, tmp_path / "tiny.gguf", "q4_k_m", **options)
    monkeypatch.setattr(GgufContainer, "copy", copy)
    with SafetensorsCheckpoint(directory) as source:
        result = write(source, tmp_path / "tiny.gguf", "q4_k_m", **options)
    assert result.resumed_blocks == 1
    assert result.output.read_bytes() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.gguf", "whole.gguf"]


def test_codes_of_a_quantized_source_are_taken_over(models: Path, tmp_path: Path) -> None:
    with SafetensorsCheckpoint(hugging_face(models, "llama")) as source:
        bfloat16 = CastView(source, torch.bfloat16)
        settings: dict[str, Any] = {"method": "gptq", "scheme": Scheme.parse("w4a16-g32"), "windows": WINDOWS}
        quantize_checkpoint(bfloat16, tmp_path / "gptq", format="gptq", **settings)
        write(bfloat16, tmp_path / "direct.gguf", "w4a16-g32", name="tiny", method="gptq", windows=WINDOWS)
    with SafetensorsCheckpoint(tmp_path / "gptq") as stored:
        dense = open_dense(stored)
        write(dense, tmp_path / "taken.gguf", "q4_0", name="tiny")
        with open_gguf(tmp_path / "taken.gguf") as taken, open_gguf(tmp_path / "direct.gguf") as direct:
            assert isinstance(dense, QuantizedView)
            for name in dense.quantized:
                assert torch.equal(taken[name], direct[name])


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, r"the activation is 'gelu'; llama.cpp's llama computes 'silu'"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, r"use_sliding_window is set"),
        ("gemma2", {"query_pre_attn_scalar": 48}, r"query_pre_attn_scalar is 48; llama.cpp scales queries"),
        ("gemma2", {"final_logit_softcapping": None}, r"final_logit_softcapping is not set"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, r"'dynamic' cannot"),
        (
            "llama",
            {"model_type": "xlm"},
            r"'xlm' cannot be written as GGUF; supported are .*llama, .*mistral.*; use format: comp",
        ),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(
    family: str, changes: dict[str, Any], message: str, models: Path, tmp_path: Path
) -> None:
    with SafetensorsCheckpoint(hugging_face(models, family)) as source:
        view = CheckpointView(source)
        view.config = {**source.config, **changes}
        with pytest.raises(UnsupportedError, match=message):
            write(view, tmp_path / "tiny.gguf", "q8_0")
    assert not list(tmp_path.iterdir())


def test_tensors_without_a_place_are_refused_by_name(models: Path, tmp_path: Path) -> None:
    with SafetensorsCheckpoint(hugging_face(models, "llama")) as source:
        view = CheckpointView(source)
        view.infos = {**source.infos, "model.mtp.weight": source.infos["model.norm.weight"]}
        with pytest.raises(UnsupportedError, match=r"'model.mtp.weight' has no place in a GGUF file of architecture"):
            write(view, tmp_path / "tiny.gguf", "q8_0")


class Spoiled(CheckpointView):
    """One weight of one tensor is not what it was."""

    value = 0.0

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        rows = super().read_rows(name, start, stop)
        if name == "model.layers.1.mlp.up_proj.weight" and start == 0:
            rows[0, 3] = self.value
        return rows


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (float("nan"), CheckpointError, r"'model.layers.1.mlp.up_proj.weight' holds NaN or infinity"),
        (7e4, UnsupportedError, r"up_proj.weight' holds 70000, Q4_K reaches to 65504; write bf16 or f32"),
    ],
)
def test_values_out_of_range_are_refused_and_nothing_is_left(
    value: float, error: type[Exception], message: str, models: Path, tmp_path: Path
) -> None:
    with SafetensorsCheckpoint(hugging_face(models, "llama")) as source:
        view = Spoiled(source)
        view.value = value
        with pytest.raises(error, match=message):
            write(view, tmp_path / "tiny.gguf", "q4_k_m")
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_refused(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"exists already"):
        written(hugging_face(models, "llama"), path, "q8_0")
    assert path.read_bytes() == b"mine"


def test_a_sentencepiece_tokenizer_is_told_to_llama_cpp(models: Path, tmp_path: Path) -> None:
    pieces = len(sentencepiece_pieces())
    model = tiny_model("llama", vocab_size=pieces)
    directory = tmp_path / "model"
    model.save_pretrained(directory)
    metadata = {"general.architecture": "llama", "llama.context_length": 512} | sentencepiece_metadata()
    metadata |= {key: np.array(metadata[key]) for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")}
    original = Metadata(tmp_path / "m.gguf", metadata)
    for name, content in tokenizer_files(original, pieces).items():
        (directory / name).write_bytes(content)
    path = written(directory, tmp_path / "tiny.gguf", "q8_0")
    tokenizer, theirs = build_tokenizer(original, pieces), LlamaCpp(path)
    for text in TRICKY:
        if text.strip():
            assert theirs.tokenize(text) == tokenizer.encode(text, add_special_tokens=False).ids, text


def test_llama_3s_rope_scaling_is_told_to_llama_cpp(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    directory = tmp_path / "model"
    hugging_face(tmp_path, "llama").rename(directory)
    config = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", config | {"rope_parameters": rope})
    tiny_tokenizer(VOCABULARY).save_pretrained(directory)
    path = written(directory, tmp_path / "tiny.gguf", "f32")
    found = LlamaCpp(path).log_probabilities(IDS[0].tolist(), VOCABULARY)
    with SafetensorsCheckpoint(directory) as source:
        assert distance(next_token(built(source)), found) < ATTENTION
