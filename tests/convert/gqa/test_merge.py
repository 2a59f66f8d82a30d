"""Merging key-value heads: lossless where heads are redundant in disguise, least-squares optimal where they are not."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.disguised_heads import disguise, grouped_model, logits, random_layer
from support.tiny_architectures import ids

from llmconvert.convert.gqa.families import FAMILIES
from llmconvert.convert.gqa.geometry import Norm, Rotary
from llmconvert.convert.gqa.merging import group as gqa_group
from llmconvert.convert.gqa.merging.group import balanced_groups
from llmconvert.convert.gqa.merging.layer import MergedLayer, merge_layer
from llmconvert.convert.gqa.merging.svd import merge_rotary, merge_subspace
from llmconvert.convert.gqa.view import MergedAttention
from llmconvert.convert.gqa.weights import LayerWeights
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.storage.directory import SINGLE_NAME
from llmconvert.storage.writer import write_json

# Every symmetry that the merge has to see through, by a model type that has it.
DISGUISES: dict[str, tuple[str, dict[str, Any]]] = {
    "rotary, half": ("llama", {"head_dim": 8}),
    "head_dim of its own": ("mistral", {"head_dim": 16}),
    "rotary, interleaved": ("cohere", {"logit_scale": 0.5}),
    "interleaved and partial": ("glm", {"head_dim": 8, "partial_rotary_factor": 0.5, "attention_bias": True}),
    "partial": ("stablelm", {"hidden_size": 64, "partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    "bias on the output too": ("phi", {"hidden_size": 64, "partial_rotary_factor": 0.5}),
    "no rotary in every second layer": ("smollm3", {"head_dim": 8, "no_rope_layers": [1, 0]}),
    "rotary only with a window": (
        "cohere2",
        {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "biases": ("qwen2", {"hidden_size": 64}),
    "fused, stacked": ("phi3", {"hidden_size": 64}),
    "fused, grouped": ("falcon", {"hidden_size": 64, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "fused, grouped, no rotary": (
        "falcon",
        {"hidden_size": 64, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": True, "bias": True},
    ),
    "soft-capped, scaled": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 11, "attn_logit_softcapping": 5.0}),
    "scaled": ("granite", {"hidden_size": 64, "attention_multiplier": 0.3}),
    "normalized heads": ("qwen3", {"head_dim": 8}),
    "normalized heads, weights plus one": (
        "gemma3_text",
        {"head_dim": 8, "query_pre_attn_scalar": 11, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "normalized heads, some not rotated": (
        "exaone4",
        {"hidden_size": 64, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "normalized heads without weights": ("nanochat", {"hidden_size": 64}),
    "normalized after rotation": ("hunyuan_v1_dense", {"head_dim": 8}),
    "normalized heads with weights of their own": ("cohere", {"head_dim": 8, "use_qk_norm": True}),
    "normalized heads, a module each": (
        "stablelm",
        {"hidden_size": 64, "partial_rotary_factor": 0.25, "qk_layernorm": True},
    ),
    "normalized layer": ("olmo2", {"hidden_size": 64}),
    "sinks": ("gpt_oss", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),
}
#: Architectures made of the parts above.
OTHERS: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "ernie4_5": {},
    "flex_olmo": {"num_experts": 2, "num_experts_per_tok": 1},
    "gemma": {"head_dim": 8},
    "glm4": {"head_dim": 8, "attention_bias": True},
    "granitemoe": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "helium": {"head_dim": 8},
    "hyperclovax": {},
    "jais2": {},
    "ministral": {"head_dim": 8},
    "ministral3": {"head_dim": 8},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "nemotron": {"partial_rotary_factor": 0.5},
    "olmo": {},
    "olmo3": {},
    "olmoe": {"num_experts": 2, "num_experts_per_tok": 1},
    "phimoe": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen2_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "head_dim": 8},
    "seed_oss": {"head_dim": 8},
    "starcoder2": {"use_bias": True},
    "vaultgemma": {"head_dim": 8},
}


def write_merged(source: Path, directory: Path, kv_heads: int, method: Any = "svd") -> list[MergedLayer]:
    """Write ``source`` merged from its weights alone; gives what was merged."""
    directory.mkdir()
    with SafetensorsCheckpoint(source) as checkpoint:
        view = MergedAttention(checkpoint, kv_heads, method)
        save_file(dict(view), directory / SINGLE_NAME, metadata={"format": "pt"})
        write_json(directory / "config.json", dict(view.config))
        assert all(view[name].shape == info.shape for name, info in view.infos.items())
        return [view.merge(layer) for layer in range(view.geometry.layers)]


def require_lossless(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    """Merge a disguised model and compare it with the small one that it was made from."""
    # Norms are blind to sizes only as far as the epsilon in them goes.
    epsilon = {"layer_norm_eps" if kind in ("cohere", "stablelm") else "rms_norm_eps": 1e-12}
    settings = {**epsilon, **config} if FAMILIES[kind].norm is not None else config
    small = grouped_model(tmp_path / "small", kind, **settings)
    wide = disguise(small, tmp_path / "wide", copies=2)
    window = ids((24,))[0]
    expected = logits(small, window)
    torch.testing.assert_close(logits(wide, window), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    layers = write_merged(wide, tmp_path / "merged", 2)
    torch.testing.assert_close(
        logits(tmp_path / "merged", window), expected, rtol=0, atol=5e-5 * float(expected.abs().max())
    )
    assert all(layer.key_loss is not None and layer.key_loss < 1e-10 for layer in layers)
    assert all(layer.value_loss is not None and layer.value_loss < 1e-10 for layer in layers)
    before, after = (json.loads((path / "config.json").read_text()) for path in (small, tmp_path / "merged"))
    assert before == after  # the same architecture, with as many heads as it began with


@pytest.mark.parametrize("case", DISGUISES)
def test_redundant_heads_merge_without_loss(case: str, tmp_path: Path) -> None:
    require_lossless(*DISGUISES[case], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_architectures_of_known_parts_merge_without_loss(kind: str, tmp_path: Path) -> None:
    require_lossless(kind, {"hidden_size": 64, **OTHERS[kind]}, tmp_path)


def test_every_architecture_has_a_disguise() -> None:
    assert set(FAMILIES) == {kind for kind, _ in DISGUISES.values()} | set(OTHERS) | {"gpt_bigcode"}


@pytest.mark.parametrize("method", ["mean", "first"])
def test_plain_methods_do_not_see_through_a_disguise(method: str, tmp_path: Path) -> None:
    wide = disguise(grouped_model(tmp_path / "small", "llama", head_dim=8), tmp_path / "wide", copies=2)
    window = ids((24,))[0]
    write_merged(wide, tmp_path / "merged", 2, method)
    expected = logits(wide, window)
    assert (logits(tmp_path / "merged", window) - expected).abs().max() > 0.1 * expected.abs().max()


def test_plain_methods_pool_neighbours() -> None:
    weights = random_layer()
    rotary = Rotary("half", 4)
    moments = torch.eye(12, dtype=torch.float64)
    first = merge_layer(weights, moments, 2, method="first", rotary=rotary)
    mean = merge_layer(weights, moments, 2, method="mean", rotary=rotary)
    assert torch.equal(first.weights.key, weights.key[[0, 2]])
    torch.testing.assert_close(mean.weights.value[1], (weights.value[2] + weights.value[3]) / 2)
    assert mean.groups == ((0, 1), (2, 3)) and torch.equal(mean.weights.query, weights.query)


@pytest.mark.parametrize("kind", ["falcon", "gpt_bigcode"])
def test_layouts_of_one_head_or_all_reach_multi_query(kind: str, tmp_path: Path) -> None:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 8, "n_inner": 64} if kind == "gpt_bigcode" else {"hidden_size": 64}
    small = grouped_model(tmp_path / "small", kind, multi_query=True, **sizes)
    wide = disguise(small, tmp_path / "wide", copies=8)
    window = ids((24,))[0]
    expected = logits(small, window)
    torch.testing.assert_close(logits(wide, window), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    write_merged(wide, tmp_path / "merged", 1)
    torch.testing.assert_close(
        logits(tmp_path / "merged", window), expected, rtol=0, atol=5e-5 * float(expected.abs().max())
    )


def test_values_merge_with_the_least_squared_error() -> None:
    """Against the truncated SVD of the stacked maps ``O_h V_h C^½``, computed as such."""
    layer = random_layer(kv_heads=3, ratio=2)
    generator = torch.Generator().manual_seed(1)
    samples = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    moments = samples.T @ samples / 50
    merged = merge_layer(layer, moments, 1, method="svd", rotary=Rotary("half", 4)).weights
    root = torch.linalg.cholesky(moments)
    stacked = torch.cat([layer.output[h] @ layer.value[h // 2] @ root for h in range(6)])
    best = torch.linalg.svdvals(stacked)[4:].square().sum()
    found = torch.cat([merged.output[h] @ merged.value[0] @ root for h in range(6)])
    torch.testing.assert_close((stacked - found).square().sum(), best)


def test_rotated_keys_merge_with_the_least_squared_error() -> None:
    """Against the singular values of each frequency's stacked rows, computed as such."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.complex(*(torch.randn(3, 2, 8, generator=generator, dtype=torch.float64) for _ in range(2)))
    samples = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    moments = samples.T @ samples
    energy = torch.rand(3, 2, generator=generator, dtype=torch.float64) + 0.1
    gram = torch.einsum("gfd,de,hfe->fgh", rows, moments.to(rows.dtype), rows.conj())
    merge = merge_rotary(rows, gram, energy)
    root = torch.linalg.cholesky(moments).to(rows.dtype)
    weight = energy.sqrt()[..., None]
    singular = [torch.linalg.svdvals((weight * rows)[:, f] @ root) for f in range(2)]
    best = sum(values[1:].square().sum() for values in singular)
    found = (weight * (rows - merge.back[..., None] * merge.shared)) @ root
    torch.testing.assert_close(found.abs().square().sum(), best)
    assert merge.lost == pytest.approx(float(best))


