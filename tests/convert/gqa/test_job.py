"""Rewriting attention on disk: lossless streaming merges, refits that gain, and nothing left behind on failure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.disguised_heads import disguise, grouped_model, logits
from support.tiny_architectures import ids

from llmconvert.convert.gqa.job import convert_attention
from llmconvert.convert.gqa.refit.options import RefitOptions
from llmconvert.errors import CheckpointError, OutputError, UnsupportedError
from llmconvert.report.steps import AttentionReport
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.storage.directory import SINGLE_NAME

# What the streaming merge meets: rotary layouts, biases, fused tensors, caps and norms.
STREAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "half": ("llama", {"head_dim": 8}),
    "interleaved": ("cohere", {}),
    "interleaved, partial": ("glm", {"head_dim": 8, "partial_rotary_factor": 0.5, "attention_bias": True}),
    "partial": ("stablelm", {"hidden_size": 64, "partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    "biases": ("qwen2", {"hidden_size": 64}),
    "fused": ("phi3", {"hidden_size": 64, "sliding_window": 8}),
    "no rotary": ("smollm3", {"head_dim": 8, "no_rope_layers": [1, 0]}),
    "capped": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 11, "attn_logit_softcapping": 5.0}),
    "normalized": ("qwen3", {"head_dim": 8}),
    "normalized, own weights": ("cohere", {"head_dim": 8, "use_qk_norm": True}),
    "normalized, own modules": ("stablelm", {"hidden_size": 64, "partial_rotary_factor": 0.25, "qk_layernorm": True}),
    "normalized layer": ("olmo2", {"hidden_size": 64}),
}
WINDOWS = ids((32, 32, 24, 32), seed=5)


def rewrite(source: Path, output: Path, kv_heads: int = 2, **options: Any) -> AttentionReport:
    with SafetensorsCheckpoint(source) as checkpoint:
        return convert_attention(checkpoint, output, kv_heads=kv_heads, **options)


def distance(left: Path, right: Path, seed: int = 9) -> float:
    """Largest difference of logits over the largest logit, on other tokens than were calibrated on."""
    window = ids((32,), seed=seed)[0]
    expected = logits(right, window)
    return float((logits(left, window) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("case", STREAMED)
def test_redundant_heads_survive_merge_and_refit(case: str, tmp_path: Path) -> None:
    kind, config = STREAMED[case]
    small = grouped_model(tmp_path / "small", kind, **config)
    wide = disguise(small, tmp_path / "wide", copies=2)
    report = rewrite(wide, tmp_path / "merged", windows=WINDOWS)
    assert distance(tmp_path / "merged", small) < 2e-4
    for layer in report.layers:
        assert layer.output_loss is not None and layer.output_loss < 1e-4
        assert layer.key_loss is not None and layer.key_loss < 1e-4  # statistics are float32
        if layer.divergence is not None:
            assert layer.divergence < 1e-5
    normed = case.startswith("normalized")
    assert all(layer.symmetric and (layer.divergence is None) == normed for layer in report.layers)
    assert any("normalized" in note for note in report.left_out) == normed


def test_refits_bring_attention_closer(tmp_path: Path) -> None:
    """Each refit lowers what it is meant to lower, and each the loss of attention output on top of the one before."""
    model = grouped_model(tmp_path / "model", "llama", kv_heads=4, head_dim=8)
    windows = ids((32,) * 24, seed=5)
    variants: dict[str, dict[str, Any]] = {
        "none": {"refit": False},
        "outputs": {"options": RefitOptions(logits=False)},
        "all": {"options": RefitOptions(rounds=2)},
    }
    reports = {name: rewrite(model, tmp_path / name, windows=windows, **kind) for name, kind in variants.items()}
    for layer in reports["all"].layers:
        assert layer.divergence is not None and layer.divergence_before is not None
        assert layer.divergence < 0.7 * layer.divergence_before
        assert layer.output_loss is not None and layer.output_loss_before is not None
        assert layer.output_loss < layer.output_loss_before
    total = {name: sum(layer.output_loss or 0 for layer in report.layers) for name, report in reports.items()}
    assert total["all"] < total["outputs"] < total["none"]


@pytest.mark.parametrize(("kind", "added"), [("llama", True), ("gemma2", False)])
def test_what_was_lost_before_is_made_up_for_where_attention_is_added_as_it_is(
    kind: str, added: bool, tmp_path: Path
) -> None:
    """In Gemma 2 a norm comes in between."""
    model = grouped_model(tmp_path / "model", kind, kv_heads=4, head_dim=8)
    windows = ids((32,) * 8, seed=5)
    for residual in (0.0, 1.0):
        options = RefitOptions(residual=residual)
        rewrite(model, tmp_path / str(residual), windows=windows, options=options)
    first, second = ((tmp_path / str(residual) / SINGLE_NAME).read_bytes() for residual in (0.0, 1.0))
    assert (first != second) == added


def test_only_attention_changes(tmp_path: Path) -> None:
    model = grouped_model(tmp_path / "model", "llama", kv_heads=4, head_dim=8)
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    report = rewrite(model, tmp_path / "merged", 1, windows=WINDOWS[:2])
    before, after = load_file(model / SINGLE_NAME), load_file(tmp_path / "merged" / SINGLE_NAME)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (".self_attn." not in name)
    old, new = (json.loads((path / "config.json").read_text()) for path in (model, tmp_path / "merged"))
    assert new == {**old, "num_key_value_heads": 1}
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == sorted(p.name for p in model.iterdir())
    assert report.kv_heads == (4, 1) and report.kv_bytes_per_token == (256, 64)
    assert all(0 < old < new for old, new in report.contexts.values())


def test_without_text_the_weights_decide(tmp_path: Path) -> None:
    small = grouped_model(tmp_path / "small", "llama", head_dim=8)
    report = rewrite(disguise(small, tmp_path / "wide", copies=2), tmp_path / "merged")
    assert distance(tmp_path / "merged", small) < 1e-4
    assert all(layer.output_loss is None for layer in report.layers)
    assert "no calibration text" in report.left_out[0]


def test_the_same_call_gives_the_same_bytes(tmp_path: Path) -> None:
    model = grouped_model(tmp_path / "model", "qwen2", kv_heads=4, hidden_size=64)
    for name in ("one", "two"):
        rewrite(model, tmp_path / name, windows=WINDOWS)
    assert (tmp_path / "one" / SINGLE_NAME).read_bytes() == (tmp_path / "two" / SINGLE_NAME).read_bytes()


def test_bad_requests_leave_nothing_behind(tmp_path: Path) -> None:
    model = grouped_model(tmp_path / "model", "llama", kv_heads=4, head_dim=8)
    output = tmp_path / "out"
    with pytest.raises(UnsupportedError, match="possible: 1, 2"):
        rewrite(model, output, 3)
    with pytest.raises(UnsupportedError, match="known are svd, mean, first"):
        rewrite(model, output, 2, method="median")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OutputError):
        rewrite(model, tmp_path / "full", 2)

    class Broken(SafetensorsCheckpoint):
        def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
            if "layers.1.mlp" in name:
                raise CheckpointError("the disk is gone")
            return super().read_rows(name, start, stop)

    for windows in ([], WINDOWS):
        with Broken(model) as checkpoint, pytest.raises(CheckpointError, match="gone"):
            convert_attention(checkpoint, output, kv_heads=2, windows=windows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "model"]
