"""Names of the dtypes that weights are written in, and what people call them."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["ALIASES", "NAMES"]

NAMES = ("bfloat16", "float16", "float32")
#: What people type → the name.
ALIASES: Mapping[str, str] = {
    **dict.fromkeys(("bf16", "torch.bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "f16", "half", "torch.float16"), "float16"),
    **dict.fromkeys(("fp32", "f32", "float", "full", "torch.float32"), "float32"),
}
