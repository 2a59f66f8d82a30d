"""Rotations: orthogonal, folded without a trace in what the model computes, and refused where that can't be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_architectures import ids
from transformers import AutoModelForCausalLM

from llmconvert.engine.evaluation import stream_logits
from llmconvert.errors import UnsupportedError
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.plan import Override
from llmconvert.quantize.rotate import Rotation, rotate_checkpoint
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint

CPU = torch.device("cpu")
WINDOWS = ids((24, 16))
Tiny = Callable[..., Path]
ROTATED = ["llama", "llama-tied", "mistral", "qwen2", "qwen2-tied", "qwen3", "qwen3-tied", "phi3"]


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    return torch.cat([found[0] for found in stream_logits(checkpoint, WINDOWS, device=CPU)])


def error(checkpoint: Checkpoint, expected: torch.Tensor) -> float:
    return float((logits(checkpoint) - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", [1, 2, 9, 64, 96, 576, 1024, 4096])
def test_rotations_are_orthogonal_and_spread_every_channel(size: int) -> None:
    rotation = Rotation(size, 0)
    rows = torch.eye(size)[:128]
    matrix = rotation.apply(rows)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(rows)), rtol=0, atol=1e-5)
    # No entry is larger than those of a Hadamard matrix, times √2 for the Hartley factor.
    assert float(matrix.abs().max()) <= (2 / size) ** 0.5 + 1e-6
    assert torch.equal(rotation.apply(rows), matrix) and torch.equal(Rotation(size, 0).apply(rows), matrix)


def test_the_factors_are_a_kronecker_product() -> None:
    rotation = Rotation(96, 3)
    first, second = rotation._factors
    assert len(first) == 32 and len(second) == 3
    expected = torch.diag(rotation.signs) @ torch.kron(first, second)
    torch.testing.assert_close(rotation.apply(torch.eye(96)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "residual", "values"),
    [*((name, True, True) for name in ROTATED), ("llama-tied", True, False), ("phi3", False, True)],
)
def test_the_rotated_model_computes_what_the_original_does(tiny: Tiny, name: str, residual: bool, values: bool) -> None:
    source = SafetensorsCheckpoint(tiny(name))
    rotated = rotate_checkpoint(source, residual=residual, values=values)
    assert error(rotated, logits(source)) < 1e-5
    changed = {key.split(".")[-2] for key in source if not torch.equal(source[key], rotated[key])}
    embedding, values_linear = "embed_tokens", "qkv_proj" if name == "phi3" else "v_proj"
    assert (embedding in changed) == residual and ({values_linear, "o_proj"} <= changed)
    assert len(rotated) - len(source) == int(residual and name.endswith("-tied"))
    seeds = [rotate_checkpoint(source, residual=residual, values=values, seed=seed) for seed in (0, 1)]
    key = next(key for key in source if key.endswith("o_proj.weight"))
    assert torch.equal(seeds[0][key], rotated[key]) and not torch.equal(seeds[1][key], rotated[key])


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "opt", "opt-untied", "gpt_neox"])
def test_values_alone_can_be_rotated_under_other_norms(tiny: Tiny, name: str) -> None:
    source = SafetensorsCheckpoint(tiny(name))
    assert error(rotate_checkpoint(source, residual=False), logits(source)) < 1e-5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma2", "rotated, it computes something else .*norms with weights behind attention or MLP"),
        ("olmo2", "neither takes what a norm gives"),
        ("opt", "self_attn_layer_norm adds a bias"),
        ("gpt_neox", "input_layernorm adds a bias"),
    ],
)
def test_residual_streams_that_do_not_rotate_are_refused(tiny: Tiny, name: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=f"architecture '{name}': .*{reason}"):
        rotate_checkpoint(SafetensorsCheckpoint(tiny(name)), values=False)


def test_outliers_are_spread(tiny: Tiny) -> None:
    """One huge channel of the embeddings is not huge any more."""

    class Loud(SafetensorsCheckpoint):
        def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
            rows = super().read_rows(name, start, stop)
            if name.endswith("embed_tokens.weight"):
                rows[:, 5] *= 100
            return rows

    source = Loud(tiny("llama"))
    name = "model.embed_tokens.weight"
    before, after = source[name], rotate_checkpoint(source)[name]
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1))
    assert float(before.abs().amax(1).mean()) > 4 * float(after.abs().amax(1).mean())


def test_rows_are_those_of_the_whole_tensor(tiny: Tiny) -> None:
    rotated = rotate_checkpoint(SafetensorsCheckpoint(tiny("qwen2")))
    for name, info in rotated.infos.items():
        assert rotated[name].dtype == info.dtype and tuple(rotated[name].shape) == info.shape
        torch.testing.assert_close(rotated.read_rows(name, 3, 9), rotated[name][3:9])


@pytest.mark.parametrize(("scheme", "head", "away"), [("w8a16-g32", None, 0.03), ("nvfp4", "w8a16-channel", 0.3)])
def test_an_artifact_of_a_rotated_model_runs_in_transformers(
    tiny: Tiny, tmp_path: Path, scheme: str, head: str | None, away: float
) -> None:
    """Tied embeddings became two tensors, and the config says so; floats and their inputs are rounded after it."""
    source, output = SafetensorsCheckpoint(tiny("llama-tied", torch.bfloat16)), tmp_path / "out"
    rotated = rotate_checkpoint(source)
    overrides = [Override("head", Scheme.parse(head))] if head is not None else []
    quantize_checkpoint(
        rotated, output, method="gptq", scheme=Scheme.parse(scheme), overrides=overrides, windows=WINDOWS
    )
    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto").eval()
    with torch.no_grad():
        found = torch.cat([model(input_ids=window).logits[0] for window in WINDOWS])
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(found, logits(open_dense(SafetensorsCheckpoint(output))))
    expected = logits(source).float()
    assert float((found.float() - expected).norm() / expected.norm()) < away
