"""Linears that multiply in float32 what is stored in 16 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from llmconvert.compute import precision
from llmconvert.compute.precision import Products, Scratch, WideLinear, WideProducts, all_finite, compute_dtype
from llmconvert.engine import skeleton as skeleton_module
from llmconvert.engine.discovery import discover
from llmconvert.engine.memory import activation_nbytes
from llmconvert.engine.skeleton import Skeleton
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

CPU = torch.device("cpu")
Tiny = Callable[..., Path]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_the_exact_one_rounded(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias).to(dtype).requires_grad_(False)
    value = torch.randn(2, 7, 96).to(dtype)
    result = WideLinear.like(linear, Scratch())(value)
    exact = value.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    assert result.dtype == dtype and result.shape == (2, 7, 40)
    # Half a unit in the last place, and what summing in float32 adds to it.
    assert ((result.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-5).all()


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_that_are_too_many_are_computed_in_turn(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 100, bias).bfloat16().requires_grad_(False)
    value = torch.randn(1, 9, 24).bfloat16()
    whole = WideLinear.like(linear, Scratch())
    assert whole.operand_sizes(9) == (9 * 24, 100 * 24, 9 * 100)
    expected = whole(value)
    monkeypatch.setattr(precision, "_OPERAND_NUMEL", 24 * 30)
    sliced = WideLinear.like(linear, Scratch())
    assert sliced.operand_sizes(9) == (9 * 24, 30 * 24, 9 * 30)
    torch.testing.assert_close(sliced(value), expected, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-5)


def test_one_scratch_serves_linears_of_all_shapes_in_turn() -> None:
    torch.manual_seed(0)
    scratch, value = Scratch(), torch.randn(5, 64).bfloat16()
    linears = [nn.Linear(64, width, False).bfloat16().requires_grad_(False) for width in (16, 128, 32)]
    wide = [WideLinear.like(linear, scratch) for linear in linears]
    first = [linear(value) for linear in wide]
    again = [linear(value) for linear in wide]
    expected = [(value.float() @ linear.weight.float().T).bfloat16() for linear in linears]
    assert all(map(torch.equal, first, expected)) and all(map(torch.equal, again, expected))


def test_gradients_are_those_of_float32() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 24).bfloat16()
    wide, scratch = WideLinear.like(linear, Scratch()), torch.randn(3, 32).bfloat16()
    wide(wide(scratch)[:, :1].expand(3, 32)).float().square().sum().backward()
    found = linear.weight.grad
    linear.weight.grad = None
    weight = linear.weight.detach().float().requires_grad_()
    bias = linear.bias.detach().float()
    middle = (scratch.float() @ weight.T + bias).bfloat16()[:, :1].expand(3, 32)
    ((middle.float() @ weight.T + bias).bfloat16()).float().square().sum().backward()
    assert found is not None and weight.grad is not None
    assert torch.allclose(found.float(), weight.grad, rtol=0.02, atol=0.02 * float(weight.grad.abs().max()))


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_f": True, "amx_bf16": True, "avx512_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_bfloat16_is_for_processors_with_instructions_for_it(
    capabilities: dict[str, bool], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert compute_dtype(CPU) == expected
    assert compute_dtype(torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize(("compute", "wide"), [(torch.float32, True), (torch.bfloat16, False)])
def test_products_are_widened_where_the_processor_gains_by_it(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, compute: torch.dtype, wide: bool
) -> None:
    monkeypatch.setattr(skeleton_module, "compute_dtype", lambda device: compute)
    checkpoint = SafetensorsCheckpoint(tiny("llama", torch.bfloat16))
    asked: tuple[Products, ...] = ("exact", "wide", "fast")
    for products in asked:
        skeleton = Skeleton(checkpoint, CPU, products=products)
        linears = [linear for block in skeleton.linears for linear in block.values()]
        linears.append(skeleton.model.get_output_embeddings())
        assert all(isinstance(linear, WideLinear) is (wide and products != "exact") for linear in linears)
    narrow = Skeleton(SafetensorsCheckpoint(tiny("llama", torch.float32)), CPU, products="fast")
    assert not any(isinstance(linear, WideLinear) for block in narrow.linears for linear in block.values())


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_the_memory_that_linears_share_is_known(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(skeleton_module, "compute_dtype", lambda device: torch.float32)
    checkpoint = SafetensorsCheckpoint(tiny(name, torch.bfloat16))
    skeleton = Skeleton(checkpoint, CPU, products="fast")
    skeleton.restore_buffers()
    skeleton.load_outer(head=True)
    for index in range(skeleton.block_count):
        skeleton.load_block(index)
    with torch.no_grad():
        skeleton.model(input_ids=torch.arange(48).view(1, 48))
    scratch = next(linear for linear in skeleton.linears[0].values() if isinstance(linear, WideLinear)).scratch
    assert skeleton.product_nbytes(48, head=True) == sum(part.nbytes for part in scratch._parts.values())
    assert 0 < skeleton.product_nbytes(48) <= skeleton.product_nbytes(48, head=True)
    windows = discover(skeleton, 48)
    alive = max(block.peak_nbytes for block in windows)
    assert activation_nbytes(windows, skeleton, [48, 48], "replay") == alive + skeleton.product_nbytes(48)
    assert Skeleton(checkpoint, CPU).product_nbytes(48) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_single_value_that_is_not_finite_is_found(dtype: torch.dtype, bad: float) -> None:
    values = torch.randn(300, 257, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert all_finite(values)
    for place in ((0, 0), (299, 256), (123, 45)):
        damaged = values.clone()
        damaged[place] = bad
        assert not all_finite(damaged)
    damaged[0, 0] = -bad  # infinities of both signs
    assert not all_finite(damaged)


def test_a_sum_that_overflows_is_no_proof() -> None:
    assert all_finite(torch.full((1000,), 6e4, dtype=torch.float16))
    assert all_finite(torch.full((1000,), 3e38, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_any_spelling_are_made_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    left, right, bias = torch.randn(6, 48).to(dtype), torch.randn(48, 20).to(dtype), torch.randn(20).to(dtype)
    exact = (left.float() @ right.float()).to(dtype)
    spelled: list[Callable[[], torch.Tensor]] = [
        lambda: left @ right,
        lambda: torch.matmul(left, right),
        lambda: left.matmul(right),
        lambda: torch.mm(left, right),
        lambda: torch.bmm(left[None], right[None])[0],
        lambda: nn.functional.linear(left, right.T),
    ]
    for product in spelled:
        with WideProducts():
            assert torch.equal(product(), exact)
    with WideProducts():
        added = nn.functional.linear(left, right.T, bias=bias)
        whole = left.float() @ right.float()
    assert torch.equal(added, (left.float() @ right.float() + bias.float()).to(dtype)) and whole.dtype == torch.float32


def test_experts_are_widened_with_the_linears(mixture: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a class that multiplies by parameters of its own; how far rounding can be off is that of its products."""
    found = []
    for compute in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(skeleton_module, "compute_dtype", lambda device, compute=compute: compute)
        skeleton = Skeleton(SafetensorsCheckpoint(mixture("mixtral")), CPU, torch.bfloat16, products="wide")
        (slot,) = skeleton.experts[0].values()
        assert slot.wide is (compute == torch.float32)
        assert (slot.product_nbytes(5) > 0) is slot.wide
        slot.load(1)
        rows = torch.randn(5, slot.layout.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
        found.append((slot.inner(rows), slot.output(rows)))
    for narrow, wide in zip(*found, strict=True):
        torch.testing.assert_close(wide, narrow, rtol=0.02, atol=0.02 * float(narrow.abs().max()))
