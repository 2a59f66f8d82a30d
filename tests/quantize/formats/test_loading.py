"""Artifacts of classes that transformers loads in a way of their own: what is written so that it can."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_checkpoints import save_tiny_checkpoint

from llmconvert.errors import CheckpointError
from llmconvert.quantize.formats.joined import JoinedTensors
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.plan import Override
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint


def test_packed_weights_that_a_class_asks_for_are_loaded_dense_where_one_scheme_has_them(tmp_path: Path) -> None:
    source = SafetensorsCheckpoint(save_tiny_checkpoint(tmp_path / "model", "falcon", "FalconForCausalLM"))
    scheme = Scheme.parse("w4a16-g32")
    made = quantize_checkpoint(source, tmp_path / "one", method="rtn", scheme=scheme)
    artifact = SafetensorsCheckpoint(tmp_path / "one")
    assert artifact.config["quantization_config"]["dequantize"] is True
    assert sum(name.endswith(".weight_packed") for name in artifact) == 4 * 4
    assert any("dequantize: true" in note for note in made.notes)
    # transformers would unpack all of them by the first group.
    other = [Override("*.0.mlp.*", Scheme.parse("w8a16-g32"))]
    made = quantize_checkpoint(source, tmp_path / "two", method="rtn", scheme=scheme, overrides=other)
    artifact = SafetensorsCheckpoint(tmp_path / "two")
    assert "dequantize" not in artifact.config["quantization_config"]
    assert sum(name.endswith(".weight_packed") for name in artifact) == 2
    assert any("14 linears stay dense" in note for note in made.notes)


@pytest.fixture
def parts(tmp_path: Path) -> SafetensorsCheckpoint:
    tensors = {"a": torch.randn(3, 2), "q": torch.randn(2, 1, 4), "k": torch.randn(3, 1, 4), "v": torch.randn(1, 1, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return SafetensorsCheckpoint(tmp_path)


def test_joined_tensors_are_their_parts_in_order(parts: SafetensorsCheckpoint) -> None:
    joined = JoinedTensors(parts, {"qkv": ("q", "k", "v")})
    assert set(joined) == {"a", "qkv"}
    whole = torch.cat([parts["q"], parts["k"], parts["v"]])
    assert torch.equal(joined["qkv"], whole) and torch.equal(joined["a"], parts["a"])
    for start in range(7):
        for stop in range(start, 7):
            assert torch.equal(joined.read_rows("qkv", start, stop), whole[start:stop])


def test_tensors_that_do_not_fit_behind_each_other_are_named(parts: SafetensorsCheckpoint) -> None:
    with pytest.raises(CheckpointError, match=r"'qa' is made of tensors that do not fit .*q float32 \[2, 1, 4\], a"):
        JoinedTensors(parts, {"qa": ("q", "a")})