def test_directions_nobody_reads_cost_nothing() -> None:
    """A head whose queries ignore half of its key is merged as if that half were not there."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(2, 4, 9, generator=generator, dtype=torch.float64)
    metrics = torch.diag_embed(torch.tensor([[1.0, 1, 0, 0]] * 2, dtype=torch.float64))
    merge = merge_subspace(rows, torch.einsum("gid,hjd->gihj", rows, rows), metrics)
    assert merge.lost < 1e-12 * merge.total
    torch.testing.assert_close((merge.back @ merge.shared)[:, :2], rows[:, :2])


def test_dead_heads_stay_finite() -> None:
    layer = random_layer()
    dead = LayerWeights(layer.query * 0, layer.key * 0, layer.value * 0, layer.output * 0)
    norms = {"query_norm": torch.zeros(8, 4, dtype=torch.float64), "key_norm": torch.zeros(4, 4, dtype=torch.float64)}
    for norm in (None, Norm(), Norm(weights="own", centred=True), Norm(scope="layer", weights="own")):
        rotary = Rotary("half", 4 if norm is not None and norm.scope == "layer" else 2)
        layer = replace(dead, **(norms if norm is not None else {}))
        merged = merge_layer(layer, torch.eye(12, dtype=torch.float64), 2, method="svd", rotary=rotary, norm=norm)
        parts = (merged.weights.query, merged.weights.key, merged.weights.value, merged.weights.output)
        assert all(part.isfinite().all() for part in parts)


@given(st.integers(0, 2**32 - 1), st.sampled_from([(4, 2), (6, 2), (6, 3), (8, 4), (9, 3)]))
@settings(max_examples=20, deadline=None)
def test_few_heads_are_grouped_optimally(seed: int, sizes: tuple[int, int]) -> None:
    heads, count = sizes
    costs = torch.rand(heads, heads, generator=torch.Generator().manual_seed(seed))
    costs = costs + costs.T
    size = heads // count

    def total(order: tuple[int, ...]) -> float:
        groups = [order[start : start + size] for start in range(0, heads, size)]
        return sum(float(costs[a, b]) for group in groups for a, b in itertools.combinations(group, 2))

    groups = balanced_groups(costs, count)
    assert sorted(head for group in groups for head in group) == list(range(heads))
    order = tuple(head for group in groups for head in group)
    sample = itertools.islice(itertools.permutations(range(heads)), 0, None, 7 if heads < 9 else 997)
    assert total(order) <= min(total(other) for other in sample) + 1e-5


def test_many_heads_find_their_like() -> None:
    """Sixteen groups of four planted in 64 heads, too many to try all partitions."""
    kind = torch.arange(64) % 16
    costs = (kind[:, None] != kind).double() + 0.1 * torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    groups = balanced_groups((costs + costs.T) / 2, 16)
    assert all(len({int(kind[head]) for head in group}) == 1 and len(group) == 4 for group in groups)


@pytest.mark.parametrize(("heads", "count"), [(12, 2), (12, 3), (12, 4), (12, 6)])
def test_exchanges_reach_the_best_partition(heads: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for many heads, on few, against all partitions."""
    for seed in range(8):
        costs = torch.rand(heads, heads, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        costs = costs + costs.T
        monkeypatch.setattr(gqa_group, "_EXHAUSTIVE", 10**6)
        best = balanced_groups(costs, count)
        monkeypatch.setattr(gqa_group, "_EXHAUSTIVE", 0)
        assert balanced_groups(costs, count) == best


def test_the_best_of_several_partitions_is_taken_as_a_whole() -> None:
    """Six heads in two groups: whatever is chosen, no other partition loses less in keys and values together."""
    moments, rotary = torch.eye(12, dtype=torch.float64), Rotary("half", 4)

    def loss(merged: MergedLayer) -> float:
        assert merged.key_loss is not None and merged.value_loss is not None
        return merged.key_loss + merged.value_loss

    def fixed(layer: LayerWeights, order: list[int]) -> float:
        users = [2 * head + i for head in order for i in range(2)]
        moved = LayerWeights(layer.query[users], layer.key[order], layer.value[order], layer.output[users])
        return loss(merge_layer(moved, moments, 2, method="svd", rotary=rotary, movable=False))

    for seed in range(5):
        layer = random_layer(kv_heads=6, seed=seed)
        taken = loss(merge_layer(layer, moments, 2, method="svd", rotary=rotary))
        halves = [[0, *pair] for pair in itertools.combinations(range(1, 6), 2)]
        others = [fixed(layer, half + [head for head in range(6) if head not in half]) for half in halves]
        assert taken <= min(others) + 1e-9
