"""Gradients of causal attention in tiles, against those of its definition in float64 and of torch's own kernel."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llmconvert.compute import attention as attention_module
from llmconvert.compute import attention_gradient
from llmconvert.compute.attention import _trained_attention
from llmconvert.compute.attention_gradient import attend, rows_of_tile

SIZE = 16
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def draw(length: int, heads: int, kv_heads: int, batch: int = 1) -> Parts:
    """Queries, keys and values as models lay them: heads beside each other in every token."""
    torch.manual_seed(length)

    def part(count: int) -> torch.Tensor:
        return torch.randn(batch, length, count, SIZE).bfloat16().transpose(1, 2).requires_grad_()

    return part(heads), part(kv_heads), part(kv_heads)


def gradients_of(output: torch.Tensor, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    slope = torch.randn(output.shape).bfloat16().to(output.dtype)
    return [found.double() for found in torch.autograd.grad(output, parts, slope)]


def exact_gradients(parts: Sequence[torch.Tensor], scaling: float) -> list[torch.Tensor]:
    query, key, value = exact = [part.detach().double().requires_grad_() for part in parts]
    key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    future = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
    scores = (scaling * query @ key.mT).masked_fill(future, -torch.inf)
    return gradients_of(scores.softmax(-1) @ value, exact)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 300),
    groups=st.integers(1, 3),
    share=st.integers(1, 3),
    batch=st.integers(1, 2),
    scores=st.sampled_from([1, 3000, 1 << 21]),
    scaling=st.sampled_from([0.25, 0.6]),
)
def test_gradients_are_those_of_the_definition(
    length: int, groups: int, share: int, batch: int, scores: int, scaling: float
) -> None:
    """Whatever the tiles: also one query each, and the last one short."""
    parts = draw(length, groups * share, groups, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_gradient, "_TILE_SCORES", scores)
        output = attend(*parts, scaling)
        found = gradients_of(output, parts)
    exact = exact_gradients(parts, scaling)
    # A single query has nothing to choose from, so that its gradient is rounding alone: the size is that of all three.
    size = torch.stack([true.norm() for true in exact]).norm()
    for mine, true in zip(found, exact, strict=True):
        assert mine.shape == true.shape
        assert (mine - true).norm() <= 0.02 * size


def test_the_forward_is_torchs_own() -> None:
    parts = draw(160, 9, 3)
    repeated = parts[0], parts[1].repeat_interleave(3, 1), parts[2].repeat_interleave(3, 1)
    assert torch.equal(
        attend(*parts, 0.3), functional.scaled_dot_product_attention(*repeated, is_causal=True, scale=0.3)
    )


def test_keys_that_many_heads_share_learn_no_worse_than_in_transformers() -> None:
    """There, what each of the heads says of a key is summed in 16 bits."""
    parts, module = draw(160, 9, 1), nn.Module()
    vars(module).update(num_key_value_groups=9, is_causal=True)
    theirs, _ = sdpa_attention_forward(module, *parts, None, scaling=0.3)
    exact = exact_gradients(parts, 0.3)
    off = [
        [float((mine - true).norm() / true.norm()) for mine, true in zip(found, exact, strict=True)]
        for found in (gradients_of(attend(*parts, 0.3), parts), gradients_of(theirs.transpose(1, 2), parts))
    ]
    assert off[0][1] < off[1][1] and off[0][2] < off[1][2] and off[0][0] < 0.01


def test_scores_of_any_size_have_finite_gradients() -> None:
    """Scores in the thousands are rounded by more than a power of e, and shares add up to one all the same."""
    query, key, value = (part.detach().mul(200).requires_grad_() for part in draw(70, 4, 2))
    for found in gradients_of(attend(query, key, value, 0.3), (query, key, value)):
        assert found.isfinite().all()


def test_tiles_of_many_heads_have_fewer_queries() -> None:
    assert rows_of_tile(9, 512) == 128
    assert rows_of_tile(64, 4096) == 8
    assert rows_of_tile(1 << 20, 1 << 20) == 1


@pytest.mark.parametrize("other", ["mask", "window", "dtype", "width", "constant", "continued"])
def test_all_that_is_not_learned_through_causally_is_torchs(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks, float32, values of another width, no gradient, keys of earlier tokens: the answer is sdpa's."""

    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("taken in tiles")

    monkeypatch.setattr(attention_module, "attend", refuse)
    module = nn.Module()
    vars(module).update(num_key_value_groups=1, is_causal=True)
    query, key, value = draw(24, 2, 2)
    mask = None
    if other == "mask":
        mask = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril()
    elif other == "window":
        mask = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril().triu(-3)
    elif other == "dtype":
        query, key, value = (part.float() for part in (query, key, value))
    elif other == "width":
        value = value[..., :8]
    elif other == "constant":
        query, key, value = (part.detach() for part in (query, key, value))
    else:
        query = query[:, :, -1:]
    found, _ = _trained_attention(module, query, key, value, mask, scaling=0.3, is_causal=mask is None)
    causal = mask is None and other != "continued"
    wanted = functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=0.3)
    assert torch.allclose(found.double(), wanted.transpose(1, 2).double(), atol=1e-6)


def test_mixed_dtypes_are_taken_as_autocast_has_them() -> None:
    module = nn.Module()
    vars(module).update(num_key_value_groups=2, is_causal=True)
    query, key, value = draw(40, 4, 2)
    wide = query.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = _trained_attention(module, wide, key, value, None, scaling=0.3)
    narrow, _ = _trained_attention(module, query, key, value, None, scaling=0.3)
    assert found.dtype == torch.bfloat16 and torch.equal(found, narrow)
    torch.manual_seed(1)
    slope = torch.randn(found.shape).bfloat16()
    (of_wide,) = torch.autograd.grad(found, wide, slope)
    assert of_wide.dtype == torch.float32
    assert torch.equal(of_wide.bfloat16(), torch.autograd.grad(narrow, query, slope)[0])
