"""Scales of GGML's blocks, and the memory that they are said to take."""

from __future__ import annotations

import pytest
import torch

from llmconvert.gguf.ggml.mix import BLOCK_TYPES
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.solve.group_scales import block_scales, block_scales_nbytes


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_the_bytes_of_block_scales_are_known_beforehand(kind: str) -> None:
    scheme, weight = Scheme.of_block(kind), torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    found = block_scales("w", weight, torch.ones(512), scheme)
    parts = [found.scale, found.offset]
    if found.nested is not None:
        parts += [found.nested.scale, found.nested.minimum, found.nested.subs, found.nested.sub_minima]
    held = sum(part.nbytes for part in parts if part is not None)
    assert held == block_scales_nbytes(scheme, 4, 512) > 0
    assert block_scales_nbytes(Scheme.parse("w4a16-g32"), 4, 512) == 0
