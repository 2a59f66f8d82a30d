"""Muon on heads: against PyTorch's on whole matrices, and against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmconvert.convert.heal.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 8, 40), (3, 40, 8), (1, 16, 16), (2, 8, 1)])
def test_singular_values_move_to_one_and_directions_stay(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalize(matrices)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    inner = left.mT @ found @ right.mT
    values = torch.diagonal(inner, dim1=1, dim2=2)
    assert values.min() > 0.3 and values.max() < 1.3
    torch.testing.assert_close(left @ torch.diag_embed(values) @ right, found, rtol=0, atol=1e-4)
    assert not orthogonalize(torch.zeros(shape)).any()


def test_one_head_is_what_pytorch_does() -> None:
    """``torch.optim.Muon`` computes in bfloat16, so the steps agree to its rounding."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(8, 24, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Muon([ours], [], head_dim=8, lr=0.01)
    reference = torch.optim.Muon(
        [theirs], lr=0.01, weight_decay=0.0, momentum=0.9, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        ours.grad = torch.randn(8, 24, generator=generator)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.03 * float((ours - start).detach().abs().max()))


def test_every_head_moves_by_itself() -> None:
    """A step on stacked heads is a step on each of them, in rows and in columns, biases and norms included."""
    generator = torch.Generator().manual_seed(2)
    for shape, columns in (((12, 20), False), ((20, 12), True), ((12,), False)):
        whole = nn.Parameter(torch.randn(shape, generator=generator))
        whole.grad = torch.randn(shape, generator=generator)
        cut = -1 if columns else 0
        heads = [nn.Parameter(part.clone()) for part in whole.detach().split(4, cut)]
        for head, gradient in zip(heads, whole.grad.split(4, cut), strict=True):
            head.grad = gradient.clone()
        Muon([] if columns else [whole], [whole] if columns else [], head_dim=4, lr=0.1).step()
        Muon([] if columns else heads, heads if columns else [], head_dim=4, lr=0.1).step()
        torch.testing.assert_close(whole, torch.cat(tuple(heads), cut))
