"""Tensors as a class holds them: against what transformers makes of the same checkpoint, and row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.tiny_checkpoints import save_tiny_checkpoint
from support.tiny_mixtures import tiny_mixture
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import MergeModulelist

from llmconvert.engine.architecture.expert_storage import Conversions
from llmconvert.engine.architecture.loading.held import HeldTensors, Made, as_held, made_tensors
from llmconvert.storage.checkpoint import SafetensorsCheckpoint


@pytest.mark.parametrize(
    ("model_type", "class_name", "made"),
    [
        # Cut, in equal parts and in others, and an embedding in two tensors.
        ("molmo2", "Molmo2ForConditionalGeneration", {"q_proj", "v_proj", "up_proj", "gate_proj", "embed_tokens"}),
        # Gates and ups of all experts, which become one.
        ("step3p7", "Step3p7ForConditionalGeneration", {"experts"}),
        # Two layers' experts in one row of numbers, and routers turned around.
        ("ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration", {"experts", "gate", "moe_statics"}),
    ],
)
def test_tensors_are_what_transformers_makes_of_them(
    tmp_path: Path, model_type: str, class_name: str, made: set[str]
) -> None:
    source = SafetensorsCheckpoint(save_tiny_checkpoint(tmp_path, model_type, class_name))
    model = getattr(transformers, class_name).from_pretrained(tmp_path, dtype=torch.float32)
    held, states = as_held(Conversions(model), source, lambda state: True), model.state_dict()
    assert isinstance(held, HeldTensors)
    owners = {name.removesuffix(".weight").split(".")[-1 if name.endswith(".weight") else -2] for name in held.made}
    assert owners >= made
    for name, one in held.made.items():
        assert torch.equal(held[name], states[name]), name
        rows = held.infos[name].shape[0]
        assert torch.equal(held.read_rows(name, 1, rows - 1), states[name][1 : rows - 1]), name
        assert not set(one.sources) & set(held)
    assert set(source) - set(held) == {part for one in held.made.values() for part in one.sources}


def test_experts_of_a_layer_are_stacked_where_that_is_asked_for(tmp_path: Path) -> None:
    """By themselves they stay as they are: each is read when it is met."""
    source = SafetensorsCheckpoint(tiny_mixture(tmp_path, "qwen3_moe"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert as_held(Conversions(model), source, lambda state: True) is source
    made = made_tensors(Conversions(model), source, lambda target, conversion: MergeModulelist in conversion.kinds)
    held, states = HeldTensors(source, made), model.state_dict()
    assert len(made) == 4
    for name in made:
        assert torch.equal(held[name], states[name]) and torch.equal(held.read_rows(name, 2, 4), states[name][2:4])
        assert held.read_rows(name, 3, 3).shape == (0, *states[name].shape[1:])


@pytest.fixture
def parts(tmp_path: Path) -> SafetensorsCheckpoint:
    tensors = {"a": torch.randn(3, 2), "q": torch.randn(2, 1, 4), "k": torch.randn(3, 1, 4), "v": torch.randn(1, 1, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return SafetensorsCheckpoint(tmp_path)


def test_what_is_made_is_its_parts_in_order(parts: SafetensorsCheckpoint) -> None:
    made = {"qkv": Made((("q", "k", "v"),), (6, 1, 4)), "t": Made((("a",),), (2, 3), turned=True)}
    held = HeldTensors(parts, made)
    assert set(held) == {"t", "qkv"} and set(HeldTensors(held, {}).made) == {"t", "qkv"}
    halves = HeldTensors(
        parts, {"even": Made((("q",),), (1, 1, 4), turns=0), "odd": Made((("q",),), (1, 1, 4), turns=1)}
    )
    assert torch.equal(halves["even"], parts["q"][:1]) and torch.equal(halves["odd"], parts["q"][1:])
    whole = torch.cat([parts["q"], parts["k"], parts["v"]])
    assert torch.equal(held["qkv"], whole) and torch.equal(held["t"], parts["a"].T)
    for start in range(7):
        for stop in range(start, 7):
            assert torch.equal(held.read_rows("qkv", start, stop), whole[start:stop])
