"""Blocks against vLLM's own rule, written out: what is joined with something behind it has whole blocks of rows."""

from __future__ import annotations

import itertools

import pytest

from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.serving.fused_blocks import cut_at_seams
from llmconvert.quantize.serving.tensor_parallel import Matrix


def matrices(scheme: str, width: int, shared: int, inner: int, prefix: str = "mlp.") -> list[Matrix]:
    sizes = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (shared, width)}
    sizes |= {"self_attn.v_proj": (shared, width), "self_attn.o_proj": (width, width)}
    sizes |= {f"{prefix}gate_proj": (inner, width), f"{prefix}up_proj": (inner, width)}
    sizes |= {f"{prefix}down_proj": (width, inner)}
    return [Matrix(f"model.layers.0.{name}", *shape, Scheme.parse(scheme)) for name, shape in sizes.items()]


@pytest.mark.parametrize(("width", "shared", "inner"), itertools.product((512, 576), (128, 192), (1536, 1600)))
def test_only_the_last_of_joined_linears_may_be_cut(width: int, shared: int, inner: int) -> None:
    joined = [[width, shared, shared], [inner, inner]]
    refused = any(rows % 128 for parts in joined for rows in parts[:-1])
    assert bool(cut_at_seams(matrices("fp8-block", width, shared, inner))) == refused
    assert not cut_at_seams(matrices("fp8-dynamic", width, shared, inner))
    assert not cut_at_seams(matrices("fp8-static", width, shared, inner))


def test_experts_have_whole_blocks_throughout() -> None:
    experts = matrices("fp8-block", 512, 128, 1600, "mlp.experts.0.")
    assert "1,600 rows are no whole number of blocks of 128" in cut_at_seams(experts)
    assert "1,600 rows" in cut_at_seams(experts[-1:]), "its input is the others' output"
    assert not cut_at_seams(matrices("fp8-block", 512, 128, 1536, "mlp.experts.0."))
