"""How precisely matrix products are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["bfloat16_products"]


@contextmanager
def bfloat16_products(*, enabled: bool = True) -> Iterator[None]:
    """Let oneDNN read float32 operands as bfloat16 where the processor multiplies those faster (AMX).

    Exact for values that are bfloat16; sums stay float32. Elsewhere, and on other devices, nothing changes.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    if enabled:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
