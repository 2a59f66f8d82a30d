"""What became of every tensor, on artifacts with known changes and known damage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support.disguised_heads import grouped_model
from support.tiny_architectures import ids
from support.tiny_mixtures import fuse_experts, tiny_mixture

from llmconvert.convert.gqa.view import MergedAttention
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint, TensorInfo
from llmconvert.validate import inventory as module
from llmconvert.validate.inventory import take_inventory


class InMemory(Checkpoint):
    """A checkpoint of tensors at hand."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], **config: object) -> None:
        self.tensors = tensors
        self.infos = {name: TensorInfo(name, t.dtype, tuple(t.shape), "memory") for name, t in tensors.items()}
        self.config = config
        self.files = {}

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor = self.tensors[name]
        return tensor[start:stop].clone() if tensor.ndim else tensor.clone()


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(7, 5, generator=generator) for name in ("embed", "a", "b")} | {
        "scalar": torch.tensor(3.0)
    }


def statuses(source: Checkpoint, artifact: Checkpoint) -> dict[str, str]:
    return {record.name: record.status for record in take_inventory(source, artifact, artifact).tensors}


def test_an_artifact_of_the_real_format(original: Path, quantized: Path) -> None:
    source, stored = SafetensorsCheckpoint(original), SafetensorsCheckpoint(quantized)
    dense = open_dense(stored)
    found = take_inventory(source, stored, dense)
    assert found.problems == ()
    assert found.counts == {"quantized": 14, "kept": 6}
    for record in found.tensors:
        before, after = source[record.name].float(), dense[record.name].float()
        assert record.error == pytest.approx((torch.linalg.norm(before - after) / torch.linalg.norm(before)).item())
        assert record.shape == tuple(before.shape)
    assert all(0.05 < record.error < 0.15 for record in found.tensors if record.error and record.status == "quantized")


def test_kept_cast_and_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two rows at a time: what is found must not depend on the pieces.
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 10)
    source = tensors()
    artifact = {**source, "a": source["a"].bfloat16(), "b": source["b"] * 1.5, "extra": torch.ones(2)}
    assert statuses(InMemory(source), InMemory(artifact)) == {
        "embed": "kept",
        "a": "cast",
        "b": "changed",
        "scalar": "kept",
        "extra": "added",
    }
    errors = {
        record.name: record.error for record in take_inventory(InMemory(source), *[InMemory(artifact)] * 2).tensors
    }
    assert errors["b"] == pytest.approx(0.5) and errors["embed"] == 0


@pytest.mark.parametrize("method", ["awq", "smoothquant", "gptq"])
def test_weights_in_other_coordinates_have_no_error(method: str, original: Path, tmp_path: Path) -> None:
    source = SafetensorsCheckpoint(original)
    scheme = Scheme.parse("w8a8" if method == "smoothquant" else "w4a16-g32-asym")
    quantize_checkpoint(source, tmp_path / "artifact", method=method, scheme=scheme, windows=ids((64, 64)))
    with SafetensorsCheckpoint(tmp_path / "artifact") as stored:
        found = take_inventory(source, stored, open_dense(stored))
    quantized = [record.error for record in found.tensors if record.status == "quantized"]
    assert found.problems == () and len(quantized) == 14
    assert found.moved == (method != "gptq")
    assert [error is None for error in quantized] == [found.moved] * 14
    assert all(record.error == 0 for record in found.tensors if record.status == "kept")


def test_a_bias_that_changed_moves_nothing() -> None:
    source = {**tensors(), "a.bias": torch.ones(7)}
    artifact = InMemory({**source, "a.bias": torch.zeros(7), "b": source["b"] * 1.5})
    found = take_inventory(InMemory(source), artifact, artifact)
    assert not found.moved and {record.name: record.error for record in found.tensors}["b"] == pytest.approx(0.5)


def test_a_dropped_tensor_is_a_problem() -> None:
    source = tensors()
    artifact = {name: tensor for name, tensor in source.items() if name != "b"}
    found = take_inventory(InMemory(source), *[InMemory(artifact)] * 2)
    assert found.problems == ("b is missing from the artifact",)
    assert found.counts["dropped"] == 1


