"""Embeddings and heads in compressed-tensors: transformers loads them and computes what is read here, tied or not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import tiny_llama_dir
from transformers import AutoModelForCausalLM

from llmconvert.engine.evaluation import stream_logits
from llmconvert.errors import CheckpointError, SchemeError, UnsupportedError
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import plan_quantize, quantize_checkpoint
from llmconvert.quantize.plan import Override, QuantizeRequest
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

WINDOW = torch.arange(24).reshape(1, 24) % 60


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Mapping[bool, Path]:
    """A model whose head is tied to the embedding, and one with a head of its own."""
    root = tmp_path_factory.mktemp("sources")
    return {
        tied: tiny_llama_dir(root / str(tied), dtype=torch.float32, tie_word_embeddings=tied, hidden_size=64)
        for tied in (True, False)
    }


def overrides(given: Mapping[str, str]) -> tuple[Override, ...]:
    return tuple(Override(match, Scheme.parse(scheme)) for match, scheme in given.items())


def quantized(source: Path, output: Path, given: Mapping[str, str], scheme: str = "w4a16-g32") -> Path:
    with SafetensorsCheckpoint(source) as checkpoint:
        quantize_checkpoint(
            checkpoint,
            output,
            method="gptaq",
            scheme=Scheme.parse(scheme),
            overrides=overrides(given),
            windows=[WINDOW, WINDOW.flip(1)],
        )
    return output


@pytest.mark.parametrize(
    ("tied", "given", "stored"),
    [
        (True, {"head": "w8a16-channel"}, {"model.embed_tokens.weight": torch.int8, "lm_head.weight_scale": None}),
        (True, {"embedding": "w4a16-g32"}, {"model.embed_tokens.weight_packed": torch.int32}),
        (
            False,
            {"head": "w3a16-g64", "embedding": "w8a16-channel-fp8"},
            {"lm_head.weight_packed": torch.int32, "model.embed_tokens.weight": torch.float8_e4m3fn},
        ),
    ],
)
def test_transformers_computes_what_is_read_here(
    tied: bool,
    given: Mapping[str, str],
    stored: Mapping[str, torch.dtype | None],
    sources: Mapping[bool, Path],
    tmp_path: Path,
) -> None:
    artifact = quantized(sources[tied], tmp_path / "artifact", given)
    with SafetensorsCheckpoint(artifact) as checkpoint:
        for name, dtype in stored.items():
            assert dtype in (None, checkpoint.infos[name].dtype)
        assert checkpoint.config["tie_word_embeddings"] is tied
        dense = open_dense(checkpoint)
        (ours,) = stream_logits(dense, [WINDOW], device=torch.device("cpu"), dtype=torch.float32)
    with SafetensorsCheckpoint(sources[tied]) as source:
        (original,) = stream_logits(source, [WINDOW], device=torch.device("cpu"), dtype=torch.float32)
    model, info = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32, output_loading_info=True)
    with torch.no_grad():
        theirs = model(WINDOW).logits
    assert not any(info.values())
    assert torch.equal(theirs, ours)
    assert not torch.allclose(ours, original, rtol=1e-3)


def test_a_head_is_solved_for_what_comes_to_it(sources: Mapping[bool, Path], tmp_path: Path) -> None:
    """With the moments of the last norm's output its outputs are nearer than those of the nearest codes."""
    away: dict[str, float] = {}
    for method in ("rtn", "gptq"):
        with SafetensorsCheckpoint(sources[False]) as checkpoint:
            quantize_checkpoint(
                checkpoint,
                tmp_path / method,
                method=method,
                scheme=Scheme.parse("w8a16-channel"),
                overrides=(*overrides({"head": "w3a16-g64"}), Override("*", None)),
                windows=[WINDOW, WINDOW.flip(1)],
            )
            (exact,) = stream_logits(checkpoint, [WINDOW], device=torch.device("cpu"), dtype=torch.float32)
        with SafetensorsCheckpoint(tmp_path / method) as stored:
            (found,) = stream_logits(open_dense(stored), [WINDOW], device=torch.device("cpu"), dtype=torch.float32)
        away[method] = float((found - exact).square().mean())
    assert 0 < away["gptq"] < 0.7 * away["rtn"]


@pytest.mark.parametrize(
    ("tied", "given", "words"),
    [
        (True, {"head": "w4a16-g32", "embedding": "w8a16-channel"}, "one matrix that is stored once"),
        (True, {"embedding": "w4a16-g64"}, "only where all that is quantized is in this one scheme"),
        (False, {"embedding": "w8a8"}, "token ids are no activations"),
        (False, {"head": "w8a8"}, "the head's inputs are not quantized here"),
        (False, {"embedding": "w8a16-channel-asym"}, "zero points"),
        (False, {"embedding": "nvfp4a16"}, "in integers or in E4M3 with one scale per row"),
    ],
)
def test_what_no_reader_takes_is_refused(
    tied: bool, given: Mapping[str, str], words: str, sources: Mapping[bool, Path], tmp_path: Path
) -> None:
    request = QuantizeRequest("rtn", Scheme.parse("w4a16-g32"), overrides=overrides(given))
    with (
        SafetensorsCheckpoint(sources[tied]) as checkpoint,
        pytest.raises((SchemeError, UnsupportedError), match=r"model\.embed_tokens|lm_head") as caught,
    ):
        plan_quantize(checkpoint, tmp_path / "never", request)
    assert words in str(caught.value)


def test_the_plan_names_who_reads_it(sources: Mapping[bool, Path], tmp_path: Path) -> None:
    request = QuantizeRequest("rtn", Scheme.parse("w4a16-g32"), overrides=overrides({"head": "w8a16-channel"}))
    with SafetensorsCheckpoint(sources[True]) as checkpoint:
        plan = plan_quantize(checkpoint, tmp_path / "artifact", request)
    assert plan.readers.read == ("transformers",)
    assert "a quantized embedding that is the head too" in plan.readers.unseen["vLLM on CPU"]
    assert any("vLLM 0.32 ends with an error" in note for note in plan.notes)


def test_a_tied_head_with_scales_of_its_own_is_refused(sources: Mapping[bool, Path], tmp_path: Path) -> None:
    """Such a file computes its logits with other weights than those of the embedding."""
    artifact = quantized(sources[True], tmp_path / "artifact", {"head": "w8a16-channel"})
    path = next(artifact.glob("*.safetensors"))
    tensors = load_file(path)
    tensors["lm_head.weight_scale"] = 2 * tensors["lm_head.weight_scale"]
    save_file(tensors, path, metadata={"format": "pt"})
    groups = json.loads((artifact / "config.json").read_text())["quantization_config"]["config_groups"]
    assert groups["group_0"]["targets"] == ["model.embed_tokens", "lm_head"]
    with SafetensorsCheckpoint(artifact) as checkpoint, pytest.raises(CheckpointError, match="the head is tied"):
        open_dense(checkpoint)
