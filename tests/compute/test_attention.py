"""Attention in float32 and in tiles, against its definition in float64 and against what transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.llama.modeling_llama import eager_attention_forward

from llmconvert.compute import attention_gradient
from llmconvert.compute.attention import _tiled_attention, _wide_attention
from llmconvert.engine import skeleton as skeleton_module
from llmconvert.engine.skeleton import Skeleton
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

CPU = torch.device("cpu")
Tiny = Callable[..., Path]


def arguments(length: int, heads: int, kv_heads: int) -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(length)
    module = nn.Module()
    vars(module).update(num_key_value_groups=heads // kv_heads, is_causal=True)
    # As models lay them: heads beside each other in every token.
    parts = [torch.randn(1, length, count, 16).bfloat16().transpose(1, 2) for count in (heads, kv_heads, kv_heads)]
    return module, parts


def exact_attention(parts: list[torch.Tensor], allowed: torch.Tensor, scaling: float) -> torch.Tensor:
    query, key, value = (part.double() for part in parts)
    key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    scores = (scaling * query @ key.mT).masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("mask", ["causal", "bool", "float"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_in_float32_is_the_exact_one_rounded(mask: str, kv_heads: int) -> None:
    module, parts = arguments(33, 4, kv_heads)
    allowed = torch.ones(33, 33, dtype=torch.bool).tril()
    if mask != "causal":
        allowed = allowed.triu(-8)
    given = {"causal": None, "bool": allowed[None, None], "float": torch.zeros(1, 1, 33, 33).bfloat16()}[mask]
    if mask == "float":
        assert given is not None
        given.masked_fill_(~allowed, torch.finfo(torch.bfloat16).min)
    found, _ = _wide_attention(module, parts[0], parts[1], parts[2], given, scaling=0.3)
    exact = exact_attention(parts, allowed, 0.3)
    assert found.dtype == torch.bfloat16 and found.shape == (1, 33, 4, 16)
    assert ((found.double() - exact).abs() <= exact.abs() * torch.finfo(torch.bfloat16).eps / 2 + 1e-5).all()


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 300),
    groups=st.integers(1, 3),
    share=st.integers(1, 3),
    scores=st.sampled_from([1, 3000, 1 << 21]),
    scaling=st.sampled_from([None, 0.3]),
)
def test_attention_in_tiles_is_as_near_as_eager_attention(
    length: int, groups: int, share: int, scores: int, scaling: float | None
) -> None:
    """Whatever the tiles: also one query each, and the last one short."""
    module, parts = arguments(length, groups * share, groups)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_gradient, "_TILE_SCORES", scores)
        found, _ = _tiled_attention(module, parts[0], parts[1], parts[2], None, scaling=scaling)
    exact = exact_attention(parts, ~future, scaling or 0.25)
    mask = torch.zeros(1, 1, length, length).masked_fill(future, -torch.inf).bfloat16()
    eager, _ = eager_attention_forward(module, *parts, mask, scaling or 0.25)
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape
    assert (found.double() - exact).norm() <= 1.1 * (eager.double() - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.parametrize("case", ["mask", "not causal", "more keys", "learning", "position bias"])
def test_what_tiles_cannot_do_is_left_to_sdpa(case: str) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module, (query, key, value) = arguments(20, 4, 2)
    mask: torch.Tensor | None = None
    settings_: dict[str, Any] = {}
    if case == "mask":
        mask = torch.ones(20, 20, dtype=torch.bool).tril().triu(-4)[None, None]
    elif case == "not causal":
        settings_ = {"is_causal": False}
    elif case == "more keys":
        query = query[:, :, -1:]
    elif case == "learning":
        query.requires_grad_()
    else:
        settings_ = {"position_bias": torch.randn(1, 4, 20, 20).bfloat16()}
    found, _ = _tiled_attention(module, query, key, value, mask, **settings_)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, **settings_)
    assert torch.equal(found, expected)
    assert found.requires_grad == (case == "learning")


@pytest.mark.parametrize("attention", ["float32", "tiled"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "phi3", "gpt_neox", "gemma2", "opt"])
def test_models_that_attend_by_sdpa_do_so_in_another_way(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, name: str, attention: str
) -> None:
    """In float32 they come nearer to what it computes in float64; where nothing can be done, they run as before."""
    wide = attention == "float32"
    monkeypatch.setattr(skeleton_module, "compute_dtype", lambda device: torch.float32 if wide else torch.bfloat16)
    monkeypatch.setattr(skeleton_module, "use_dot_products", lambda: True)
    checkpoint = SafetensorsCheckpoint(tiny(name, torch.bfloat16))
    window = torch.randint(0, 100, (1, 48), generator=torch.Generator().manual_seed(1))
    logits = []
    for dtype, fast in ((torch.float64, False), (None, False), (None, True)):
        skeleton = Skeleton(checkpoint, CPU, dtype, products="fast" if fast else "exact")
        skeleton.restore_buffers()
        skeleton.load_outer(head=True)
        for index in range(skeleton.block_count):
            skeleton.load_block(index)
        with torch.no_grad():
            logits.append(skeleton.model(input_ids=window).logits.double())
    kind = skeleton.model.config._attn_implementation
    assert kind == ("eager" if name == "gemma2" else f"llmconvert_{attention}")
    plain, other = ((found - logits[0]).norm() for found in logits[1:])
    assert other < (1.2 if wide else 1.5) * plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiles_are_for_bfloat16(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(skeleton_module, "compute_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(skeleton_module, "use_dot_products", lambda: True)
    skeleton = Skeleton(SafetensorsCheckpoint(tiny("llama", dtype)), CPU, products="fast")
    assert skeleton.model.config._attn_implementation == "sdpa"