@pytest.mark.parametrize(
    ("equal", "tie", "status"), [(True, True, "tied"), (False, True, "dropped"), (True, False, "dropped")]
)
def test_a_missing_head_is_tied_only_if_equal_and_declared(equal: bool, tie: bool, status: str) -> None:
    source = tensors()
    source["lm_head"] = source["embed"].clone() if equal else source["embed"] + 1
    artifact = {name: tensor for name, tensor in source.items() if name != "lm_head"}
    found = statuses(InMemory(source), InMemory(artifact, tie_word_embeddings=tie))
    assert found["lm_head"] == status


def test_another_shape_is_a_problem() -> None:
    source = tensors()
    artifact = {**source, "a": source["a"][:3]}
    found = take_inventory(InMemory(source, num_key_value_heads=4), *[InMemory(artifact, num_key_value_heads=2)] * 2)
    assert found.problems == ("a has shape [3, 5], the source [7, 5]",)


@pytest.mark.parametrize("kind", ["llama", "stablelm"])
def test_merged_heads_explain_just_their_own_shapes(kind: str, tmp_path: Path) -> None:
    norms = {"qk_layernorm": True} if kind == "stablelm" else {}
    source = SafetensorsCheckpoint(grouped_model(tmp_path / "model", kind, kv_heads=4, hidden_size=64, **norms))
    artifact = MergedAttention(source, 2)
    found = take_inventory(source, artifact, artifact)
    assert found.problems == ()
    keys_values, norms_of_two_heads = 4, 4 if norms else 0  # in two layers
    assert found.counts["merged"] == keys_values + norms_of_two_heads
    kept = {name: tensor for name, tensor in artifact.items() if "layers.0.mlp.up_proj" not in name}
    kept["lm_head.weight"] = artifact["lm_head.weight"][:3]
    damaged = InMemory(kept, **artifact.config)
    problems = take_inventory(source, damaged, damaged).problems
    assert len(problems) == 2 and "lm_head.weight has shape [3, 64]" in " ".join(problems)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_a_problem(value: float) -> None:
    source = tensors()
    broken = source["b"].clone()
    broken[4, 2] = value
    found = take_inventory(InMemory(source), *[InMemory({**source, "b": broken})] * 2)
    assert len(found.problems) == 1 and found.problems[0].startswith("b holds values that are not finite")


def test_infinities_that_stay_are_kept_and_others_are_problems() -> None:
    """Gemma 4's audio tower holds the limits of its clipping as buffers, infinite ones among them."""
    source = {"limit": torch.tensor([-math.inf, math.inf, 2.0]), "bound": torch.tensor(math.inf)}
    before = InMemory(source)
    kept = take_inventory(before, before, before)
    assert kept.counts == {"kept": 2} and not kept.problems
    for changed in ([math.inf, math.inf, 2.0], [-math.inf, 1.0, 2.0], [-math.inf, math.inf, math.nan]):
        after = InMemory({**source, "limit": torch.tensor(changed)})
        assert [problem.split()[0] for problem in take_inventory(before, after, after).problems] == ["limit"]
    narrow = InMemory({**source, "limit": torch.tensor([-math.inf, math.inf, 2.0], dtype=torch.bfloat16)})
    assert take_inventory(before, narrow, narrow).counts == {"cast": 1, "kept": 1}


def test_tensors_are_found_in_what_the_class_makes_of_them(tmp_path: Path) -> None:
    """Experts in one tensor of their layer are each of those that the source has; another number in one is found."""
    source = SafetensorsCheckpoint(tiny_mixture(tmp_path / "model", "qwen3_moe"))
    held = dict(SafetensorsCheckpoint(fuse_experts(source.directory, tmp_path / "one")))
    found = take_inventory(source, InMemory(held, **source.config), InMemory(held, **source.config))
    assert not found.problems and found.counts == {"kept": len(held)} and len(held) < len(source)
    name = next(name for name in held if name.endswith("gate_up_proj"))
    held[name] = held[name].clone()
    held[name][3, 5] *= 2
    found = take_inventory(source, InMemory(held, **source.config), InMemory(held, **source.config))
    assert [record.name for record in found.tensors if record.status == "changed"] == [name]
